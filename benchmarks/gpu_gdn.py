"""Gated delta rule, its decode step, convolution and norms on one GPU.

    python benchmarks/gpu_gdn.py --out FOLDER [--quick] [--no-fla]

Order: correctness of every kernel against fp64 torch (and of repeated runs against each other),
then times by events (median) or, for small launches, by replays of a CUDA graph, then a few
launch configurations. Needs torch and triton only; flash-linear-attention is timed if importable.

Floors and predictions (H200: 4.26 TB/s copy; layer Hk 16, Hv 32, d 128; written before the second
run; first run in brackets). Bytes per chunk of 64 tokens and value head, 16-bit:
    scores   k 8 q 8             -> M 8 P 8     32 KB    12 dependent products of 64 x 64
    states   k 8 q 8 v 16 M 8 P 8 -> o 16       64 KB    8.4 MFLOP, serial over chunks
  1x32768 = 16384 chunk-heads: 0.12 + 0.25 ms of bytes. scores: 4.2k cycles a chunk-head, 3 to a
  multiprocessor: 0.15 to 0.22 ms (0.617 with the inverse in a kernel of its own). states: tile 64
  turned, 1.0 us a step, half the L2 bytes: 0.50 to 0.60 ms (0.795). Sum 0.70 to 0.80 (1.41; fla
  2.19). 1x4096: 0.10 (0.199). 8192x4: 256 programs, two to a multiprocessor: 0.30 + 0.2 = 0.5
  (1.41); 2048x4 0.15 (0.37).
  backward 1x32768: prepare 0.2 + states 0.5 + reverse states 0.7 + score grads 0.3 + input grads
  about 2 = 3.7 ms (4.96).
  decode: state read and written once, 4.19 MB (fp32) a sequence and layer: batch 1 / 32 / 128 / 256
  6 / 36 / 145 / 290 us (87 %); bf16 state 5 / 20 / 75 / 148 us.
  conv 32768 x 8192: 1.07 GB, 0.25 ms of bytes, 0.34 expected (0.607); backward 1.61 GB, 0.38 ms of
  bytes, 0.7 expected: 60 instructions an element (4.74).
  norms 32768 x 2048: 0.27 GB, 0.07 ms; add 0.54 GB, 0.14 ms; gated (1M x 128) 0.8 GB, 0.21 ms.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qnext.kernels.causal_conv import triton as conv
from qnext.kernels.gated_delta import triton_chunk as chunk
from qnext.kernels.gated_delta import triton_chunk_grad as grad
from qnext.kernels.gated_delta import triton_recurrent as recurrent
from qnext.kernels.norm import triton as norm

COPY = 4.26e12
#: Seconds after which no further configuration is tried.
LIMIT_S = 66
FP32_BEFORE_S = 58
BF16, FP32 = torch.bfloat16, torch.float32
LAYER, SMALL = (16, 32, 128), (3, 6, 64)
FLA_MS = {"1x4096": 0.53, "1x32768": 2.19}
report: dict[str, Any] = {"errors": {}, "ms": {}, "configs": {}, "failed": {}}
started = time.time()


def attempt(name: str, work: Callable[[], None]) -> None:
    """Run one part; what it raises is recorded and the rest goes on."""
    try:
        work()
        torch.cuda.synchronize()
    except Exception as problem:
        report["failed"][name] = f"{type(problem).__name__}: {problem}"[:300]
        print(f"FAILED {name}: {problem}\n{traceback.format_exc()}"[:1500], flush=True)


def check(name: str, got: Tensor, want: Tensor, limit: float) -> None:
    """Record ||got - want|| / ||want||; NaN and anything above ``limit`` fail the part."""
    want = want.double()
    error = float((got.detach().double() - want).norm() / want.norm().clamp_min(1e-30))
    report["errors"][name] = error
    if not error < limit:
        report["failed"][f"error {name}"] = f"{error:.2e} above {limit:.0e}"
        print(f"WRONG {name}: {error:.3e} (limit {limit:.0e})", flush=True)


def naive(q, k, v, g, beta, lengths, state):
    """Spec 4.4 in fp64, token by token, all heads at once; differentiable."""
    ratio = v.shape[1] // q.shape[1]
    q, k = q.repeat_interleave(ratio, 1), k.repeat_interleave(ratio, 1)
    out, final, t = [], [], 0
    for n, length in enumerate(lengths):
        s = state[n]
        for _ in range(length):
            s = s * g[t].exp()[:, None, None]
            delta = beta[t, :, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], s))
            s = s + k[t, :, :, None] * delta[:, None, :]
            out.append(torch.einsum("hk,hkv->hv", q[t], s))
            t += 1
        final.append(s)
    return torch.stack(out), torch.stack(final)


def draw(lengths: Sequence[int], shape: tuple[int, int, int], dtype=BF16, seed=0):
    """Random inputs of the rule; keys share a direction so that (I + A)^-1 is not trivial."""
    hk, hv, d = shape
    gen = torch.Generator("cuda").manual_seed(seed)
    tokens = sum(lengths)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device="cuda")

    q = (F.normalize(normal(tokens, hk, d), dim=-1) * d**-0.5).to(dtype)
    k = F.normalize(normal(tokens, hk, d) + 0.5 * normal(1, hk, d), dim=-1).to(dtype)
    v = normal(tokens, hv, d).to(dtype)
    g = -normal(tokens, hv).abs() * (torch.arange(hv, device="cuda") % 4) * 0.3
    beta = torch.sigmoid(normal(tokens, hv) + 1)
    state = normal(len(lengths), hv, d, d) * 0.3
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    return (q, k, v, g, beta, cu, state)


def correct_chunk(name: str, lengths: Sequence[int], shape, dtype, limit: float) -> None:
    q, k, v, g, beta, cu, state = draw(lengths, shape, dtype)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta, state)]
    wants = [x.detach().double().requires_grad_() for x in leaves]
    want = naive(*wants[:5], lengths, wants[5])
    grads = [torch.randn_like(x) for x in want]

    def run() -> list[Tensor]:
        got = chunk.chunk_gated_delta_rule(*leaves[:5], cu, leaves[5])
        used = [x.to(y.dtype) for x, y in zip(grads, got, strict=True)]
        return [*got, *torch.autograd.grad(got, leaves, used)]

    got = run()
    names = ("o", "final", "dq", "dk", "dv", "dg", "dbeta", "dstate")
    rounded = [grads[0].to(dtype).double(), grads[1].float().double()]
    want = [*want, *torch.autograd.grad(want, wants, rounded)]
    for part, a, b in zip(names, got, want, strict=True):
        check(f"{name} {part}", a, b, limit)
    again = run()
    moved = [p for p, a, b in zip(names, got, again, strict=True) if not torch.equal(a, b)]
    if moved:
        report["failed"][f"race {name}"] = ", ".join(moved)
        print(f"RACE {name}: {moved} differ between two runs", flush=True)


def decode_inputs(batch: int, slots: int, dtype: torch.dtype) -> dict[str, Tensor]:
    hk, hv, d = LAYER
    channels = 2 * hk * d + hv * d
    wide = torch.randn(batch, channels + hv * d + 2 * hv, device="cuda").to(BF16)
    qkv, z, b, a = wide.split([channels, hv * d, hv, hv], 1)
    return {
        "mixed_qkv": qkv, "z": z, "b": b, "a": a,
        "conv_state": torch.randn(slots, channels, 3, device="cuda").to(BF16),
        "conv_weight": torch.randn(channels, 4, device="cuda").to(BF16),
        "A_log": torch.randn(hv, device="cuda").to(BF16),
        "dt_bias": torch.randn(hv, device="cuda").to(BF16),
        "norm_weight": torch.randn(d, device="cuda").to(BF16),
        "recurrent_state": torch.randn(slots, hv, d, d, device="cuda").to(dtype),
        "slot_ids": torch.randperm(slots, device="cuda")[:batch].int(),
    }  # fmt: skip


def correct_decode(dtype: torch.dtype, limit: float) -> None:
    hk, hv, d = LAYER
    x = decode_inputs(5, 9, dtype)
    x["slot_ids"][3] = -1
    live = [0, 1, 2, 4]
    slots = x["slot_ids"][live].long()
    y = {k: v.double() for k, v in x.items()}
    window = torch.cat([y["conv_state"][slots], y["mixed_qkv"][live].unsqueeze(2)], 2)
    mixed = F.silu((window * y["conv_weight"]).sum(2))
    q, k, v = (p.view(len(live), -1, d) for p in mixed.split([hk * d, hk * d, hv * d], 1))
    q = q * (q.square().sum(2, keepdim=True) + 1e-6).rsqrt() * d**-0.5
    k = k * (k.square().sum(2, keepdim=True) + 1e-6).rsqrt()
    g = -y["A_log"].exp() * F.softplus(y["a"][live] + y["dt_bias"])
    state = y["recurrent_state"][slots]
    o, final = naive(q, k, v, g, y["b"][live].sigmoid(), [1] * len(live), state)
    o = o * (o.square().mean(2, keepdim=True) + 1e-6).rsqrt() * y["norm_weight"]
    want = (o * F.silu(y["z"][live].view(o.shape))).flatten(1)
    untouched = x["recurrent_state"].clone()
    got = recurrent.fused_decode(**x, eps=1e-6)
    name = f"decode {str(dtype)[6:]}"
    check(f"{name} out", got[live], want, 5e-3)
    check(f"{name} state", x["recurrent_state"][slots], final, limit)
    check(f"{name} conv", x["conv_state"][slots], window[:, :, 1:], 1e-12)
    rest = [s for s in range(9) if s not in slots.tolist()]
    if not torch.equal(x["recurrent_state"][rest], untouched[rest]) or got[3].any():
        report["failed"][f"{name} slots"] = "slots of other sequences changed"


def correct_recurrent() -> None:
    lengths = [3, 0, 8]
    q, k, v, g, beta, cu, state = draw(lengths, LAYER)
    got = recurrent.recurrent_gated_delta_rule(q, k, v, g, beta, cu, state, True)
    doubles = [x.double() for x in (q, k, v, g, beta)]
    want = naive(*doubles, lengths, state.double())
    check("recurrent o", got[0], want[0], 4e-3)
    check("recurrent final", got[1], want[1], 1e-5)
    check("recurrent states", got[2][[2, 10]], want[1][[0, 2]], 1e-5)


def compare(name: str, mine: Callable, formula: Callable, inputs: list[Tensor], limit: float):
    leaves = [x.detach().requires_grad_() for x in inputs]
    wants = [x.detach().double().requires_grad_() for x in inputs]
    got, want = mine(*leaves), formula(*wants)
    grads = [torch.randn_like(x) for x in got]
    got_grads = torch.autograd.grad(got, leaves, grads)
    want_grads = torch.autograd.grad(want, wants, [x.double() for x in grads])
    for i, (a, b) in enumerate(zip([*got, *got_grads], [*want, *want_grads], strict=True)):
        check(f"{name} {i}", a, b, limit)


def correct_small() -> None:
    lengths = [1, 200, 2, 64]
    cu = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda").to(BF16)

    def formula(x: Tensor, w: Tensor, initial: Tensor) -> list[Tensor]:
        out, final = [], []
        for part, start in zip(x.split(lengths), initial, strict=True):
            window = torch.cat([start.t(), part])
            out.append(F.silu(sum(window[j : j + len(part)] * w[:, j] for j in range(4))))
            final.append(window[len(part) :].t())
        return [torch.cat(out), torch.stack(final)]

    inputs = [randn(267, 384), randn(384, 4), randn(4, 384, 3)]
    compare("conv", lambda x, w, i: list(conv.causal_conv(x, w, cu, i)), formula, inputs, 6e-3)

    def scaled(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    x, z, w = randn(300, 2048), randn(300, 2048), randn(2048)
    compare("rms_norm", lambda x, w: [norm.rms_norm(x, w, 1e-6)],
            lambda x, w: [scaled(x) * (1 + w)], [x, w], 6e-3)  # fmt: skip
    compare("add_rms_norm", lambda x, z, w: list(norm.add_rms_norm(x, z, w, 1e-6)),
            lambda x, z, w: [scaled(x + z) * (1 + w), x + z], [x, z, w], 1e-2)  # fmt: skip
    x, z, w = randn(5000, 128), randn(5000, 128), randn(128)
    compare("gated_rms_norm", lambda x, z, w: [norm.gated_rms_norm(x, z, w, 1e-6)],
            lambda x, z, w: [scaled(x) * w * F.silu(z)], [x, z, w], 6e-3)  # fmt: skip


def timed(name: str, work: Callable[[], Any], byte_count: float = 0.0, rep: int = 60) -> float:
    ms = float(triton.testing.do_bench(work, warmup=15, rep=rep, return_mode="median"))
    report["ms"][name] = {"ms": ms}
    if byte_count:
        report["ms"][name]["share_of_copy"] = byte_count / COPY / (ms * 1e-3)
    return ms


def graphed(work: Callable[[], Any], calls: int) -> float:
    """Milliseconds of one of the ``calls`` launches that ``work`` makes, from graph replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    ms = triton.testing.do_bench(graph.replay, warmup=10, rep=40, return_mode="median")
    return float(ms) / calls


