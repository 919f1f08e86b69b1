"""Names of Gluon that Triton 3.6 (with torch 2.11) and 3.9 (with torch 2.13) spell differently."""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

#: All threads of a partition wait for each other.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
#: A tile from memory to shared memory: (descriptor, coordinates, mbarrier, destination).
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
#: 16 bytes a thread from memory to shared memory: (destination, pointers).
load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
