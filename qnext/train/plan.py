"""What a training run takes on every rank: bytes held and bytes sent, from the config alone.

Parameters are counted on the meta device and cut as ``qnext.parallel`` cuts them. Activations are
those of ``recompute = ["layer"]``: the input of every layer, and one layer at work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from qnext.checkpoint import build_model
from qnext.config import ModelConfig
from qnext.errors import ConfigError
from qnext.parallel.mesh import ParallelConfig
from qnext.train.loss import chunk_tokens
from qnext.train.report import flops_per_token

#: Bytes of a number: gathered weights and activations, and everything that is kept of them.
NARROW, WIDE = 2, 4


@dataclass(frozen=True)
class TrainPlan:
    """One layout of one run.

    Attributes:
        ranks: how many there are.
        tokens: of a micro batch on one rank.
        micro_steps: micro batches that a rank computes for a step.
        memory: bytes by part on the fullest rank.
        sent: bytes that a rank sends in a step, by part; what it receives is the same.
        group: ranks of the group that each part of ``sent`` runs over.
        flops: of a step, over all ranks, recomputation left out.
    """

    ranks: int
    tokens: int
    micro_steps: int
    memory: dict[str, int]
    sent: dict[str, int]
    group: dict[str, int]
    flops: float

    @property
    def total(self) -> int:
        """Bytes held at the peak."""
        return sum(self.memory.values())

    def seconds(
        self, peak: float, utilisation: float, node: int, inside: float, between: float
    ) -> tuple[float, float]:
        """Seconds of computing and of sending, if nothing overlapped.

        Args:
            peak: FLOP/s of a device.
            utilisation: share of it that the model's FLOPs reach.
            node: ranks of one machine.
            inside: bytes/s between ranks of a machine.
            between: bytes/s of a rank to other machines.
        """
        computing = self.flops / (self.ranks * peak * utilisation)
        sending = sum(
            size / (inside if self.group[part] <= node else between)
            for part, size in self.sent.items()
        )
        return computing, sending


def plan_training(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    ranks: int,
    seq_len: int,
    batch_tokens: int,
    micro_batches: int,
    mtp_depth: int = 1,
    muon: bool = False,
) -> TrainPlan:
    """Plan a run in BF16 with FP32 masters.

    Args:
        config: the model, with its MTP layer if that is trained.
        parallel: the layout.
        ranks: devices.
        seq_len: tokens of the longest sequence.
        batch_tokens: tokens of a step, over all ranks.
        micro_batches: pieces of a step, over all ranks.
        mtp_depth: of the MTP loss.
        muon: one momentum for the hidden matrices instead of two moments.

    Raises:
        ConfigError: a layout that does not divide.
    """
    context, tensor = parallel.context_parallel_size, parallel.tensor_parallel_size
    expert = parallel.expert_parallel_size
    data, rest = divmod(ranks, context * tensor)
    if rest or ranks % expert or micro_batches % max(data, 1) or batch_tokens % micro_batches:
        raise ConfigError(
            f"{ranks} ranks, {batch_tokens} tokens and {micro_batches} micro batches do not divide "
            f"over context {context} x tensor {tensor}, expert {expert}"
        )
    if config.num_experts % expert:
        raise ConfigError(f"{config.num_experts} experts do not divide over {expert} ranks")
    depth = mtp_depth if config.num_mtp_layers else 0
    parts = _Parts(config, ranks, expert)
    tokens = ceil(batch_tokens / micro_batches / context)
    plan = TrainPlan(
        ranks=ranks,
        tokens=tokens,
        micro_steps=micro_batches // data,
        memory=_memory(config, parts, tokens, tensor, expert, context, seq_len, depth, muon),
        sent={},
        group={},
        flops=batch_tokens * flops_per_token(config, seq_len, depth),
    )
    for part, size, group in _sent(config, parallel, parts, ranks, tokens, depth):
        plan.sent[part] = size * plan.micro_steps
        plan.group[part] = group
    return plan


class _Parts:
    """Numbers of parameters by how they are cut.

    Attributes:
        local: held by the fullest rank.
        matrices: of those, the ones that Muon takes.
        root: gathered for the whole forward and backward pass.
        dense: of the largest layer, without experts that are dealt out.
        dense_all: of all layers, the same.
        experts: of one layer on one expert-parallel rank; 0 without expert parallelism.
        experts_all: of all layers, the same.
    """

    def __init__(self, config: ModelConfig, ranks: int, expert: int) -> None:
        model = build_model(config, "bfloat16", "meta")
        self.local = self.matrices = self.root = self.dense_all = self.experts_all = 0
        dense: dict[str, int] = {}
        dealt: dict[str, int] = {}
        for name, param in model.named_parameters():
            is_expert = ".experts." in name and expert > 1
            if is_expert:
                mine = _cut_experts(tuple(param.shape), expert, ranks // expert)
            else:
                mine = ceil(len(param) / ranks) * (param.numel() // len(param))
            self.local += mine
            hidden = param.ndim >= 2 and "layers." in name and "gate.weight" not in name
            self.matrices += mine if hidden and "conv1d" not in name else 0
            layer = name.partition("layers.")[0] + name.partition("layers.")[2].partition(".")[0]
            if "layers." not in name:
                self.root += param.numel()
            elif is_expert:
                dealt[layer] = dealt.get(layer, 0) + param.numel() // expert
            else:
                dense[layer] = dense.get(layer, 0) + param.numel()
        self.dense, self.dense_all = max(dense.values()), sum(dense.values())
        self.experts = max(dealt.values(), default=0)
        self.experts_all = sum(dealt.values())


def _cut_experts(shape: tuple[int, ...], expert: int, rest: int) -> int:
    """Numbers of a stack of experts on a rank: whole experts if they divide, else rows of each."""
    count, rows, columns = shape[0] // expert, shape[1], shape[2]
    if count % rest == 0:
        return count // rest * rows * columns
    return count * ceil(rows / rest) * columns


def _memory(
    config: ModelConfig,
    parts: _Parts,
    tokens: int,
    tensor: int,
    expert: int,
    context: int,
    seq_len: int,
    depth: int,
    muon: bool,
) -> dict[str, int]:
    hidden, layers = config.hidden_size, config.num_hidden_layers + depth
    moments = 2 * parts.local - (parts.matrices if muon else 0)
    gathered = parts.root + 2 * (parts.dense + parts.experts)  # one at work, the next on its way
    # Of one layer in BF16, and once more in FP32 while it is summed; the root's stay to the end.
    gradients = NARROW * (parts.root + parts.dense + parts.experts)
    gradients += WIDE * max(parts.dense + parts.experts, parts.root)
    sliced = ceil(tokens / tensor)
    chunk = min(chunk_tokens(config.vocab_size), sliced)
    # Logits in BF16 and the head's gradient in FP32, for the main loss and every depth.
    loss = NARROW * chunk * config.vocab_size + WIDE * config.vocab_size * hidden * (1 + depth)
    return {
        "masters (FP32)": WIDE * parts.local,
        "gradients (FP32)": WIDE * parts.local,
        "moments (FP32)": WIDE * moments,
        "gathered weights (BF16)": NARROW * gathered,
        "gathered gradients": gradients,
        # Three more behind the last layer (norm, loss), nine around each MTP layer.
        "layer inputs": NARROW * tokens * hidden * (layers + 3 + 9 * depth),
        "one layer at work": _layer_at_work(config, tokens, tensor, expert, context),
        "loss": loss,
    }


def _layer_at_work(config: ModelConfig, tokens: int, tensor: int, expert: int, context: int) -> int:
    """Activations and their gradients of the largest layer in its backward pass, an estimate."""
    key = config.linear_num_key_heads * config.linear_key_head_dim
    value = config.linear_num_value_heads * config.linear_value_head_dim
    width = config.num_attention_heads * config.head_dim
    # Projections, convolution, normed q and k in FP32, output, gate; twice for the gradients.
    delta = NARROW * (2 * (2 * key + value) + 3 * value) + WIDE * 2 * key
    chunks = WIDE * config.linear_num_value_heads * 64 * 2  # the matrices of a chunk, per token
    attention = NARROW * (5 * width + 4 * config.num_key_value_heads * config.head_dim)
    gathered_kv = NARROW * 2 * config.num_key_value_heads * config.head_dim * context
    mixer = max(delta + chunks, attention + gathered_kv) // tensor
    rows = config.num_experts_per_tok or 1
    inner = config.moe_intermediate_size or config.intermediate_size
    # Rows to the experts and back (sent and received), gate, up and their product.
    moe = NARROW * rows * ((4 if expert > 1 else 2) * config.hidden_size + 4 * inner)
    return 2 * tokens * mixer + 2 * ceil(tokens / tensor) * moe


def _sent(
    config: ModelConfig,
    parallel: ParallelConfig,
    parts: _Parts,
    ranks: int,
    tokens: int,
    depth: int,
) -> Iterator[tuple[str, int, int]]:
    """(part, bytes a rank sends for a micro batch, ranks of the group)."""
    context, tensor = parallel.context_parallel_size, parallel.tensor_parallel_size
    expert = parallel.expert_parallel_size
    hidden = config.hidden_size
    twice = 2 if parallel.reshard_after_forward else 1
    full = config.layer_types.count("full_attention") + depth
    delta = config.layer_types.count("linear_attention")
    passes = 3  # forward, forward again, backward

    def share(size: float, group: int) -> int:
        return int(size * (group - 1) / group)

    yield (
        "weights, all ranks", share(NARROW * (twice * parts.dense_all + parts.root), ranks), ranks
    )  # fmt: skip
    yield "gradients, all ranks", share(WIDE * (parts.dense_all + parts.root), ranks), ranks
    if expert > 1:
        rest = ranks // expert
        if rest > 1:
            yield "weights, experts", share(NARROW * twice * parts.experts_all, rest), rest
            yield "gradients, experts", share(WIDE * parts.experts_all, rest), rest
        rows = ceil(tokens / tensor) * config.num_experts_per_tok * hidden * NARROW
        sparse = sum(config.is_sparse(i) for i in range(config.num_hidden_layers)) + depth
        yield "tokens to experts and back", share(2 * passes * sparse * rows, expert), expert
    if tensor > 1:
        # A ring sends a sum twice, the parts of a gather once.
        sums = 2 * tokens * hidden * NARROW * (full + delta)
        gathers = tokens * hidden * NARROW * (full + delta)
        yield "outputs of heads and tokens", share(passes * (sums + gathers), tensor), tensor
    if context > 1:
        kv = 2 * config.num_key_value_heads * config.head_dim // max(tensor, 1)
        keys = passes * full * tokens * context * kv * NARROW
        yield "keys and values", share(keys, context), context
        dk, dv = config.linear_key_head_dim, config.linear_value_head_dim
        state = config.linear_num_value_heads * dk * (dk + dv) * WIDE // tensor
        yield "DeltaNet states", passes * delta * state * (context - 1), context


def table(plans: dict[str, TrainPlan]) -> str:
    """The plans side by side, in GiB, as a Markdown table."""
    names = list(plans)
    lines = ["| GiB per rank | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]

    def row(label: str, values: list[str]) -> None:
        lines.append(f"| {label} | " + " | ".join(values) + " |")

    def sizes(kind: str) -> None:
        parts = dict.fromkeys(part for p in plans.values() for part in getattr(p, kind))
        for part in parts:
            found = [getattr(p, kind).get(part) for p in plans.values()]
            row(part, ["-" if f is None else f"{f / 2**30:.2f}" for f in found])

    sizes("memory")
    row("**held in all**", [f"**{p.total / 2**30:.1f}**" for p in plans.values()])
    sizes("sent")
    row("**sent in a step**", [f"**{sum(p.sent.values()) / 2**30:.1f}**" for p in plans.values()])
    return "\n".join(lines)
