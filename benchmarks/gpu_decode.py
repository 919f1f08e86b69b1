"""Decode of the 80B shapes, FP8, random weights, one GPU: the whole step in one CUDA graph.

    python benchmarks/gpu_decode.py --out FOLDER [--layers 48] [--runs 1,8,1@32768,32,64]

For each batch (@ context, else 1024): launch configurations of each kernel family over all layers,
the best of them kept; every kernel against torch in fp32; bitwise comparison of the step with and
without programmatic dependent launch; time of the step and of each family. Needs torch and triton.

First run (2026-11-24): batch 1 2.503 ms, batch 8 10.85 ms. Read from it: gate_up (12 us a layer at
batch 1, 4.9 of bytes) ran in 1.6 waves and searched the experts in each, ten cross-warp maxima
deep; down in three latencies; the DeltaNet stand-in had every load wait for the store before;
at batch 8 x was normalised in every program, one program routed, and prefetching whole tiles into
L2 cost more than it hid. The attention layer's 4.6e-2 was its residual: the update is 0.035 beside
a residual of 1, and rounding their sum to BF16 alone gives 4.8e-2 (now measured by stage).

Predictions of this version, ms per step (first run -> now, the best configuration of each):
    batch 1: gdn_in 0.344 -> 0.27, gdn_delta 0.327 -> 0.14, gdn_out 0.163 -> 0.14, att_in 0.095 ->
    0.08, att 0.087, att_out 0.049 -> 0.045, router 0.159 -> 0.16, gate_up 0.576 -> 0.39, down
    0.367 -> 0.25, head 0.152 -> 0.14; sum 1.70, step 1.8 (0.1 over the sum as before): 550 tok/s.
    batch 8: gdn_in 1.31 -> 0.55, gdn_delta 0.61 -> 0.45, gdn_out 0.37 -> 0.25, att_in 0.27 -> 0.18,
    att 0.20, att_out 0.11 -> 0.09, router 0.26 -> 0.25, route 0.52 -> 0.22, gate_up 5.6 -> 2.2,
    down 1.33, combine 0.09, head 0.21 -> 0.16; sum 6.0, step 6.0 (vLLM 7.53).
    batch 32: 15 (vLLM 14.5; gate_up 5, down 4, linears 64 rows untuned); 64: 22 (19.9).
    batch 1 at 32K: + 0.19 of KV bytes at 80 %: 2.05 (vLLM 5.04, target 1.66).
"""

# ruff: noqa: RUF012
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
from qnext.kernels.gated_delta import triton_decode as delta
from qnext.kernels.linear import reference as linear_reference
from qnext.kernels.linear import triton as linear

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
             "_few_gate_up": "gate_up", "_down": "down", "_grouped_down": "down",
             "_place": "route", "_choose": "route", "_combine": "combine"}  # fmt: skip

    def __init__(self, kernel, name: str) -> None:
        self.kernel, self.name = kernel, self.NAMES.get(name)

    def __getitem__(self, grid):
        on, name = Switch.ON, self.name or Switch.FAMILY
        return self.kernel[grid] if on is None or name in on else lambda *a, **k: None

    @classmethod
    def install(cls) -> None:
        for module in (linear, single, grouped, attention, delta, sys.modules[__name__]):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.runtime.JITFunction) and name in KERNELS:
                    setattr(module, name, cls(value, name))


