"""bench: the shape of its result on the smallest run there is."""

from __future__ import annotations

import json

import pytest


def test_bench_measures_ours_and_prints_json(qnext):
    done = qnext("bench", "--repeats", 1, "--new-tokens", 4, "--prompt-tokens", 16, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert {"decode_ms", "prefill_ms", "mtp1_ms"} <= set(result["ours"])
    assert all(value > 0 for value in result["ours"].values())
    assert 0 < result["bandwidth_share"] < 2


def test_an_unknown_peer_is_refused(qnext):
    done = qnext("bench", "--against", "abacus")
    assert done.code == 2
    assert "peer 'abacus' is not known" in done.err


@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        ("throughput", ("--batch", 2, "--new-tokens", 4, "--repeats", 1), "tokens_per_second"),
        ("latency", ("--batch", 2, "--new-tokens", 4, "--prompt-tokens", 8), "tokens_per_second"),
        ("prefix", ("--repeats", 1), "second_over_first"),
        ("overhead", ("--batch", 8), "ms"),
        ("storm", ("--requests", 60), "aborted"),
        ("soak", ("--minutes", 0.02), "answers, all right"),
    ],
)
def test_the_engine_under_load(qnext, what, options, words):
    done = qnext("bench", what, *options, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result[words]
    if what == "prefix":
        assert result["cached_tokens"] == {"first": 0, "second": 1984, "the same again": 2020}
