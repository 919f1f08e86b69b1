"""Decode of the 80B shapes, FP8, random weights, one GPU: the whole step in one CUDA graph.

    python benchmarks/gpu_decode.py --out FOLDER [--layers 48] [--batch 1,8] [--context 1024]

Order: correctness of every kernel against torch in fp32, bitwise comparison of the step with and
without programmatic dependent launch, time of the step, time of each kernel family alone over all
layers, launch cost and GEMV bandwidth, a few launch configurations. Needs torch and triton only.

Predictions (written before the first run; bytes / 4.26 TB/s + 0.7 us a launch with PDL; batch 1):
    GDN in    25.5 MB   6.0 + 0.7 us   x36     attention in   18.9 MB   4.4 + 0.7 us   x12
    GDN delta  4.2 MB   2.5 us         x36     attention      2.1 MB    2 launches 5 us x12
    GDN out    8.4 MB   2.0 + 0.7 us   x36     attention out   8.4 MB   2.0 + 0.7 us   x12
    router     4.2 MB   1.0 + 1.2 us   x48     gate_up 10     21.0 MB   4.9 + 1.8 us   x48
    down 11   11.5 MB   2.7 + 0.7 us   x48     lm_head         622 MB   150 us         x1
    sum: 36*11.9 + 12*12.8 + 48*12.3 + 160 = 1.33 ms; without PDL + 300 * 1.5 us = 1.8 ms.
    vLLM 4.71 ms, floor 0.96 ms. Batch 8: floor 3.54 ms, predicted 5.0, vLLM 7.53 ms.
"""

# ruff: noqa: T201, RUF012
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qnext.kernels.attention import triton_decode as attention
from qnext.kernels.experts import triton_grouped as grouped
from qnext.kernels.experts import triton_single as single
from qnext.kernels.linear import reference as linear_reference
from qnext.kernels.linear import triton as linear
from qnext.kernels.linear.triton import prefetch_l2

H, F, E, TOP, V = 2048, 512, 512, 10, 151936
HEADS, KV_HEADS, HEAD_DIM, ROTARY = 16, 2, 256, 64
HK, HV, DK = 16, 32, 128
CHANNELS = 2 * HK * DK + HV * DK
QKVZBA = CHANNELS + HV * DK + 2 * HV
FLOOR_MS = {1: 0.96, 8: 3.54, 32: 10.4, 64: 16.3, 128: 22.8, 256: 29.8}
VLLM_MS = {1: 4.71, 8: 7.53, 32: 14.53, 64: 19.93, 128: 29.78, 256: 36.19}
BANDWIDTH = 4.26e12
FP8 = torch.float8_e4m3fn
DTYPE = torch.bfloat16


