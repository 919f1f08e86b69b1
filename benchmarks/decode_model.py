"""The decode step of the 80B, FP8, random weights: layers, buffers, and what one step launches.

``Model`` holds weights and caches; ``Work`` the buffers for one number of rows. Two ways through a
half layer: ``stream`` (activations in e4m3, weights through the copy engine to the tensor cores;
any number of rows) and, for one row, ``single`` (BF16 activations, weights widened in registers).
"""

# ruff: noqa: RUF012
from __future__ import annotations

import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qnext.kernels.attention import triton_decode as attention
from qnext.kernels.experts import gluon_stream as stream_experts
from qnext.kernels.experts import triton_route as routing
from qnext.kernels.experts import triton_single as single
from qnext.kernels.gated_delta import triton_decode as delta
from qnext.kernels.gated_delta import triton_verify as verify
from qnext.kernels.linear import gluon_stream as stream
from qnext.kernels.linear import triton as linear
from qnext.kernels.norm import triton_quantise as seam

H, F, E, TOP, V = 2048, 512, 512, 10, 151936
HEADS, KV_HEADS, HEAD_DIM, ROTARY = 16, 2, 256, 64
HK, HV, DK = 16, 32, 128
CHANNELS = 2 * HK * DK + HV * DK
QKVZ = CHANNELS + HV * DK
QKV = HEADS * 2 * HEAD_DIM + 2 * KV_HEADS * HEAD_DIM
MIXED = HV * DK
FP8 = torch.float8_e4m3fn
DTYPE = torch.bfloat16
BLOCK = 64
RING = 8


