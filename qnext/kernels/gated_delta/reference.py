"""The gated delta rule in torch: token by token, and in chunks of 64.

Both work in fp32, or in fp64 when asked with fp64 inputs (the tests compare them there).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Spec section 4.4, one token after the other; see ``qnext.kernels.gated_delta``."""
    bounds = cu_seqlens.tolist()
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    ratio = v.shape[1] // q.shape[1]
    qf, kf = (x.to(dtype).repeat_interleave(ratio, 1) for x in (q, k))
    vf, decay, b = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    shape = (len(bounds) - 1, v.shape[1], q.shape[2], v.shape[2])
    state = _start(initial_state, shape, dtype, q)
    outputs, states, finals = [], [], []
    for n in range(len(bounds) - 1):
        s = state[n]  # (Hv, dk, dv)
        for t in range(bounds[n], bounds[n + 1]):
            s = s * decay[t, :, None, None]
            predicted = torch.bmm(kf[t].unsqueeze(1), s)  # (Hv, 1, dv)
            delta = (vf[t].unsqueeze(1) - predicted) * b[t, :, None, None]
            s = torch.baddbmm(s, kf[t].unsqueeze(2), delta)
            outputs.append(torch.bmm(qf[t].unsqueeze(1), s))
            if return_states:
                states.append(s)
        finals.append(s)
    out = torch.cat(outputs, 1).transpose(0, 1).to(v.dtype) if outputs else v.new_empty(v.shape)
    final = torch.stack(finals) if finals else state
    if return_states:
        return out, final, torch.stack(states) if states else state.new_empty((0, *shape[1:]))
    return out, final


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Spec section 4.5; see ``qnext.kernels.gated_delta``.

    Sequences are cut into chunks of 64 tokens. Everything inside a chunk runs for all chunks at
    once; only the passing of states is serial, over the chunks of the longest sequence.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lengths = cu_seqlens.diff().tolist()
    heads, groups = v.shape[1], q.shape[1]
    state = _start(initial_state, (len(lengths), heads, q.shape[2], v.shape[2]), dtype, q)
    if len(q) == 0:
        return v.new_empty(v.shape), state

    # Axes: chunk, key head, value head of that key head, token, channel.
    layout = _Chunks(lengths, q.device)
    qc, kc = (layout.split(x.to(dtype)).unsqueeze(2) for x in (q, k))
    vc, gc, bc = (
        layout.split(x.to(dtype)).unflatten(1, (groups, heads // groups))
        for x in (v, g.unsqueeze(2), beta.unsqueeze(2))
    )
    gc = gc.squeeze(4).cumsum(3)  # G of the spec

    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    gap = (gc.unsqueeze(4) - gc.unsqueeze(3)).masked_fill(~causal, float("-inf"))
    decay = gap.exp()  # masked before the exponential: the upper part could overflow
    grown = gc.exp().unsqueeze(4)
    eye = torch.eye(CHUNK, dtype=dtype, device=q.device)
    lower = ((kc @ kc.transpose(3, 4)) * decay * bc).tril(-1) + eye
    inverse = torch.linalg.solve_triangular(lower, eye, upper=False, unitriangular=True)
    u = inverse @ (vc * bc)
    w = inverse @ (kc * (bc * grown))
    within = (qc @ kc.transpose(3, 4)) * decay
    q_grown = qc * grown
    k_left = (kc * (gc[..., -1:] - gc).exp().unsqueeze(4)).transpose(3, 4)
    last = gc[..., -1].exp()[..., None, None]

    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    running = state[layout.order].unflatten(1, (groups, heads // groups))
    for count, rows in layout.steps:
        # The first ``count`` sequences (longest first) still have a chunk at this step.
        finals.insert(0, running[count:])
        running = running[:count]
        fresh = u[rows] - w[rows] @ running
        outputs.append(q_grown[rows] @ running + within[rows] @ fresh)
        running = running * last[rows] + k_left[rows] @ fresh
    finals.insert(0, running)
    final = torch.cat(finals).flatten(1, 2)[layout.inverse]
    out = layout.join(torch.cat(outputs).flatten(1, 2))
    return out.to(v.dtype), final


class _Chunks:
    """Where the chunks of ragged sequences lie: step-major, longest sequence first."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.single = len(lengths) == 1  # then chunks lie as tokens do: no gathers
        counts = [-(-n // CHUNK) for n in lengths]
        order = sorted(range(len(lengths)), key=lambda n: -counts[n])
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        first: list[int] = []
        size: list[int] = []
        self.steps: list[tuple[int, slice]] = []
        for step in range(max(counts, default=0)):
            live = [n for n in order if counts[n] > step]
            begin = len(first)
            for n in live:
                first.append(starts[n] + step * CHUNK)
                size.append(min(CHUNK, lengths[n] - step * CHUNK))
            self.steps.append((len(live), slice(begin, len(first))))
        self.order = torch.tensor(order, device=device)
        self.inverse = torch.argsort(self.order)
        self.total = starts[-1]
        offset = torch.arange(CHUNK, device=device)
        index = torch.tensor(first, device=device)[:, None] + offset
        inside = offset < torch.tensor(size, device=device)[:, None]
        # Rows past the end of a sequence read the extra zero row: q = k = v = beta = g = 0
        # leaves the state as it is (spec 4.5).
        self.index = torch.where(inside, index, self.total)  # (M, 64)

    def split(self, x: Tensor) -> Tensor:
        """(T, H, d) -> (M, H, 64, d), zero past the end of each sequence."""
        if self.single:
            whole = F.pad(x, (0, 0, 0, 0, 0, -len(x) % CHUNK))
            return whole.unflatten(0, (-1, CHUNK)).transpose(1, 2)
        padded = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        return padded[self.index].transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """(M, H, 64, d) -> (T, H, d)."""
        flat = x.transpose(1, 2).flatten(0, 1)
        if self.single:
            return flat[: self.total]
        out = x.new_empty(self.total + 1, *flat.shape[1:])
        return out.index_copy(0, self.index.flatten(), flat)[: self.total]


def _start(
    initial: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> Tensor:
    if initial is None:
        return torch.zeros(shape, dtype=dtype, device=like.device)
    return initial.to(dtype)
