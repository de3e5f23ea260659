"""What a corpus operation holds while it decides, in a process of its own.

    python -m tests.unit.corpus_memory OPERATION FOLDER ROWS

prints the peak memory, in bytes, that deciding on ROWS made-up views on disk adds to what the process held
after deciding on a few.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.minhash import MinHashSettings
from data_prep.operations.base import CorpusOperation
from data_prep.operations.mixing import Mix
from data_prep.operations.near_duplicates import Duplicates, NearDuplicates
from data_prep.operations.preferences import VIEW, PreferenceChecks
from data_prep.operations.view_columns import fixed

BATCH, FEW, SHINGLES, BANDS = 2_000, 4_000, 60, 8
Draw = Callable[[np.random.Generator, int], dict[str, Any]]


def places(rng: np.random.Generator, begin: int) -> pa.Array:
    return pa.array([f"data/some-file.jsonl:{row}" for row in range(begin, begin + BATCH)])


def paired(values: np.ndarray) -> np.ndarray:
    """Every second row as the one before it."""
    values[1::2] = values[::2]
    return values


def duplicates(rng: np.random.Generator, begin: int) -> dict[str, Any]:
    keys = paired(rng.integers(0, 2**63, (BATCH, 2), dtype=np.uint64))
    return {"key": fixed(keys), "place": places(rng, begin)}


def near_duplicates(rng: np.random.Generator, begin: int) -> dict[str, Any]:
    """Every second text is the one before it but for one shingle."""
    sets = paired(rng.integers(0, 2**63, (BATCH, SHINGLES), dtype=np.uint64))
    sets[1::2, 0] += np.uint64(1)
    sets.sort(axis=1)
    bounds = pa.array(np.arange(BATCH + 1) * SHINGLES * 8, pa.int64())
    buffers = [None, bounds.buffers()[1], pa.py_buffer(sets)]
    return {
        "keys": fixed(paired(rng.integers(0, 2**63, (BATCH, BANDS), dtype=np.uint64))),
        "shingles": pa.LargeBinaryArray.from_buffers(pa.large_binary(), BATCH, buffers),
        "id": pa.array([f"id-{row}" for row in range(begin, begin + BATCH)]),
        "place": places(rng, begin),
    }


def preferences(rng: np.random.Generator, begin: int) -> dict[str, Any]:
    """Of every two pairs the second contradicts the first."""
    prompt = paired(rng.integers(0, 2**63, BATCH, dtype=np.uint64))
    sides = rng.integers(0, 2**63, (BATCH, 2), dtype=np.uint64)
    sides[1::2] = sides[::2, ::-1]
    sizes = rng.integers(1, 900, (2, BATCH), dtype=np.int32)
    wordless = np.zeros(BATCH, dtype=np.uint8)
    columns = [prompt, sides[:, 0].copy(), sides[:, 1].copy(), wordless, *sizes, places(rng, begin)]
    return dict(zip(VIEW.names, columns, strict=True))


def mix(rng: np.random.Generator, begin: int) -> dict[str, Any]:
    return {
        "source": pa.array(rng.choice(["a", "b", "c"], BATCH)),
        "rank": fixed(rng.integers(0, 2**63, (BATCH, 2), dtype=np.uint64)),
    }


OPERATIONS: dict[str, tuple[CorpusOperation, Draw]] = {
    "duplicates": (Duplicates(), duplicates),
    "near_duplicates": (
        NearDuplicates(MinHashSettings(bands=BANDS), "whole", "first", tie=True),
        near_duplicates,
    ),
    "preference_checks": (PreferenceChecks(), preferences),
    "mix": (Mix({"a": 3, "b": 1, "c": 1}, max_epochs=2), mix),
}


@dataclass(frozen=True)
class FileViews:
    """Views in a file of Arrow's IPC format, of which one batch is read at a time."""

    path: Path
    rows: int

    def __len__(self) -> int:
        return self.rows

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        with pa.OSFile(str(self.path)) as file:
            names = pa.ipc.open_file(file).schema.names
            chosen = [names.index(name) for name in columns or names]
            options = pa.ipc.IpcReadOptions(included_fields=chosen)
            reader = pa.ipc.open_file(file, options=options)
            for number in range(reader.num_record_batches):
                yield pa.Table.from_batches([reader.get_batch(number)])


def written(path: Path, draw: Draw, rows: int) -> FileViews:
    """Made-up views of so many rows."""
    rng = np.random.default_rng(0)
    with pa.OSFile(str(path), "wb") as file:
        writer = None
        for begin in range(0, rows, BATCH):
            table = pa.table(draw(rng, begin))
            writer = writer or pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
    return FileViews(path, rows)


def peak() -> int:
    """Peak memory since `forget_peak`, in bytes (VmHWM)."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def decide(operation: CorpusOperation, views: FileViews) -> int:
    """The verdicts, consumed as a stream; how many there are."""
    with tempfile.TemporaryDirectory(dir=views.path.parent) as scratch:
        return sum(table.num_rows for table in operation.decide(views, Path(scratch)).verdicts)


def main(name: str, folder: Path, rows: int) -> None:
    operation, draw = OPERATIONS[name]
    few, many = written(folder / "few", draw, FEW), written(folder / "many", draw, rows)
    decide(operation, few)
    forget_peak()
    before = peak()
    verdicts = decide(operation, many)
    assert verdicts >= rows // 3, "the views give too few verdicts to say anything"
    print(peak() - before)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
