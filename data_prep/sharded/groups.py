"""Groups of rows that an operation tied together become one, under the smallest of their names.

So a side, which is a hash of the group, is the same for all of them, whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.sharded.store import read_table, write_table

BATCH_ROWS = 100_000


def join_groups(files: Sequence[Path], joined: Sequence[Path]) -> None:
    """Write to `joined` the groups of the rows of each file, where any of them changes its name.

    files: tables with the columns group and ties, a chunk each.
    """
    names, roots = _roots(*_ties(files))
    if not len(names):
        return
    for begin, groups in _columns(files):
        found = pc.index_in(groups, value_set=names)
        if found.null_count == len(groups):
            continue
        renamed = pc.if_else(pc.is_valid(found), pc.take(roots, pc.fill_null(found, 0)), groups)
        place = 0
        for offset, column in enumerate(groups.chunks):
            part = renamed.slice(place, len(column))
            place += len(column)
            if not part.equals(pa.chunked_array([column])):
                write_table(joined[begin + offset], pa.table({"group": part}))


def _ties(files: Sequence[Path]) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """The group and the tie of every tie of every row."""
    groups, ties = [], []
    for file in files:
        table = read_table(file, ["group", "ties"]).combine_chunks()
        for batch in table.to_batches():
            parents = pc.list_parent_indices(batch.column("ties"))
            groups.append(batch.column("group").take(parents))
            ties.append(pc.list_flatten(batch.column("ties")))
    return pa.chunked_array(groups, pa.string()), pa.chunked_array(ties, pa.string())


def _roots(groups: pa.ChunkedArray, ties: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Names of groups that become part of another, and the names of those, in the same order."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    names = pc.unique(groups)
    # Bytes of UTF-8 are in the order of the code points, as Python compares texts.
    names = names.take(pc.sort_indices(names))
    known = pc.unique(ties)
    left = pc.index_in(groups, value_set=names).to_numpy()
    right = pc.index_in(ties, value_set=known).to_numpy() + len(names)
    size = len(names) + len(known)
    edges = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size))
    _, label = connected_components(edges, directed=False)
    _, first, inverse = np.unique(label[: len(names)], return_index=True, return_inverse=True)
    root = first[inverse]
    moved = np.flatnonzero(root != np.arange(len(names)))
    return names.take(pa.array(moved)), names.take(pa.array(root[moved]))


def _columns(files: Sequence[Path]) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """(place of the first file, groups of some files), a chunk of the array a file."""
    begin, held, rows = 0, [], 0
    for number, file in enumerate(files):
        column = read_table(file, ["group"]).column("group")
        held.append(column.combine_chunks())
        rows += len(column)
        if rows >= BATCH_ROWS or number + 1 == len(files):
            yield begin, pa.chunked_array(held, pa.string())
            begin, held, rows = number + 1, [], 0
