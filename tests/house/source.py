"""The source of the package as syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qnext"


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def tree(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a module imports anywhere, typing blocks left out."""
    top = tree(path)
    skipped = {
        id(inner)
        for node in ast.walk(top)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(top):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("qnext"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qnext"):
            assert not node.level, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else str(node.module)


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Functions at the top of a file."""
    return {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names in order; keyword-only ones after a star."""
    args = function.args
    stars = ["*"] if args.kwonlyargs else []
    return [a.arg for a in [*args.posonlyargs, *args.args]] + stars + [
        a.arg for a in args.kwonlyargs
    ]  # fmt: skip
