from __future__ import annotations

import random
import re
import time
from typing import Any

import numpy as np
import pytest
from json_schemas import check_json, random_schema
from pydantic import BaseModel

from qnext.engine.constraint import Constraint
from qnext.engine.grammar import Grammar, GrammarCompiler
from qnext.engine.structured_outputs import MAX_DEPTH, StructuredOutputsParams
from qnext.engine.thinking import Thinking
from qnext.errors import RequestError
from qnext.hub import resolve_model
from qnext.text import Tokenizer

Form = StructuredOutputsParams


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(resolve_model(None))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def ids_of(words: np.ndarray) -> list[int]:
    return np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0].tolist()


def walk(grammar: Grammar, rng: random.Random, most: int = 600) -> list[int]:
    """Random allowed tokens until the text may end and a coin says so, or nothing else may come."""
    ids: list[int] = []
    for _ in range(most):
        allowed = ids_of(grammar.allowed())
        assert grammar.error is None
        if grammar.may_end and (not allowed or rng.random() < 0.5):
            return ids
        ids.append(rng.choice(allowed))
        assert grammar.push(ids[-1:]) == 1
    raise AssertionError("the text does not end")


@pytest.mark.parametrize("seed", range(60))
def test_random_walks_give_json_of_random_schemas(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    rng = random.Random(seed)
    schema = random_schema(rng)
    for whitespace in ({}, {"disable_any_whitespace": True}):
        grammar = compiler.compile(Form(json=schema, **whitespace))
        text = tokenizer.decode(walk(grammar, rng), skip_special_tokens=False)
        check_json(text, schema)
        if whitespace:
            assert text == text.strip()


@pytest.mark.parametrize(
    "regex", [r"[A-Z][a-z]{2,8} [0-9]{1,4}", r"(ja|nein|vielleicht)!{0,3}", "[äöü漢]{1,5}x?", "a*b"]
)
def test_random_walks_match_the_regex(
    compiler: GrammarCompiler, tokenizer: Tokenizer, regex: str
) -> None:
    for seed in range(10):
        ids = walk(compiler.compile(Form(regex=regex)), random.Random(seed))
        assert re.fullmatch(regex, tokenizer.decode(ids))


def test_choices_are_met_letter_by_letter(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    choices = ["yes", "yes, but", "né\n", "tab\there", 'a "quoted" \\ one', "😀", "\x01\x7f"]
    seen = set()
    for seed in range(60):
        ids = walk(compiler.compile(Form(choice=choices)), random.Random(seed))
        seen.add(tokenizer.decode(ids))
    assert seen == set(choices)


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= sum\nsum ::= term ("+" term)*\nterm ::= [0-9]+ | "(" sum ")"',
        'start: sum\nsum: term ("+" term)*\nterm: /[0-9]+/ | "(" sum ")"',
    ],
)
def test_both_dialects_of_ebnf(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str
) -> None:
    one = compiler.compile(Form(grammar=grammar))
    for text, ends in [("1+(2+33)", True), ("((7))+1", True), ("1+", False), ("(1", False)]:
        ids = tokenizer.encode(text)
        fresh = one.copy()
        assert fresh.push(ids) == len(ids)
        assert fresh.may_end is ends
    assert one.copy().push(tokenizer.encode("1)")) < 2


class Person(BaseModel):
    name: str
    age: int


def test_a_schema_is_a_dict_a_text_or_a_model() -> None:
    as_dict = Form(json=Person.model_json_schema())
    assert Form(json=Person) == as_dict == Form(json=as_dict.json)
    assert Form(json=Person).source == as_dict.source