def time_chunk(fla: Any) -> None:
    cases = {"1x4096": [4096], "1x32768": [32768], "8192x4": [8192] * 4, "2048x4": [2048] * 4}
    for name, lengths in cases.items():
        *args, cu, _ = draw(lengths, LAYER)
        with torch.no_grad():
            timed(f"forward {name}", lambda a=args, c=cu: chunk.chunk_gated_delta_rule(*a, c))
            call = graphed(lambda a=args, c=cu: chunk.chunk_gated_delta_rule(*a, c), 1)
            report["ms"][f"forward {name}"]["graph_ms"] = call
            if fla:
                report["ms"][f"forward {name}"]["fla_ms"] = triton.testing.do_bench(
                    lambda a=args, c=cu: fla.chunk_gated_delta_rule(
                        *(x.unsqueeze(0) for x in a), scale=1.0, output_final_state=True,
                        cu_seqlens=c.long(),
                    ), warmup=15, rep=60, return_mode="median",
                )  # fmt: skip
        if name == "1x32768":
            time_stages(*args, cu)


def time_stages(q, k, v, g, beta, cu) -> None:
    made = chunk.prepare(q, k, g, beta, cu)
    states = (q, k, v, made, cu, None)
    timed("stage index+scores", lambda: chunk.prepare(q, k, g, beta, cu))
    timed("stage states", lambda: chunk.run_states(*states))
    timed("stage states kept", lambda: chunk.run_states(*states, keep=True))
    try:
        import gdn_v1 as old
    except ImportError:
        return
    before = old.prepare(q, k, g, beta, cu)
    timed("stage index+scores old", lambda: old.prepare(q, k, g, beta, cu), rep=30)
    timed("stage states old", lambda: old.run_states(q, k, v, before, cu, None), rep=30)
    want = old.run_states(q, k, v, before, cu, None)[0].double()
    check("long new-old o", chunk.run_states(*states)[0], want, 1e-2)


