"""Who sits in which cache slot: the one owner of the model's state."""

from __future__ import annotations

from qnext.engine.request import Sequence as Generation
from qnext.errors import EngineError
from qnext.layers.model import CausalLM
from qnext.layers.state import ModelState

_CAPACITY_STEP = 256
"""Cache rows are asked for in multiples of this."""


class CacheSlots:
    """Slots of one ModelState, made when first needed and remade larger while nobody sits.

    Args:
        model: gives the state.
        max_slots: most sequences at the same time.
        max_tokens: most cache rows a slot ever needs.
    """

    def __init__(self, model: CausalLM, *, max_slots: int, max_tokens: int) -> None:
        self.model, self.max_slots, self.max_tokens = model, max_slots, max_tokens
        self.num_slots = 0
        self.free: list[int] = []
        self._state: ModelState | None = None

    @property
    def state(self) -> ModelState:
        """The state; only after ``ensure``."""
        if self._state is None:
            raise EngineError("no cache slots were made yet")
        return self._state

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self.free)

    def ensure(self, wanted: int, num_tokens: int) -> None:
        """Have slots for ``wanted`` sequences, if that is possible now.

        Args:
            wanted: sequences that would like to sit.
            num_tokens: cache rows of the first of them.
        """
        wanted = min(wanted, self.max_slots)
        if wanted <= self.num_slots or self.num_free < self.num_slots:
            return
        self.num_slots = min(self.max_slots, 1 << (wanted - 1).bit_length())
        self._state = None  # the old one goes before the new one comes
        self._state = self.model.new_state(self.num_slots, self._rounded(num_tokens))
        self.free = list(reversed(range(self.num_slots)))

    def take(self, sequence: Generation) -> None:
        """Seat a sequence; its slot is clean."""
        slot = self.free.pop()
        sequence.slot, sequence.num_computed = slot, 0
        self.state.reset(slot)

    def fork(self, parent: Generation, child: Generation) -> None:
        """Seat ``child``, whose cache will be copied from ``parent`` at the end of the step."""
        child.slot, child.num_computed = self.free.pop(), parent.num_computed

    def leave(self, sequence: Generation) -> None:
        """Free a sequence's slot."""
        self.free.append(sequence.seat)
        sequence.slot = None

    def clear(self) -> None:
        """Free every slot, whoever sits there."""
        self.free = list(reversed(range(self.num_slots)))

    def grown(self, num_tokens: int) -> ModelState:
        """The state, with room for ``num_tokens`` rows in every slot."""
        state = self.state
        if num_tokens > state.capacity:
            state.ensure_capacity(self._rounded(num_tokens))
        return state

    def _rounded(self, num_tokens: int) -> int:
        return min(self.max_tokens, -(-num_tokens // _CAPACITY_STEP) * _CAPACITY_STEP)
