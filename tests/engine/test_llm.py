from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import TINY, greedy_oracle, head, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from qnext.checkpoint import save_model
from qnext.engine.llm import LLM
from qnext.engine.outputs import RequestOutput, StreamDelta
from qnext.engine.sampling_params import SamplingParams
from qnext.errors import ConfigError, RequestError, TextError

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights with a byte-level tokenizer of its own."""
    path = tmp_path_factory.mktemp("tiny")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the cat and the dog and the sun"] * 3, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    used = backend.get_vocab_size()
    eos = backend.token_to_id("<|im_end|>")
    changes = {"vocab_size": used + 9, "eos_token_id": eos, "bos_token_id": None}
    save_model(tiny_model(seed=7, **{**changes, "pad_token_id": None}), path)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"})
    )
    (path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [eos, used - 3]})
    )
    return path


@pytest.fixture(scope="session")
def llm(folder: Path) -> LLM:
    return LLM(folder, max_model_len=128)


def test_prompts_may_be_texts_ids_dicts_or_lists_of_them(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("the cat")
    want = greedy_oracle_of(llm, ids)
    forms: list[Any] = [
        "the cat",
        ids,
        {"prompt": "the cat"},
        {"prompt_token_ids": ids},
        ["the cat"],
        [ids],
        [{"prompt": "the cat"}],
        torch.tensor(ids),
    ]
    for form in forms:
        (output,) = llm.generate(form, GREEDY)
        assert output.token_ids == want
        assert output.prompt_token_ids == ids
        assert output.prompt in ("the cat", None)
    mixed = llm.generate(["the dog", ids], [GREEDY, GREEDY.replace(max_tokens=3)])
    assert [len(output.token_ids) for output in mixed] == [12, 3]
    assert mixed[1].token_ids == want[:3]
    assert llm.generate([], GREEDY) == []


def greedy_oracle_of(llm: LLM, ids: list[int], count: int = 12) -> list[int]:
    return greedy_oracle(llm.model, ids, count, llm.engine.options.vocab_size)


def test_an_output_has_texts_reasons_and_metrics(llm: LLM) -> None:
    (output,) = llm.generate("the cat", GREEDY.replace(logprobs=1))
    first = output.outputs[0]
    assert llm.tokenizer is not None
    assert output.text == first.text == llm.tokenizer.decode(output.token_ids)
    assert (output.finish_reason, output.stop_reason, first.index) == ("length", None, 0)
    assert output.logprobs is not None
    entry = output.logprobs[0][output.token_ids[0]]
    assert (entry.rank, entry.decoded_token) == (1, llm.tokenizer.decode(output.token_ids[:1]))
    assert first.cumulative_logprob == pytest.approx(
        sum(
            step[token].logprob
            for step, token in zip(output.logprobs, output.token_ids, strict=True)
        )
    )
    metrics = output.metrics
    assert metrics.finished_time is not None
    assert metrics.first_token_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time
    assert metrics.num_generated_tokens == 12
    assert output.prompt_logprobs is None


def test_stop_strings_cut_the_text_wherever_tokens_end(llm: LLM) -> None:
    (whole,) = llm.generate("the sun", GREEDY.replace(max_tokens=30))
    for start in range(0, len(whole.text) - 2, 3):
        stop = whole.text[start : start + 2]
        if "\ufffd" in stop:
            continue
        at = whole.text.index(stop)
        params = GREEDY.replace(max_tokens=30, stop=["@@never@@", stop])
        (cut,) = llm.generate("the sun", params)
        assert (cut.text, cut.finish_reason, cut.stop_reason) == (whole.text[:at], "stop", stop)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        (kept,) = llm.generate("the sun", params.replace(include_stop_str_in_output=True))
        assert kept.text == whole.text[: at + 2]
        late = params.replace(min_tokens=30)
        assert len(llm.generate("the sun", late)[0].token_ids) == 30


def test_the_stopping_token_has_no_text(llm: LLM) -> None:
    (whole,) = llm.generate("the sun", GREEDY)
    token = whole.token_ids[4]
    params = GREEDY.replace(stop_token_ids=[token])
    (cut,) = llm.generate("the sun", params)
    assert cut.stop_reason == token
    assert cut.token_ids[-1] == token
    assert llm.tokenizer is not None
    assert cut.text == llm.tokenizer.decode(cut.token_ids[:-1])
    (kept,) = llm.generate("the sun", params.replace(include_stop_str_in_output=True))
    assert kept.text == llm.tokenizer.decode(kept.token_ids)


def collect(deltas: Iterator[StreamDelta]) -> tuple[str, list[int], str | None]:
    text, ids, reason = "", [], None
    for delta in deltas:
        assert reason is None, "a delta after the last"
        text, ids, reason = text + delta.text, ids + delta.token_ids, delta.finish_reason
    return text, ids, reason


@pytest.mark.parametrize("k", [0, 3])
def test_a_stream_gives_what_generate_gives(folder: Path, llm: LLM, k: int) -> None:
    streaming = LLM(folder, max_model_len=128, num_speculative_tokens=k)
    for params in (
        GREEDY.replace(max_tokens=40),
        SamplingParams(seed=3, temperature=1.5, max_tokens=40, ignore_eos=True, stop=["e", "qq"]),
        GREEDY.replace(detokenize=False),
    ):
        (want,) = llm.generate("the dog", params)
        got = collect(streaming.stream("the dog", params))
        assert got == (want.text, want.token_ids, want.finish_reason)


def test_streams_interleave_and_a_closed_one_frees_its_slot(llm: LLM) -> None:
    wants = [llm.generate(text, GREEDY)[0] for text in ("the dog", "the cat")]
    first, second = llm.stream("the dog", GREEDY), llm.stream("the cat", GREEDY)
    abandoned = llm.stream("and the", GREEDY)
    parts: list[list[StreamDelta]] = [[next(first)], [next(second)]]
    next(abandoned)
    assert llm.generate("the cat", GREEDY)[0].token_ids == wants[1].token_ids
    abandoned.close()  # type: ignore[attr-defined]
    parts[0] += first
    parts[1] += second
    for found, want in zip(parts, wants, strict=True):
        assert collect(iter(found)) == (want.text, want.token_ids, "length")
    assert not llm.engine.has_work


def test_chat_renders_the_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "the cat"}]
    prompt = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    (want,) = llm.generate(prompt, GREEDY)
    (got,) = llm.chat(talk, GREEDY)
    assert got.prompt == prompt
    assert got.token_ids == want.token_ids
    many = llm.chat([talk, talk], GREEDY)
    assert [one.token_ids for one in many] == [want.token_ids] * 2
    assert collect(llm.chat_stream(talk, GREEDY))[1] == want.token_ids
    (bare,) = llm.chat(talk, GREEDY, add_generation_prompt=False)
    assert bare.prompt == "<|im_start|>user\nthe cat<|im_end|>\n"
    with pytest.raises(RequestError, match="no messages"):
        llm.chat([], GREEDY)
    for wrong in ("hi", talk[0], [1], [talk, 1], [["hi"]], None):
        with pytest.raises(RequestError, match="a conversation must be a list of messages"):
            llm.chat(wrong, GREEDY)  # type: ignore[arg-type]


def test_defaults_come_from_the_checkpoint(llm: LLM, folder: Path) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k) == (0.7, 0.8, 20)
    assert llm.model_path == folder
    assert llm.engine.options.eos_token_ids == llm.defaults.eos_token_ids
    assert len(llm.defaults.eos_token_ids) == 2
    (output,) = llm.generate("the cat")
    assert 1 <= len(output.token_ids) <= 16


def test_padding_rows_of_the_checkpoint_are_never_generated(folder: Path) -> None:
    llm = LLM(folder, max_model_len=128)
    assert llm.tokenizer is not None
    used = llm.tokenizer.vocab_size
    assert llm.config.vocab_size == used + 9
    with torch.no_grad():
        head(llm.model)[used:] = 10.0
    params = SamplingParams(n=4, temperature=3.0, max_tokens=40, ignore_eos=True)
    output: RequestOutput = llm.generate("the", params)[0]
    assert max(max(one.token_ids) for one in output.outputs) < used


def test_token_ids_alone_need_no_tokenizer(folder: Path, llm: LLM, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    bare = LLM(tmp_path, skip_tokenizer_init=True)
    (output,) = bare.generate([1, 2, 3], GREEDY)
    assert output.text == ""
    assert output.token_ids == greedy_oracle(bare.model, [1, 2, 3], 12, bare.config.vocab_size)
    assert bare.defaults.eos_token_ids == (bare.config.eos_token_id,)
    assert bare.get_default_sampling_params() == SamplingParams()
    for call in (
        lambda: bare.generate("text", GREEDY),
        lambda: bare.generate([1], SamplingParams(stop="x")),
        lambda: bare.generate([1], SamplingParams(bad_words=["x"])),
        lambda: bare.chat([{"role": "user", "content": "x"}]),
    ):
        with pytest.raises(RequestError, match="needs a tokenizer"):
            call()


def test_bad_words_are_never_written(llm: LLM) -> None:
    params = SamplingParams(n=8, seed=0, temperature=2.0, max_tokens=60, ignore_eos=True)
    free = llm.generate("the cat", params)[0]
    words = sorted({c for one in free.outputs for c in one.text if c.isascii() and c.isalpha()})[:3]
    assert len(words) == 3
    assert llm.tokenizer is not None
    banned = llm.generate("the cat", params.replace(bad_words=words))[0]
    ids = {token for one in banned.outputs for token in one.token_ids}
    assert not ids & {llm.tokenizer.encode(word)[0] for word in words}


@pytest.mark.parametrize(
    ("prompts", "params", "words"),
    [
        ([], [GREEDY], "each of the 0 prompts; found 1 of them"),
        ("a", [GREEDY, GREEDY], "found 2 of them"),
        ("a", {"temperature": 0}, "found dict"),
        ("a", [GREEDY, 3], "found int"),
        ("", GREEDY, "empty"),
        (["a", ""], GREEDY, "empty"),
        ([["a"]], GREEDY, "'a'"),
        (3, GREEDY, "int"),
        ([None], GREEDY, "NoneType"),
        ({"text": "a"}, GREEDY, "dict"),
        ([[1, 10**9]], GREEDY, "1000000000"),
        ([[1] * 128], GREEDY, "max_model_len=128"),
    ],
)
def test_bad_requests_run_nothing(llm: LLM, prompts: Any, params: Any, words: str) -> None:
    before = llm.stats.num_requests
    with pytest.raises(RequestError, match=words):
        llm.generate(prompts, params)
    assert not llm.engine.has_work
    assert llm.stats.num_requests == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_num_seq": 4}, "max_num_seq"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens=-1"),
        ({"max_model_len": 257}, "1..256"),
        ({"num_speculative_tokens": 9}, "0..8"),
        ({"dtype": "float12"}, "float12"),
        ({"device": "warp"}, "warp"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_bad_options_are_refused(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        LLM(folder, **options)
    if "max_num_seq" in options:
        assert caught.value.hint == "did you mean 'max_num_seqs'?"


def test_yarn_makes_the_context_longer(tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    save_model(tiny_model(rope_scaling=scaling), tmp_path)
    assert (
        LLM(tmp_path, skip_tokenizer_init=True).max_model_len == 4 * TINY["max_position_embeddings"]
    )


def test_another_models_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    with pytest.raises(TextError, match="48 rows"):
        LLM(tmp_path, tokenizer=folder)


def test_a_progress_bar_only_on_request(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["the cat"] * 2, GREEDY)
    assert capsys.readouterr() == ("", "")
    llm.generate(["the cat"] * 2, GREEDY, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "generate" in shown.err


def test_acceptance_is_reported_per_request_and_in_all(folder: Path) -> None:
    llm = LLM(folder, max_model_len=128, num_speculative_tokens=2)
    outputs = llm.generate(["the cat", "the dog"], GREEDY.replace(max_tokens=30))
    for place in range(2):
        assert llm.stats.num_drafted[place] == sum(o.metrics.num_drafted[place] for o in outputs)
        assert llm.stats.num_accepted[place] == sum(o.metrics.num_accepted[place] for o in outputs)
    assert outputs[0].metrics.acceptance_rate is not None
    assert llm.stats.num_generated_tokens == 60
    assert llm.stats.num_requests == 2


def test_an_interrupt_leaves_a_clean_engine(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    want = llm.generate(["the cat", "the dog"], GREEDY)
    real, calls = llm.model.logits, []

    def interrupted(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(hidden)

    monkeypatch.setattr(llm.model, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["the cat", "the dog"], GREEDY)
    assert not llm.engine.has_work
    llm.engine.cache.check()
    assert not llm.engine.cache.leases
    again = llm.generate(["the cat", "the dog"], GREEDY)
    assert [one.token_ids for one in again] == [one.token_ids for one in want]