def time_kernels() -> None:
    """Device time of each kernel of one forward and backward, 1x32768."""
    from torch.profiler import ProfilerActivity, profile

    *args, cu, _ = draw([32768], LAYER)
    leaves = [x.requires_grad_() for x in args]
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        o, _ = chunk.chunk_gated_delta_rule(*leaves, cu)
        torch.autograd.grad(o, leaves, torch.ones_like(o))
        torch.cuda.synchronize()
    for event in seen.key_averages():
        if event.device_time_total > 10:
            name = f"kernel {event.key[:28]}"
            report["ms"][name] = {"ms": event.device_time_total / 1000, "calls": event.count}


def time_backward() -> None:
    cases = {
        "1x4096": ([4096], LAYER), "1x32768": ([32768], LAYER),
        "128x1024 small": ([1024] * 128, SMALL),
    }  # fmt: skip
    for name, (lengths, shape) in cases.items():
        *args, cu, state = draw(lengths, shape)
        d_o = torch.randn_like(args[2])
        d_final = torch.zeros_like(state)
        ms = timed(
            f"backward {name}",
            lambda a=args, c=cu, o=d_o, f=d_final: grad.gradients(*a, c, None, o, f),
        )
        if shape == SMALL:
            leaves = [x.requires_grad_() for x in args]

            def both(leaves=leaves, c=cu, d=d_o) -> None:
                o, _ = chunk.chunk_gated_delta_rule(*leaves, c)
                torch.autograd.grad(o, leaves, d)

            total = timed(f"forward+backward {name}", both)
            report["ms"][f"forward+backward {name}"]["forward_ms"] = total - ms