@triton.jit
def _delta(
    qkvz, conv, conv_w, a_log, dt_bias, norm, state, context, out, eps,
    STRIDE: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of the DeltaNet mixer, a program per value head: conv, gates, rule, gated norm.

    The convolution window is a ring of four columns indexed by the position, so that the two
    value heads that share a key head may both write it.
    """
    if PDL:
        gdc_launch_dependents()
    hv = tl.program_id(0)
    seq = tl.program_id(1)
    hk = hv // (HV // HK)
    c: tl.constexpr = 2 * HK * D + HV * D
    d = tl.arange(0, D)
    head = state + (seq * HV + hv).to(tl.int64) * (D * D)
    if PDL:
        size: tl.constexpr = D * D * 4
        prefetch_l2(head, size)
        gdc_wait()
    position = tl.load(context + seq)
    row = qkvz + seq * STRIDE
    window = conv + seq.to(tl.int64) * (c * 4)
    q = _conv(row, window, conv_w, hk * D + d, position)
    k = _conv(row, window, conv_w, HK * D + hk * D + d, position)
    v = _conv(row, window, conv_w, 2 * HK * D + hv * D + d, position)
    z = tl.load(row + c + hv * D + d).to(tl.float32)
    b = tl.load(row + c + HV * D + hv).to(tl.float32)
    a = tl.load(row + c + HV * D + HV + hv).to(tl.float32) + tl.load(dt_bias + hv)
    # loaded last: Triton gives the products the layout of the last load
    s_at = head + d[:, None] * D + d[None, :]
    s = tl.load(s_at)
    soft = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(a)))
    s *= tl.exp(-tl.exp(tl.load(a_log + hv)) * soft)
    q *= tl.rsqrt(tl.sum(q * q, axis=0) + 1e-6) * (1.0 / tl.sqrt(D * 1.0))
    k *= tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)
    delta = tl.sigmoid(b) * (v - tl.sum(k[:, None] * s, axis=0))
    s += k[:, None] * delta[None, :]
    o = tl.sum(q[:, None] * s, axis=0)
    tl.store(s_at, s)
    o *= tl.rsqrt(tl.sum(o * o, axis=0) / D + eps) * tl.load(norm + d).to(tl.float32)
    o *= z * tl.sigmoid(z)
    tl.store(out + (seq * HV + hv) * D + d, o.to(out.dtype.element_ty))


@triton.jit
def _conv(row, window, conv_w, channel, position):
    r = tl.arange(0, 4)[None, :]
    at = channel[:, None] * 4 + r
    # tiles as large as the block keep Triton from repeating these loads in every warp
    new = tl.load(row + channel[:, None] + r * 0).to(tl.float32)
    past = tl.load(window + at).to(tl.float32)
    tap = tl.load(conv_w + channel[:, None] * 4 + (r + 3 - position % 4) % 4).to(tl.float32)
    now = r == position % 4
    acc = tl.sum(tl.where(now, new, past) * tap, axis=1)
    tl.store(window + at, new.to(window.dtype.element_ty), mask=now)
    return acc * tl.sigmoid(acc)


@triton.jit
def _finish(
    pmax, pidx, embed, h, tokens, context, counter, rotary, inv_freq, P, base,
    V: tl.constexpr, H: tl.constexpr, ROT: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Arg-max over the programs of the head; the next token's row, position and rotation.

    A counter is added to the token so that replays never fall into a cycle; the position runs
    over 64 values.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0)
    lane = tl.arange(0, B)
    best = tl.full([B], float("-inf"), tl.float32)
    index = tl.full([B], 2147483647, tl.int32)
    for p in range(0, P, B):
        live = p + lane < P
        value = tl.load(pmax + t * P + p + lane, mask=live, other=float("-inf"))
        at = tl.load(pidx + t * P + p + lane, mask=live, other=2147483647)
        index = tl.where(value > best, at, index)
        best = tl.maximum(best, value)
    index = tl.where(best == tl.max(best, axis=0), index, 2147483647)
    step = tl.load(counter + t)
    token = (tl.min(index, axis=0) + step * 7919) % V
    tl.store(tokens + t, token)
    tl.store(counter + t, step + 1)
    position = base + (tl.load(context + t) - base + 1) % 64
    tl.store(context + t, position)
    x = tl.arange(0, H)
    tl.store(h + t * H + x, tl.load(embed + token.to(tl.int64) * H + x))
    f = tl.arange(0, ROT // 2)
    angle = position.to(tl.float32) * tl.load(inv_freq + f)
    tl.store(rotary + t * ROT + f, tl.cos(angle))
    tl.store(rotary + t * ROT + ROT // 2 + f, tl.sin(angle))


class Switch:
    """A kernel that launches only where its family is switched on; ``ON`` None: always."""

    ON: set[str] | None = None
    FAMILY = ""
    NAMES = {"_router": "router", "_gate_up": "gate_up", "_grouped_gate_up": "gate_up",
             "_down": "down", "_grouped_down": "down", "_dispatch": "route", "_choose": "route",
             "_combine": "combine"}  # fmt: skip

    def __init__(self, kernel, name: str) -> None:
        self.kernel, self.name = kernel, self.NAMES.get(name)

    def __getitem__(self, grid):
        on, name = Switch.ON, self.name or Switch.FAMILY
        return self.kernel[grid] if on is None or name in on else lambda *a, **k: None

    @classmethod
    def install(cls) -> None:
        for module in (linear, single, grouped, attention, sys.modules[__name__]):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.runtime.JITFunction) and name in KERNELS:
                    setattr(module, name, cls(value, name))


KERNELS = {"_gemv", "_skinny", "_router", "_gate_up", "_down", "_choose", "_dispatch", "_delta",
           "_grouped_gate_up", "_grouped_down", "_combine", "_split", "_merge", "_finish"}  # fmt: skip  # noqa: E501
FAMILIES = ["gdn_in", "gdn_delta", "gdn_out", "att_in", "att", "att_out", "router", "route",
            "gate_up", "down", "combine", "head", "finish"]  # fmt: skip


class Filler:
    """Random e4m3 numbers of standard deviation 1 (no NaN codes), copied in shifted pieces."""

    def __init__(self, device: str, size: int = 97 * (1 << 21) + 33 * 4096 + 16) -> None:
        self.block = torch.empty(size, dtype=FP8, device=device)
        for part in self.block.split(1 << 24):
            part.copy_(torch.randn(part.shape, device=device))
        self.start, self.device = 0, device

    def __call__(self, *shape: int) -> Tensor:
        out = torch.empty(shape, dtype=FP8, device=self.device)
        flat, done = out.view(torch.uint8).view(-1), 0
        source = self.block.view(torch.uint8)
        while done < flat.numel():
            n = min(flat.numel() - done, source.numel() - self.start)
            flat[done : done + n].copy_(source[self.start : self.start + n])
            done, self.start = done + n, (self.start + n + 4096 * 7919) % (source.numel() - 4096)
        return out

    def scales(self, *shape: int) -> Tensor:
        shape = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
        return 0.02 * (0.75 + 0.5 * torch.rand(shape, device=self.device))


class Model:
    """Weights, caches and workspaces of the decode step for one batch size."""

    def __init__(self, layers: int, device: str) -> None:
        fill = Filler(device)
        bf = DTYPE

        def normal(*shape: int, std: float = 0.02, dtype=bf) -> Tensor:
            return (torch.randn(shape, device=device) * std).to(dtype)

        def matrix(*shape: int) -> tuple[Tensor, Tensor]:
            return fill(*shape), fill.scales(*shape)

        self.layers = []
        for i in range(layers):
            full = i % 4 == 3
            out = matrix(H, HEADS * HEAD_DIM)
            layer = {"full": full, "norm1": normal(H), "norm2": normal(H), "out": out}
            if full:
                wide = HEADS * 2 * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM
                layer |= {"in": matrix(wide, H), "q_norm": normal(HEAD_DIM),
                          "k_norm": normal(HEAD_DIM)}  # fmt: skip
            else:
                layer |= {
                    "in": matrix(CHANNELS + HV * DK, H), "ba": normal(2 * HV, H),
                    "conv": normal(CHANNELS, 4, std=0.5), "norm": 1 + normal(DK),
                    "a_log": torch.rand(HV, device=device).mul_(8).add_(0.01).log_(),
                    "dt_bias": torch.ones(HV, device=device),
                }  # fmt: skip
            layer |= {
                "router": normal(E + 1, H),
                "experts": (*matrix(E, 2 * F, H), *matrix(E, H, F)),
                "shared": (*matrix(2 * F, H), *matrix(H, F)),
            }
            self.layers.append(layer)
        self.embed, self.head = normal(V, H), torch.empty(V, H, dtype=bf, device=device)
        for part in self.head.split(1 << 14):
            part.copy_(torch.randn(part.shape, device=device) * 0.02)
        self.final_norm = normal(H)
        self.device = device
        self.pdl = True
        self.config: dict = {}

    def prepare(self, batch: int, context: int) -> None:
        """Caches of ``batch`` sequences with ``context`` tokens behind them, and workspaces."""
        bf, dev, f32, i32 = DTYPE, self.device, torch.float32, torch.int32
        self.batch, self.context = batch, context
        capacity = context + 128
        for layer in self.layers:
            if layer["full"]:
                shape = (batch, KV_HEADS, capacity, HEAD_DIM)
                layer["k"] = torch.randn(shape, device=dev, dtype=bf)
                layer["v"] = torch.randn(shape, device=dev, dtype=bf)
            else:
                layer["state"] = torch.zeros(batch, HV, DK, DK, device=dev)
                layer["window"] = torch.zeros(batch, CHANNELS, 4, device=dev, dtype=bf)
        self.h = torch.empty(batch, H, dtype=bf, device=dev)
        self.qkvz = torch.empty(batch, QKVZBA, dtype=bf, device=dev)
        self.qkv = torch.empty(batch, HEADS * 2 * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM, dtype=bf,
                               device=dev)  # fmt: skip
        self.mixed = torch.empty(batch, HV * DK, dtype=bf, device=dev)
        self.act = torch.empty(TOP + 1, F, dtype=bf, device=dev)
        self.router_logits = torch.empty(E + 1, dtype=f32, device=dev)
        self.buffers = grouped.workspace(batch, TOP, H, F, E, bf, dev)
        self.splits = attention.splits_for(batch, KV_HEADS, context)
        self.parts = attention.workspace(batch, 1, HEADS, KV_HEADS, HEAD_DIM, self.splits, dev)
        self.logits = torch.empty(batch, V, dtype=bf, device=dev)
        self.best = (torch.empty(batch * V, dtype=f32, device=dev),
                     torch.empty(batch * V, dtype=i32, device=dev))  # fmt: skip
        self.tokens = torch.zeros(batch, dtype=i32, device=dev)
        self.counter = torch.zeros(batch, dtype=i32, device=dev)
        self.lens = torch.zeros(batch, dtype=i32, device=dev)
        self.slots = torch.arange(batch, dtype=i32, device=dev)
        self.inv_freq = 1e7 ** (-torch.arange(ROTARY // 2, device=dev) / (ROTARY / 2))
        self.rotary = torch.empty(batch, ROTARY, device=dev)
        self.reset()

    def reset(self) -> None:
        """The same start for every comparison."""
        for layer in self.layers:
            if not layer["full"]:
                layer["state"].zero_()
                layer["window"].zero_()
        self.counter.copy_(torch.arange(self.batch, device=self.device) * 13)
        lane = torch.arange(self.batch, device=self.device)
        self.tokens.copy_((lane * 1013 + 5) % V)
        self.lens.fill_(self.context)
        self.h.copy_(self.embed[self.tokens.long()])
        angle = self.context * self.inv_freq
        self.rotary.copy_(torch.cat([angle.cos(), angle.sin()]).expand(self.batch, -1))

    def mixer(self, layer: dict) -> None:
        w, s = layer["in"]
        o, so = layer["out"]
        if layer["full"]:
            Switch.FAMILY = "att_in"
            linear.linear(self.h, w, s, norm_weight=layer["norm1"], out=self.qkv, pdl=self.pdl,
                          config=self.config.get("in"))  # fmt: skip
            Switch.FAMILY = "att"
            attention.decode_attention(
                self.qkv, layer["q_norm"], layer["k_norm"], self.rotary, layer["k"], layer["v"],
                self.slots, self.lens, heads=HEADS, splits=self.splits, out=self.mixed,
                buffers=self.parts, pdl=self.pdl,
            )  # fmt: skip
            Switch.FAMILY = "att_out"
        else:
            Switch.FAMILY = "gdn_in"
            linear.linear(self.h, w, s, norm_weight=layer["norm1"], tail=layer["ba"],
                          out=self.qkvz, pdl=self.pdl, config=self.config.get("in"))  # fmt: skip
            Switch.FAMILY = "gdn_delta"
            _delta[(HV, self.batch)](
                self.qkvz, layer["window"], layer["conv"], layer["a_log"], layer["dt_bias"],
                layer["norm"], layer["state"], self.lens, self.mixed, 1e-6, STRIDE=QKVZBA, HK=HK,
                HV=HV, D=DK, PDL=self.pdl, num_warps=8, launch_pdl=self.pdl,
            )  # fmt: skip
            Switch.FAMILY = "gdn_out"
        linear.linear(self.mixed, o, so, residual=self.h, out=self.h, pdl=self.pdl,
                      config=self.config.get("out"))  # fmt: skip

    def moe(self, layer: dict, ahead: Tensor | None = None) -> None:
        Switch.FAMILY = "router"
        args = (self.h, layer["norm2"], layer["router"], layer["experts"], layer["shared"])
        common = {"top_k": TOP, "out": self.h, "pdl": self.pdl, "config": self.config.get("moe")}
        if self.batch == 1:
            single.moe(*args, logits=self.router_logits, act=self.act, ahead=ahead,
                       **common)  # fmt: skip
        else:
            grouped.moe(*args, buffers=self.buffers, **common)

    def step(self) -> None:
        """One token for every sequence."""
        following = [x["in"][0] for x in self.layers[1:]] + [self.head][: len(self.layers)]
        for layer, ahead in zip(self.layers, following, strict=True):
            self.mixer(layer)
            self.moe(layer, ahead)
        Switch.FAMILY = "head"
        t, config = self.batch, self.config.get("head")
        if config is None:
            make = linear.gemv_config if t == 1 else linear.skinny_config
            config = make(V, H, False)
        programs = triton.cdiv(V, config[0])
        linear.linear(self.h, self.head, norm_weight=self.final_norm, out=self.logits,
                      best=self.best, pdl=self.pdl, config=config)  # fmt: skip
        Switch.FAMILY = "finish"
        _finish[(t,)](
            *self.best, self.embed, self.h, self.tokens, self.lens, self.counter, self.rotary,
            self.inv_freq, programs, self.context, V=V, H=H, ROT=ROTARY, B=1024, PDL=self.pdl,
            num_warps=8, launch_pdl=self.pdl,
        )  # fmt: skip

    def step_bytes(self, experts: float) -> float:
        """Bytes that a step must move when each layer hits so many distinct experts."""
        total = self.head.numel() * 2.0
        for layer in self.layers:
            total += layer["in"][0].numel() + layer["out"][0].numel()
            total += (E + 1) * H * 2 + (experts + 1) * 3 * H * F
            if layer["full"]:
                total += self.batch * self.context * KV_HEADS * HEAD_DIM * 4
            else:
                total += layer["ba"].numel() * 2 + self.batch * HV * DK * DK * 8
        return total


def capture(run) -> torch.cuda.CUDAGraph:
    """Warm up (compiles) and capture."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int = 20, rounds: int = 5) -> float:
    """Median over rounds of the mean time of a replay."""
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(rounds):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        for _ in range(replays):
            graph.replay()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / replays)
    return statistics.median(times)


