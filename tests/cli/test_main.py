"""Help, exit codes and how failures are told."""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

VERBS = (
    "generate",
    "chat",
    "serve",
    "inspect",
    "pull",
    "convert",
    "train",
    "eval",
    "data",
    "bench",
    "doctor",
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(qnext, verb):
    done = qnext(verb, "--help")
    assert done.code == 0
    assert f"Usage: qnext {verb}" in done.out


def test_without_arguments_the_help_is_shown(qnext):
    done = qnext()
    assert done.code == 0
    assert all(f"  {verb} " in done.out for verb in VERBS)


def test_version(qnext):
    from qnext import __version__

    assert qnext("--version").out == f"{__version__}\n"


def test_help_answers_in_under_0_3_seconds_and_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['qnext', 'generate', '--help']\n"
        "from qnext.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'numpy', 'qnext.config'} & set(sys.modules), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.stderr == "set()\n"
    assert seconds < 0.3, f"{seconds:.2f} s of processor time"


@pytest.mark.parametrize(
    ("arguments", "code", "says", "hint"),
    [
        (["nonsense"], 2, "No such command 'nonsense'", "qnext --help"),
        (["generate", "--nonsense"], 2, "No such option", "qnext generate --help"),
        (["generate", "--temperature", "warm"], 2, "'--temperature'", "qnext generate --help"),
        (["convert", "only-one"], 2, "Missing argument 'target'", "qnext convert --help"),
        (["generate", "-k", "9"], 2, "num_speculative_tokens=9 must be 0..8", None),
        (["generate", "-k", "many"], 2, "num_speculative_tokens='many' must be 0..8", None),
        (["generate", "--dtype", "int3"], 2, "dtype 'int3' is not known", "bfloat16"),
        (["generate", "--device", "abacus"], 2, "device 'abacus' is not known", None),
        (["generate", "-m", "/no/folder"], 1, "no folder '/no/folder'", "check the path"),
        (["inspect", "/no/folder"], 1, "no folder '/no/folder'", "check the path"),
        (["inspect", "no model"], 1, "neither an existing folder nor", "org/name"),
        (["pull", "kaggle:one/two"], 1, "not a Kaggle model name", "kaggle:owner/"),
        (["train", "/no/recipe.toml"], 2, "recipe /no/recipe.toml does not exist", None),
        (
            ["data", "corpus", "/no/sources.toml", "out"],
            2,
            "is not a list of sources",
            "sources.toml",
        ),
    ],
)
def test_failures_are_one_sentence_and_a_hint(qnext, arguments, code, says, hint):
    done = qnext(*arguments)
    lines = done.err.splitlines()
    assert done.code == code
    assert done.out == ""
    assert lines[0].startswith("qnext: ")
    assert says in lines[0]
    assert [line.startswith("hint: ") for line in lines[1:]] in ([], [True])
    if hint is not None:
        assert hint in lines[1]


def test_a_bug_is_one_sentence_and_its_traceback_comes_with_debug(qnext, monkeypatch):
    from qnext.cli import machine

    def broken():
        raise ZeroDivisionError("the machine is gone")

    monkeypatch.setattr(machine, "examine", broken)
    done = qnext("doctor")
    assert done.code == 1
    assert done.err.startswith("qnext: ZeroDivisionError: the machine is gone\nhint: `qnext --d")
    with pytest.raises(ZeroDivisionError):
        qnext("--debug", "doctor")


def test_a_missing_package_names_its_extra(qnext, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lxml", None)
    monkeypatch.delitem(sys.modules, "qnext.train.corpus", raising=False)
    monkeypatch.delitem(sys.modules, "qnext.train.extract", raising=False)
    done = qnext("data", "corpus", tmp_path / "sources.toml", tmp_path)
    assert done.code == 1
    assert "needs the package lxml" in done.err
    assert "hint: pip install 'qnext[train]'" in done.err


def test_doctor_tells_the_same_to_people_and_scripts(qnext):
    facts = json.loads(qnext("doctor", "--json").out)
    text = qnext("doctor")
    assert text.code == 0
    assert facts["problems"] == 0
    for name, value in (*facts["machine"].items(), *facts["packages"].items()):
        if name != "disk free":
            assert any(
                line.startswith(name) and line.endswith(str(value))
                for line in text.out.splitlines()
            )


def test_doctor_finds_what_is_missing(qnext, monkeypatch, tmp_path):
    from qnext.cli import machine

    installed = machine._version
    monkeypatch.setattr(
        machine, "_version", lambda name: None if name in ("jinja2", "triton") else installed(name)
    )
    pull = importlib.import_module("qnext.hub.pull")
    monkeypatch.setattr(pull, "SHIPPED_FOLDER", tmp_path)
    done = qnext("doctor", "--json")
    facts = json.loads(done.out)
    assert done.code == 1
    assert facts["problems"] == 2
    assert facts["packages"]["jinja2"] == "missing"
    assert "qnext[gpu]" in facts["packages"]["triton"]


def test_a_reader_that_leaves_is_no_news(repository: Path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "qnext", "doctor"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
        timeout=100,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
