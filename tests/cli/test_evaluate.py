"""eval."""

from __future__ import annotations

import json
import math


def test_eval_scores_files_and_needles(qnext, tmp_path):
    file = tmp_path / "x.jsonl"
    text = "The file system is mounted read-only when an error is found. " * 3
    file.write_text(json.dumps({"text": text}) + "\n")
    done = qnext("eval", "--text", file, "--needle", "80", "--trials", 1, "--json")
    assert done.code == 0
    result = json.loads(done.out)
    held = result["heldout"]
    assert held["tokens"] > 30
    assert 0 < held["loss"] < math.log(8192)
    assert held["draft_agreement"] is not None
    assert len(result["needle"]) == 5
    table = qnext("eval", "--text", file, "--needle", "80", "--trials", 1).out
    assert "bits per byte" in table
    assert "needle found" in table


def test_eval_says_what_is_wrong(qnext, tmp_path):
    done = qnext("eval")
    assert (done.code, "nothing to evaluate" in done.err) == (2, True)
    done = qnext("eval", "--needle", "12,x")
    assert (done.code, "is not a list of lengths" in done.err) == (2, True)
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n{"text"\n')
    done = qnext("eval", "--text", file)
    assert done.code == 1
    assert f"{file}:2: not JSON" in done.err


def test_eval_refuses_shards_of_another_vocabulary(qnext, tmp_path):
    from toy import write_shards

    write_shards(tmp_path, [[1, 9000]], "heldout")
    done = qnext("eval", "--shards", tmp_path)
    assert done.code == 1
    assert "holds token 9000" in done.err
