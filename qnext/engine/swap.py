"""How a sequence gives way when blocks run out: copied to the host, or computed again later."""

from __future__ import annotations

from qnext.engine.cache import CacheManager
from qnext.engine.options import Preemption
from qnext.engine.request import Sequence
from qnext.engine.tensors import StateTensors
from qnext.layers.model import CausalLM

# Rates that the choice is made by, per second. Fixed, so that a schedule can be repeated; a factor
# of two in either moves the point where both ways cost the same, not the result.
_COPY_BYTES = {"cuda": 20e9, "cpu": 8e9}
_FLOPS = {"cuda": 200e12, "cpu": 100e9}


class SwapEstimate:
    """Compares the two ways by bytes and floating-point operations.

    Args:
        model: its active parameters give the cost of computing a token.
        tensors: bytes of a block and of a slot.
        cache: how many blocks a sequence has.
        mode: "auto" compares; the others decide.
    """

    def __init__(
        self, model: CausalLM, tensors: StateTensors, cache: CacheManager, mode: Preemption
    ) -> None:
        from qnext.checkpoint.census import active_parameter_count

        self._mode, self._cache = mode, cache
        self._block, self._slot = tensors.block_nbytes, tensors.slot_nbytes
        kind = model.device.type if model.device.type in _FLOPS else "cpu"
        self._bytes_per_second = _COPY_BYTES[kind]
        self._seconds_per_token = 2 * active_parameter_count(model.config) / _FLOPS[kind]

    def pays(self, sequence: Sequence) -> bool:
        """Whether copying ``sequence`` out and in again is the cheaper way."""
        if self._mode != "auto":
            return self._mode == "swap"
        size = len(self._cache.block_table(sequence.seq_id)) * self._block + self._slot
        copying = 2 * size / self._bytes_per_second
        return copying < sequence.num_computed * self._seconds_per_token
