"""Memory that a phase of the work used and no longer needs goes back to the system before the next one."""

from __future__ import annotations

import ctypes
import sys

import pyarrow as pa


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
