"""Which modules a list of names means: exact names, and fused or split twins of them.

Names are compared by whole components: ``mlp.gate`` never matches ``mlp.gate_proj``. A list may
call a projection by the name of the fused or of the split form, whichever tool wrote it; the
files may hold the other one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qnext.errors import ConfigError

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
FUSED_OF = {part: fused for fused, parts in FUSED.items() for part in parts}
ROOTS = ("model", "mtp", "lm_head")


class NameList:
    """Entries of an ignore or target list: names, or ``re:`` patterns.

    A name that starts at the root (``model.``, ``mtp.``, ``lm_head``) matches the module and
    everything below it; another name matches wherever its components stand in a row.
    """

    def __init__(self, entries: Iterable[str], what: str) -> None:
        self.what = what
        self._exact: set[tuple[str, ...]] = set()
        self._loose: list[tuple[str, ...]] = []
        self._patterns: list[re.Pattern[str]] = []
        for entry in entries:
            if not isinstance(entry, str):
                raise ConfigError(f"{what} holds {entry!r}, which is no name")
            if entry.startswith("re:"):
                try:
                    self._patterns.append(re.compile(entry.removeprefix("re:")))
                except re.error as error:
                    raise ConfigError(f"{what}: {entry!r} is no pattern: {error}") from error
                continue
            parts = _components(entry)
            if not parts:
                continue
            if parts[0] in ROOTS:
                self._exact.add(parts)
            else:
                self._loose.append(parts)
        self._leaves = {entry[-1] for entry in self._loose}

    def __contains__(self, stem: str) -> bool:
        """Whether a module is meant.

        Raises:
            ConfigError: a fused module of which the list names only some parts.
        """
        if self._named(stem):
            return True
        parent, _, leaf = stem.rpartition(".")
        if leaf in FUSED_OF:
            return self._named(f"{parent}.{FUSED_OF[leaf]}")
        split = FUSED.get(leaf, ())
        found = [part for part in split if self._named(f"{parent}.{part}")]
        if found and len(found) < len(split):
            raise ConfigError(
                f"{self.what} names {', '.join(found)} of {stem}, which is one tensor",
                hint=f"name all of {', '.join(split)}, or none",
            )
        return bool(found)

    def _named(self, stem: str) -> bool:
        if not (self._exact or self._loose or self._patterns):
            return False
        parts = _components(stem)
        if self._exact and any(parts[:n] in self._exact for n in range(1, len(parts) + 1)):
            return True
        if self._leaves & set(parts) and any(_within(entry, parts) for entry in self._loose):
            return True
        if not self._patterns:
            return False
        names = {stem, ".".join(parts)}
        return any(p.match(name) for p in self._patterns for name in names)


def _components(name: str) -> tuple[str, ...]:
    """Name by components; the two places of ``language_model`` are one."""
    parts = tuple(name.strip(".").split(".")) if name.strip(".") else ()
    if "language_model" in parts[:2]:
        rest = tuple(p for p in parts if p != "language_model")
        parts = rest if rest[:1] == ("lm_head",) else ("model", *rest[rest[:1] == ("model",) :])
    return parts


def _within(entry: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    size = len(entry)
    return any(parts[i : i + size] == entry for i in range(len(parts) - size + 1))