KERNELS = {"_gemv", "_skinny", "_norm_rows", "_router", "_gate_up", "_down", "_choose", "_place",
           "_decode_head", "_few_gate_up", "_grouped_gate_up", "_grouped_down", "_combine",
           "_split", "_merge", "_finish"}  # fmt: skip
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
        self.normed = torch.empty(batch, H, dtype=bf, device=dev)
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
                          normed=self.normed, config=self.config.get("in"))  # fmt: skip
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
                          normed=self.normed, out=self.qkvz, pdl=self.pdl,
                          config=self.config.get("in"))  # fmt: skip
            Switch.FAMILY = "gdn_delta"
            qkv, z, b, a = self.qkvz.split([CHANNELS, HV * DK, HV, HV], -1)
            delta.fused_decode_ring(
                qkv, z, b, a, layer["window"], layer["conv"], layer["a_log"], layer["dt_bias"],
                layer["norm"], layer["state"], self.slots, self.lens, 1e-6, out=self.mixed,
                pdl=self.pdl, **self.config.get("delta", {}),
            )  # fmt: skip
            Switch.FAMILY = "gdn_out"
        linear.linear(self.mixed, o, so, residual=self.h, out=self.h, pdl=self.pdl,
                      config=self.config.get("out"))  # fmt: skip

    def moe(self, layer: dict) -> None:
        Switch.FAMILY = "router"
        args = (self.h, layer["norm2"], layer["router"], layer["experts"], layer["shared"])
        common = {"top_k": TOP, "out": self.h, "pdl": self.pdl, "config": self.config.get("moe")}
        if self.batch == 1:
            single.moe(*args, logits=self.router_logits, act=self.act, normed=self.normed,
                       **common)  # fmt: skip
        else:
            grouped.moe(*args, buffers=self.buffers, **common)

    def step(self) -> None:
        """One token for every sequence."""
        for layer in self.layers:
            self.mixer(layer)
            self.moe(layer)
        Switch.FAMILY = "head"
        t, config = self.batch, self.config.get("head")
        if config is None:
            one = t == 1
            config = (
                linear.gemv_config(V, H, False) if one else linear.skinny_config(V, H, False, t)
            )
        programs = triton.cdiv(V, config[0])
        linear.linear(self.h, self.head, norm_weight=self.final_norm, out=self.logits,
                      normed=self.normed, best=self.best, pdl=self.pdl, config=config)  # fmt: skip
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