def time_decode(fla: Any) -> None:
    for dtype in (FP32, BF16):
        for batch in (1, 32, 128):
            calls = max(512 // batch, 1) if batch < 32 else max(256 // batch, 1)
            calls = min(calls, 64)
            slots = calls * batch
            x = decode_inputs(batch, slots, dtype)
            order = torch.randperm(slots, device="cuda").int().view(calls, batch)
            rows = [order[i].contiguous() for i in range(calls)]
            x["conv_weight"] *= 0.3
            for pdl in (False, True):

                def step(x=x, rows=rows, pdl=pdl) -> None:
                    for row in rows:
                        recurrent.fused_decode(**{**x, "slot_ids": row}, eps=1e-6, pdl=pdl)

                ms = graphed(step, calls)
                size = 2 * x["recurrent_state"][0].numel() * dtype.itemsize
                size = batch * (size + 2 * 8192 * 6 + 12352 * 2 + 4096 * 2)
                report["ms"][f"decode {batch} {str(dtype)[6:]}{' pdl' if pdl else ''}"] = {
                    "ms": ms, "share_of_copy": size / COPY / (ms * 1e-3),
                }  # fmt: skip
            del x
    if fla:
        q, k, v, g, beta, cu, state = draw([1] * 128, LAYER)
        report["ms"]["decode 128 float32"]["fla_recurrent_ms"] = triton.testing.do_bench(
            lambda: fla.fused_recurrent_gated_delta_rule(
                *(x.unsqueeze(1) for x in (q, k, v, g, beta)), scale=1.0, initial_state=state,
                output_final_state=True,
            ), warmup=15, rep=60, return_mode="median",
        )  # fmt: skip
    for batch, tokens in ((1, 3), (128, 3)):
        q, k, v, g, beta, cu, state = draw([tokens] * batch, LAYER)
        slots = torch.arange(batch, device="cuda").int()
        states = torch.empty(batch * tokens, 32, 128, 128, device="cuda")
        timed(
            f"recurrent {batch}x{tokens} with states",
            lambda a=(q, k, v, g, beta, cu, state, slots), s=states: (
                recurrent.recurrent_gated_delta_rule_slots(*a, states=s, update=False)
            ),
            (tokens + 1) * batch * 2**21,
        )


def time_small() -> None:
    tokens = 32768
    x = torch.randn(tokens, 8192, device="cuda").to(BF16)
    w = torch.randn(8192, 4, device="cuda").to(BF16)
    cu = torch.tensor([0, tokens], device="cuda").int()
    size = x.numel() * 2
    with torch.no_grad():
        timed("conv forward", lambda: conv.causal_conv(x, w, cu), 2 * size)
    x.requires_grad_()
    y, _ = conv.causal_conv(x, w, cu)
    timed("conv backward", lambda: torch.autograd.grad(y, x, y.detach(), retain_graph=True),
          3 * size)  # fmt: skip
    del y
    hidden = torch.randn(tokens, 2048, device="cuda").to(BF16)
    w = torch.randn(2048, device="cuda").to(BF16)
    size = hidden.numel() * 2
    with torch.no_grad():
        timed("rms_norm", lambda: norm.rms_norm(hidden, w, 1e-6), 2 * size)
        timed("add_rms_norm", lambda: norm.add_rms_norm(hidden, hidden, w, 1e-6), 3 * size)
        rows = x.detach().view(-1, 128)
        w = torch.randn(128, device="cuda").to(BF16)
        timed("gated_rms_norm", lambda: norm.gated_rms_norm(rows, rows, w, 1e-6), 2 * 2 * x.numel())
    leaf = hidden.requires_grad_()
    w = torch.randn(2048, device="cuda").to(BF16).requires_grad_()
    y = norm.rms_norm(leaf, w, 1e-6)
    timed("rms_norm backward",
          lambda: torch.autograd.grad(y, (leaf, w), y.detach(), retain_graph=True),
          3 * size)  # fmt: skip


def candidate(name: str, build: Callable[[], Sequence[Tensor]], want: Any, ms: Callable) -> Any:
    """Time one configuration while there is time left; its difference from ``want``, its races."""
    if time.time() - started > LIMIT_S:
        report["configs"][name] = {"skipped": "no time left"}
        return want
    try:
        got, again = build(), build()
        want = [x.double() for x in got] if want is None else want
        report["configs"][name] = {
            "ms": ms(), "difference": max(
                float((a.double() - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)
            ), "repeats": all(torch.equal(a, b) for a, b in zip(got, again, strict=True)),
        }  # fmt: skip
    except Exception as problem:
        report["configs"][name] = {"failed": f"{type(problem).__name__}: {problem}"[:120]}
    return want


def bench(work: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(work, warmup=5, rep=25, return_mode="median"))


def sweep_inputs() -> None:
    *args, cu, state = draw([32768], LAYER)
    d_o, d_final = torch.randn_like(args[2]), torch.zeros_like(state)
    kept, want = grad.INPUT_CONFIG, None

    def run() -> Sequence[Tensor]:
        return grad.gradients(*args, cu, None, d_o, d_final)[:2]

    for config in (kept, (32, 64, 2, 1), (32, 64, 4, 2), (64, 64, 2, 2), (64, 32, 4, 2)):
        grad.INPUT_CONFIG = config
        want = candidate(f"backward 1x32768 {config}", run, want, lambda: bench(run))
    grad.INPUT_CONFIG = kept


def sweep_states() -> None:
    for name, lengths in {"1x32768": [32768], "8192x4": [8192] * 4}.items():
        q, k, v, g, beta, cu, _ = draw(lengths, LAYER)
        made, want = chunk.prepare(q, k, g, beta, cu), None
        for config in ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2)):

            def run(a=(q, k, v, made, cu, None), c=config) -> Sequence[Tensor]:
                return chunk.run_states(*a, config=c)[:2]

            want = candidate(f"states {name} {config}", run, want, lambda r=run: bench(r))


