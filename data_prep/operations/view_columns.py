"""Columns of views as arrays, and single cells of them, for corpus operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    found = np.empty(len(order), dtype=np.int64)
    # The sort is stable, so a run begins with its first row.
    found[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    return found


def blocks(rows: NDArray[np.int64], size: int = 8192) -> Iterator[NDArray[np.int64]]:
    """`rows` in runs of at most `size`."""
    return (rows[begin : begin + size] for begin in range(0, len(rows), size))


class Cells:
    """The strings of a column at some rows. rows: ascending, each once."""

    def __init__(self, views: Views, column: str, rows: NDArray[np.int64]) -> None:
        parts, begin = [], 0
        for table in views.tables([column]):
            low, high = np.searchsorted(rows, [begin, begin + table.num_rows])
            if low < high:
                parts.append(table[column].take(pa.array(rows[low:high] - begin)).combine_chunks())
            begin += table.num_rows
        self._rows = rows
        self._cells = pa.chunked_array(parts, pa.string()).cast(pa.large_string()).combine_chunks()

    def at(self, rows: NDArray[np.int64]) -> list[str]:
        """The strings at some of the rows, in any order."""
        return self._cells.take(pa.array(np.searchsorted(self._rows, rows))).to_pylist()