@triton.jit
def _best(logits, pmax, pidx, V, B: tl.constexpr, STEPS: tl.constexpr, PDL: tl.constexpr):
    """Largest of STEPS * B logits of one row and its lowest index."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, B)
    best = tl.full([B], float("-inf"), tl.float32)
    index = tl.full([B], 2147483647, tl.int32)
    for i in tl.static_range(STEPS):
        at = (part * STEPS + i) * B + lane
        value = tl.load(logits + t * V + at, mask=at < V, other=float("-inf")).to(tl.float32)
        index = tl.where(value > best, at, index)
        best = tl.maximum(best, value)
    top = tl.max(best, axis=0)
    tl.store(pmax + t * tl.num_programs(1) + part, top)
    index = tl.where(best == top, index, 2147483647)
    tl.store(pidx + t * tl.num_programs(1) + part, tl.min(index, axis=0))


@triton.jit
def _finish(
    pmax, pidx, embed, h, tokens, context, counter, rotary, inv_freq, P, base,
    V: tl.constexpr, H: tl.constexpr, ROT: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
    ADVANCE: tl.constexpr, B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Arg-max over the programs of the head; the next token's row, position and rotation.

    A counter is added to the token so that replays never fall into a cycle; the position runs
    over 64 values. Row t of R a sequence; a sequence advances by STEP positions.
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
    token = tl.min(index, axis=0)
    if ADVANCE:
        step = tl.load(counter + t)
        token = (token + step * 7919) % V
        tl.store(counter + t, step + 1)
        # every row of a sequence works from its own copy of the position: no order among them
        position = base + (tl.load(context + t) - base + STEP) % 64
        tl.store(context + t, position)
        f = tl.arange(0, ROT // 2)
        angle = (position + t % R).to(tl.float32) * tl.load(inv_freq + f)
        tl.store(rotary + t * ROT + f, tl.cos(angle))
        tl.store(rotary + t * ROT + ROT // 2 + f, tl.sin(angle))
    tl.store(tokens + t, token)
    x = tl.arange(0, H)
    tl.store(h + t * H + x, tl.load(embed + token.to(tl.int64) * H + x))


class Switch:
    """A kernel that launches only where its family is switched on; ``ON`` None: always."""

    ON: set[str] | None = None
    FAMILY = ""
    NAMES = {"_router": "router", "_gate_up": "gate_up", "_down": "down", "_route": "route",
             "_add_norm_quantise": "norm", "_best": "best"}  # fmt: skip

    def __init__(self, kernel, name: str) -> None:
        self.kernel, self.name = kernel, self.NAMES.get(name)

    def __getitem__(self, grid):
        on, name = Switch.ON, self.name or Switch.FAMILY
        return self.kernel[grid] if on is None or name in on else lambda *a, **k: None

    @classmethod
    def install(cls) -> None:
        kernels = {"_gemv", "_skinny", "_norm_rows", "_router", "_gate_up", "_down", "_decode_head",
                   "_verify_head", "_split", "_merge", "_finish", "_linear_stream", "_route",
                   "_add_norm_quantise", "_best"}  # fmt: skip
        rooms = (linear, single, attention, delta, verify, stream, stream_experts, routing, seam)
        for module in (*rooms, sys.modules[__name__]):
            for name, value in list(vars(module).items()):
                if isinstance(value, triton.runtime.JITFunction) and name in kernels:
                    setattr(module, name, cls(value, name))


FAMILIES = ["norm", "gdn_in", "gdn_delta", "gdn_out", "att_in", "att", "att_out", "router",
            "route", "gate_up", "down", "head", "best", "finish", "fc"]  # fmt: skip


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


class Work:
    """Buffers of a step over ``t`` rows, ``rows`` of each sequence."""

    def __init__(self, t: int, rows: int, context: int, config: dict, dev: str) -> None:
        def new(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=dev)

        f32 = torch.float32
        self.t, self.rows = t, rows
        self.h, self.normed = new(t, H), new(t, H)
        self.xq, self.xs = new(t, H, dtype=FP8), new(t, H // 128, dtype=f32)
        self.qkv = new(t, QKV)
        split = config.get("in", (0, 0))[2:]  # parts of K, for few rows
        self.qkvz = new(*split, t, QKVZ, dtype=f32) if split else new(t, QKVZ)
        self.qkvzba = new(t, QKVZ + 2 * HV)
        self.ba = new(config.get("ba", 4), t, 2 * HV, dtype=f32)
        self.mixed = new(t, MIXED)
        self.mq, self.ms = new(t, MIXED, dtype=FP8), new(t, MIXED // 128, dtype=f32)
        self.parts = new(config.get("out", (8, 64, 4))[0], t, H, dtype=f32)
        self.logits = new(config.get("router", (4, 8))[0], t, E + 1, dtype=f32)
        tile = config.get("tile", stream_experts.tile_for(t))
        self.route = routing.buffers(t, TOP, E, tile, dev)
        self.act, self.y = new(t * (TOP + 1), F), new(t * (TOP + 1), H, dtype=f32)
        n = t // rows
        split = config.get("att", (attention.splits_for(n, KV_HEADS, context), 32, 2))[0]
        self.attention = attention.workspace(n, rows, HEADS, KV_HEADS, HEAD_DIM, split, dev)
        self.splits = split
        self.rotary = new(t, ROTARY, dtype=f32)
        # one row
        self.act1, self.logits1 = new(TOP + 1, F), new(E + 1, dtype=f32)


class Model:
    """Weights, caches and the step."""

    def __init__(self, layers: int, device: str, mtp: bool = False) -> None:
        fill = Filler(device)
        self.device, self.pdl, self.heavy, self.config = device, True, True, {}
        self.fp8_head = None

        def normal(*shape: int, std: float = 0.02) -> Tensor:
            return (torch.randn(shape, device=device) * std).to(DTYPE)

        def matrix(*shape: int) -> tuple[Tensor, Tensor]:
            return fill(*shape), fill.scales(*shape)

        def layer(full: bool) -> dict:
            out = {"full": full, "norm1": normal(H), "norm2": normal(H), "out": matrix(H, MIXED)}
            if full:
                out |= {"in": matrix(QKV, H), "q_norm": normal(HEAD_DIM),
                        "k_norm": normal(HEAD_DIM)}  # fmt: skip
            else:
                out |= {
                    "in": matrix(QKVZ, H), "ba": normal(2 * HV, H),
                    "conv": normal(CHANNELS, 4, std=0.5), "norm": 1 + normal(DK),
                    "a_log": torch.rand(HV, device=device).mul_(8).add_(0.01).log_(),
                    "dt_bias": torch.ones(HV, device=device),
                }  # fmt: skip
            return out | {
                "router": normal(E + 1, H),
                "experts": (*matrix(E, 2 * F, H), *matrix(E, H, F)),
                "shared": (*matrix(2 * F, H), *matrix(H, F)),
            }

        self.layers = [layer(i % 4 == 3) for i in range(layers)]
        self.mtp = None
        if mtp:
            extra = {"fc": (matrix(H, H), matrix(H, H)), "norms": (normal(H), normal(H))}
            self.mtp = layer(True) | extra
        self.embed, self.head = normal(V, H), torch.empty(V, H, dtype=DTYPE, device=device)
        for part in self.head.split(1 << 14):
            part.copy_(torch.randn(part.shape, device=device) * 0.02)
        self.final_norm = normal(H)

    def quantise_head(self) -> dict[str, float]:
        """Head to e4m3 with 128 x 128 scales; what that does to logits of random rows."""
        q, scale = torch.empty_like(self.head, dtype=FP8), []
        for part, to in zip(self.head.split(1 << 14), q.split(1 << 14), strict=True):
            blocks = part.float().view(-1, 128, H // 128, 128)
            s = blocks.abs().amax((1, 3), keepdim=True) / 448
            to.copy_((blocks / s).view(part.shape))
            scale.append(s[:, 0, :, 0])
        self.fp8_head = (q, torch.cat(scale).contiguous())
        x = torch.randn(256, H, device=self.device).to(DTYPE).float()
        wide = q.float().view(-1, 128, H // 128, 128) * self.fp8_head[1][:, None, :, None]
        a, b = x @ self.head.float().T, x @ wide.view(V, H).T
        return {"head error": float((a - b).norm() / a.norm()),
                "argmax agrees": float((a.argmax(1) == b.argmax(1)).float().mean())}  # fmt: skip

    def prepare(self, batch: int, context: int, rows: int = 1, state=torch.float32) -> None:
        """Caches of ``batch`` sequences with ``context`` tokens behind them, and buffers."""
        dev, i32 = self.device, torch.int32
        self.batch, self.context, self.rows, self.state_dtype = batch, context, rows, state
        self.t = t = batch * rows
        self.width = -(-(context + 128) // BLOCK)
        blocks = batch * self.width
        self.tables = torch.randperm(blocks, device=dev).to(i32).view(batch, self.width)
        full = [x for x in self.layers if x["full"]] + ([self.mtp] if self.mtp else [])
        for layer in self.layers:  # those of the run before go first
            for name in ("k", "v", "state", "ring", "kept"):
                layer.pop(name, None)
        for layer in full:
            shape = (blocks, BLOCK, KV_HEADS, HEAD_DIM)
            layer["k"] = torch.randn(shape, device=dev, dtype=DTYPE)
            layer["v"] = torch.randn(shape, device=dev, dtype=DTYPE)
        for layer in self.layers:
            if not layer["full"]:
                layer["state"] = torch.zeros(batch, HV, DK, DK, device=dev, dtype=state)
                ring = RING if rows > 1 else 4
                layer["ring"] = torch.zeros(batch, CHANNELS, ring, device=dev, dtype=DTYPE)
                if rows > 1:
                    layer["kept"] = verify.verify_buffers(batch, HV, DK, rows, dev)
        self.all_logits = torch.empty(t, V, dtype=DTYPE, device=dev)
        best = t * (V if t <= 4 else 9600)
        self.best = (torch.empty(best, device=dev), torch.empty(best, dtype=i32, device=dev))
        self.tokens = torch.zeros(t, dtype=i32, device=dev)
        self.counter = torch.zeros(t, dtype=i32, device=dev)
        self.lens_t = torch.zeros(t, dtype=i32, device=dev)
        self.lens = self.lens_t.view(batch, rows)[:, 0].contiguous() if rows > 1 else self.lens_t
        self.slots = torch.arange(batch, dtype=i32, device=dev)
        self.last = torch.arange(batch, device=dev) * rows + min(rows, 2) - 1
        self.drafted = torch.zeros(batch, dtype=i32, device=dev)
        self.accepted = torch.full((batch,), min(rows, 2), dtype=i32, device=dev)
        self.inv_freq = 1e7 ** (-torch.arange(ROTARY // 2, device=dev) / (ROTARY / 2))
        self.resize()
        self.reset()

    def resize(self) -> None:
        """Buffers to the configuration."""
        self.work = Work(self.t, self.rows, self.context, self.config, self.device)
        if self.rows > 1:
            self.second = Work(self.t, self.rows, self.context, self.config, self.device)
            self.draft = Work(self.batch, 1, self.context, self.config, self.device)
            self.draft.picked = torch.empty_like(self.draft.h)
            self.second.rotary = self.work.rotary
            self.draft.rotary.copy_(self.rotary()[:: self.rows])
        self.work.rotary.copy_(self.rotary())

    def rotary(self) -> Tensor:
        at = (self.lens_t + torch.arange(self.t, device=self.device) % self.rows).float()
        angle = at[:, None] * self.inv_freq
        return torch.cat([angle.cos(), angle.sin()], 1)

    def reset(self) -> None:
        """The same start for every comparison."""
        for layer in self.layers:
            if not layer["full"]:
                layer["state"].zero_()
                layer["ring"].zero_()
                for kept in layer.get("kept", ()):
                    kept.zero_()
        self.counter.copy_(torch.arange(self.t, device=self.device) * 13)
        lane = torch.arange(self.t, device=self.device)
        self.tokens.copy_((lane * 1013 + 5) % V)
        self.lens_t.fill_(self.context)
        self.lens.fill_(self.context)
        self.work.h.copy_(self.embed[self.tokens.long()])
        self.work.rotary.copy_(self.rotary())

    # -- one row, BF16 activations ---------------------------------------------------------
    def single_layer(self, layer: dict, w: Work) -> None:
        c, pdl = self.config, self.pdl
        if layer["full"]:
            Switch.FAMILY = "att_in"
            linear.linear(w.h, *layer["in"], norm_weight=layer["norm1"], out=w.qkv, pdl=pdl,
                          normed=w.normed, config=c.get("in1"))  # fmt: skip
            self.attend(layer, w, w.mixed, None)
            Switch.FAMILY = "att_out"
        else:
            Switch.FAMILY = "gdn_in"
            linear.linear(w.h, *layer["in"], norm_weight=layer["norm1"], tail=layer["ba"],
                          normed=w.normed, out=w.qkvzba, pdl=pdl, config=c.get("in1"))  # fmt: skip
            qkvz, b, a = w.qkvzba.split([QKVZ, HV, HV], -1)
            self.mix(layer, w, qkvz, b, a, w.mixed, None)
            Switch.FAMILY = "gdn_out"
        linear.linear(w.mixed, *layer["out"], residual=w.h, out=w.h, pdl=pdl,
                      config=c.get("out1"))  # fmt: skip
        Switch.FAMILY = "router"
        single.moe(w.h, layer["norm2"], layer["router"], layer["experts"], layer["shared"],
                   top_k=TOP, out=w.h, logits=w.logits1, act=w.act1, normed=w.normed, pdl=pdl,
                   config=c.get("moe1"))  # fmt: skip

    # -- any number of rows, e4m3 activations ----------------------------------------------
    def seam(self, w: Work, norm: Tensor, kind: str, zero: Tensor | None = None) -> None:
        """Add what the half layer before left, normalise, quantise."""
        parts = extra = None
        if kind == "experts":
            parts, extra = w.y[: w.t * TOP].view(w.t, TOP, H), w.y[w.t * TOP :]
        elif kind == "mixer":
            parts = w.parts.transpose(0, 1)
        seam.add_norm_quantise(w.h, norm, w.normed, w.xq, w.xs, parts=parts, extra=extra,
                               zero=zero, pdl=self.pdl)  # fmt: skip

    def stream_layer(self, layer: dict, w: Work, before: str) -> None:
        c, pdl = self.config, self.pdl
        self.seam(w, layer["norm1"], before)
        rows, stages, *split = c.get("in", (128 if w.t > 32 else 64, 6))
        options = {"rows": rows, "stages": stages, "pdl": pdl}
        if layer["full"]:
            Switch.FAMILY = "att_in"
            stream.stream_linear(w.xq, w.xs, *layer["in"], w.qkv, **options)
            self.attend(layer, w, w.mq, w.ms)
            Switch.FAMILY = "att_out"
        else:
            Switch.FAMILY = "gdn_in"
            stream.stream_linear(w.xq, w.xs, *layer["in"], w.qkvz,
                                 tail=(layer["ba"], w.normed, w.ba),
                                 split=split[0] if split else 1, **options)  # fmt: skip
            self.mix(layer, w, w.qkvz, w.ba[..., :HV], w.ba[..., HV:], w.mq, w.ms)
            Switch.FAMILY = "gdn_out"
        split, rows, stages = c.get("out", (8, 64, 4))
        stream.stream_linear(w.mq, w.ms, *layer["out"], w.parts, split=split, rows=rows,
                             stages=stages, pdl=pdl)  # fmt: skip
        self.seam(w, layer["norm2"], "mixer", w.route["counts"])
        Switch.FAMILY = "router"
        split, stages = c.get("router", (4, 8))
        stream.stream_linear(w.normed, None, layer["router"], None, w.logits, split=split,
                             stages=stages, pdl=pdl)  # fmt: skip
        routing.route_tasks(w.logits, w.route, top_k=TOP, pdl=pdl)
        stream_experts.experts(w.xq, w.xs, layer["experts"], layer["shared"], w.route, w.act, w.y,
                               top_k=TOP, pdl=pdl and self.heavy, config=c.get("moe"))  # fmt: skip

    def attend(self, layer: dict, w: Work, out: Tensor, scale: Tensor | None) -> None:
        Switch.FAMILY = "att"
        _, block, stages = self.config.get("att", (0, 32, 2))
        attention.decode_attention(
            w.qkv, layer["q_norm"], layer["k_norm"], w.rotary, layer["k"], layer["v"],
            self.tables, self.lens, heads=HEADS, splits=w.splits, out=out, out_scale=scale,
            buffers=w.attention, block=block, stages=stages, pdl=self.pdl,
        )  # fmt: skip

    def mix(self, layer: dict, w: Work, qkvz: Tensor, b, a, out, scale) -> None:
        Switch.FAMILY = "gdn_delta"
        qkv, z = qkvz.split([CHANNELS, HV * DK], -1)
        args = (qkv, z, b, a, layer["ring"], layer["conv"], layer["a_log"], layer["dt_bias"],
                layer["norm"], layer["state"], self.slots, self.lens)  # fmt: skip
        options = {"out": out, "scale": scale, "pdl": self.pdl and self.heavy}
        options |= self.config.get("delta", {})
        if w.rows == 1:
            delta.fused_decode_ring(*args, 1e-6, **options)
        else:
            verify.fused_verify_ring(*args, self.accepted, layer["kept"], 1e-6, **options)

    # -- the step --------------------------------------------------------------------------
    def step(self) -> None:
        """One token (or ``rows`` rows and the drafts of the next step) for every sequence."""
        w = self.work
        streamed = self.t > 1 or self.config.get("way") == "stream"
        for i, layer in enumerate(self.layers):
            if streamed:
                self.stream_layer(layer, w, "experts" if i else "none")
            else:
                self.single_layer(layer, w)
        if streamed and self.layers:
            self.seam(w, self.final_norm, "experts")
        programs = self.logits(w.h, w.normed if streamed and self.layers else None, w)
        Switch.FAMILY = "finish"
        self.finish(w, self.tokens, programs, advance=True)
        if self.rows > 1:
            if self.mtp:
                self.drafts()
            if Switch.ON is None:
                self.lens.copy_(self.lens_t.view(self.batch, self.rows)[:, 0])

    def logits(self, h: Tensor, normed: Tensor | None, w: Work) -> int:
        """Head and partial arg-max of ``h``; normed already, or not. Programs per row."""
        t = len(h)
        Switch.FAMILY = "head"
        out = self.all_logits[:t]
        if t <= 64:
            head = self.fp8_head or (self.head, None)
            fp8 = self.fp8_head is not None
            c = self.config.get("head")
            if c is None:
                c = (linear.gemv_config(V, H, fp8) if t == 1
                     else linear.skinny_config(V, H, fp8, t))  # fmt: skip
            options = {"out": out, "best": self.best, "pdl": self.pdl, "config": c}
            if normed is None:
                linear.linear(h, *head, norm_weight=self.final_norm, normed=w.normed[:t], **options)
            else:
                linear.linear(normed, *head, **options)
            return triton.cdiv(V, c[0])
        rows, stages = self.config.get("head_many", (128, 4))
        stream.stream_linear(normed, None, self.head, None, out, rows=rows, stages=stages,
                             pdl=self.pdl)  # fmt: skip
        parts = triton.cdiv(V, 8 * 2048)
        _best[(t, parts)](out, *self.best, V, B=2048, STEPS=8, PDL=self.pdl, num_warps=8,
                          launch_pdl=self.pdl)  # fmt: skip
        return parts

    def drafts(self) -> None:
        """Two drafts: the MTP layer over all rows (its cache), then over one row a sequence."""
        w, d = self.second, self.draft
        self.draft_pass(w, self.work.h, self.work.normed)
        torch.index_select(w.normed, 0, self.last, out=d.picked)
        for again in (True, False):
            programs = self.logits(d.picked, d.picked, d)
            Switch.FAMILY = "finish"
            self.finish(d, self.drafted, programs, advance=False)
            if again:
                self.draft_pass(d, d.h, d.picked)
                d.picked.copy_(d.normed)

    def draft_pass(self, w: Work, embedded: Tensor, hidden: Tensor) -> None:
        layer, half = self.mtp, w.parts.shape[0] // 2
        pairs = zip(
            (embedded, hidden), layer["norms"], layer["fc"], w.parts.split(half), strict=True
        )
        for x, norm, fc, parts in pairs:
            seam.add_norm_quantise(x, norm, w.normed, w.xq, w.xs, pdl=self.pdl)
            Switch.FAMILY = "fc"
            stream.stream_linear(w.xq, w.xs, *fc, parts, split=half, stages=4, pdl=self.pdl)
        w.h.zero_()
        self.stream_layer(layer, w, "mixer")
        self.seam(w, self.final_norm, "experts")

    def finish(self, w: Work, tokens: Tensor, programs: int, advance: bool) -> None:
        _finish[(len(tokens),)](
            *self.best, self.embed, w.h, tokens, self.lens_t, self.counter, w.rotary,
            self.inv_freq, programs, self.context, V=V, H=H, ROT=ROTARY, R=w.rows,
            STEP=min(w.rows, 2), ADVANCE=advance, B=1024, PDL=self.pdl, num_warps=8,
            launch_pdl=self.pdl,
        )  # fmt: skip