def reference_mixer(m: Model, layer: dict, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 formula of the mixer for one new token (spec sections 3 and 4); reads the caches.

    Projections, input of the output projection, and output.
    """
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
        o = o.reshape(b, -1)
        return y, o, h.float() + matmul(o, *layer["out"])
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
    o = (o * torch.nn.functional.silu(z)).reshape(b, -1)
    return y, o, h.float() + matmul(o, *layer["out"])


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
        for buffer in (m.qkv, m.qkvz, m.mixed, m.act, m.normed, *m.parts, m.router_logits):
            buffer.fill_(float("nan"))
        m.h.copy_(x)
        y, o, want = reference_mixer(m, layer, m.h)
        m.mixer(layer)
        errors[f"{name} in"] = rel((m.qkv if layer["full"] else m.qkvz)[:, : y.shape[1]], y)
        errors[f"{name} mixed"] = rel(m.mixed, o)
        errors[f"{name} update"] = rel(m.h.float() - x.float(), want - x.float())
        # what rounding the exact sum to BF16 does to the update: the floor of the line above
        errors[f"{name} rounding"] = rel(want.to(DTYPE).float() - x.float(), want - x.float())
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
    for pdl, graphed in ((False, False), (True, True), (True, True)):
        m.pdl = pdl
        graph = capture(m.step) if graphed else None
        m.reset()
        torch.cuda.synchronize()
        for _ in range(steps):
            graph.replay() if graph else m.step()
            if m.batch > 1:
                distinct.append(len(m.buffers["ids"].unique()))
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


def families(m: Model) -> dict[str, float]:
    """Time in ms of each family alone over all layers."""
    out = {}
    for name in FAMILIES:
        Switch.ON = {name}
        out[name] = replay_ms(capture(m.step), 10, 3)
    Switch.ON = None
    return {k: v for k, v in out.items() if v > 0.003}


SWEEPS: dict[str, dict[str, tuple[str, list]]] = {
    "one": {
        "in": ("gdn_in", [(8, 4, 4), (16, 2, 4), (16, 4, 8), (8, 2, 4)]),
        "out": ("gdn_out", [(4, 8, 4), (4, 4, 4), (8, 2, 4), (8, 4, 8)]),
        "gate_up": ("gate_up", [{}, {"KC": 4}, {"BN": 16, "KC": 1},
                                {"BN": 16, "KC": 2, "warps": 8}]),
        "down": ("down", [{}, {"KE": 8}, {"BD": 8, "dwarps": 4}]),
        "router": ("router", [{}, {"BR": 8}, {"BS": 4}]),
        "head": ("head", [(16, 4, 4), (16, 8, 8)]),
    },
    "few": {
        "in": ("gdn_in", [(16, 4, 4, 4), (32, 4, 8, 4), (32, 2, 4, 4), (64, 2, 8, 4)]),
        "out": ("gdn_out", [(16, 4, 4, 4), (16, 8, 8, 4), (32, 4, 8, 4)]),
        "gate_up": ("gate_up", [{"few": 1}, {"few": 1, "FN": 16}, {"few": 1, "KC": 4},
                                {"few": 0}, {"few": 0, "S": 3}]),
        "down": ("down", [{}, {"BD": 128}, {"BD": 128, "dwarps": 8}]),
        "head": ("head", [(64, 1, 4, 4), (32, 4, 8, 3)]),
    },
    "many": {
        "in": ("gdn_in", [(64, 1, 4, 3), (64, 1, 4, 4), (128, 1, 8, 3)]),
        "gate_up": ("gate_up", [{"few": 0}, {"few": 1, "KC": 4}, {"few": 0, "S": 3}]),
        "down": ("down", [{}, {"BD": 128}]),
    },
}  # fmt: skip


def sweep(m: Model) -> dict[str, dict[str, float]]:
    """Time in ms of a family over all layers by launch configuration; ``m`` keeps the best."""
    out: dict[str, dict[str, float]] = {}
    best: dict = {"moe": {}}
    kind = "one" if m.batch == 1 else "few" if m.batch <= 16 else "many"
    for key, (family, configs) in SWEEPS[kind].items():
        Switch.ON = {family}
        out[key] = {}
        for config in configs:
            m.config = {"moe" if isinstance(config, dict) else key: config}
            try:
                out[key][str(config)] = replay_ms(capture(m.step), 10, 3)
            except Exception as error:  # a configuration that does not fit is a result too
                torch.cuda.synchronize()
                out[key][str(config)] = float("inf")
                print(f"  {key} {config}: {type(error).__name__}: {str(error)[:120]}")
        chosen = min(configs, key=lambda c, table=out[key]: table[str(c)])
        if isinstance(chosen, dict):
            best["moe"] |= chosen
        else:
            best[key] = chosen
    Switch.ON = None
    m.config = best
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
    if full and b in FLOOR_MS and m.context == 1024:
        print(f"   floor {FLOOR_MS[b]} ms ({FLOOR_MS[b] / ms * 100:.0f} %), vLLM {VLLM_MS[b]} ms "
              f"({VLLM_MS[b] / ms:.2f}x)")  # fmt: skip
    print("   errors " + ", ".join(f"{k} {v:.1e}" for k, v in result["errors"].items()))
    total = 0.0
    for name, spent in result["families"].items():
        size = family_bytes(m, name, experts)
        total += spent
        print(f"   {name:10s} {spent:7.3f} ms  {size / 1e9:6.2f} GB  "
              f"{size / spent * 1e3 / 1e12:5.2f} TB/s")  # fmt: skip
    print(f"   sum        {total:7.3f} ms; kept {m.config}")
    for key, table in result.get("sweep", {}).items():
        print(f"   sweep {key}: " + "; ".join(f"{c} {v:.3f}" for c, v in table.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--runs", default="1,8,1@32768,32,64", help="batch[@context], ...")
    parser.add_argument("--seconds", type=float, default=110.0, help="no new run after this")
    args = parser.parse_args()
    torch.manual_seed(0)
    begin = time.time()
    Switch.install()
    results: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                     "triton": triton.__version__, "layers": args.layers}  # fmt: skip
    results["micro us"] = micro("cuda")
    print("us per dependent tiny kernel:", results["micro us"], flush=True)
    m = Model(args.layers, "cuda")
    torch.cuda.synchronize()
    print(f"weights {torch.cuda.memory_allocated() / 1e9:.1f} GB at {time.time() - begin:.0f} s")
    tuned: dict[int, dict] = {}
    for run in args.runs.split(","):
        batch, context = (int(n) for n in (*run.split("@"), 1024)[:2])
        if time.time() - begin > args.seconds:
            print(f"== {run} left out: {time.time() - begin:.0f} s have passed")
            continue
        m.prepare(batch, context)
        result: dict = {"errors default": check(m)}
        m.reset()
        result["ms default"] = replay_ms(capture(m.step))
        print(f"{run}: {result['ms default']:.3f} ms with defaults, {result['errors default']} "
              f"({time.time() - begin:.0f} s)", flush=True)  # fmt: skip
        if batch in tuned:
            m.config = tuned[batch]
        else:
            result["sweep"] = sweep(m)
            tuned[batch] = m.config
        result["config"] = m.config
        m.reset()
        result["errors"] = check(m)
        m.reset()
        result["same"], result["experts"] = repeatable(m)
        m.pdl = False
        result["ms_plain"] = replay_ms(capture(m.step))
        m.pdl = True
        result["ms"] = replay_ms(capture(m.step))
        result["families"] = families(m)
        results[run] = result
        report(m, result)
        m.config = {}
        print(f"   ({time.time() - begin:.0f} s)", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "decode.json").write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
