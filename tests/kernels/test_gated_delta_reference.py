"""The chunked delta rule equals the recurrent one, and both the written equations (spec 4.4)."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from qnext.errors import KernelError
from qnext.kernels.gated_delta import chunk_gated_delta_rule, recurrent_gated_delta_rule

LENGTHS = [(1,), (3,), (4,), (63,), (64,), (65,), (150,), (1, 64, 7), (150, 3, 65, 128),
           (0, 5, 0, 70)]  # fmt: skip


def draw(
    lengths: tuple[int, ...], ratio: int, start: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Arguments of the rule: two key heads, dk 8, dv 5, decays from weak to strong."""
    rng = torch.Generator().manual_seed(sum(lengths) + ratio)
    total, hk, hv, dk, dv = sum(lengths), 2, 2 * ratio, 8, 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(total, hk, dk), dim=-1) for _ in range(2))
    g = -torch.exp(2 * normal(total, hv) - 2)
    state = normal(len(lengths), hv, dk, dv) if start else None
    bounds = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
    args = (q * dk**-0.5, k, normal(total, hv, dv), g, normal(total, hv).sigmoid())
    return *(x.to(dtype) for x in args), bounds, state


def by_hand(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, bounds: Tensor,
            start: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Spec 4.4 head by head, token by token."""
    out, finals = torch.empty_like(v), []
    ratio = v.shape[1] // q.shape[1]
    for n, (a, b) in enumerate(pairwise(bounds)):
        heads = []
        for h in range(v.shape[1]):
            s = q.new_zeros(q.shape[2], v.shape[2]) if start is None else start[n, h].clone()
            for t in range(a, b):
                s = s * g[t, h].exp()
                key = k[t, h // ratio]
                s = s + torch.outer(key, beta[t, h] * (v[t, h] - s.T @ key))
                out[t, h] = s.T @ q[t, h // ratio]
            heads.append(s)
        finals.append(torch.stack(heads))
    return out, torch.stack(finals)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [False, True])
def test_chunked_equals_recurrent(lengths: tuple[int, ...], ratio: int, start: bool) -> None:
    args = draw(lengths, ratio, start)
    out, final = recurrent_gated_delta_rule(*args)
    chunked, chunked_final = chunk_gated_delta_rule(*args)
    close(chunked, out)
    close(chunked_final, final)


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("start", [False, True])
def test_recurrent_equals_the_written_equations(ratio: int, start: bool) -> None:
    args = draw((4, 1, 21), ratio, start)
    out, final = recurrent_gated_delta_rule(*args)
    expected, expected_final = by_hand(*args)
    close(out, expected)
    close(final, expected_final)


def test_states_after_every_token() -> None:
    args = draw((5, 3), 2, True)
    out, final, states = recurrent_gated_delta_rule(*args, return_states=True)
    close(states[4], final[0])
    close(states[7], final[1])
    q, k, v, g, beta, _, start = args
    for t in range(1, 5):
        cut = [x[:t] for x in (q, k, v, g, beta)]
        _, end = recurrent_gated_delta_rule(*cut, torch.tensor([0, t]), start[:1])
        close(states[t - 1], end[0])
    assert len(out) == len(states) == 8


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 100])
def test_two_pieces_equal_the_whole(cut: int) -> None:
    q, k, v, g, beta, bounds, start = draw((130,), 2, True)
    whole, final = chunk_gated_delta_rule(q, k, v, g, beta, bounds, start)
    pieces, state = [], start
    for part in (slice(0, cut), slice(cut, 130)):
        args = [x[part] for x in (q, k, v, g, beta)]
        out, state = chunk_gated_delta_rule(*args, torch.tensor([0, len(args[0])]), state)
        pieces.append(out)
    close(torch.cat(pieces), whole)
    close(state, final)


def test_gradients_of_both_forms_agree() -> None:
    grads = []
    for rule in (chunk_gated_delta_rule, recurrent_gated_delta_rule):
        *inputs, bounds, start = draw((70, 9), 2, True)
        leaves = [x.requires_grad_() for x in (*inputs, start)]
        out, final = rule(*leaves[:5], bounds, leaves[5])
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        ((out * weight).sum() + final.square().sum()).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_decay_that_forgets_everything_stays_finite() -> None:
    q, k, v, _, beta, bounds, start = draw((130,), 1, True)
    g = torch.full_like(beta, -200.0)
    out, final = chunk_gated_delta_rule(*(x.float() for x in (q, k, v, g, beta)), bounds, start)
    last = torch.einsum("hk,hv->hkv", k[-1], v[-1] * beta[-1, :, None])
    assert out.isfinite().all()
    torch.testing.assert_close(final[0], last.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [chunk_gated_delta_rule, recurrent_gated_delta_rule])
def test_fp32_inside_whatever_comes_in(rule) -> None:  # type: ignore[no-untyped-def]
    q, k, v, g, beta, bounds, start = draw((70,), 2, True)
    half = (q.bfloat16(), k.bfloat16(), v.bfloat16(), g.float(), beta.float())
    out, final = rule(*half, bounds, start.float())
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_final = rule(*(x.double() for x in half), bounds, start)
    torch.testing.assert_close(final, exact_final.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, exact.bfloat16(), rtol=1e-2, atol=1e-3)


def test_shapes_that_do_not_belong_together() -> None:
    q, k, v, g, beta, bounds, _ = draw((4,), 2, False)
    with pytest.raises(KernelError, match="do not belong together"):
        chunk_gated_delta_rule(q, k, v[:, :3], g[:, :3], beta[:, :3], bounds)
    with pytest.raises(KernelError, match="both must be"):
        recurrent_gated_delta_rule(q, k, v, g[:, :3], beta, bounds)
