from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qnext.engine.constraint import ANYTHING, Constraint, Rule
from qnext.engine.sampling_params import SamplingParams
from qnext.engine.sampling_state import SamplingState
from qnext.engine.thinking import Phase, Thinking, ThinkTokens, template_thinks
from qnext.hub import resolve_model
from qnext.text import Tokenizer

START, END, BLANK, TURN, A, B, EOS = range(7)
TOKENS = ThinkTokens(START, (END, BLANK), frozenset({TURN}))
OPENS = ThinkTokens(START, (END, BLANK), frozenset({TURN}), model_opens=True)


@pytest.mark.parametrize(
    ("prompt", "phase"),
    [
        ([], Phase.ANSWER),
        ([A, START, B], Phase.THINKING),
        ([A, START, B, END, BLANK], Phase.ANSWER),
        ([START, A, END, TURN, A, START], Phase.THINKING),
        ([A, START, B, TURN, A], Phase.ANSWER),  # a user who wrote <think>
    ],
)
def test_the_prompt_says_where_an_answer_begins(prompt: list[int], phase: Phase) -> None:
    assert Thinking.after(prompt, TOKENS, None).phase is phase
    opened = Thinking.after(prompt, OPENS, None).phase
    ended = END in prompt and TURN not in prompt
    assert opened is (Phase.START if phase is Phase.ANSWER and not ended else phase)


def forced_outputs(budget: int, prompt: list[int], output: list[int]) -> list[int | None]:
    """What is forced after each beginning of ``output``."""
    thinking = Thinking.after(prompt, TOKENS, budget)
    found = [thinking.forced]
    for token in output:
        thinking.push(token)
        found.append(thinking.forced)
    return found


def test_the_budget_closes_the_block_and_nothing_else() -> None:
    assert forced_outputs(2, [START], [A, B, END, BLANK, A]) == [None, None, END, BLANK, None, None]
    assert forced_outputs(0, [START], [END, BLANK, A]) == [END, BLANK, None, None]
    assert forced_outputs(3, [START], [A, END, A, B, B, B]) == [None] * 7
    assert forced_outputs(1, [A], [B, START, A, END, BLANK]) == [None, None, None, END, BLANK, None]
    # all blocks of an answer share one budget
    again = forced_outputs(2, [START], [A, END, BLANK, B, START, A, END, BLANK])
    assert again == [None, None, None, None, None, None, END, BLANK, None]


def test_every_token_sequence_keeps_to_the_budget_and_only_where_forced() -> None:
    """Exhaustive: whatever the model says, no block outgrows the budget, and no other token is
    decided."""
    for output in itertools.product([START, END, A], repeat=6):
        thinking = Thinking.after([START], TOKENS, 2)
        inside, used = True, 0
        said: list[int] = []
        for token in output:
            forced = thinking.forced
            said.append(token if forced is None else forced)
            assert (forced is END) == (inside and used >= 2)
            thinking.push(said[-1])
            if inside and said[-1] == END:
                inside = False
            elif inside:
                used += 1
            elif said[-1] == START:
                inside = True
            assert used <= 2
            assert thinking.used == used


def test_the_grammar_starts_after_the_block(tokenizer: Tokenizer) -> None:
    think = ThinkTokens.of(tokenizer)
    assert think is not None
    a, text = tokenizer.token_to_id("a"), tokenizer.encode("what")[0]
    ends = [8185]
    rule = rules_of(tokenizer, think, None, [think.start])
    assert rule([]) == Rule(no_end=True)  # thinking must not end the answer
    assert rule([text, text]) == Rule(no_end=True)
    closed = rule([text, think.close[0]])
    assert bits(closed) == {*bits(first_rule(tokenizer)), think.close[1]}
    # </think>, its blanks and the answer may all arrive as drafts
    assert bits(rule([text], [*think.close])) == bits(first_rule(tokenizer))
    assert bits(rule([text], [*think.close, a])) == set(ends)
    assert bits(rule([text], [think.close[0], a])) == set(ends)
    assert rule([text], [*think.close, text]) == ANYTHING  # a draft that is not accepted
    assert bits(rule([text, *think.close, a])) == set(ends)


def test_a_model_that_opens_its_own_block_may_do_so_first_only(tokenizer: Tokenizer) -> None:
    think = ThinkTokens.of(tokenizer, model_opens=True)
    assert think is not None
    rule = rules_of(tokenizer, think, 1, [5])
    answer = bits(first_rule(tokenizer))
    assert bits(rule([])) == {*answer, think.start}
    assert rule([think.start]) == Rule(no_end=True)
    assert rule([think.start], [7]) == Rule(forced=think.close[0])
    assert rule([think.start], [7, 7]) == ANYTHING
    assert rule([think.start, 7], [think.close[0]]) == Rule(forced=think.close[1])
    assert bits(rule([think.start, 7, *think.close])) == answer


def test_states_without_rules_have_none(tokenizer: Tokenizer) -> None:
    think = ThinkTokens.of(tokenizer)
    state = SamplingState(SamplingParams(), prompt_ids=[1], vocab_size=8192, thinking=think)
    assert state.constraint is None
    assert state.rule() is ANYTHING


def test_the_template_says_whether_the_model_opens_a_block(tmp_path: Path) -> None:
    assert not template_thinks(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert not template_thinks(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content.split('</think>')[-1] }}")
    assert template_thinks(tmp_path)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve_model(None))


def a_or_b(tokenizer: Tokenizer):  # type: ignore[no-untyped-def]
    from qnext.engine.grammar import GrammarCompiler
    from qnext.engine.structured_outputs import StructuredOutputsParams

    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    return compiler.compile(StructuredOutputsParams(choice=["a", "b"]))


def rules_of(
    tokenizer: Tokenizer, think: ThinkTokens, budget: int | None, prompt: list[int]
) -> Callable[..., Rule]:
    """The rule after an output and drafts, of a new sequence each time."""

    def rule(output: list[int], drafts: Sequence[int] = ()) -> Rule:
        found = Constraint.of(
            a_or_b(tokenizer), think, budget, prompt_ids=prompt, end_ids=[8185], vocab_size=8192
        )
        assert found is not None
        return found.rule(output, drafts)

    return rule


def first_rule(tokenizer: Tokenizer) -> Rule:
    return Constraint(a_or_b(tokenizer), Thinking(None), [8185], 8192).rule([])


def bits(rule: Rule) -> set[int]:
    assert rule.allowed is not None
    return {i for i in range(8192) if rule.allowed[i >> 5] >> (i & 31) & 1}