def rel(out: Tensor, ref: Tensor) -> float:
    """Relative RMS error; NaN where something was not written."""
    return float((out.double() - ref.double()).norm() / ref.double().norm())


def reference_norm(x: Tensor, w: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + w.float())


def matmul(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    return x.float() @ linear_reference.dequantise(weight, scale, torch.float32).T


def reference_mixer(m: Model, layer: dict, h: Tensor) -> Tensor:
    """fp32 formula of the mixer for one new token (spec sections 3 and 4); reads the caches."""
    x, b = reference_norm(h, layer["norm1"]), h.shape[0]
    y = matmul(x, *layer["in"])
    if layer["full"]:
        pos, d = int(m.lens[0]), HEAD_DIM
        cos, sin = m.rotary[:, None, : ROTARY // 2], m.rotary[:, None, ROTARY // 2 :]

        def rotate(t: Tensor) -> Tensor:
            a, c = t[..., : ROTARY // 2], t[..., ROTARY // 2 : ROTARY]
            return torch.cat([a * cos - c * sin, c * cos + a * sin, t[..., ROTARY:]], -1)

        qg = y[:, : HEADS * 2 * d].view(b, HEADS, 2 * d)
        kv = y[:, HEADS * 2 * d :].view(b, 2, KV_HEADS, d)
        q, k = rotate(reference_norm(qg[..., :d], layer["q_norm"])), kv[:, 0]
        k = rotate(reference_norm(k, layer["k_norm"]))
        keys = torch.cat([layer["k"][:, :, :pos].float(), k[:, :, None]], 2)
        values = torch.cat([layer["v"][:, :, :pos].float(), kv[:, 1][:, :, None]], 2)
        keys, values = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (keys, values))
        p = (torch.einsum("bhd,bhtd->bht", q, keys) * d**-0.5).softmax(-1)
        o = torch.einsum("bht,bhtd->bhd", p, values) * qg[..., d:].sigmoid()
        return h.float() + matmul(o.reshape(b, -1), *layer["out"])
    ba = matmul(x, layer["ba"])
    pos = int(m.lens[0])
    order = [(pos + 1 + j) % 4 for j in range(3)]
    window = torch.cat([layer["window"][:, :, order].float(), y[:, :CHANNELS, None]], 2)
    c = torch.nn.functional.silu((window * layer["conv"].float()).sum(-1))
    q, k, v = c.split([HK * DK, HK * DK, HV * DK], -1)
    q, k = (t.view(b, HK, DK) for t in (q, k))
    q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q, k = (t.repeat_interleave(HV // HK, 1) for t in (q * DK**-0.5, k))
    v, z = v.view(b, HV, DK), y[:, CHANNELS:].view(b, HV, DK)
    g = -layer["a_log"].exp() * torch.nn.functional.softplus(ba[:, HV:] + layer["dt_bias"])
    state = layer["state"] * g.exp()[..., None, None]
    delta = ba[:, :HV].sigmoid()[..., None] * (v - torch.einsum("bhk,bhkv->bhv", k, state))
    state = state + k[..., None] * delta[:, :, None]
    o = torch.einsum("bhk,bhkv->bhv", q, state)
    o = o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + 1e-6) * layer["norm"].float()
    return h.float() + matmul((o * torch.nn.functional.silu(z)).reshape(b, -1), *layer["out"])


def reference_moe(layer: dict, h: Tensor, logits: Tensor) -> Tensor:
    """fp32 formula of the MoE block; experts are chosen by the kernel's logits rounded to BF16."""
    x = reference_norm(h, layer["norm2"])
    rounded = logits.to(DTYPE).float()
    w, ids = rounded[:, :E].softmax(-1).topk(TOP, -1)
    w = w / w.sum(-1, keepdim=True)
    w1, s1, w2, s2 = layer["experts"]

    def mlp(row: Tensor, a: Tensor, sa: Tensor, b: Tensor, sb: Tensor) -> Tensor:
        gate, up = matmul(row, a, sa).chunk(2, -1)
        return matmul(torch.nn.functional.silu(gate) * up, b, sb)

    out = h.float() + logits[:, E:].sigmoid() * mlp(x, *layer["shared"])
    for t in range(h.shape[0]):
        for j in range(TOP):
            e = int(ids[t, j])
            out[t] += w[t, j] * mlp(x[t : t + 1], w1[e], s1[e], w2[e], s2[e])[0]
    return out


def check(m: Model) -> dict[str, float]:
    """Relative RMS errors of the kernels on fresh random inputs with poisoned outputs."""
    errors = {}
    x = torch.randn(m.batch, H, device=m.device).to(DTYPE)
    for name, index in (("gdn", 0), ("attention", 3)):
        layer = m.layers[index]
        m.reset()
        if not layer["full"]:
            layer["state"].normal_(std=0.1)
            layer["window"].normal_()
        for buffer in (m.qkv, m.qkvz, m.mixed, m.act, *m.parts, m.router_logits):
            buffer.fill_(float("nan"))
        m.h.copy_(x)
        want = reference_mixer(m, layer, m.h)
        m.mixer(layer)
        errors[name] = rel(m.h.float() - x.float(), want - x.float())
        before = m.h.clone()
        m.moe(layer)
        logits = m.router_logits[None] if m.batch == 1 else m.buffers["logits"]
        exact = matmul(reference_norm(before, layer["norm2"]), layer["router"])
        errors[f"{name} router"] = rel(logits, exact)
        want = reference_moe(layer, before, logits)
        errors[f"{name} moe"] = rel(m.h.float() - before.float(), want - before.float())
    m.reset()
    want = matmul(reference_norm(m.h, m.final_norm), m.head)
    saved, m.layers = m.layers, []
    saved_pdl, m.pdl = m.pdl, False
    m.step()
    m.layers, m.pdl = saved, saved_pdl
    errors["head"] = rel(m.logits, want)
    top = (m.tokens - torch.arange(m.batch, device=m.device) * 13 * 7919) % V
    errors["argmax wrong"] = float((top != m.logits.float().argmax(-1)).sum())
    return errors


def repeatable(m: Model, steps: int = 6) -> tuple[bool, float]:
    """Same bits with and without PDL, in a graph and out of it; spread of distinct experts."""
    results, distinct = [], []
    for pdl, graphed in ((False, False), (True, True), (True, True), (True, False)):
        m.pdl = pdl
        graph = capture(m.step) if graphed else None
        m.reset()
        torch.cuda.synchronize()
        for _ in range(steps):
            graph.replay() if graph else m.step()
            if m.batch > 1:
                distinct.append(int(m.buffers["count"]))
        torch.cuda.synchronize()
        results.append((m.tokens.clone(), m.logits.clone(), m.h.clone()))
    m.pdl = True
    same = all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r, strict=True))
    finite = bool(torch.isfinite(results[0][1].float()).all())
    return same and finite, statistics.mean(distinct) if distinct else float(TOP)


@triton.jit
def _tiny(x, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(x + i, tl.load(x + i) + 1.0)


def micro(device: str) -> dict[str, float]:
    """Time in us per dependent tiny kernel (132 programs) in a graph, without and with PDL."""
    x, out = torch.zeros(132 * 128, device=device), {}
    for pdl in (False, True):

        def chain(pdl: bool = pdl) -> None:
            for _ in range(500):
                _tiny[(132,)](x, PDL=pdl, launch_pdl=pdl)

        out["pdl" if pdl else "plain"] = replay_ms(capture(chain)) / 500 * 1e3
    return out


def families(m: Model) -> dict[str, tuple[float, float]]:
    """Time in ms of each family alone over all layers, with and without PDL."""
    out = {}
    for name in FAMILIES:
        Switch.ON = {name}
        times = []
        for pdl in (True, False):
            m.pdl = pdl
            try:
                times.append(replay_ms(capture(m.step), 10, 3))
            finally:
                Switch.ON, m.pdl = {name}, True
        out[name] = (times[0], times[1])
    Switch.ON = None
    return {k: v for k, v in out.items() if v[0] > 0.002}


SWEEPS = {
    1: {
        "in": ("gdn_in", [(16, 4, 4), (8, 4, 4), (8, 4, 2), (32, 4, 8), (64, 1, 4, 5)]),
        "out": ("gdn_out", [(8, 8, 4), (4, 8, 4), (8, 4, 4), (16, 8, 8), (16, 4, 4, 5)]),
        "gate_up": ("gate_up", [{"BN": 8}, {"BN": 4}, {"BN": 16, "warps": 8},
                                {"BN": 8, "warps": 8}]),
        "down": ("down", [{"BD": 8}, {"BD": 4}, {"BD": 4, "KE": 16}, {"BD": 8, "KE": 2},
                          {"BD": 16, "warps": 8}]),
        "head": ("head", [(16, 4, 4), (8, 8, 4), (8, 4, 4), (64, 1, 4, 4)]),
    },
    0: {
        "in": ("gdn_in", [(64, 1, 4, 5), (32, 1, 4, 6), (32, 1, 2, 6), (16, 4, 4, 4)]),
        "out": ("gdn_out", [(16, 4, 4, 5), (16, 2, 2, 8), (32, 4, 4, 4)]),
        "gate_up": ("gate_up", [{"BN": 32}, {"BN": 64}, {"BN": 32, "S": 6}, {"BN": 16, "S": 6},
                                {"BN": 64, "BK": 64, "S": 5}]),
        "down": ("down", [{"BD": 64}, {"BD": 128}, {"BD": 32}, {"BD": 64, "SD": 3}]),
        "head": ("head", [(64, 1, 4, 4), (32, 1, 4, 6), (128, 1, 8, 4)]),
    },
}  # fmt: skip


def sweep(m: Model) -> dict[str, dict[str, float]]:
    """Time in ms of a family over all layers for a few launch configurations."""
    out: dict[str, dict[str, float]] = {}
    for key, (family, configs) in SWEEPS[1 if m.batch == 1 else 0].items():
        Switch.ON = {family}
        out[key] = {}
        for config in configs:
            m.config = {"moe" if isinstance(config, dict) else key: config}
            try:
                out[key][str(config)] = replay_ms(capture(m.step), 10, 3)
            except Exception as error:  # a configuration that does not fit is a result too
                out[key][str(config)] = float("nan")
                print(f"  {key} {config}: {type(error).__name__}: {str(error)[:120]}")
        m.config = {}
    Switch.ON = None
    return out


def look_ahead(m: Model) -> dict[str, float]:
    """Time in ms of the step when the router kernel fetches the next layer's first weights."""
    out = {}
    for size in (0, 16384, 32768, 65536, 98304) if m.batch == 1 else ():
        m.config = {"moe": {"AHEAD": size}}
        out[str(size)] = replay_ms(capture(m.step))
    m.config = {}
    return out


def family_bytes(m: Model, name: str, experts: float) -> float:
    """Bytes a family must read and write in one step."""
    gdn = sum(not x["full"] for x in m.layers)
    full = len(m.layers) - gdn
    one = 3 * H * F
    t = m.batch
    table = {
        "gdn_in": gdn * (12288 * H + 64 * H * 2), "gdn_delta": gdn * t * HV * DK * DK * 8,
        "gdn_out": gdn * 4096 * H, "att_in": full * 9216 * H, "att_out": full * 4096 * H,
        "att": full * t * m.context * KV_HEADS * HEAD_DIM * 4, "head": V * H * 2,
        "router": len(m.layers) * (513 * H * 2 + (one * 2 // 3 if t == 1 else 0)),
        "gate_up": len(m.layers) * (experts + (t > 1)) * one * 2 / 3,
        "down": len(m.layers) * (experts + 1) * one / 3,
    }  # fmt: skip
    return table.get(name, 0.0)


def report(m: Model, result: dict) -> None:
    """One batch size's table."""
    b = m.batch
    ms, experts = result["ms"], result["experts"]
    moved = m.step_bytes(experts)
    full = len(m.layers) == 48
    print(f"== batch {b}, context {m.context}, {len(m.layers)} layers: {ms:.3f} ms per step, "
          f"{b / ms * 1e3:,.0f} tok/s; without PDL {result['ms_plain']:.3f} ms")  # fmt: skip
    print(f"   {moved / 1e9:.2f} GB = {moved / ms * 1e3 / 1e12:.2f} TB/s = "
          f"{moved / BANDWIDTH / ms * 1e5:.0f} % of 4.26; distinct experts {experts:.1f}; "
          f"same bits {result['same']}")  # fmt: skip
    if full and b in FLOOR_MS:
        print(f"   floor {FLOOR_MS[b]} ms ({FLOOR_MS[b] / ms * 100:.0f} %), vLLM {VLLM_MS[b]} ms "
              f"({VLLM_MS[b] / ms:.2f}x)")  # fmt: skip
    print("   errors " + ", ".join(f"{k} {v:.1e}" for k, v in result["errors"].items()))
    total = 0.0
    for name, (pdl, plain) in result["families"].items():
        size = family_bytes(m, name, experts)
        total += pdl
        print(f"   {name:10s} {pdl:7.3f} ms  plain {plain:7.3f}  {size / 1e9:6.2f} GB  "
              f"{size / pdl * 1e3 / 1e12:5.2f} TB/s")  # fmt: skip
    print(f"   sum        {total:7.3f} ms")
    for key, table in result.get("sweep", {}).items():
        print(f"   sweep {key}: " + "; ".join(f"{c} {v:.3f}" for c, v in table.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--no-sweep", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    begin = time.time()
    Switch.install()
    results: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                     "triton": triton.__version__}  # fmt: skip
    results["micro us"] = micro("cuda")
    print("us per dependent tiny kernel:", results["micro us"], flush=True)
    m = Model(args.layers, "cuda")
    torch.cuda.synchronize()
    print(f"weights {torch.cuda.memory_allocated() / 1e9:.1f} GB at {time.time() - begin:.0f} s")
    for batch in (int(b) for b in args.batch.split(",")):
        m.prepare(batch, args.context)
        result: dict = {"errors": check(m)}
        print(f"batch {batch}: {result['errors']} ({time.time() - begin:.0f} s)", flush=True)
        m.reset()
        result["same"], result["experts"] = repeatable(m)
        m.pdl = False
        result["ms_plain"] = replay_ms(capture(m.step))
        m.pdl = True
        result["ms"] = replay_ms(capture(m.step))
        print(f"batch {batch}: {result['ms']:.3f} ms ({time.time() - begin:.0f} s)", flush=True)
        result["families"] = families(m)
        if not args.no_sweep:
            result["sweep"] = sweep(m)
            result["sweep"]["whole step, AHEAD"] = look_ahead(m)
        results[f"batch {batch}"] = result
        report(m, result)
        print(f"   ({time.time() - begin:.0f} s)", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "decode.json").write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
