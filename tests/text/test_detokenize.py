from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import TextError
from qnext.text import IncrementalDetokenizer, StopChecker, Tokenizer
from qnext.text.qwen3 import qwen3_tokenizer_from_ranks

BYTES = Tokenizer(qwen3_tokenizer_from_ranks({bytes([i]): i for i in range(256)}))
"""One token per byte: every invalid UTF-8 sequence can be written."""

CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=8)


def pieces(items: list[int], cuts: list[int]) -> list[list[int]]:
    found, at = [], 0
    while at < len(items):
        size = cuts[len(found) % len(cuts)]
        found.append(items[at : at + size])
        at += size
    return found


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=40), cuts=CUTS, skip=st.booleans())
def test_pieces_of_any_bytes_add_up(ids: list[int], cuts: list[int], skip: bool) -> None:
    stream = IncrementalDetokenizer(BYTES, skip_special_tokens=skip)
    shown = "".join(stream.push(piece) for piece in pieces(ids, cuts)) + stream.flush()
    assert shown == BYTES.backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_no_half_character_is_shown(text: str) -> None:
    stream, shown = IncrementalDetokenizer(BYTES), ""
    data = text.encode("utf-8", errors="replace")
    for byte in data:
        token = next(i for i in range(256) if BYTES.token_bytes(i) == bytes([byte]))
        shown += stream.push([token])
        assert data.decode().startswith(shown)
    assert shown + stream.flush() == data.decode()


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 151_935), max_size=30), cuts=CUTS)
def test_pieces_of_the_real_tokenizer_add_up(
    qwen3: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    stream = IncrementalDetokenizer(qwen3)
    shown = "".join(stream.push(piece) for piece in pieces(ids, cuts)) + stream.flush()
    assert shown == qwen3.decode(ids)


def test_an_unfinished_character_appears_only_in_flush() -> None:
    tokens = [
        next(i for i in range(256) if BYTES.token_bytes(i) == bytes([b])) for b in "é".encode()
    ]
    stream = IncrementalDetokenizer(BYTES)
    assert stream.push(tokens[:1]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(tokens) == "é"


def reference_stop(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            hit = max(hits, key=len)
            return text[: end if include else end - len(hit)], hit
    return text, None


@settings(max_examples=500)
@given(
    text=st.text("ab<", max_size=30),
    stop=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=4),
    cuts=CUTS,
    include=st.booleans(),
)
def test_stop_strings_for_any_cut(
    text: str, stop: list[str], cuts: list[int], include: bool
) -> None:
    checker, shown, at, i = StopChecker(stop, include), "", 0, 0
    while at < len(text):
        shown += checker.push(text[at : at + cuts[i % len(cuts)]])
        at += cuts[i % len(cuts)]
        i += 1
    expected, hit = reference_stop(text, stop, include)
    assert (shown + checker.flush(), checker.stopped) == (expected, hit)


def test_only_a_possible_beginning_is_held_back() -> None:
    checker = StopChecker(["</end>"])
    assert checker.push("a < b") == "a < b"
    assert checker.push(" </en") == " "
    assert checker.push("x") == "</enx"
    assert checker.push("</end> more") == ""
    assert checker.stopped == "</end>"
    assert checker.push("still more") == ""


@pytest.mark.parametrize("stop", ["abc", [""], [1]])
def test_wrong_stop_strings(stop: list[str]) -> None:
    with pytest.raises(TextError, match="non-empty strings"):
        StopChecker(stop)
