"""README and documents: commands that parse, paths that exist, Python that compiles."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from source import ROOT, modules

from qnext.cli import app

DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?:qnext|tests|recipes|benchmarks|docs|\.ci)/[\w./*-]*")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def commands(text: str) -> list[str]:
    """Command lines of shell blocks, one per pipe or ``&&`` member, comments left out."""
    found = []
    for language, body in FENCE.findall(text):
        if language not in ("bash", "sh", "shell", "console"):
            continue
        for line in body.replace("\\\n", " ").splitlines():
            if language == "console" and not line.startswith("$ "):
                continue
            line = re.sub(r"(^|\s)#.*", "", line.removeprefix("$ "))
            found += [part.strip() for part in re.split(r"\|\||&&|[|;]", line) if part.strip()]
    return found


def complaint(command: str) -> str | None:
    """What is wrong with a ``qnext`` or ``make`` command."""
    words = shlex.split(re.sub(r"[<>]\s*\S+$", "", command))
    while words and "=" in words[0]:
        del words[0]
    if not words:
        return None
    if words[:3] == ["python", "-m", "qnext"]:
        words = ["qnext", *words[3:]]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
        wrong = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"make has no target {wrong[0]}" if wrong else None
    if Path(words[0]).name != "qnext":
        return None
    group = typer.main.get_command(app)
    try:
        verb = words[1] if len(words) > 1 else ""
        if verb in ("", "--help", "--version"):
            return None
        if verb not in group.commands:
            return f"qnext has no verb {verb}"
        group.commands[verb].make_context(verb, words[2:])
    except typer.Exit:
        return None
    except Exception as error:
        return f"{command}: {getattr(error, 'message', error)}"
    return None


def missing_paths(text: str, folder: Path) -> list[str]:
    """Paths in backticks and links that lead nowhere."""
    named = [m for code in re.findall(r"`([^`\n]+)`", text) for m in PATH.findall(code)]
    wrong = [name for name in named if not any(ROOT.glob(name.rstrip("/.")))]
    links = [link for link in LINK.findall(text) if not re.match(r"\w+:", link)]
    return wrong + [link for link in links if not (folder / link).exists()]


def bad_python(text: str) -> list[str]:
    """What is wrong with the Python blocks: syntax, or names that qnext does not have."""
    wrong, known = [], modules()
    for language, body in FENCE.findall(text):
        if language not in ("python", "py"):
            continue
        try:
            top = ast.parse(re.sub(r"^(>>>|\.\.\.) ?", "", body, flags=re.MULTILINE))
        except SyntaxError as error:
            wrong.append(str(error))
            continue
        for node in ast.walk(top):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qnext"):
                module = __import__(str(node.module), fromlist=["*"])
                for alias in node.names:
                    if f"{node.module}.{alias.name}" not in known and not hasattr(
                        module, alias.name
                    ):
                        wrong.append(f"{node.module} has no {alias.name}")
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_tells_no_lies(path):
    text = path.read_text(encoding="utf-8")
    assert [c for command in commands(text) if (c := complaint(command))] == []
    assert missing_paths(text, path.parent) == []
    assert bad_python(text) == []


def test_the_readme_has_the_two_commands():
    found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {"make demo", "make test"} <= set(found)


def test_lies_are_found():
    text = (
        "See `qnext/nothing.py` and [this](gone.md) and `qnext/cli/`.\n"
        "```bash\nmake demo  # fine\nmake coffee\nqnext brew && qnext chat --sugar 2\n"
        "HF_HOME=x qnext inspect org/name --json | less\nqnext train\n```\n"
        "```python\nfrom qnext import LLM, Nothing\n```\n```python\n1 +\n```\n"
    )
    told = [c for command in commands(text) if (c := complaint(command))]
    assert len(told) == 4
    assert told[:2] == ["make has no target coffee", "qnext has no verb brew"]
    assert "--sugar" in told[2]
    assert missing_paths(text, ROOT) == ["qnext/nothing.py", "gone.md"]
    assert len(bad_python(text)) == 2
