"""Text of one sequence as its tokens come: UTF-8 safe, cut at stop strings."""

from __future__ import annotations

from qnext.engine.sampling_params import SamplingParams
from qnext.text import IncrementalDetokenizer, StopChecker, Tokenizer


class TextStream:
    """Collects pieces of text that are final: later tokens cannot change or retract them.

    Args:
        tokenizer: of the checkpoint.
        params: stop strings and how special tokens appear.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.pieces: list[str] = []
        self._keep_stop = params.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens
        )
        self._stops = StopChecker(params.stop, include_stop_str_in_output=self._keep_stop)

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self.pieces)
