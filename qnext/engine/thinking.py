r"""Where a sequence stands with its think block: a pure function of its prompt and its tokens.

    ANSWER --<think>--> THINKING --</think>--> CLOSED --"\n\n"--> ANSWER
                            |                    ^
                            +--budget reached--> CLOSING (</think> and what follows is forced)

A grammar rules the answer alone. Qwen3's templates put two newlines after ``</think>``: right
after it they are not yet part of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.errors import TextError

if TYPE_CHECKING:
    from qnext.text import Tokenizer

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ThinkTokens:
    """The ids around thinking in one checkpoint.

    Attributes:
        start: ``<think>``.
        close: ``</think>`` and the tokens that a template puts after it.
        boundaries: special ids, none of which stands inside of a think block.
        model_opens: the model itself writes ``<think>`` at the start of an answer.
    """

    start: int
    close: tuple[int, ...]
    boundaries: frozenset[int] = frozenset()
    model_opens: bool = False

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, model_opens: bool = False) -> ThinkTokens | None:
        """The ids of a tokenizer, None if it has no single tokens for them."""
        start, end = tokenizer.token_to_id(THINK), tokenizer.token_to_id(END_THINK)
        if start is None or end is None:
            return None
        close = tuple(tokenizer.encode(f"{END_THINK}\n\n"))
        if not close or close[0] != end:
            return None
        return cls(start, close, tokenizer.special_ids - {start, end}, model_opens)


def template_thinks(folder: Path) -> bool:
    """Whether the checkpoint's chat template knows answers that begin with ``<think>``."""
    from qnext.text import ChatTemplate

    try:
        return END_THINK in ChatTemplate.from_pretrained(folder).source()
    except TextError:
        return False


class Phase(Enum):
    """What the next token belongs to."""

    START = "the first token: an answer, or <think>"
    THINKING = "a think block"
    CLOSING = "the forced end of a think block"
    CLOSED = "blanks after a think block, or an answer"
    ANSWER = "an answer"


@dataclass(slots=True)
class Thinking:
    """The phase of one sequence.

    Attributes:
        tokens: ids around thinking; None for a sequence that only answers.
        budget: most tokens within think blocks, None for any number.
        phase: of the next token.
        used: tokens within think blocks so far.
        at: next place in ``tokens.close`` while closing or closed.
    """

    tokens: ThinkTokens | None
    budget: int | None = None
    phase: Phase = Phase.ANSWER
    used: int = 0
    at: int = 0

    @classmethod
    def after(
        cls, prompt_ids: Sequence[int], tokens: ThinkTokens | None, budget: int | None
    ) -> Thinking:
        """The phase in which an answer to ``prompt_ids`` begins."""
        found = cls(tokens, budget)
        if tokens is None:
            return found
        if tokens.model_opens:
            found.phase = Phase.START
        for token in reversed(prompt_ids):
            if token == tokens.start:
                found.phase = Phase.THINKING
                break
            if token == tokens.close[0]:
                found.phase = Phase.ANSWER
                break
            if token in tokens.boundaries:
                break
        return found

    def copy(self) -> Thinking:
        """One to go ahead with."""
        return Thinking(self.tokens, self.budget, self.phase, self.used, self.at)

    @property
    def forced(self) -> int | None:
        """The only id that may come next, if the engine decides it."""
        if self.tokens is None:
            return None
        if self.phase is Phase.CLOSING:
            return self.tokens.close[self.at]
        out = self.budget is not None and self.used >= self.budget
        return self.tokens.close[0] if self.phase is Phase.THINKING and out else None

    @property
    def also_allowed(self) -> int | None:
        """An id that may come next besides those of the answer."""
        if self.tokens is None:
            return None
        if self.phase is Phase.START:
            return self.tokens.start
        return self.tokens.close[self.at] if self.phase is Phase.CLOSED else None

    @property
    def answers(self) -> bool:
        """Whether the next token may belong to the answer."""
        return self.phase in (Phase.START, Phase.CLOSED, Phase.ANSWER)

    def push(self, token: int, *, may_reopen: bool = True) -> bool:
        """Go on by one token; whether it belongs to the answer.

        ``may_reopen`` lets ``<think>`` open a block anywhere, as where no grammar rules.
        """
        tokens = self.tokens
        if tokens is None:
            return True
        if self.phase is Phase.THINKING:
            if token == tokens.close[0]:
                forced = self.forced is not None
                self._close(Phase.CLOSING if forced else Phase.CLOSED, 1)
            else:
                self.used += 1
            return False
        if self.phase in (Phase.CLOSING, Phase.CLOSED) and token == tokens.close[self.at]:
            self._close(self.phase, self.at + 1)
            return False
        opens = token == tokens.start and (may_reopen or self.phase is Phase.START)
        self.phase = Phase.THINKING if opens else Phase.ANSWER
        return not opens

    def _close(self, phase: Phase, at: int) -> None:
        done = self.tokens is None or at == len(self.tokens.close)
        self.phase, self.at = (Phase.ANSWER, 0) if done else (phase, at)