def sweep_scores() -> None:
    q, k, _, g, beta, cu, _ = draw([32768], LAYER)
    kept, want = chunk.warps, None
    for count in (4, 2, 8):
        chunk.warps = lambda dtype, n=count: n

        def run() -> Sequence[Tensor]:
            made = chunk.prepare(q, k, g, beta, cu)
            return made.M[:512], made.P[:512]

        want = candidate(f"scores {count} warps", run, want, lambda r=run: bench(r))
    chunk.warps = kept


def sweep_decode() -> None:
    rows = [torch.arange(128, device="cuda").int(), torch.arange(128, 256, device="cuda").int()]
    kept = recurrent.DECODE_CONFIG
    for dtype in (BF16, FP32):
        x = decode_inputs(128, 256, dtype)
        for config in ((64, 4, 1), (128, 8, 1), (128, 4, 1), (64, 2, 1)):
            recurrent.DECODE_CONFIG = config

            def step(x=x) -> list[Tensor]:
                return [recurrent.fused_decode(**{**x, "slot_ids": r}, eps=1e-6) for r in rows]

            name = f"decode 128 {str(dtype)[6:]} {config}"
            start = {s: x[s].clone() for s in ("conv_state", "recurrent_state")}

            def fresh(x=x, start=start) -> list[Tensor]:
                for s, value in start.items():
                    x[s].copy_(value)
                return [recurrent.fused_decode(**{**x, "slot_ids": rows[0]}, eps=1e-6)]

            candidate(name, fresh, None, lambda s=step: graphed(s, 2))
            row = report["configs"][name]
            if "ms" in row:
                size = 128 * 2**20 * dtype.itemsize
                row["share_of_copy"] = size / COPY / (row["ms"] * 1e-3)
    recurrent.DECODE_CONFIG = kept


