"""lm-eval asks, our model answers: what plain forward passes and the engine say."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own

TASK = """
task: caps
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: "{{{{a}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def harness() -> Any:
    from qnext.checkpoint import load_model
    from qnext.cli.harness import HarnessModel
    from qnext.hub import resolve_model

    folder = resolve_model(None)
    return HarnessModel(load_model(folder, dtype="float32", device="cpu"), folder)


def _asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def _plain(harness: Any, before: list[int], after: list[int]) -> float:
    with torch.no_grad():
        scores = harness.model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    rows = range(len(before) - 1, len(before) + len(after) - 1)
    return sum(float(scores[row, token]) for row, token in zip(rows, after, strict=True))


def test_likelihoods_are_those_of_plain_forward_passes(harness: Any) -> None:
    encode = harness.tokenizer.encode
    pairs = [("The file system is", " mounted read-only"), ("A transaction", " is"), ("", "When")]
    got = harness.loglikelihood([_asked(*pair) for pair in pairs])
    for (context, text), (score, _) in zip(pairs, got, strict=True):
        before = encode(context) if context else [harness.prefix]
        after = encode(context + text)[len(before) if context else 0 :]
        assert score == pytest.approx(_plain(harness, before, after), abs=1e-3)
    # A blank at the end of the context goes to the continuation.
    assert harness.loglikelihood([_asked("The file system is ", "mounted read-only")])[0][
        0
    ] == pytest.approx(got[0][0], abs=1e-3)
    one = encode("The file system is")
    greedy = int(harness.model(torch.tensor([one])).logits[0, -1].argmax())
    text = harness.tokenizer.decode([greedy])
    assert harness.loglikelihood([_asked("The file system is", text)])[0][1]


def test_whole_texts_are_scored_in_windows(harness: Any) -> None:
    text = "The kernel keeps a list of processes that wait for a lock. " * 3
    [whole] = harness.loglikelihood_rolling([_asked(text)])
    ids = harness.tokenizer.encode(text)
    assert whole == pytest.approx(_plain(harness, [harness.prefix], ids), abs=1e-2)
    harness.max_length, kept = 11, harness.max_length
    [cut] = harness.loglikelihood_rolling([_asked(text)])
    harness.max_length = kept
    assert cut < whole  # less is known at the start of a window


def test_generation_stops_where_the_task_says(harness: Any) -> None:
    [text] = harness.generate_until([_asked("The kernel keeps a list of", {"max_gen_toks": 12})])
    assert text
    word = text.split()[2]
    [cut] = harness.generate_until(
        [_asked("The kernel keeps a list of", {"max_gen_toks": 12, "until": [word]})]
    )
    assert cut == text[: text.index(word)]


def test_eval_runs_a_task(qnext, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = {"q": "The file system is mounted", "c": [" banana zebra", " read-only"], "a": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "caps.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    done = qnext("eval", "--tasks", "caps", "--include-path", tmp_path, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tasks"]["caps"]["acc,none"] == 1.0
