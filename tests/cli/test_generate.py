"""generate on the model in the box: in this process, and killed in another one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.cli.generate import SAMPLE


def test_json_and_text_are_the_same_completion(qnext):
    arguments = ("generate", "The kernel", "--max-tokens", 12, "--seed", 3)
    row = json.loads(qnext(*arguments, "--json").out)
    done = qnext(*arguments)
    assert done.code == 0
    assert done.out == f"The kernel{row['text']}\n"
    assert row["prompt"] == "The kernel"
    assert row["finish_reason"] == "length"
    assert len(row["token_ids"]) == row["stats"]["generated_tokens"] == 12
    assert row["stats"]["decode_tokens_per_s"] > 0
    first, last = done.err.splitlines()
    assert first.startswith("[qnext-small: qwen3_next trained by this project")
    assert "22.2M parameters" in first
    assert last.startswith("[12 tokens, ")
    longer = (*arguments[:3], 60, *arguments[4:], "--json")
    calm = json.loads(qnext(*longer, "--repetition-penalty", 5).out)
    assert calm["token_ids"] != json.loads(qnext(*longer).out)["token_ids"]
    other = json.loads(qnext(*arguments[:-1], 4, "--json").out)
    assert other["token_ids"] != row["token_ids"]


def test_greedy_is_the_same_with_and_without_drafts(qnext):
    arguments = ("generate", "The kernel", "--max-tokens", 12, "--temperature", 0, "--json")
    plain, drafted = (
        json.loads(qnext(*arguments, "--dtype", "float32", "-k", k).out) for k in (0, 2)
    )
    assert plain["token_ids"] == drafted["token_ids"]
    assert plain["stats"]["acceptance_per_position"] == []
    assert len(drafted["stats"]["acceptance_per_position"]) == 2


def test_a_text_of_a_form(qnext, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"ok": {"type": "boolean"}},'
                      ' "required": ["ok"], "additionalProperties": false}')  # fmt: skip
    done = json.loads(qnext("generate", "As JSON:", "--json-schema", schema, "--json").out)
    assert json.loads(done["text"])["ok"] in (True, False)
    done = json.loads(qnext("generate", "So:", "--regex", "[ab]{3}", "--json").out)
    assert len(done["text"]) == 3
    two = ("--choice", "yes", "--choice", "no")
    assert json.loads(qnext("generate", "So:", *two, "--json").out)["text"] in ("yes", "no")
    ebnf = tmp_path / "sum.ebnf"
    ebnf.write_text('root ::= [1-9] "+" [1-9]')
    done = json.loads(qnext("generate", "So:", "--grammar", ebnf, "--json").out)
    assert done["text"][1] == "+"
    assert done["finish_reason"] == "stop"
    thought = ("generate", "Why?<think>\n", "--max-thinking-tokens", 3, "--max-tokens", 20)
    assert "</think>" in json.loads(qnext(*thought, "--json").out)["text"]
    done = qnext("generate", "So:", *two, "--regex", "a")
    assert done.code == 2
    assert "exactly one" in done.err


def test_a_prompt_from_standard_input(qnext, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Läuft".encode())))
    assert qnext("generate", "-", "--max-tokens", 1).out.startswith("Läuft")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff")))
    done = qnext("generate", "-", "--max-tokens", 1)
    assert done.code == 2
    assert "standard input is not UTF-8" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--max-tokens", 0), "max_tokens=0"),
        (("--temperature", -1), "temperature"),
        (("--top-p", 2), "top_p"),
        (("word " * 9000,), "tokens"),
    ],
)
def test_requests_that_can_never_be_served(qnext, arguments, says):
    done = qnext("generate", *arguments)
    assert done.code == 2
    assert says in done.err.splitlines()[-2 if "hint:" in done.err else -1]
    assert done.out == ""


def test_without_arguments_a_sample_streams_until_ctrl_c(repository: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "qnext", "generate", "--max-tokens", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        start = b""
        while len(start) < 60:  # arrives while the rest is still being written
            start += process.stdout.read1(64)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert start.startswith(SAMPLE.encode())
    assert process.returncode == 130
    assert err.endswith(b"\ninterrupted\n")
    assert b"Traceback" not in err


def test_a_reader_that_leaves_ends_the_generation(repository: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "qnext", "generate", "--max-tokens", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with process:
        process.stdout.read1(8)
        process.stdout.close()
        process.wait(timeout=60)
        err = process.stderr.read()
    assert process.returncode == 1
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


def test_a_disk_cache_serves_the_next_process(qnext, tmp_path):
    prompt = "The kernel keeps a list of all processes that wait. " * 12
    options = ("--max-tokens", 4, "--temperature", 0, "--disk-cache", tmp_path, "--json")
    first, second = (qnext("generate", prompt, *options) for _ in range(2))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    facts = [json.loads(done.out) for done in (first, second)]
    assert facts[0]["token_ids"] == facts[1]["token_ids"]
    assert facts[0]["stats"]["cached_tokens"] == 0
    assert facts[1]["stats"]["cached_tokens"] > 0
    assert list(tmp_path.iterdir())


def test_engine_options_reach_the_engine_and_are_checked(qnext):
    done = qnext("generate", "The", "--max-model-len", 12, "--max-tokens", 100, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["finish_reason"] == "length"
    done = qnext("generate", "The", "--kv-cache-dtype", "int3")
    assert done.code == 2
    assert "kv_cache_dtype='int3' is not known" in done.err
