"""Ids of their own for all rows: `wanted`, or with the smallest number from 2 on that makes it new.

Only rows that could want the same id are held together: those whose wanted id several rows want, and those
whose id is such a one with numbers behind it (a-2, a-2-3), for these are the names that are given out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.sharded.parsing import id_hash, id_hashes
from data_prep.sharded.plan import READ
from data_prep.sharded.store import Store, read_table, replacing, write_bytes, write_table

IDS = pa.schema([("row", pa.int64()), ("id", pa.string())])
_NUMBERED = re.compile(r"(.*)-[0-9]+", re.DOTALL)
Hashes = NDArray[np.uint64]


def unique_id(ids: Counter[str], wanted: str) -> str:
    """`wanted`, or with a number where that id is taken; the id is then taken."""
    name = wanted
    while ids[name]:
        ids[wanted] += 1
        name = f"{wanted}-{ids[wanted]}"
    ids[name] += 1
    return name


def give_ids(store: Store, chunks: int) -> None:
    """Write the ids that differ from the wanted ones, of the rows that are no duplicates, for each chunk."""
    # Hashes are read twice, so that no more than one array of them is held.
    held = [_left(store, chunk)[1] for chunk in range(chunks)]
    every = np.concatenate(held) if held else np.empty(0, np.uint64)
    del held
    every.sort()
    several = np.unique(every[1:][every[1:] == every[:-1]])
    new: list[str] = []
    if len(several):
        ids: Counter[str] = Counter()
        for chunk in range(chunks):
            changed: list[tuple[int, str]] = []
            for place, name in _in_question(store, chunk, *_left(store, chunk), several):
                given = unique_id(ids, name)
                if given != name:
                    changed.append((place, given))
            if changed:
                table = pa.table([[place for place, _ in changed], [name for _, name in changed]], IDS)
                write_table(store.file(1, chunk, "ids.arrow"), table)
                new += [name for _, name in changed]
    with replacing(store.root / "ids") as beside, beside.open("wb") as stream:
        every.tofile(stream)
        id_hashes(new).tofile(stream)


def _left(store: Store, chunk: int) -> tuple[NDArray[np.int64], Hashes]:
    """Places of the rows of a chunk that are no duplicates, and hashes of the ids they want."""
    hashes = read_table(store.file(READ, chunk, "keys.arrow"), ["id"]).column("id").to_numpy()
    left = np.ones(len(hashes), dtype=bool)
    file = store.file(1, chunk, "verdicts.arrow")
    if file.exists():
        left[read_table(file, ["row"]).column("row").to_numpy()] = False
    return np.flatnonzero(left), hashes[left]


def _in_question(
    store: Store, chunk: int, places: NDArray[np.int64], hashes: Hashes, several: Hashes
) -> Iterator[tuple[int, str]]:
    """(place, wanted id) of the rows that may have to share a name with others."""
    names = read_table(store.file(READ, chunk, "rows.arrow"), ["id"]).column("id").to_pylist()
    known = set(places[_inside(hashes, several)].tolist())
    for place in places.tolist():
        if place in known or _stems_in(names[place], several):
            yield place, names[place]


def _inside(hashes: Hashes, ordered: Hashes) -> NDArray[np.bool_]:
    at = np.minimum(np.searchsorted(ordered, hashes), len(ordered) - 1)
    return ordered[at] == hashes


def _stems_in(name: str, several: Hashes) -> bool:
    """Whether the id without one or more numbers behind it is among these."""
    while found := _NUMBERED.fullmatch(name):
        name = found.group(1)
        if _inside(np.array([id_hash(name)], dtype=np.uint64), several)[0]:
            return True
    return False


def write_taken(store: Store, segment: int, chunks: int) -> None:
    """Write, sorted, hashes of all ids that rows have or had before the decision that `segment` is about."""
    held: list[Hashes] = [np.fromfile(store.root / "ids", dtype=np.uint64)]
    held += [
        np.fromfile(file, dtype=np.uint64) for at in range(1, segment) for file in _made(store, at, chunks)
    ]
    for chunk in range(chunks):
        names = read_table(store.file(segment - 1, chunk, "rows.arrow"), ["id"]).column("id").to_pylist()
        held.append(id_hashes(names))
    write_bytes(store.segment(segment) / "taken", np.unique(np.concatenate(held)).tobytes())


def _made(store: Store, segment: int, chunks: int) -> Sequence[Path]:
    return [store.file(segment, chunk, "made") for chunk in range(chunks)]


class Taken:
    """Gives copies of rows ids that no row has or had.

    The smallest free number is the one that a count of all rows in their order would give: a number is only
    passed over when its name is taken.
    """

    def __init__(self, store: Store, segment: int) -> None:
        self._file = store.segment(segment) / "taken"
        self._taken: Any = None
        self._new: set[str] = set()
        self.made: list[int] = []

    def copy_name(self, id: str) -> str:
        """A new id for a copy of the row `id`."""
        if self._taken is None:
            self._taken = np.memmap(self._file, dtype=np.uint64, mode="r")
        number = 2
        while not self._free(name := f"{id}-{number}"):
            number += 1
        self._new.add(name)
        self.made.append(id_hash(name))
        return name

    def _free(self, name: str) -> bool:
        key = np.uint64(id_hash(name))
        at = int(np.searchsorted(self._taken, key))
        return name not in self._new and not (at < len(self._taken) and self._taken[at] == key)
