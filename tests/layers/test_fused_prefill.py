"""Prompts through register tiles against the layers in torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import HYBRID, randomise

from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.kernels.tiles.tile import has_bfloat16
from qnext.layers.fused import MANY_ROWS, FusedModel, fuse
from qnext.layers.model import CausalLM

SIBLINGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "odd widths": {
        "hidden_size": 30, "moe_intermediate_size": 7, "shared_expert_intermediate_size": 9,
        "linear_key_head_dim": 10, "linear_value_head_dim": 22, "head_dim": 24,
        "num_attention_heads": 6, "intermediate_size": 21,
    },
    "wide heads": {
        "head_dim": 72, "linear_key_head_dim": 40, "linear_value_head_dim": 72, "hidden_size": 80,
    },
    "head ratio 3, weights not renormalised": {
        "linear_num_value_heads": 6, "linear_num_key_heads": 2, "norm_topk_prob": False,
    },
    "three taps, one key head": {"linear_conv_kernel_dim": 3, "num_key_value_heads": 1},
}  # fmt: skip


def _model(changes: dict[str, Any], *, rounded: bool = True) -> CausalLM:
    model = build_model(ModelConfig.from_dict({**HYBRID, **changes})).eval()
    randomise(model)
    if rounded:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().float())
    return model


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _run(model: CausalLM) -> list[torch.Tensor]:
    """Ragged prompts in pieces with snapshots on their way, drafting rows, then the snapshots."""
    ids = torch.arange(400) * 7 % model.config.vocab_size
    found, past, place = [], [0, 0, 0], 0
    with torch.inference_mode():
        state = model.new_state(6, 256)
        slots = [4, 0, 2]
        for lengths, saves in [
            ([70, 9, 1], []),
            ([5, 41, 30], [(1, 10, 1), (1, 39, 3), (2, 30, 5)]),
            ([3, 130, 2], [(0, 3, 1)]),
        ]:
            where: dict[str, Any] = {"context_lens": past, "slots": slots}
            rows = ids[place : place + sum(lengths)]
            batch = state.batch(lengths, **where, saves=saves)
            hidden = model.hidden_states(rows, batch, state)
            drafted = model.draft_states(
                hidden, rows, state.batch(lengths, **where, kv_shift=1), state
            )
            found += [hidden, drafted]
            past = [p + n for p, n in zip(past, lengths, strict=True)]
            place += sum(lengths)
    for delta in state.delta_states:
        found += [delta.recurrent_state, delta.conv_state]
    return found


@pytest.mark.parametrize("name", SIBLINGS)
def test_tiles_equal_torch(name: str, threads: int) -> None:
    plain, fused = (_model(SIBLINGS[name], rounded=False) for _ in range(2))
    assert fuse(fused)
    for want, got in zip(_run(plain), _run(fused), strict=True):
        assert (want - got).abs().max() < 2e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.skipif(not has_bfloat16(), reason="this processor does not multiply BF16")
@pytest.mark.parametrize("name", SIBLINGS)
def test_half_is_near(name: str, threads: int) -> None:
    plain, fused = (_model(SIBLINGS[name]) for _ in range(2))
    assert fuse(fused, half=True)
    assert fused.fused is not None
    assert fused.fused.half
    apart = []
    for want, got in zip(_run(plain), _run(fused), strict=True):
        # Rows whose router flips between near equals may differ more: the mean is what counts.
        apart.append(float((want - got).abs().mean() / want.abs().mean()))
    assert max(apart) < 5e-2
    assert max(apart) > 1e-4  # rounding is visible: it is the other path


@pytest.mark.parametrize("kinds", [["linear", "full"], ["full", "linear"]], ids=" last ".join)
def test_rows_that_are_wanted_are_those_of_the_whole(kinds: list[str], threads: int) -> None:
    """The last layer runs for some rows only; states and caches are as if it ran for all."""
    model = _model({"layer_types": [f"{kind}_attention" for kind in 2 * kinds]})
    assert fuse(model)
    ids = torch.arange(90) * 7 % model.config.vocab_size
    wanted, found = [3, 4, 5, 40, 41, 69, 70, 78], []
    with torch.inference_mode():
        for rows in (None, wanted):
            state = model.new_state(3, 128)
            where: dict[str, Any] = {"context_lens": [0, 0], "slots": [2, 0]}
            batch = state.batch([70, 9], **where, saves=[(0, 41, 1)])
            hidden = model.hidden_states(ids[:79], batch, state, wanted=rows)
            after = state.batch([8, 3], context_lens=[70, 9], slots=[2, 0])
            more = model.hidden_states(ids[79:90], after, state)
            states = [t for d in state.delta_states for t in (d.recurrent_state, d.conv_state)]
            found.append([hidden[wanted], more, *states])
    for want, got in zip(*found, strict=True):
        assert (want - got).abs().max() < 1e-6


def test_half_needs_weights_that_lose_nothing() -> None:
    model = _model({}, rounded=False)
    assert fuse(model, half=True)
    assert model.fused is not None
    assert not model.fused.half


def test_pieces_equal_the_whole() -> None:
    model = _model({})
    assert fuse(model)
    ids = torch.arange(120) * 5 % model.config.vocab_size
    found = []
    with torch.inference_mode():
        for pieces in ([120], [60, 60], [13, 50, 57], [96, 24]):
            state = model.new_state(1, 128)
            rows, past = [], 0
            for count in pieces:
                batch = state.batch([count], context_lens=[past], slots=[0])
                rows.append(model.hidden_states(ids[past : past + count], batch, state))
                past += count
            found.append(torch.cat(rows))
    for one, other in itertools.pairwise(found):
        assert (one - other).abs().max() < 2e-5 * float(one.abs().max())


def test_not_a_number_stays_with_its_sequence() -> None:
    model = _model({})
    assert fuse(model)
    with torch.inference_mode():
        model.model.embed_tokens.weight[3] = float("nan")
        state = model.new_state(2, 64)
        ids = torch.tensor([1, 2] * 10 + [1, 3] * 10)
        hidden = model.hidden_states(ids, state.batch([20, 20], slots=[0, 1]), state)
    assert hidden[:20].isfinite().all()
    assert hidden[21:].isnan().all()


def test_what_goes_where() -> None:
    """Drafts among prompts are for torch, and whatever has gradients or no cache."""
    model = _model({})
    assert fuse(model)
    state = model.new_state(12, 64)

    def fits(lengths: list[int], **more: Any) -> bool:
        batch = state.batch(lengths, slots=list(range(len(lengths))), **more)
        return FusedModel.fits(sum(lengths), state, batch)

    with torch.inference_mode():
        assert fits([30])
        assert fits([30, 1, 1])
        assert fits([8], saves=[(0, 2, 11)])
        assert fits([1] * 10)
        assert not fits([30, 3], provisional=[False, True])
        assert FusedModel.fits(MANY_ROWS)  # the head alone
        assert not FusedModel.fits(MANY_ROWS + 1)
    assert not fits([30])
