"""The same weights give the same numbers here and in transformers 5, and files pass both ways."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import KINDS, draw_config, draw_model, reload
from tiny import randomise

from qnext.checkpoint import load_model, save_model
from qnext.layers.model import CausalLM

CASES = [("qwen3_next", seed) for seed in range(25)]
CASES += [(kind, seed) for kind in list(KINDS)[1:] for seed in range(4)]
by_case = pytest.mark.parametrize(("kind", "seed"), CASES)


def both(kind: str, seed: int, folder: Path, **changes: Any) -> tuple[Any, CausalLM]:
    theirs = draw_model(kind, seed, **changes)
    theirs.save_pretrained(folder)
    return theirs, load_model(folder, device="cpu").requires_grad_(False)


def draw_ids(model: Any, rows: int, length: int) -> torch.Tensor:
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(length))


def assert_same(ours: CausalLM, theirs: Any, ids: torch.Tensor) -> None:
    a = ours(ids, output_hidden_states=True)
    b = theirs(ids, output_hidden_states=True)
    assert b.logits.std() > 0.1, "the weights are too small to prove anything"
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-4)
    p, q = (x.logits.double().log_softmax(-1) for x in (a, b))
    assert (q.exp() * (q - p)).sum(-1).max() < 1e-7
    assert len(a.hidden_states) == len(b.hidden_states)
    for mine, other in zip(a.hidden_states, b.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def assert_same_model(a: torch.nn.Module, b: torch.nn.Module, ids: torch.Tensor) -> None:
    """Equal weights bit for bit; a product may round by where its inputs lie in memory."""
    names = b.state_dict()
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, names[name]), name
    torch.testing.assert_close(a(ids).logits, b(ids).logits, rtol=1e-5, atol=1e-5)


def greedy(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """Prefill, then one token at a time on the state."""
    state, tokens, new = model.new_state(1, len(prompt) + count), list(prompt), list(prompt)
    for _ in range(count):
        batch = state.batch([len(new)], context_lens=[len(tokens) - len(new)], slots=[0])
        hidden = model.hidden_states(torch.tensor(new), batch, state)
        new = [int(model.logits(hidden[-1]).argmax())]
        tokens += new
    return tokens[len(prompt) :]


@by_case
def test_logits_hidden_states_and_greedy_text(kind: str, seed: int, tmp_path: Path) -> None:
    theirs, ours = both(kind, seed, tmp_path)
    assert_same(ours, theirs, draw_ids(theirs, 2, 3 + 13 * (seed % 11)))
    prompt = draw_ids(theirs, 1, 5 + seed)
    text = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    assert greedy(ours, prompt[0].tolist(), 12) == text[0, prompt.shape[1] :].tolist()


@by_case
def test_what_we_save_transformers_loads_without_a_difference(
    kind: str, seed: int, tmp_path: Path
) -> None:
    theirs, ours = both(kind, seed, tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")
    again = reload(theirs, tmp_path / "ours")
    ids = draw_ids(theirs, 1, 33)
    assert_same_model(again, theirs, ids)


@by_case
def test_a_single_file_is_byte_identical(kind: str, seed: int, tmp_path: Path) -> None:
    _, ours = both(kind, seed, tmp_path / "theirs")
    # transformers writes one matrix per expert for every family.
    save_model(ours, tmp_path / "ours", fused_experts=False)
    assert filecmp.cmp(
        tmp_path / "theirs/model.safetensors", tmp_path / "ours/model.safetensors", shallow=False
    )


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = draw_model(kind, 3)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = load_model(tmp_path, device="cpu").requires_grad_(False)
    assert_same(ours, theirs, draw_ids(theirs, 1, 21))


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_moe", "qwen3_5_moe"])
@pytest.mark.parametrize("fused", [False, True])
def test_both_expert_storages_load_in_transformers(kind: str, fused: bool, tmp_path: Path) -> None:
    theirs, ours = both(kind, 5, tmp_path / "theirs")
    save_model(ours, tmp_path / "ours", fused_experts=fused, max_shard_size=20_000)
    again = reload(theirs, tmp_path / "ours")
    ids = draw_ids(theirs, 1, 21)
    assert_same_model(again, theirs, ids)


@pytest.mark.parametrize(
    ("kind", "family"), [("qwen3_5", "Qwen3_5"), ("qwen3_5_moe", "Qwen3_5Moe")]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_text_of_a_multimodal_checkpoint(
    kind: str, family: str, seed: int, tmp_path: Path
) -> None:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
              "out_hidden_size": 24, "num_position_embeddings": 16}  # fmt: skip
    text = draw_config(kind, seed)
    rotary = int(text["head_dim"] * text["rope_parameters"]["partial_rotary_factor"]) // 2
    sections = [rotary - 2 * (rotary // 3), rotary // 3, rotary // 3]
    text["rope_parameters"] |= {"mrope_section": sections, "mrope_interleaved": True}
    vision["out_hidden_size"] = text["hidden_size"]
    config = getattr(transformers, family + "Config")(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"]
    )
    config._attn_implementation = "eager"
    config.text_config._experts_implementation = "eager"
    theirs = getattr(transformers, family + "ForConditionalGeneration")(config)
    theirs.eval().requires_grad_(False)
    randomise(theirs, seed)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu").requires_grad_(False)
    assert_same(ours, theirs, draw_ids(theirs, 2, 40))
