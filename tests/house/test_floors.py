"""Imports only go down, as the contract in pyproject.toml says; importing is cheap."""

from __future__ import annotations

import subprocess
import sys
import tomllib

from source import ROOT, imports, modules


def floors() -> list[set[str]]:
    """The layers of the contract, the top one first."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = data["tool"]["importlinter"]["contracts"]
    assert contract["type"] == "layers"
    return [{name.strip(" ()") for name in row.split("|")} for row in contract["layers"]]


def floor_of(name: str, rows: list[set[str]]) -> tuple[int, str] | None:
    for number, row in enumerate(rows):
        for room in row:
            if name == room or name.startswith(f"{room}."):
                return number, room
    return None


def test_every_module_has_a_floor():
    rows, free = floors(), {"qnext", "qnext.__main__"}
    assert [name for name in modules() if name not in free and not floor_of(name, rows)] == []


def test_imports_only_go_down():
    rows, known = floors(), modules()
    wrong = []
    for name, path in known.items():
        here = floor_of(name, rows)
        for target in imports(name, path, known):
            there = floor_of(target, rows)
            if here and there and here[1] != there[1] and there[0] <= here[0]:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_the_import_reader_sees_lazy_imports():
    known, name = modules(), "qnext.cli.session"
    assert "qnext.engine.llm" in set(imports(name, known[name], known))


def test_import_qnext_is_quick_and_light():
    code = (
        "import sys, time\nbefore = time.process_time()\nimport qnext\n"
        "print(time.process_time() - before, sorted({'torch', 'numpy', 'pydantic', 'typer'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, heavy = done.stdout.split(" ", 1)
    assert heavy == "[]\n"
    assert float(seconds) < 0.2


def test_public_names_load_on_first_use():
    import qnext

    for name in qnext.__all__:
        assert getattr(qnext, name) is not None
