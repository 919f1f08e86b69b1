"""What an installation contains."""

from __future__ import annotations

import re
import tomllib

from source import PACKAGE, ROOT

import qnext

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_there_is_one_version():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "qnext.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", qnext.__version__)


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_data_file_is_shipped():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["qnext"]
    shipped = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    present = {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    }
    assert present - shipped == set()
    assert PACKAGE / "assets/qnext-small/model.safetensors" in shipped
    assert PACKAGE / "py.typed" in shipped


def test_extras_and_pins():
    project = PROJECT["project"]
    assert {"serve", "train", "gpu", "test"} <= set(project["optional-dependencies"])
    assert project["license"] == "Apache-2.0"
    assert project["requires-python"] == ">=3.11"
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert project["scripts"]["qnext"] == "qnext.cli:main"


def test_the_command_line_knows_which_extra_brings_what():
    from qnext.cli.machine import NEEDED, OPTIONAL

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=]", line)[0] for line in requirements}

    project = PROJECT["project"]
    assert set(NEEDED) == names(project["dependencies"])
    for package, extra in OPTIONAL.items():
        assert package in names(project["optional-dependencies"][extra])


def test_the_model_in_the_box_is_small():
    folder = PACKAGE / "assets/qnext-small"
    assert (folder / "model.safetensors").stat().st_size < 48 << 20
    assert sum(path.stat().st_size for path in folder.iterdir()) < 50 << 20


def test_triton_modules_are_the_ones_that_mypy_leaves_alone():
    """A pattern with a star inside a component matches nothing, so they are listed."""
    listed = {
        name
        for override in PROJECT["tool"]["mypy"]["overrides"]
        for name in override["module"]
        if name.startswith("qnext.")
    }
    present = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (PACKAGE / "kernels").glob("*/triton*.py")
    }
    assert present <= listed
    assert all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in listed)
