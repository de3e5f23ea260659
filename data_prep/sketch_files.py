"""What near-duplicates are found by, on disk: band keys band by band, and the shingle sets that are compared.

In memory are 9 bytes a text for where its set begins and whether it has one, and one band at a time, 32 bytes
a text while its buckets are made. Sets are read one by one from the file, not mapped, so that memory does not
grow with them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from data_prep.near_duplicates import Buckets, buckets
from data_prep.shingles import Hashes

ITEM = 8
"""Bytes of a key and of a hash."""


class SketchFiles:
    """Sketches of `count` texts. First all keys are added, then the sets of the texts that are `wanted`.

    A context manager, which closes its files. folder: where they are made.
    """

    def __init__(self, folder: Path, count: int, bands: int) -> None:
        self.count, self.bands = count, bands
        self._keys = os.open(folder / "keys", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._sets = os.open(folder / "sets", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self._filled = np.zeros(count, dtype=np.bool_)
        self._seen = self._written = self._sized = 0
        self._bounds = np.zeros(count + 1, dtype=np.int64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._keys)
        os.close(self._sets)

    def add_keys(self, keys: Hashes, filled: NDArray[np.bool_]) -> None:
        """Of the next texts (texts, bands); filled: whether a text has any word."""
        self._filled[self._seen : self._seen + len(keys)] = filled
        self._seen += len(keys)
        chosen = np.ascontiguousarray(keys[filled].T)
        for band, of_band in enumerate(chosen):
            _write(self._keys, of_band, (band * self.count + self._written) * ITEM)
        self._written += chosen.shape[1]

    def buckets(self) -> Iterator[Buckets]:
        """Of every band, in order."""
        numbers = np.flatnonzero(self._filled)
        for band in range(self.bands):
            yield buckets(_read(self._keys, len(numbers), band * self.count * ITEM), numbers)

    def wanted(self) -> NDArray[np.bool_]:
        """Which texts are in a bucket."""
        found = np.zeros(self.count, dtype=np.bool_)
        for band in self.buckets():
            found[band.members] = True
        return found

    def add_sets(self, hashes: Hashes, sizes: NDArray[np.int64]) -> None:
        """Shingle sets of the next texts, one after the other; size 0 for a text that is not wanted."""
        begin = self._bounds[self._sized]
        _write(self._sets, hashes, int(begin) * ITEM)
        np.cumsum(sizes, out=self._bounds[self._sized + 1 : self._sized + 1 + len(sizes)])
        self._bounds[self._sized + 1 : self._sized + 1 + len(sizes)] += begin
        self._sized += len(sizes)

    def read(self, text: int) -> Hashes:
        """The shingle set of a text."""
        begin, end = self._bounds[text : text + 2].tolist()
        return _read(self._sets, end - begin, begin * ITEM)


def _read(file: int, items: int, begin: int) -> Hashes:
    """Numbers from byte `begin` on. One system call gives 2 GiB at most."""
    values = np.empty(items, dtype=np.uint64)
    left = values.data.cast("B") if items else memoryview(b"")
    while left:
        done = os.preadv(file, [left], begin)
        if not done:
            raise OSError(f"a file of sketches ends {len(left)} bytes early")
        left, begin = left[done:], begin + done
    return values


def _write(file: int, values: Hashes, begin: int) -> None:
    left = memoryview(values.tobytes())
    while left:
        done = os.pwrite(file, left, begin)
        left, begin = left[done:], begin + done
