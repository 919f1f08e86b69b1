"""Decode of the 80B shapes, FP8, random weights, one GPU: the whole step in one CUDA graph.

    python benchmarks/gpu_decode.py --out FOLDER [--layers 48] [--runs 1,8,1@32768,32,64]

A run is ``batch[@context][xrows]``: with rows (MTP verify) the step takes so many rows of every
sequence and drafts twice. For each run: launch configurations of each kernel family over all
layers, the best of them kept; every kernel against torch in fp32; bitwise comparison of the step
with and without programmatic dependent launch; time of the step and of each family. Needs torch
and triton. What was predicted and what came out: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import triton
import triton.language as tl
from decode_check import check, repeatable
from decode_model import (
    DK,
    FAMILIES,
    HEAD_DIM,
    HV,
    KV_HEADS,
    MIXED,
    QKV,
    QKVZ,
    E,
    F,
    H,
    Model,
    Switch,
    V,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FLOOR_MS = {1: 0.96, 8: 3.54, 32: 10.4, 64: 16.3, 128: 22.8, 256: 29.8}
VLLM_MS = {1: 4.71, 8: 7.53, 32: 14.53, 64: 19.93, 128: 29.78, 256: 36.19}
VLLM_MTP_MS = {1: 6.90, 8: 13.96, 32: 28.55, 64: 35.01, 128: 43.13, 256: 57.57}
BANDWIDTH = 4.26e12


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


@triton.jit
def _tiny(x, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * 128 + tl.arange(0, 128)
    tl.store(x + i, tl.load(x + i) + 1.0)


def micro(device: str) -> dict[str, float]:
    """us per dependent tiny kernel (132 programs) in a graph, without and with PDL."""
    x, out = torch.zeros(132 * 128, device=device), {}
    for pdl in (False, True):

        def chain(pdl: bool = pdl) -> None:
            for _ in range(500):
                _tiny[(132,)](x, PDL=pdl, launch_pdl=pdl)

        out["pdl us" if pdl else "plain us"] = replay_ms(capture(chain)) / 500 * 1e3
    return out


def candidates(m: Model) -> list[tuple[str, str, list]]:
    """(key of the configuration, family that it moves, candidates); dictionaries add up.

    The others were tried in the first run and are left out: stages of 12, 8 warps in DeltaNet,
    1 or 4 programs per multiprocessor for the experts.
    """
    t, parts = m.t, m.work.splits
    if t == 1 and m.config.get("way") != "stream":
        return [
            ("moe1", "router", [{}, {"BR": 8}, {"BS": 4}, {"BR": 8, "BS": 4}]),
            ("moe1", "down", [{}, {"KE": 8}, {"BD": 8, "dwarps": 4}]),
            ("att", "att", [(parts, 32, 2), (min(256, 2 * parts), 32, 2), (parts, 64, 2)]),
        ]
    few = t <= 16
    plan = [
        (
            "in",
            "gdn_in",
            [(64, 8)] + [(64, 8, 2)] * (m.rows == 1)
            if few
            else [(64, 6), (64, 4), (64, 3), (128, 3)],
        ),
        ("out", "gdn_out", [(8, 64, 4)] if few else [(8, 64, 4), (8, 128, 4), (4, 128, 6)]),
        ("router", "router", [(8, 4)] if t <= 32 else [(4, 8)]),
        ("att", "att", [(parts, 64, 2), (parts, 64, 3)] + [(2 * parts, 64, 2)] * few),
        ("tile", "gate_up", [8, 16] if t > 128 else []),
        ("moe", "gate_up", [{"S": 3, "P": 396}, {"S": 4, "P": 264}]),
        ("moe", "down", [{"SD": 4, "PD": 396, "CHUNK": 2}, {"SD": 4, "PD": 396, "CHUNK": 4}]),
    ]
    if m.rows > 1:
        tiles = [{"tile": 64}, {"tile": 32}, {"tile": 64, "warps": 2}]
        plan.append(("delta", "gdn_delta", tiles))
    return plan


def alone(m: Model, family: str, replays: int = 10) -> float:
    """ms of one family over all layers, on the routing that a whole step left."""
    Switch.ON = None
    m.reset()
    m.step()
    Switch.ON = {family}
    spent = replay_ms(capture(m.step), replays, 3)
    Switch.ON = None
    return spent


def sweep(m: Model, quick: bool) -> dict[str, dict[str, float]]:
    """Time in ms of a family over all layers by launch configuration; ``m`` keeps the best."""
    out: dict[str, dict[str, float]] = {}
    plan, best = candidates(m), dict(m.config)
    for key, family, configs in plan:
        if not configs:
            continue
        table = out[f"{key} {family}"] = {}
        choices = [best.get(key, {}) | c if isinstance(c, dict) else c for c in configs]
        for config in choices:
            m.config = best | {key: config}
            try:
                m.resize()
                table[str(config)] = alone(m, family, 1 if quick else 8)
            except Exception as error:  # a configuration that does not fit is a result too
                if "CUDA error" in str(error):
                    raise
                torch.cuda.synchronize()
                table[str(config)] = float("inf")
                print(f"  {key} {config}: {type(error).__name__}: {str(error)[:120]}")
        best[key] = min(choices, key=lambda c, t=table: t[str(c)])
    m.config = best
    m.resize()
    return out


def families(m: Model) -> dict[str, float]:
    """Time in ms of each family alone over all layers."""
    out = {name: alone(m, name) for name in FAMILIES}
    return {k: v for k, v in out.items() if v > 0.003}


def family_bytes(m: Model, name: str, experts: float) -> float:
    """Bytes a family must read and write in one step (without drafts)."""
    gdn = sum(not x["full"] for x in m.layers)
    full, one, t = len(m.layers) - gdn, 3 * H * F, m.batch
    state = 2 * torch.finfo(m.state_dtype).bits // 8
    single = m.t == 1 and m.config.get("way") != "stream"
    table = {
        "gdn_in": gdn * (QKVZ * H + 2 * HV * H * 2), "gdn_delta": gdn * t * HV * DK * DK * state,
        "gdn_out": gdn * MIXED * H, "att_in": full * QKV * H, "att_out": full * MIXED * H,
        "att": full * t * m.context * KV_HEADS * HEAD_DIM * 4,
        "head": V * H * (1 if m.fp8_head else 2),
        "router": len(m.layers) * ((E + 1) * H * 2 + (one * 2 // 3 if single else 0)),
        "gate_up": len(m.layers) * (experts + (not single)) * one * 2 / 3,
        "down": len(m.layers) * (experts + 1) * one / 3,
    }  # fmt: skip
    return table.get(name, 0.0)


def report(m: Model, name: str, result: dict) -> None:
    """One run's table."""
    b, ms, experts = m.batch, result["ms"], result["experts"]
    moved = sum(family_bytes(m, f, experts) for f in FAMILIES)
    print(f"== {name} ({m.config.get('way', 'stream' if m.t > 1 else 'single')}), "
          f"{len(m.layers)} layers: {ms:.3f} ms per step, {b / ms * 1e3:,.0f} steps*seq/s; "
          f"with PDL {result['ms_pdl']:.3f}, on small kernels {result['ms_mixed']:.3f}, "
          f"without {result['ms_plain']:.3f} ms")  # fmt: skip
    print(f"   {moved / 1e9:.2f} GB = {moved / ms * 1e3 / 1e12:.2f} TB/s = "
          f"{moved / BANDWIDTH / ms * 1e5:.0f} % of 4.26; distinct experts {experts:.1f}; "
          f"same bits {result['same']}")  # fmt: skip
    if len(m.layers) == 48 and b in FLOOR_MS and m.context == 1024:
        vllm = VLLM_MS[b] if m.rows == 1 else VLLM_MTP_MS[b]
        print(f"   floor {FLOOR_MS[b]} ms ({FLOOR_MS[b] / ms * 100:.0f} %), vLLM {vllm} ms "
              f"({vllm / ms:.2f}x)")  # fmt: skip
    total = 0.0
    for family, spent in result["families"].items():
        size = family_bytes(m, family, experts)
        total += spent
        print(f"   {family:10s} {spent:7.3f} ms  {size / 1e9:6.2f} GB  "
              f"{size / spent * 1e3 / 1e12:5.2f} TB/s")  # fmt: skip
    print(f"   sum        {total:7.3f} ms; kept {m.config}")
    for key, table in result.get("sweep", {}).items():
        print(f"   sweep {key}: " + "; ".join(f"{c} {v:.3f}" for c, v in table.items()))


