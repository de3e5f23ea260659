"""Memory that a phase of the work used and no longer needs goes back to the system before the next one."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


@contextmanager
def system_memory() -> Iterator[None]:
    """Arrow takes memory from the allocator of the system: its own ones keep more of what was freed."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def release_memory() -> None:
    """Give free memory back, so that the peaks of two phases do not add up.

    The allocators of Arrow and of glibc keep what was freed for themselves. Where there is no glibc, only
    Arrow's is asked.
    """
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
