"""Columns of views as arrays, and single cells of them, for corpus operations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.operations.base import Row, Views


def place(row: Row) -> str:
    """Where a row was read: file and line."""
    return f"{row.file}:{row.line}"


def words_of(column: pa.ChunkedArray) -> NDArray[np.uint64]:
    """A column of fixed-size binary without nulls as big-endian words of 8 bytes: (rows, words).

    They order as the bytes do.
    """
    array = column.combine_chunks()
    width = column.type.byte_width
    if not len(array):
        return np.empty((0, width // 8), dtype=np.uint64)
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    data = data[array.offset * width : (array.offset + len(array)) * width]
    return data.view(">u8").reshape(len(array), -1).astype(np.uint64)


def fixed(words: NDArray[np.uint64]) -> pa.Array:
    """What `words_of` reads: (rows, words) as fixed-size binary."""
    data = np.ascontiguousarray(words).astype(">u8")
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(8 * words.shape[1]), len(words), [None, pa.py_buffer(data)]
    )


def all_words(views: Views, column: str, words: int) -> NDArray[np.uint64]:
    """`words_of` a column of all views: (words, rows), 8 bytes a word."""
    found = np.empty((words, len(views)), dtype=np.uint64)
    done = 0
    for table in views.tables([column]):
        found[:, done : done + table.num_rows] = words_of(table[column]).T
        done += table.num_rows
    return found


def same_as_first(keys: Sequence[NDArray[np.uint64]]) -> NDArray[np.int64]:
    """Of every row the first row whose keys are all the same, its own where it is the first."""
    order = np.lexsort(keys)
    begins = np.zeros(len(order), dtype=np.bool_)
    begins[:1] = True
    for key in keys:
        ordered = key[order]
        begins[1:] |= ordered[1:] != ordered[:-1]
        del ordered
    # Where in the order each run begins. The sort is stable, so that is the first row of it.
    run = np.arange(len(order))
    run[~begins] = 0
    np.maximum.accumulate(run, out=run)
    np.take(order, run, out=run, mode="clip")
    found = np.empty(len(order), dtype=np.int64)
    found[order] = run
    return found


def blocks(rows: NDArray[np.int64], size: int = 8192) -> Iterator[NDArray[np.int64]]:
    """`rows` in runs of at most `size`."""
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))


def cluster_counts(sizes: NDArray[np.int64]) -> dict[str, int]:
    """How many clusters of two rows and more, the rows in them, and those of the largest. sizes: as below."""
    several = sizes[sizes > 1]
    return {
        "clusters": len(several),
        "rows_in_clusters": int(several.sum()),
        "largest_cluster": int(several.max(initial=0)),
    }


def cluster_facts(sizes: NDArray[np.int64], views: Views, shown: int = 5) -> dict[str, Any]:
    """Of clusters of two rows and more. sizes: rows of the cluster that each row leads, or 0.

    cluster_sizes: clusters by number of rows; largest_clusters: the place of the first row, and the number of
    rows, of a few.
    """
    leaders = np.flatnonzero(sizes > 1)
    numbers, counts = np.unique(sizes[leaders], return_counts=True)
    largest = leaders[np.argsort(-sizes[leaders], kind="stable")[:shown]]
    places: dict[int, str] = {}
    begin = 0
    for table in views.tables(["place"]) if len(largest) else ():
        for row in largest[(begin <= largest) & (largest < begin + table.num_rows)].tolist():
            places[row] = table["place"][row - begin].as_py()
        begin += table.num_rows
    return {
        "cluster_sizes": dict(zip(map(str, numbers.tolist()), counts.tolist(), strict=True)),
        "largest_clusters": [
            {"first": places[row], "rows": size}
            for row, size in zip(largest.tolist(), sizes[largest].tolist(), strict=True)
        ],
    }


class Cells:
    """The strings of a column at some rows, in a file; 16 bytes a row are held. rows: ascending, each once.

    A context manager, which closes the file.
    """

    def __init__(self, views: Views, column: str, rows: NDArray[np.int64], scratch: Path) -> None:
        self._rows = rows
        self._bounds = np.zeros(len(rows) + 1, dtype=np.int64)
        self._file = (scratch / column).open("x+b")
        begin = low = 0
        for table in views.tables([column]):
            high = low + int(np.searchsorted(rows[low:], begin + table.num_rows))
            chosen = table[column].take(pa.array(rows[low:high] - begin)).to_pylist()
            cells = [cell.encode() for cell in chosen]
            self._bounds[low + 1 : high + 1] = self._bounds[low] + np.cumsum([len(cell) for cell in cells])
            self._file.write(b"".join(cells))
            begin, low = begin + table.num_rows, high
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def at(self, rows: NDArray[np.int64]) -> list[str]:
        """The strings at some of the rows, in any order."""
        places = np.searchsorted(self._rows, rows)
        bounds = zip(self._bounds[places].tolist(), self._bounds[places + 1].tolist(), strict=True)
        return [os.pread(self._file.fileno(), end - begin, begin).decode() for begin, end in bounds]
