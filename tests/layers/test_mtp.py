"""The MTP module against the written equations (spec 6.1, 6.2), from the tensors on disk."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import draw_ids, tiny_model, whole
from torch import Tensor

from qnext.checkpoint import load_model, save_model
from qnext.errors import ConfigError
from qnext.layers.model import CausalLM
from qnext.layers.packed import PackedBatch

MODEL = tiny_model()
DENSE = tiny_model(
    model_type="qwen3_5", num_nextn_predict_layers=0, mtp_num_hidden_layers=1,
    tie_word_embeddings=True, shared_expert_intermediate_size=0,
)  # fmt: skip
by_model = pytest.mark.parametrize("model", [MODEL, DENSE], ids=["experts", "dense and tied"])


class Written:
    """Spec 6.1 in fp64, one row, head and expert at a time, knowing only names on disk."""

    def __init__(self, model: CausalLM, folder: Path) -> None:
        save_model(model, folder)
        self.w = load_file(folder / "model.safetensors")
        self.c = model.config

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale = 1 / torch.sqrt((x * x).mean(-1, keepdim=True) + self.c.rms_norm_eps)
        return x * scale * (1 + self.w[f"mtp.{name}.weight"])

    def rotate(self, x: Tensor, position: int) -> Tensor:
        x, half = x.clone(), int(self.c.head_dim * self.c.partial_rotary_factor) // 2
        for j in range(half):
            angle = position * self.c.rope_theta ** (-j / half)
            a, b = x[j].clone(), x[j + half].clone()
            x[j] = a * math.cos(angle) - b * math.sin(angle)
            x[j + half] = b * math.cos(angle) + a * math.sin(angle)
        return x

    def attention(self, x: Tensor) -> Tensor:
        c, d, rows = self.c, self.c.head_dim, []
        stem = "layers.0.self_attn."
        q, k, v, o = (self.w[f"mtp.{stem}{n}_proj.weight"] for n in "qkvo")
        keys = (x @ k.T).view(len(x), -1, d)
        values = (x @ v.T).view(len(x), -1, d)
        queries = (x @ q.T).view(len(x), -1, 2, d)  # each head: query, then gate
        for i in range(len(x)):
            heads = []
            for h in range(c.num_attention_heads):
                g = h * c.num_key_value_heads // c.num_attention_heads
                query = self.rotate(self.norm(queries[i, h, 0], stem + "q_norm"), i)
                scores = [
                    query @ self.rotate(self.norm(keys[j, g], stem + "k_norm"), j) / math.sqrt(d)
                    for j in range(i + 1)
                ]
                p = torch.stack(scores).softmax(0)
                heads.append((p @ values[: i + 1, g]) * torch.sigmoid(queries[i, h, 1]))
            rows.append(o @ torch.cat(heads))
        return torch.stack(rows)

    def swiglu(self, x: Tensor, stem: str) -> Tensor:
        gate, up, down = (self.w[f"{stem}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        inner = gate @ x
        return down @ (inner * torch.sigmoid(inner) * (up @ x))

    def mlp(self, x: Tensor) -> Tensor:
        stem = "mtp.layers.0.mlp"
        if not self.c.num_experts:
            return self.swiglu(x, stem)
        p = (self.w[stem + ".gate.weight"] @ x).softmax(0)
        best = sorted(range(self.c.num_experts), key=lambda e: -p[e])[: self.c.num_experts_per_tok]
        out = sum(p[e] / p[best].sum() * self.swiglu(x, f"{stem}.experts.{e}") for e in best)
        shared = torch.sigmoid(self.w[stem + ".shared_expert_gate.weight"] @ x)
        return out + shared * self.swiglu(x, stem + ".shared_expert")

    def __call__(self, hidden: Tensor, next_ids: list[int]) -> Tensor:
        """Rows (H_i, token i + 1), all from position 0 on -> rows m_i."""
        e = self.norm(self.w["model.embed_tokens.weight"][next_ids], "pre_fc_norm_embedding")
        x = torch.cat([e, self.norm(hidden, "pre_fc_norm_hidden")], 1) @ self.w["mtp.fc.weight"].T
        x = x + self.attention(self.norm(x, "layers.0.input_layernorm"))
        y = self.norm(x, "layers.0.post_attention_layernorm")
        x = x + torch.stack([self.mlp(row) for row in y])
        return self.norm(x, "norm")

    def logits(self, m: Tensor) -> Tensor:
        head = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])
        return m @ head.T


def close(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@by_model
def test_the_module_equals_the_written_equations(model: CausalLM, tmp_path: Path) -> None:
    ids = draw_ids(model, 12)
    hidden = whole(model, ids[:-1])
    written = Written(model, tmp_path)
    m = model.draft_states(hidden, ids[1:], PackedBatch.of([11]))
    # The angles of the rotary embedding are fp32 here and fp64 in the equations.
    close(m, written(hidden, ids[1:].tolist()), atol=1e-6)
    close(model.logits(m), written.logits(m))


@by_model
@pytest.mark.parametrize("k", [2, 3, 5])
def test_drafting_k_tokens(model: CausalLM, k: int, tmp_path: Path) -> None:
    ids = draw_ids(model, 9, seed=k)
    hidden = whole(model, ids[:-1])
    written = Written(model, tmp_path)
    rows, following = hidden, ids[1:].tolist()
    state, past, expected, drafts = model.new_state(2, 32), 0, [], []
    new, tokens = hidden, ids[1:]
    for _ in range(k):
        batch = state.batch([len(tokens)], context_lens=[past], slots=[1], kv_shift=1)
        m = model.draft_states(new, tokens, batch, state)[-1:]
        past += len(tokens)
        drafts.append(int(model.logits(m).argmax()))
        new, tokens = m, torch.tensor(drafts[-1:])

        last = written(rows, following)[-1:]
        close(m, last, atol=1e-6)
        expected.append(int(written.logits(last).argmax()))
        rows, following = torch.cat([rows, last]), [*following, expected[-1]]
    assert drafts == expected


@by_model
@pytest.mark.parametrize("pieces", [[1, 10], [4, 4, 3], [1] * 11])
def test_its_cache_in_pieces_equals_the_whole(model: CausalLM, pieces: list[int]) -> None:
    ids = draw_ids(model, 12)
    hidden = whole(model, ids[:-1])
    expected = model.draft_states(hidden, ids[1:], PackedBatch.of([11]))
    state, past, found = model.new_state(1, 16), 0, []
    for h, t in zip(hidden.split(pieces), ids[1:].split(pieces), strict=True):
        batch = state.batch([len(t)], context_lens=[past], slots=[0], kv_shift=1)
        found.append(model.draft_states(h, t, batch, state))
        past += len(t)
    close(torch.cat(found), expected)


def test_rejected_rows_are_overwritten() -> None:
    ids = draw_ids(MODEL, 12)
    hidden = whole(MODEL, ids[:-1])
    expected = MODEL.draft_states(hidden, ids[1:], PackedBatch.of([11]))
    state = MODEL.new_state(1, 16)
    first = state.batch([6], context_lens=[0], slots=[0], kv_shift=1)
    MODEL.draft_states(hidden[:6], ids[1:7], first, state)
    wrong = state.batch([4], context_lens=[6], slots=[0], kv_shift=1)
    MODEL.draft_states(hidden[:4], ids[:4], wrong, state)
    again = state.batch([5], context_lens=[6], slots=[0], kv_shift=1)
    close(MODEL.draft_states(hidden[6:], ids[7:], again, state), expected[6:])


def test_ragged_drafts_equal_drafts_alone() -> None:
    ids = draw_ids(MODEL, 14)
    hidden = torch.randn(14, MODEL.config.hidden_size, dtype=torch.float64,
                         generator=torch.Generator().manual_seed(0))  # fmt: skip
    together = MODEL.draft_states(hidden, ids, PackedBatch.of([9, 5]))
    alone = [
        MODEL.draft_states(hidden[part], ids[part], PackedBatch.of([part.stop - part.start]))
        for part in (slice(0, 9), slice(9, 14))
    ]
    close(together, torch.cat(alone))


def test_a_model_without_the_module_says_so() -> None:
    model = tiny_model(num_nextn_predict_layers=0)
    assert model.mtp is None
    with pytest.raises(ConfigError, match="no multi-token prediction"):
        model.draft_states(torch.zeros(1, 24), torch.tensor([0]), PackedBatch.of([1]))


@by_model
def test_its_weights_survive_a_round_trip(model: CausalLM, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    again = load_model(tmp_path, device="cpu")
    for name, p in model.mtp.named_parameters():
        assert torch.equal(again.mtp.get_parameter(name), p), name
