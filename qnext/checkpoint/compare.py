"""How far a quantised folder is from the plain one: both run over one text, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext.checkpoint.stream import PartialModel
from qnext.errors import ConfigError
from qnext.layers.packed import PackedBatch

Advance = Callable[[int, int], None]
ROWS = 256
"""Tokens whose logits are in memory at a time."""


@dataclass(frozen=True)
class LayerError:
    """What quantising one layer does.

    Attributes:
        name: of the part.
        own: error of the layer's update for the plain model's input, relative to the update.
        carried: error of the hidden states after it, relative to them, with all layers before.
    """

    name: str
    own: float
    carried: float


@dataclass(frozen=True)
class Prediction:
    """Next-token predictions of the quantised model against the plain one, over all positions.

    Attributes:
        tokens: positions that were compared.
        kl_mean: KL(plain || quantised), nats.
        kl_p99: its 99th percentile.
        kl_max: its maximum.
        same_top1: share of positions with the same most likely token.
        perplexity: of the plain model.
        perplexity_quantized: of the quantised one.
        bits_per_byte: of the plain model.
        bits_per_byte_quantized: of the quantised one.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    same_top1: float
    perplexity: float
    perplexity_quantized: float
    bits_per_byte: float
    bits_per_byte_quantized: float


@dataclass(frozen=True)
class Comparison:
    """Everything that was measured."""

    plain: str
    quantized: str
    quantization: str
    bytes_plain: int
    bytes_quantized: int
    prediction: Prediction
    draft: Prediction | None
    layers: tuple[LayerError, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def as_markdown(self) -> str:
        """For people."""
        p, ratio = self.prediction, self.bytes_quantized / self.bytes_plain
        lines = [
            f"# {self.quantized} against {self.plain}",
            "",
            f"{self.quantization}; {self.bytes_quantized / 1e9:.3f} GB instead of "
            f"{self.bytes_plain / 1e9:.3f} GB ({ratio:.1%}).",
            "",
            f"| {p.tokens} tokens of a fixed text | plain | quantised |",
            "|---|---|---|",
            f"| perplexity | {p.perplexity:.4f} | {p.perplexity_quantized:.4f} |",
            f"| bits per byte | {p.bits_per_byte:.4f} | {p.bits_per_byte_quantized:.4f} |",
            f"| KL, mean / 99th percentile / max (nats) | | {p.kl_mean:.5f} / {p.kl_p99:.4f} / "
            f"{p.kl_max:.3f} |",
            f"| same most likely token | | {p.same_top1:.2%} |",
        ]
        if self.draft is not None:
            d = self.draft
            lines += [
                f"| MTP: KL, mean / 99th percentile / max | | {d.kl_mean:.5f} / {d.kl_p99:.4f} / "
                f"{d.kl_max:.3f} |",
                f"| MTP: same most likely token | | {d.same_top1:.2%} |",
            ]
        lines += ["", "| layer | error of its update | of the hidden state after it |",
                  "|---|---|---|"]  # fmt: skip
        lines += [f"| {e.name} | {e.own:.3%} | {e.carried:.3%} |" for e in self.layers]
        return "\n".join(lines) + "\n"


@torch.no_grad()
def compare(
    plain: Path,
    quantized: Path,
    documents: list[Tensor],
    nbytes: int,
    *,
    device: torch.device | None = None,
    advance: Advance | None = None,
) -> Comparison:
    """Measure a quantised folder against the plain one.

    Args:
        plain: folder of the reference.
        quantized: folder of the same model in another storage.
        documents: token ids of the text, one tensor per document.
        nbytes: of the text.
        device: that computes; one layer of each model is in memory at a time.
        advance: called with (parts done, parts in all).

    Raises:
        ConfigError: the folders hold different models.
    """
    device = device or torch.device("cpu")
    dtype = torch.float32 if device.type == "cpu" else None
    a, b = (PartialModel(folder, device, dtype) for folder in (plain, quantized))
    if a.layout.config != b.layout.config:
        raise ConfigError(f"{plain} and {quantized} are different models")
    ids = torch.cat(documents).to(device)
    batch = PackedBatch.of([len(d) for d in documents], device=ids.device)
    for one in (a, b):
        one.load("model.embed_tokens.")
    ha, hb = (one.model.model.embed_tokens(ids) for one in (a, b))
    rotary = a.model.rotary(batch.positions, ha.dtype)
    layers = []
    names = a.parts()
    for i, name in enumerate(names):
        for one in (a, b):
            one.load(name)
        ours, theirs = (one.model.model.layers[i] for one in (a, b))
        after = ours(ha, batch, rotary, None, None)
        alone = theirs(ha, batch, rotary, None, None)
        hb = theirs(hb, batch, rotary, None, None)
        own, carried = _relative(alone - after, after - ha), _relative(hb - after, after)
        layers.append(LayerError(name.strip("."), own, carried))
        ha = after
        for one in (a, b):
            one.drop(name)
        if advance is not None:
            advance(i + 1, len(names) + 1)
    for one in (a, b):
        one.load("model.norm.", "lm_head.")
    ha, hb = a.model.model.norm(ha), b.model.model.norm(hb)
    prediction = _predictions(a, b, ha, hb, ids, batch, 1, nbytes)
    draft = None
    if a.model.mtp is not None:
        for one in (a, b):
            one.load("mtp.")
        following = ids.roll(-1)
        draft = _predictions(
            a, b, a.model.draft_states(ha, following, batch),
            b.model.draft_states(hb, following, batch), ids, batch, 2, nbytes,
        )  # fmt: skip
    if advance is not None:
        advance(len(names) + 1, len(names) + 1)
    label = b.layout.quantization.label if b.layout.quantization else "plain"
    return Comparison(
        plain.name, quantized.name, label, a.files.nbytes, b.files.nbytes, prediction, draft,
        tuple(layers),
    )  # fmt: skip


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.float().norm() / reference.float().norm().clamp_min(1e-30))


def _predictions(
    a: PartialModel, b: PartialModel, ha: Tensor, hb: Tensor, ids: Tensor, batch: PackedBatch,
    ahead: int, nbytes: int,
) -> Prediction:  # fmt: skip
    """Compare the predictions of the token ``ahead`` places on, inside each document."""
    bounds = pairwise(batch.cu_seqlens.tolist())
    rows = torch.cat([torch.arange(begin, max(begin, end - ahead)) for begin, end in bounds])
    divergence, loss_a, loss_b, same = [], 0.0, 0.0, 0
    for some in rows.split(ROWS):
        some = some.to(ids.device)
        p, q = (one.model.logits(h[some]).float().log_softmax(-1) for one, h in ((a, ha), (b, hb)))
        divergence.append((p.exp() * (p - q)).sum(-1).clamp_min_(0).cpu())
        target = ids[some + ahead].unsqueeze(1)
        loss_a -= float(p.gather(1, target).double().sum())
        loss_b -= float(q.gather(1, target).double().sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    kl, count = torch.cat(divergence).double(), len(rows)
    bits = math.log(2) * nbytes
    return Prediction(
        count, float(kl.mean()), float(kl.quantile(0.99)), float(kl.max()), same / count,
        math.exp(loss_a / count), math.exp(loss_b / count), loss_a / bits, loss_b / bits,
    )  # fmt: skip
