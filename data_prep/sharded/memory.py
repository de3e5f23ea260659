"""Memory that a phase of the work used and no longer needs goes back to the system before the next one."""

from __future__ import annotations

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

    Inside `system_memory` Arrow asks the allocator of the system, which with glibc (malloc_trim) gives back
    what Python and NumPy freed as well.
    """
    pa.default_memory_pool().release_unused()