def rounded(errors: dict[str, float]) -> dict[str, float]:
    return {k: float(f"{v:.2g}") for k, v in errors.items()}


def measure(m: Model, name: str, args: argparse.Namespace) -> dict:
    batch, context, rows = re.fullmatch(r"(\d+)(?:@(\d+))?(?:x(\d+))?", name).groups()
    m.config = {"way": args.way} if args.way and batch == "1" and not rows else {}
    if args.config:
        m.config |= json.loads(args.config.read_text()).get(name, {})
    state = torch.bfloat16 if args.bf16_state else torch.float32
    m.prepare(int(batch), int(context or 1024), int(rows or 1), state)
    result: dict = {"errors": check(m)}
    print(f"{name}: {rounded(result['errors'])}", flush=True)
    if not args.no_sweep:
        result["sweep"] = sweep(m, args.quick)
    result["config"] = m.config
    m.reset()
    if not args.quick:
        result["errors"] = check(m)
        print(f"{name}: {rounded(result['errors'])}", flush=True)
        m.reset()
    result["same"], result["experts"] = repeatable(m, capture)
    for name_, m.pdl, m.heavy in (("plain", False, False), ("mixed", True, False),
                                  ("pdl", True, True)):  # fmt: skip
        result[f"ms_{name_}"] = replay_ms(capture(m.step))
    result["ms"] = min(result["ms_pdl"], result["ms_plain"], result["ms_mixed"])
    result["families"] = {} if args.quick else families(m)
    report(m, name, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--runs", default="1,8,1@32768,32,64", help="batch[@context][xrows], ...")
    parser.add_argument("--seconds", type=float, default=110.0, help="no new run after this")
    parser.add_argument("--way", default="", help="stream: batch 1 with e4m3 activations too")
    parser.add_argument("--config", type=Path, help="launch configurations by run")
    parser.add_argument("--no-sweep", action="store_true")
    parser.add_argument("--quick", action="store_true", help="compile and check only")
    parser.add_argument("--bf16-state", action="store_true")
    parser.add_argument("--fp8-head", action="store_true")
    parser.add_argument("--name", default="decode")
    args = parser.parse_args()
    torch.manual_seed(0)
    begin = time.time()
    Switch.install()
    results: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
                     "triton": triton.__version__, "layers": args.layers}  # fmt: skip
    if not args.quick:
        results["micro"] = micro("cuda")
        print("micro:", results["micro"], flush=True)
    m = Model(args.layers, "cuda", mtp="x" in args.runs)
    if args.fp8_head:
        results["head"] = m.quantise_head()
        print("e4m3 head:", results["head"])
    torch.cuda.synchronize()
    print(f"weights {torch.cuda.memory_allocated() / 1e9:.1f} GB at {time.time() - begin:.0f} s")
    for run in args.runs.split(","):
        if time.time() - begin > args.seconds:
            print(f"== {run} left out: {time.time() - begin:.0f} s have passed")
            continue
        results[run] = measure(m, run, args)
        print(f"   ({time.time() - begin:.0f} s)", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / f"{args.name}.json"
            path.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    sys.exit(main())