def test_a_multi_byte_character_may_be_split_over_tokens(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    grammar = compiler.compile(Form(regex="😀|😁"))
    for place, token in enumerate(ids):
        assert token in ids_of(grammar.allowed())
        assert grammar.push([token]) == 1
        assert grammar.may_end is (place == len(ids) - 1)


def test_control_tokens_are_never_text(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.compile(Form(json={"type": "string"}))
    grammar.push(tokenizer.encode('"a'))
    allowed = set(ids_of(grammar.allowed()))
    assert len(allowed) > 5000
    assert not allowed & set(tokenizer.added_tokens)


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_pure_functions_of_the_text(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    """Whatever was pushed and popped in between, the next tokens are those of a fresh grammar."""
    rng = random.Random(seed)
    form = Form(json=random_schema(rng))
    ids = walk(compiler.compile(form), rng)
    grammar = compiler.compile(form)
    for place, token in enumerate(ids):
        pushed = grammar.push(ids[place : place + rng.randrange(6)])
        grammar.allowed()
        pushed += grammar.push(rng.choices(range(tokenizer.vocab_size), k=rng.randrange(3)))
        grammar.pop(pushed)
        fresh = compiler.compile(form)
        fresh.push(ids[:place])
        assert (grammar.allowed() == fresh.allowed()).all()
        assert grammar.may_end == fresh.may_end
        grammar.push([token])


def nested(deep: int) -> str:
    return '{"type":"array","items":' * deep + "{}" + "}" * deep


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "exactly one"),
    "two forms": ({"regex": "a", "choice": ["b"]}, "found regex and choice"),
    "unknown": ({"jsn": "{}"}, "'jsn'"),
    "not json": ({"json": "{"}, "no JSON"),
    "not a schema": ({"json": "[1]"}, "schema"),
    "nan": ({"json": {"minimum": float("nan")}}, "JSON"),
    "not a type": ({"json": 3}, "found int"),
    "bad type": ({"json": {"type": "strin"}}, "strin"),
    "false": ({"json": False}, "allows no text"),
    "nothing fits": (
        {"json": {"type": "object", "required": ["a"], "properties": {"a": False}}},
        "nsatisfiable",
    ),
    "unsatisfiable": ({"json": {"$ref": "#"}}, "no text|no extension|NoExtension"),
    "unsupported": ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "remote": ({"json": {"$ref": "http://example.com/a.json"}}, "example.com"),
    "deep": ({"json": nested(MAX_DEPTH + 1)}, "deep"),
    "very deep": ({"json": nested(100_000 // 25)}, "deep"),
    "large": ({"json": {"enum": ["x" * 100] * 4000}}, "at most"),
    "many": ({"json": {"allOf": [{"minLength": i} for i in range(9000)]}}, "large|oo many"),
    "open": ({"regex": "(ab"}, "unclosed"),
    "look-ahead": ({"regex": "(?=a)b"}, "look-around"),
    "reference": ({"regex": r"(a)\1"}, "backreference"),
    "long regex": ({"regex": "a" * 20_000}, "at most"),
    "long pattern": ({"json": {"properties": {"a": {"pattern": "a" * 5000}}}}, "at most"),
    "large multiple": ({"json": {"allOf": [{"multipleOf": 999_983}]}}, "multipleOf"),
    "deep regex": ({"regex": "(" * 100 + "a" + ")" * 100}, "deep"),
    "exploding regex": ({"regex": "(?:(?:a?){1,500}){1,500}a{500}"}, "too many"),
    "no choice": ({"choice": []}, "at least one"),
    "empty choice": ({"choice": ["a", ""]}, "empty"),
    "choice of numbers": ({"choice": [1]}, "list of texts"),
    "no rule": ({"grammar": "start: foo"}, "foo"),
    "no ebnf": ({"grammar": "???"}, "grammar"),
    "exploding grammar": ({"grammar": 'start: "a" start'}, "oo many|no text"),
    "blanks of regex": ({"regex": "a", "disable_any_whitespace": True}, "of json"),
    "both blanks": (
        {"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "},
        "contradict",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_at_once(compiler: GrammarCompiler, name: str) -> None:
    values, words = REFUSED[name]
    began = time.perf_counter()
    with pytest.raises(RequestError, match=words) as caught:
        compiler.compile(Form(**values))
    assert time.perf_counter() - began < 5
    assert "<state>" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_grammar_that_takes_too_long_is_refused_and_cannot_pile_up(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, time_limit=0.05)
    slow = {"allOf": [{"multipleOf": 397}, {"multipleOf": 401}], "type": "integer"}
    began = time.perf_counter()
    for minimum in (0, 1):
        with pytest.raises(RequestError, match=r"takes longer than 0\.05 s"):
            compiler.compile(Form(json={**slow, "minimum": minimum}))
    with pytest.raises(RequestError, match="still being compiled"):
        compiler.compile(Form(json={**slow, "minimum": 2}))
    assert time.perf_counter() - began < 1
    for thread in compiler._late:
        thread.join()
    assert compiler.compile(Form(choice=["a"])).allowed().any()


def test_a_grammar_is_compiled_once(compiler: GrammarCompiler) -> None:
    form = Form(json={"type": "object", "properties": {"only here": {"type": "integer"}}})
    before = len(compiler._cache)
    for _ in range(3):
        compiler.compile(form)
    assert len(compiler._cache) == before + 1


def test_a_rule_after_drafts_is_that_of_the_text(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    form = Form(json={"type": "object"})
    ids = tokenizer.encode('{"key": [1, 2, {"a": null}], "b": "text"}')
    ends, vocab = [8185], tokenizer.vocab_size

    def new() -> Constraint:
        return Constraint(compiler.compile(form), Thinking(None), ends, vocab)

    kept = new()
    for place in range(len(ids) + 1):
        for drafts in (ids[place : place + 3], [*ids[place : place + 1], 8000, 8001]):
            for count in range(len(drafts) + 1):
                rule = kept.rule(ids[:place], drafts[:count])
                text = [*ids[:place], *drafts[:count]]
                if tuple(text) == tuple(ids[: len(text)]):
                    plain = new().rule(text)
                    assert (rule.allowed == plain.allowed).all()
                    assert rule.only_end == plain.only_end == (len(text) == len(ids))
    # a shorter output is another text, as after a restart
    again = kept.rule(ids[:2])
    assert (again.allowed == new().rule(ids[:2]).allowed).all()


def test_ends_are_allowed_exactly_where_the_text_is_complete(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    ends = [8185, 17]
    rules = Constraint(
        compiler.compile(Form(regex="a(bc)?")), Thinking(None), ends, tokenizer.vocab_size
    )
    a, b, c = (tokenizer.token_to_id(letter) for letter in "abc")

    def found(*ids: int | None) -> set[int]:
        return set(ids_of(rules.rule(ids).allowed))  # type: ignore[arg-type]

    assert not found() & set(ends)
    assert set(ends) <= found(a)
    assert not found(a, b) & set(ends)
    assert found(a, b, c) == set(ends)
