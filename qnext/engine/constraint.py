"""What the next token of one sequence must be: its grammar and its thinking budget together.

Every rule is a pure function of the prompt, the output so far and the drafts after it. Output is
taken in lazily, so drafts that were refused, a preempted sequence and a restart need no undoing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from qnext.engine.grammar import Grammar, Words, bits_of
from qnext.engine.thinking import Thinking, ThinkTokens


class Rule(NamedTuple):
    """What one row of logits may become.

    Attributes:
        forced: the only token, or None.
        allowed: bits of the tokens that may come, or None for all.
        no_end: end tokens may not come, whatever ``allowed`` says.
        only_end: nothing but an end token may come, so ``min_tokens`` cannot hold it off.
    """

    forced: int | None = None
    allowed: Words | None = None
    no_end: bool = False
    only_end: bool = False


ANYTHING = Rule()


class Constraint:
    """The rules of one sequence.

    Args:
        grammar: of the answer, at its beginning; None for any text.
        thinking: where the sequence begins.
        end_ids: ids that end the sequence: allowed exactly where the grammar may end.
        vocab_size: V.
    """

    def __init__(
        self, grammar: Grammar | None, thinking: Thinking, end_ids: Iterable[int], vocab_size: int
    ) -> None:
        self._origin, self._first = grammar, thinking
        self._grammar = grammar and grammar.copy()
        self._thinking = thinking.copy()
        self._ends = bits_of(end_ids, vocab_size)
        self._vocab_size = vocab_size
        self._taken: list[int] = []
        self._known: dict[tuple[int, ...], Rule] = {}

    @classmethod
    def of(
        cls,
        grammar: Grammar | None,
        tokens: ThinkTokens | None,
        budget: int | None,
        *,
        prompt_ids: Sequence[int],
        end_ids: Iterable[int],
        vocab_size: int,
    ) -> Constraint | None:
        """None where nothing is asked for."""
        if grammar is None and budget is None:
            return None
        thinking = Thinking.after(prompt_ids, tokens, budget)
        return cls(grammar, thinking, end_ids, vocab_size)

    def rule(self, output_ids: Sequence[int], drafts: Sequence[int] = ()) -> Rule:
        """What may follow ``drafts`` after ``output_ids``, which only grow or begin again.

        Drafts that break a rule themselves are followed by anything: nothing there is ever used.
        """
        self._take(output_ids)
        key = tuple(drafts)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._rule(key)
        return found

    @property
    def error(self) -> str | None:
        """Why the grammar gave up on this text."""
        return self._grammar.error if self._grammar else None

    def _take(self, output_ids: Sequence[int]) -> None:
        """Take in output; output that is not a continuation begins again."""
        count = len(self._taken)
        if len(output_ids) == count:
            return
        if len(output_ids) < count:
            self._begin()
            count = 0
        new = output_ids[count:]
        self._push(self._thinking, new)
        self._taken += new
        self._known.clear()

    def _begin(self) -> None:
        """Back to the empty output."""
        self._taken, self._thinking = [], self._first.copy()
        self._grammar = self._origin and self._origin.copy()

    def _push(self, thinking: Thinking, ids: Sequence[int]) -> None:
        """Move on by ``ids``."""
        free = self._grammar is None
        answer = [token for token in ids if thinking.push(token, may_reopen=free)]
        if self._grammar is not None and answer:
            self._grammar.push(answer)

    def _rule(self, drafts: tuple[int, ...]) -> Rule:
        grammar, thinking = self._grammar, self._thinking
        if not drafts:
            return self._here(thinking)
        thinking = thinking.copy()
        pushed, ahead = 0, 0
        for token in drafts:
            forced = thinking.forced
            if forced is not None and token != forced:
                break
            if thinking.push(token, may_reopen=grammar is None) and grammar is not None:
                if not grammar.push([token]):
                    break
                pushed += 1
            ahead += 1
        rule = self._here(thinking) if ahead == len(drafts) else ANYTHING
        if grammar is not None and grammar.error:  # these drafts broke it, not the output
            taken = self._taken
            self._begin()
            self._push(self._thinking, taken)
            self._taken = taken
        elif grammar is not None:
            grammar.pop(pushed)
        return rule

    def _here(self, thinking: Thinking) -> Rule:
        forced = thinking.forced
        if forced is not None:
            return Rule(forced=forced)
        grammar = self._grammar
        if grammar is None:
            return ANYTHING
        if not thinking.answers:
            return Rule(no_end=True)
        allowed = grammar.allowed()
        if grammar.error:
            return Rule(allowed=np.zeros_like(self._ends))
        also = thinking.also_allowed
        if also is not None:
            allowed = allowed | bits_of([also], self._vocab_size)
        only_end = not (allowed & ~self._ends).any()
        if grammar.may_end:
            allowed = allowed | self._ends
        return Rule(allowed=allowed, only_end=only_end)
