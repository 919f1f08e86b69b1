"""House rules that a linter does not know."""

from __future__ import annotations

import ast
import builtins
import inspect
import re

import pytest
from source import PACKAGE, ROOT, functions, modules, parameters, tree

from qnext import errors

OPS = sorted(path.parent for path in (PACKAGE / "kernels").glob("*/__init__.py"))


def uses(*texts: str) -> list[str]:
    """Modules in which one of the expressions occurs."""
    return [
        name
        for name, path in modules().items()
        if any(
            isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in texts
            for node in ast.walk(tree(path))
        )
    ]


def test_only_the_command_line_prints():
    assert [name for name in uses("print", "pprint") if not name.startswith("qnext.cli")] == []


def test_the_environment_is_read_in_two_places():
    readers = uses("os.environ", "os.getenv", "environ", "getenv")
    rooms = ("qnext.cli", "qnext.kernels.select", "qnext.hub")
    assert [name for name in readers if not name.startswith(rooms)] == []
    assert readers, "the search finds nothing at all"


def test_every_module_says_what_it_is():
    for name, path in modules().items():
        doc = ast.get_docstring(tree(path))
        assert doc, f"{name} has no docstring"


@pytest.mark.parametrize("folder", OPS, ids=lambda folder: folder.name)
def test_an_op_is_a_contract_and_equal_implementations(folder):
    contract = functions(folder / "__init__.py")
    assert ast.get_docstring(tree(folder / "__init__.py"))
    for name, function in contract.items():
        if not name.startswith("_"):
            assert ast.get_docstring(function), f"{folder.name}.{name} has no docstring"
            assert function.returns is not None
    twins = [p for p in (*folder.glob("triton*.py"), *folder.glob("cuda.py")) if p.is_file()]
    if not twins:
        return
    reference = functions(folder / "reference.py")
    ops = {name: f for name, f in contract.items() if not name.startswith("_")}
    for name, function in ops.items():
        assert name in reference, f"{folder.name}: {name} has no reference"
        wanted, given = parameters(reference[name]), parameters(function)
        # The contract may take hints that only save work, never more.
        assert given[: len(wanted)] == wanted
        hints = function.args.args[len(wanted) :]
        assert len(hints) <= len(function.args.defaults)
        for twin in twins:
            if name in (own := functions(twin)):
                assert parameters(own[name])[: len(wanted)] == wanted, f"{twin.name}: {name}"


def test_the_tree_of_errors_is_the_one_in_its_docstring():
    assert errors.__doc__ is not None
    drawn, stack = {}, ["QnextError"]
    for line in errors.__doc__.splitlines():
        found = re.match(r"    ([│ ]*)[├└]─ (\w+) ", line)
        if found:
            depth = 1 + len(found[1]) // 3
            stack[depth:] = [found[2]]
            drawn[found[2]] = stack[depth - 1]
    classes = {
        name: cls.__base__.__name__
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if cls is not errors.QnextError
    }
    assert drawn == classes


def test_only_our_own_errors_are_raised():
    """Apart from what Python's protocols and pydantic's validators ask for.

    The hub rooms speak the words of the clients, and ``hub/failures.py`` translates them all.
    """
    allowed = {"AttributeError", "ValueError"}
    wrong = []
    for name, path in modules().items():
        if name.startswith("qnext.hub."):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised = ast.unparse(node.exc.func)
                if hasattr(builtins, raised) and raised not in allowed:
                    wrong.append(f"{name}: {raised}")
    assert wrong == []


def test_no_path_of_a_machine_is_written_down():
    homes = re.compile("/" + r"(?:root|home/\w+|wo" + r"rk|Users/\w+)/\w")
    files = [*modules().values()]
    files += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    files += [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.toml")]
    files += [ROOT / "pyproject.toml", ROOT / "Makefile"]
    wrong = [str(p) for p in files if homes.search(p.read_text(encoding="utf-8"))]
    assert wrong == []
