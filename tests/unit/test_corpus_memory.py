"""Corpus operations hold so many bytes a row while they decide, whatever the views are long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = 200_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("operation", "bytes_a_row"),
    [
        ("duplicates", 64),
        ("preference_checks", 112),
        ("mix", 64),
        pytest.param("near_duplicates", 128, marks=pytest.mark.slow),
    ],
)
def test_memory_a_row(operation: str, bytes_a_row: int, tmp_path: Path) -> None:
    """At the peak, batches of views and verdicts included. A string a row would be more than the bound."""
    # What is freed goes back at once, so that the peak is of what is held.
    allocators = {"MALLOC_MMAP_THRESHOLD_": "65536", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.corpus_memory", operation, str(tmp_path), str(ROWS)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **allocators},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    assert 0 < int(done.stdout) <= bytes_a_row * ROWS