def sweep_conv() -> None:
    x = torch.randn(32768, 8192, device="cuda").to(BF16).requires_grad_()
    w = torch.randn(8192, 4, device="cuda").to(BF16)
    cu = torch.tensor([0, 32768], device="cuda").int()
    kept = conv.CONFIG, conv.BACKWARD_CONFIG
    for config in ((512, 2), (1024, 4), (256, 2), (512, 4)):
        conv.CONFIG = conv.BACKWARD_CONFIG = config

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [conv.causal_conv(x, w, cu)[0]]

        y, _ = conv.causal_conv(x, w, cu)

        def backward(y=y) -> Sequence[Tensor]:
            return torch.autograd.grad(y, [x], y.detach(), retain_graph=True)

        candidate(f"conv forward {config}", forward, None, lambda f=forward: bench(f))
        candidate(f"conv backward {config}", backward, None, lambda f=backward: bench(f))
    conv.CONFIG, conv.BACKWARD_CONFIG = kept


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="no sweep of configurations")
    parser.add_argument("--no-fla", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    report["machine"] = f"{properties.name}, torch {torch.__version__}, triton {triton.__version__}"

    # torch.empty is filled with NaN while results are checked
    torch.use_deterministic_algorithms(True, warn_only=True)
    lengths = [1, 63, 64, 130, 40]
    attempt("chunk layer", lambda: correct_chunk("layer", lengths, LAYER, BF16, 2e-2))
    attempt("chunk small", lambda: correct_chunk("small", [200, 65], SMALL, BF16, 2e-2))
    attempt("chunk fp16", lambda: correct_chunk("fp16", [100], SMALL, torch.float16, 4e-3))
    attempt("decode fp32", lambda: correct_decode(FP32, 1e-5))
    attempt("decode bf16", lambda: correct_decode(BF16, 4e-3))
    attempt("recurrent", correct_recurrent)
    attempt("conv and norms", correct_small)
    torch.use_deterministic_algorithms(False)
    report["checked_s"] = time.time() - started

    fla = None
    if not options.no_fla:
        try:
            import fla.ops.gated_delta_rule as fla
        except Exception as problem:
            report["fla"] = str(problem)[:120]
    attempt("time forward", lambda: time_chunk(fla))
    attempt("time backward", time_backward)
    attempt("time decode", lambda: time_decode(fla))
    attempt("time small", time_small)
    attempt("kernels", time_kernels)
    if not options.quick:
        sweeps = (sweep_states, sweep_inputs, sweep_scores, sweep_decode, sweep_conv)
        for part in sweeps:
            attempt(part.__name__, part)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gdn.json").write_text(json.dumps(report, indent=1))
    if time.time() - started < FP32_BEFORE_S:  # slow to compile
        torch.use_deterministic_algorithms(True, warn_only=True)
        attempt("chunk fp32", lambda: correct_chunk("fp32", [100], SMALL, FP32, 5e-5))
    report["seconds"] = time.time() - started
    (options.out / "gdn.json").write_text(json.dumps(report, indent=1))

    print(report["machine"], f"{report['seconds']:.0f} s")
    worst: dict[str, tuple[float, str]] = {}
    for name, error in report["errors"].items():
        group = name.split()[0]
        worst[group] = max(worst.get(group, (-1.0, "")), (error, name))
    print("worst error:", "; ".join(f"{name} {error:.1e}" for error, name in worst.values()))
    for name, row in {**report["ms"], **report["configs"]}.items():
        numbers = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        published = FLA_MS.get(name.removeprefix("forward ")) if "forward" in name else None
        print(f"{name:34s}", *numbers, f"(fla measured {published})" if published else "")
    print("FAILED:" if report["failed"] else "all correct", json.dumps(report["failed"]))


if __name__ == "__main__":
    main()
