"""Memory of devices: what known cards offer to one process, and what this machine has free."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.errors import ConfigError

if TYPE_CHECKING:
    import torch

MIB, GIB = 2**20, 2**30

# What ``cudaMemGetInfo`` gives as a card's total, which is less than nvidia-smi's figure. H100 and
# H200 are measured; the others are the capacities that torch's out-of-memory messages report,
# rounded there to 0.01 GiB, the smallest where reports differ.
GPUS: dict[str, int] = {
    "h100": 85_017_493_504,
    "h200": 150_109_880_320,
    "b200": round(178.35 * GIB),
    "a100-80": round(79.25 * GIB),
    "a100-40": round(39.39 * GIB),
    "l40s": round(44.40 * GIB),
    "rtx4090": round(23.52 * GIB),
    "rtx5090": round(31.36 * GIB),
    "mi300x": round(191.69 * GIB),
}
"""Bytes of one card, before the context of the process."""

CONTEXT_BYTES = 768 * MIB
"""What a process takes on a GPU before it holds a single tensor: context, kernels, cuBLAS.

Measured on an H100: 700 MiB after a step."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": MIB, "GIB": GIB, "TIB": 2**40}


def parse_memory(text: str) -> int:
    """Bytes of ``48GiB``, ``80 GB``, ``512MiB`` or ``1000000``.

    Raises:
        ConfigError: not such a text.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip(), re.ASCII)
    if found is None or found[2].upper() not in _UNITS:
        raise ConfigError(
            f"memory {text!r} is not a size", hint="write it as 48GiB, 80GB or a count of bytes"
        )
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size < 1:
        raise ConfigError(f"memory {text!r} must be positive", hint="write it as 48GiB, say")
    return size


def gpu_memory(name: str) -> int:
    """Bytes of a known card.

    Raises:
        ConfigError: not in the table.
    """
    key = re.sub(r"[\s_]", "", name.lower())
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, 1)
        raise ConfigError(
            f"GPU {name!r} is not known",
            hint=(f"did you mean {near[0]}? " if near else "")
            + f"known: {', '.join(GPUS)}; or give --memory 48GiB",
        )
    return GPUS[key]


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a device of this machine."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return free_ram()


def free_ram(root: Path = Path("/")) -> int:
    """Bytes of RAM that can be had without swapping; a container's limit counts.

    Args:
        root: where ``/proc`` and ``/sys`` are found.
    """
    offers = [size for size in (_available(root), _cgroup(root)) if size is not None]
    if offers:
        return max(0, min(offers))
    try:  # neither Linux nor its files: half of what the machine has
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return 2 * GIB


def _available(root: Path) -> int | None:
    try:
        text = (root / "proc/meminfo").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroup(root: Path) -> int | None:
    """What the control group leaves: its limit less its use, file cache not counted as use."""
    pairs = (
        ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat"),
        (
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "sys/fs/cgroup/memory/memory.usage_in_bytes",
            "sys/fs/cgroup/memory/memory.stat",
        ),
    )
    for limit, used, stat in pairs:
        try:
            most = int((root / limit).read_text(encoding="ascii"))  # "max" means no limit
            now = int((root / used).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        try:
            text = (root / stat).read_text(encoding="ascii")
        except (OSError, ValueError):
            text = ""
        cache = re.search(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)
        return most - now + (int(cache[1]) if cache else 0)
    return None
