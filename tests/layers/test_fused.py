"""The compiled loops for few rows against the layers in torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import HYBRID, randomise

from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.layers.fused import FusedModel, fuse
from qnext.layers.model import CausalLM

SIBLINGS = {
    "qwen3_next": {},
    "head ratio 3, weights not renormalised": {
        "linear_num_value_heads": 6,
        "linear_num_key_heads": 2,
        "norm_topk_prob": False,
    },
    "all sparse": {"mlp_only_layers": []},
    "three taps": {"linear_conv_kernel_dim": 3},
    "tied": {"tie_word_embeddings": True},
}


def _model(changes: dict[str, object], *, rounded: bool) -> CausalLM:
    model = build_model(ModelConfig.from_dict({**HYBRID, **changes})).eval()
    randomise(model)
    if rounded:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().float())
    return model


def _run(model: CausalLM) -> list[torch.Tensor]:
    """Prefill, decode, verify with rejections, decode, draft: every kind of small batch."""
    ids = torch.arange(200) % model.config.vocab_size
    found = []
    with torch.inference_mode():
        state = model.new_state(3, 128)
        past, place = [20, 9], 29
        batch = state.batch(past, slots=[2, 0])
        found.append(model.hidden_states(ids[:29], batch, state))
        steps = [([1, 1], None), ([3, 2], [2, 1]), ([1, 2], None), ([4, 4], [4, 0]), ([1], None)]
        for lengths, accepted in steps:
            slots = [2, 0][: len(lengths)]
            flags = [accepted is not None] * len(lengths)
            where: dict[str, Any] = {"context_lens": past[: len(lengths)], "slots": slots}
            batch = state.batch(lengths, **where, provisional=flags)
            rows = ids[place : place + sum(lengths)]
            hidden = model.hidden_states(rows, batch, state)
            drafted = model.draft_states(
                hidden, rows, state.batch(lengths, **where, kv_shift=1), state
            )
            found += [hidden, model.logits(hidden), drafted]
            if accepted is not None:
                state.commit(batch, accepted)
            kept = accepted or lengths
            past = [p + k for p, k in zip(past, kept, strict=False)] + past[len(kept) :]
            place += sum(lengths)
    return found


@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.parametrize("rounded", [True, False], ids=["bfloat16 weights", "fp32 weights"])
def test_fused_equals_torch(name: str, rounded: bool) -> None:
    plain, fused = (_model(SIBLINGS[name], rounded=rounded) for _ in range(2))
    assert fuse(fused)
    for want, got in zip(_run(plain), _run(fused), strict=True):
        assert (want - got).abs().max() < 2e-5 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_sequences_are_shared_out_over_threads(threads: int) -> None:
    """Thirteen sequences decode, verify and draft: more rows than one thread takes alone."""
    plain, fused = (_model({}, rounded=True) for _ in range(2))
    assert fuse(fused)
    count = 13
    ids = torch.arange(4 * count * 8) % plain.config.vocab_size
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for model in (plain, fused):
            rows = []
            with torch.inference_mode():
                state, past = model.new_state(count, 64), [5] * count
                batch = state.batch(past, slots=range(count))
                model.hidden_states(ids[: 5 * count], batch, state)
                for step in range(3):
                    lengths = [1 + (n + step) % 3 * (step > 0) for n in range(count)]
                    flags = [step == 2 and n % 2 == 0 for n in range(count)]
                    where: dict[str, Any] = {"context_lens": past, "slots": range(count)}
                    batch = state.batch(lengths, **where, provisional=flags)
                    some = ids[100 * step : 100 * step + sum(lengths)]
                    hidden = model.hidden_states(some, batch, state)
                    drafts = state.batch(lengths, **where, kv_shift=1)
                    rows += [hidden, model.draft_states(hidden, some, drafts, state)]
                    kept = [
                        1 + n % length if flag else length
                        for n, (length, flag) in enumerate(zip(lengths, flags, strict=True))
                    ]
                    if step == 2:
                        state.commit(batch, kept)
                    past = [p + k for p, k in zip(past, kept, strict=True)]
                batch = state.batch([1] * count, context_lens=past, slots=range(count))
                rows.append(model.hidden_states(ids[:count], batch, state))
            found.append(rows)
    finally:
        torch.set_num_threads(before)
    for want, got in zip(*found, strict=True):
        assert (want - got).abs().max() < 2e-5 * max(1.0, float(want.abs().max()))


def test_the_loops_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model({}, rounded=True)
    assert fuse(model)
    calls = []
    original = FusedModel.run

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(FusedModel, "run", counted)
    _run(model)
    assert len(calls) == 6  # the prefill of 29 rows too


def test_not_for_biases() -> None:
    assert not fuse(_model({"attention_bias": True}, rounded=True))


def test_not_for_bfloat16_or_gradients() -> None:
    model = _model({}, rounded=True)
    assert not fuse(model.bfloat16())
    model = model.float()
    assert fuse(model)
    state = model.new_state(1, 8)
    batch = state.batch([2], slots=[0])
    hidden = model.hidden_states(torch.tensor([1, 2]), batch, state)
    assert hidden.requires_grad


def test_exponential_is_accurate_and_keeps_what_is_not_finite() -> None:
    from qnext.kernels.small_batch import loops

    for x in np.linspace(-80, 80, 401, dtype=np.float32):
        assert loops._exp(x) == pytest.approx(math.exp(x), rel=1e-5)
    assert loops._exp(np.float32(-1000)) < 1e-37
    assert np.isnan(loops._exp(np.float32("nan")))
