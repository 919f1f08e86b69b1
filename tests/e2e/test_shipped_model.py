"""The model in the box, from its files to text: engine, drafts, figures, and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from qnext import LLM, SamplingParams, load_model
from qnext.hub import shipped_model
from qnext.train.data import TokenShards
from qnext.train.evaluate import Evaluation, evaluate
from qnext.train.loss import Objective
from qnext.train.tokenizer import tokenize_shards

PROMPTS = [
    "The kernel keeps a list of",
    "Fellow-Citizens of the Senate and House of Representatives:",
    "To install the package, run the following command:\n\n",
    "class",
]
# Measured on the speech in tests/data: 1.071 and 0.652.
BITS_PER_BYTE, DRAFT_AGREEMENT = 1.09, 0.62
GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def plain() -> LLM:
    """In fp32, without drafts."""
    return LLM(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference(plain: LLM) -> list[list[int]]:
    """Greedy tokens of every prompt."""
    return [output.token_ids for output in plain.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def theirs() -> transformers.PreTrainedModel:
    """The same folder, read by transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(shipped_model(), dtype=torch.float32)


def test_the_folder_has_what_a_checkpoint_needs(plain):
    folder = shipped_model()
    assert plain.model_path == folder
    assert (folder / "model.safetensors").stat().st_size < 48 << 20
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config"):
        assert (folder / f"{name}.json").is_file()
    assert (folder / "LICENSE").is_file()
    config = plain.config
    assert config.layer_types == (*["linear_attention"] * 3, "full_attention") * 3
    assert config.num_experts > config.num_experts_per_tok > 1
    assert config.shared_expert_intermediate_size > 0
    assert config.num_mtp_layers == 1
    assert plain.defaults.eos_token_ids[0] == config.eos_token_id
    assert plain.tokenizer.vocab_size == config.vocab_size


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_greedy_tokens_do_not_depend_on_drafts(reference, drafts):
    llm = LLM(dtype="float32", device="cpu", num_speculative_tokens=drafts)
    outputs = llm.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == reference
    acceptance = llm.stats.acceptance_per_position
    assert len(acceptance) == drafts
    assert acceptance[0] > 0.5, "drafts of a trained module are mostly right"
    assert sorted(acceptance, reverse=True) == acceptance


def test_stream_says_the_same_as_generate(plain, reference):
    deltas = list(plain.stream(PROMPTS[1], GREEDY))
    [output] = plain.generate(PROMPTS[1], GREEDY)
    assert "".join(delta.text for delta in deltas) == output.text
    assert [token for delta in deltas for token in delta.token_ids] == reference[1]
    assert deltas[-1].finish_reason == output.finish_reason == "length"
    assert len(deltas) > 20


def test_recommended_sampling_is_repeatable_and_writes_words(plain):
    params = plain.get_default_sampling_params()
    assert params.temperature > 0
    params = params.replace(max_tokens=60, seed=5)
    first, again = (plain.generate("A transaction is", params)[0] for _ in range(2))
    assert first.token_ids == again.token_ids
    words = first.text.split()
    assert len(words) > 20
    assert sum(word.strip(",.").isalpha() for word in words) > 0.7 * len(words)


@pytest.fixture(scope="module")
def heldout(tmp_path_factory, request) -> Evaluation:
    """Scores on a speech that the model was not trained on, in the dtype on disk."""
    speech = request.path.parents[1] / "data/state-of-the-union-1790.txt"
    text = speech.read_text(encoding="utf-8").strip()
    folder: Path = tmp_path_factory.mktemp("heldout")
    (folder / "heldout.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    tokenize_shards(folder / "heldout.jsonl", shipped_model(), folder, "heldout")
    shards = TokenShards(folder, "heldout")
    assert shards.num_bytes == len(text.encode())
    model = load_model(dtype="float32", device="cpu")
    return evaluate(Objective(model), [shards], 1024, 1024)


def test_bits_per_byte_of_a_heldout_speech(heldout):
    assert 0.8 < heldout.bits_per_byte < BITS_PER_BYTE


def test_first_drafts_on_a_heldout_speech(heldout):
    """How often the first draft is what the main model would have said greedily."""
    assert heldout.draft_agreement > DRAFT_AGREEMENT


def test_transformers_reads_the_folder_and_agrees(plain, theirs, reference):
    tokenizer = transformers.AutoTokenizer.from_pretrained(shipped_model())
    for prompt, tokens in zip(PROMPTS, reference, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == plain.tokenizer.encode(prompt)
        with torch.no_grad():
            torch.testing.assert_close(
                plain.model(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4
            )
        out = theirs.generate(ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.0)
        out = out[0, ids.shape[1] :]
        assert out.tolist() == tokens
        assert tokenizer.decode(out) == plain.tokenizer.decode(tokens)
