"""Text of one sequence as its tokens come: UTF-8 safe, cut at stop strings."""

from __future__ import annotations

from qnext.engine.sampling_params import SamplingParams
from qnext.text import IncrementalDetokenizer, StopChecker, Tokenizer


class TextStream:
    """Collects pieces of text that are final: later tokens neither change nor retract them.

    Args:
        tokenizer: of the checkpoint.
        params: stop strings, and how special tokens appear.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.pieces: list[str] = []
        self._keep_stop = params.include_stop_str_in_output
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens
        )
        self._checker = StopChecker(params.stop, self._keep_stop) if params.stop else None

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self.pieces)

    def push(self, token: int, *, stops: bool, may_stop: bool) -> str | None:
        """Add a token's text.

        Args:
            token: the newest id.
            stops: it ends the sequence; its own text is then left out unless asked for.
            may_stop: ``min_tokens`` is reached, so stop strings count.

        Returns:
            the stop string that ends the text here, or None.
        """
        if stops and not self._keep_stop:
            return None
        piece = self._detokenizer.push((token,))
        if self._checker is not None and may_stop:
            piece = self._checker.push(piece)
        if piece:
            self.pieces.append(piece)
        return self._checker.stopped if self._checker is not None else None

    def finish(self) -> None:
        """Release what was held back: no further token comes."""
        rest = self._detokenizer.flush()
        if self._checker is not None:
            rest = self._checker.push(rest) + self._checker.flush()
        if rest:
            self.pieces.append(rest)
