"""The decode kernels against torch in fp32 on the device, on fresh random inputs.

Two references for the e4m3 way: ``exact`` works on the activations as they were, ``same``
quantises them as the kernels do. The first says what e4m3 activations cost, the second whether
the kernels are right.
"""

from __future__ import annotations

import statistics

import torch
from decode_model import (
    CHANNELS,
    DK,
    DTYPE,
    FP8,
    HEADS,
    HK,
    HV,
    TOP,
    E,
    Model,
)
from torch import Tensor

from qnext.kernels.attention import reference as attention
from qnext.kernels.linear import reference as linear


def rel(out: Tensor, ref: Tensor) -> float:
    """Relative RMS error; NaN where something was not written."""
    return float((out.double() - ref.double()).norm() / ref.double().norm())


def norm(x: Tensor, w: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + w.float())


def matmul(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return x.float() @ linear.dequantise(weight, scale, torch.float32).T


def rounded(x: Tensor) -> Tensor:
    """x through e4m3 with a scale for every 128 channels."""
    groups = x.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return ((groups / scale).to(FP8).float() * scale).flatten(-2)


def plain(x: Tensor) -> Tensor:
    return x.float()


def mixer(m: Model, layer: dict, h: Tensor, through) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 formula of the mixer (spec sections 3 and 4): projections, mixed values, output."""
    x, t, rows = norm(h, layer["norm1"]), m.t, m.rows
    y = matmul(through(x), *layer["in"])
    if layer["full"]:
        caches = [layer[n].float() for n in ("k", "v")]
        o = attention.decode_attention(
            y, layer["q_norm"], layer["k_norm"], m.work.rotary, *caches, m.tables, m.lens,
            heads=HEADS,
        )  # fmt: skip
        return y, o, h.float() + matmul(through(o), *layer["out"])
    ba = matmul(x, layer["ba"])
    pos, ring = int(m.lens[0]), layer["ring"].shape[-1]
    past = layer["ring"][:, :, [(pos - 3 + j) % ring for j in range(3)]].float()
    new = y[:, :CHANNELS].view(m.batch, rows, CHANNELS).transpose(1, 2)
    window = torch.cat([past, new], 2).unfold(2, 4, 1)  # batch, channels, rows, 4
    c = torch.nn.functional.silu((window * layer["conv"].float()[:, None]).sum(-1))
    c = c.transpose(1, 2)
    q, k, v = c.split([HK * DK, HK * DK, HV * DK], -1)
    q, k = (i.reshape(m.batch, rows, HK, DK) for i in (q, k))
    q, k = (i * torch.rsqrt(i.pow(2).sum(-1, keepdim=True) + 1e-6) for i in (q, k))
    q, k = (i.repeat_interleave(HV // HK, 2) for i in (q * DK**-0.5, k))
    v, z = v.reshape(m.batch, rows, HV, DK), y[:, CHANNELS:].view(t, HV, DK)
    g = -layer["a_log"].exp() * torch.nn.functional.softplus(ba[:, HV:] + layer["dt_bias"])
    g, beta = g.view(m.batch, rows, HV), ba[:, :HV].sigmoid().view(m.batch, rows, HV)
    state, outs = layer["state"].float(), []
    for r in range(rows):
        state = state * g[:, r].exp()[..., None, None]
        delta = v[:, r] - torch.einsum("bhk,bhkv->bhv", k[:, r], state)
        state = state + k[:, r][..., None] * (beta[:, r][..., None] * delta)[:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, r], state))
    o = torch.stack(outs, 1).reshape(t, HV, DK)
    o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-6) * layer["norm"].float()
    o = (o * torch.nn.functional.silu(z)).reshape(t, -1)
    return y, o, h.float() + matmul(through(o), *layer["out"])


def experts(layer: dict, h: Tensor, logits: Tensor, through) -> Tensor:
    """fp32 formula of the MoE block; experts are chosen by the kernel's logits rounded to BF16."""
    x = through(norm(h, layer["norm2"]))
    w, ids = logits.to(DTYPE).float()[:, :E].softmax(-1).topk(TOP, -1)
    w = w / w.sum(-1, keepdim=True)
    w1, s1, w2, s2 = layer["experts"]

    def mlp(row: Tensor, weight: Tensor, a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> Tensor:
        gate, up = matmul(row, a, sa).chunk(2, -1)
        return matmul(through(torch.nn.functional.silu(gate) * up * weight), b, sb)

    out = h.float() + mlp(x, logits[:, E:].sigmoid(), *layer["shared"])
    for e in ids.unique().tolist():
        token, rank = (ids == e).nonzero(as_tuple=True)
        out[token] += mlp(x[token], w[token, rank][:, None], w1[e], s1[e], w2[e], s2[e])
    return out


def widen(q: Tensor, scale: Tensor) -> Tensor:
    return (q.float().unflatten(-1, (-1, 128)) * scale[..., None]).flatten(-2)


def check(m: Model) -> dict[str, float]:
    """Relative RMS errors with poisoned outputs: against ``same`` and, after ``>``, ``exact``."""
    errors, w = {}, m.work
    streamed = m.t > 1 or m.config.get("way") == "stream"
    ways = {"": rounded, " > exact": plain} if streamed else {"": plain}
    x = torch.randn(m.t, 2048, device=m.device).to(DTYPE)
    accepted, m.accepted = m.accepted, torch.zeros_like(m.accepted)
    for name, index in (("gdn", 0), ("attention", 3)):
        layer = m.layers[index]
        m.reset()
        if not layer["full"]:
            layer["state"].normal_(std=0.1)
            layer["ring"].normal_()
        for buffer in (w.qkv, w.qkvz, w.qkvzba, w.mixed, w.act, w.normed, w.xs, w.ms, w.y, w.ba,
                       w.parts, w.logits, w.logits1, *w.attention):  # fmt: skip
            buffer.fill_(float("nan"))
        w.h.copy_(x)
        want = {k: mixer(m, layer, w.h, f) for k, f in ways.items()}
        if streamed:
            m.stream_layer(layer, w, "none")
            left = w.h.clone()  # the mixer's share is in, the experts' still in parts
            y = w.qkv if layer["full"] else w.qkvz.view(-1, *w.qkvz.shape[-2:]).float().sum(0)
            o = widen(w.mq, w.ms)
            logits = w.logits.sum(0)
        else:
            m.single_layer(layer, w)
            y, o = w.qkv if layer["full"] else w.qkvzba, w.mixed
            logits = w.logits1[None]
        for k, (y_want, o_want, h_want) in want.items():
            errors[f"{name} in{k}"] = rel(y[:, : y_want.shape[1]], y_want)
            errors[f"{name} mixed{k}"] = rel(o, rounded(o_want) if k == "" and streamed else o_want)
            if streamed:
                share = w.parts.sum(0)
                errors[f"{name} out{k}"] = rel(share, h_want - x.float())
        before = left if streamed else want[""][2].to(DTYPE)
        exact = matmul(norm(before, layer["norm2"]), layer["router"])
        errors[f"{name} router"] = rel(logits, exact)
        if streamed:
            got = w.y[: m.t * TOP].view(m.t, TOP, -1).sum(1) + w.y[m.t * TOP :]
            for k, f in ways.items():
                block = experts(layer, before, logits, f) - before.float()
                errors[f"{name} moe{k}"] = rel(got, block)
        else:
            block = experts(layer, before, logits, plain)
            errors[f"{name} moe"] = rel(w.h.float() - before.float(), block - before.float())
    m.accepted = accepted
    m.reset()
    hidden = w.h.clone()
    if m.t <= 64:
        m.logits(w.h, None, w)
        errors["head"] = rel(m.all_logits[: m.t], matmul(norm(hidden, m.final_norm), m.head))
    return errors


def repeatable(m: Model, capture, steps: int = 6) -> tuple[bool, float]:
    """Same bits with and without PDL, in a graph and out of it; spread of distinct experts."""
    results, distinct = [], []
    for pdl, graphed in ((False, False), (True, True), (True, True)):
        m.pdl = pdl
        graph = capture(m.step) if graphed else None
        m.reset()
        torch.cuda.synchronize()
        for _ in range(steps):
            graph.replay() if graph else m.step()
            if m.t > 1:
                distinct.append(int((m.work.route["counts"][:E] > 0).sum()))
        torch.cuda.synchronize()
        results.append((m.tokens.clone(), m.all_logits.clone(), m.work.h.clone()))
    m.pdl = True
    same = all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    finite = bool(torch.isfinite(results[0][1].float()).all())
    return same and finite, statistics.mean(distinct) if distinct else float(TOP)
