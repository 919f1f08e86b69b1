"""A model of strict loops: every row bitwise the same in any company, and close to the layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_models import FAMILIES, config_of
from tiny import draw_ids, randomise

from qnext.checkpoint import build_model, load_model
from qnext.errors import ConfigError
from qnext.hub import shipped_model
from qnext.layers.invariant import make_invariant
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch
from qnext.layers.state import ModelState

CUTS = st.lists(st.integers(1, 17), min_size=1, max_size=6)


def model_of(family: str, dtype: torch.dtype = torch.float32) -> CausalLM:
    model = build_model(config_of(**FAMILIES[family]), dtype).eval().requires_grad_(False)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, CausalLM]:
    found = {name: model_of(name) for name in FAMILIES}
    for model in found.values():
        make_invariant(model)
    return found


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def whole(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    return model.hidden_states(ids, PackedBatch.of([len(ids)]))


def pieces(
    model: CausalLM, ids: torch.Tensor, cuts: list[int], state: ModelState, slot: int = 0
) -> torch.Tensor:
    out, at = [], 0
    for n in cuts:
        batch = state.batch([n], slots=[slot], context_lens=[at])
        out.append(model.hidden_states(ids[at : at + n], batch, state))
        at += n
    return torch.cat(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_the_layers(family: str) -> None:
    model, plain = model_of(family), model_of(family, torch.float64)
    ids, batch, limit = draw_ids(model, 70), PackedBatch.of([70]), {"atol": 1e-4, "rtol": 1e-4}
    plain.load_state_dict(model.state_dict())
    make_invariant(model)
    strict, exact = whole(model, ids), whole(plain, ids)
    torch.testing.assert_close(strict.double(), exact, **limit)
    torch.testing.assert_close(model.logits(strict).double(), plain.logits(exact), **limit)
    if model.mtp is not None:
        drafted = model.draft_states(strict, ids.roll(-1), batch)
        other = plain.draft_states(exact, ids.roll(-1), batch)
        torch.testing.assert_close(drafted.double(), other, **limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_come_closer_than_in_the_layers(family: str) -> None:
    model, plain = model_of(family, torch.bfloat16), model_of(family, torch.float64)
    ids = draw_ids(model, 70)
    plain.load_state_dict(model.state_dict())
    exact, usual = whole(plain, ids), whole(model, ids)
    make_invariant(model)
    strict = whole(model, ids)
    assert strict.dtype == torch.bfloat16
    error, before = ((x.double() - exact).abs().median() for x in (strict, usual))
    assert error < before


@settings(max_examples=8)
@given(CUTS, st.integers(0, 99))
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_and_company_change_no_bit(
    models: dict[str, CausalLM], family: str, cuts: list[int], seed: int
) -> None:
    model, total = models[family], sum(cuts)
    ids = draw_ids(model, total, seed)
    alone = whole(model, ids)
    state = model.new_state(4, total + 1, block_size=8)
    assert torch.equal(pieces(model, ids, cuts, state), alone)
    assert torch.equal(pieces(model, ids, [1] * total, state, slot=1), alone)
    # Among others, with and without a cache.
    others = [draw_ids(model, n, seed + n) for n in (1, 5, 30)]
    packed = torch.cat([others[0], ids, *others[1:]])
    batch = PackedBatch.of([1, total, 5, 30])
    assert torch.equal(model.hidden_states(packed, batch)[1 : 1 + total], alone)
    state = model.new_state(4, max(total, 30) + 1, block_size=4)
    batch = state.batch([1, total, 5, 30], slots=[2, 0, 3, 1])
    assert torch.equal(model.hidden_states(packed, batch, state)[1 : 1 + total], alone)
    rows = model.logits(alone)
    one = torch.cat([model.logits(alone[i : i + 1]) for i in range(total)])
    assert torch.equal(rows, one)
    scores = torch.log_softmax(rows.float(), -1)
    assert torch.equal(scores, torch.cat([torch.log_softmax(r[None], -1) for r in one]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv", [None, torch.bfloat16, torch.float8_e4m3fn])
def test_other_dtypes_keep_the_promise(dtype: torch.dtype, kv: torch.dtype | None) -> None:
    model = model_of("qwen3_next", dtype)
    make_invariant(model)
    ids = draw_ids(model, 40)

    def run(cuts: list[int]) -> torch.Tensor:
        return pieces(model, ids, cuts, model.new_state(1, 41, kv_dtype=kv))

    one = run([40])
    assert torch.equal(one, run([1] * 40))
    assert torch.equal(one, run([3, 1, 17, 19]))


def test_a_state_that_rounds_is_refused() -> None:
    model = model_of("qwen3_next")
    make_invariant(model)
    state = model.new_state(1, 8, state_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="states in float32"):
        pieces(model, draw_ids(model, 4), [4], state)


@settings(max_examples=12)
@given(st.integers(1, 20), st.lists(st.integers(0, 3), min_size=1, max_size=5), st.integers(0, 99))
def test_drafts_change_no_bit(
    models: dict[str, CausalLM], prompt: int, accepted: list[int], seed: int
) -> None:
    """Verification of right and wrong drafts beside another sequence, committed by replay."""
    model = models["qwen3_next"]
    total = prompt + sum(n + 1 for n in accepted)
    ids = draw_ids(model, total, seed)
    alone = whole(model, ids)
    neighbour = draw_ids(model, 200, seed + 1)
    state = model.new_state(2, total + 40)
    found = [pieces(model, ids, [prompt], state)]
    at, beside = prompt, 0
    for right in accepted:
        wrong = draw_ids(model, 3 - right, seed + at)
        rows = torch.cat([ids[at : at + 1 + right], wrong])  # the sampled token and three drafts
        packed = torch.cat([neighbour[beside : beside + 2], rows])
        batch = state.batch([2, 4], slots=[1, 0], context_lens=[beside, at],
                            provisional=[False, True])  # fmt: skip
        hidden = model.hidden_states(packed, batch, state)
        found.append(hidden[2 : 3 + right])
        state.commit(batch, [2, 1 + right])
        at, beside = at + 1 + right, beside + 2
    assert torch.equal(torch.cat(found), alone)
    assert torch.equal(
        pieces(model, neighbour, [beside], model.new_state(1, 300)),
        whole(model, neighbour[:beside]),
    )


@given(st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=8)
def test_a_snapshot_goes_on_with_the_same_bits(
    models: dict[str, CausalLM], first: int, second: int
) -> None:
    model = models["qwen3_next"]
    ids = draw_ids(model, first + second, first)
    alone = whole(model, ids)
    state = model.new_state(2, first + second + 1)
    batch = state.batch([first + second], slots=[0], saves=[(0, first, 1)])
    assert torch.equal(model.hidden_states(ids, batch, state), alone)
    state.batch([first], slots=[1])
    share = state.num_blocks // 2
    for block in range(share):  # the snapshot's own blocks: those of the prefix
        state.copy_block(block, share + block)
    batch = state.batch([second], slots=[1], context_lens=[first])
    assert torch.equal(model.hidden_states(ids[first:], batch, state), alone[first:])


@settings(max_examples=8)
@given(CUTS)
def test_rows_of_the_mtp_layer(models: dict[str, CausalLM], cuts: list[int]) -> None:
    model, total = models["qwen3_next"], sum(cuts)
    ids = draw_ids(model, total + 1)
    hidden = whole(model, ids)[:total]
    alone = model.draft_states(hidden, ids[1:], PackedBatch.of([total]))
    state, at, found = model.new_state(1, total + 2), 0, []
    for n in cuts:
        batch = state.batch([n], slots=[0], context_lens=[at], kv_shift=1)
        rows = slice(at, at + n)
        found.append(model.draft_states(hidden[rows], ids[1:][rows], batch, state))
        at += n
    assert torch.equal(torch.cat(found), alone)


def test_threads_change_no_bit(models: dict[str, CausalLM]) -> None:
    model, ids = models["qwen3_next"], draw_ids(models["qwen3_next"], 90)
    one = whole(model, ids)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(whole(model, ids), one)
    finally:
        torch.set_num_threads(threads)


def test_all_hidden_states_on_request(models: dict[str, CausalLM]) -> None:
    model = models["qwen3_next"]
    ids = draw_ids(model, 9)
    found = model(ids[None], output_hidden_states=True).hidden_states
    assert len(found) == model.config.num_hidden_layers + 1
    assert torch.equal(found[0][0], model.model.embed_tokens(ids))
    assert torch.equal(found[-1][0], whole(model, ids))
    assert not torch.equal(found[0], found[1])


def test_the_shipped_model() -> None:
    """The promise, and that the usual path does not keep it."""
    with torch.inference_mode(False):
        model = load_model(shipped_model(), dtype="float32", device="cpu")
    ids = draw_ids(model, 200)

    def runs() -> list[torch.Tensor]:
        cuts = ([200], [1] * 30 + [100, 13, 57], [64, 64, 72])
        return [pieces(model, ids, list(c), model.new_state(1, 201)) for c in cuts]

    usual = runs()
    make_invariant(model)
    strict = runs()
    assert all(torch.equal(strict[0], other) for other in strict[1:])
    assert not all(torch.equal(usual[0], other) for other in usual[1:])
    torch.testing.assert_close(strict[0], usual[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("change", "match"), [("half", "float16"), ("double", "float64")])
def test_weights_it_does_not_cover(change: str, match: str) -> None:
    model: Any = getattr(model_of("qwen3"), change)()
    with pytest.raises(ConfigError, match=match):
        make_invariant(model)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qnext.layers.invariant.usable", lambda package: False)
    with pytest.raises(ConfigError, match="needs numba"):
        make_invariant(model_of("qwen3"))
