"""Rows of the sources, in order, cut into chunks: the only part of the work that one process has to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from data_prep.config import CurateConfig
from data_prep.files import BadRow, display_names, expand
from data_prep.ingest import SourceReport, open_file, open_hub, read_generator
from data_prep.records import Record
from data_prep.sharded.plan import Part, Sizes

Rows = Iterator[tuple[int, Any]]


class Counter(Protocol):
    """Counts what was read."""

    def advance(self, n: int = 1) -> None:
        """So many more."""
        ...


Reading = Callable[[str, int | None], AbstractContextManager[Counter]]
"""Begins to count the rows of a file, with their number where it is known."""


def chunks(
    config: CurateConfig,
    hub: Callable[[int], Path | None],
    reports: list[SourceReport],
    sizes: Sizes,
    reading: Reading,
    read: Callable[[SourceReport], None],
) -> Iterator[Sequence[Part]]:
    """The chunks; where they begin depends on the rows alone. hub: where a source's data set is.

    reports: one a file is added, and filled while its rows are read. read: called when they are. Raises
    DataError as `read_file`.
    """
    filling = _Filling(sizes)
    for index, report, rows, total in _opened(config, hub):
        reports.append(report)
        with reading(report.name, total) as counter:
            for line, row in rows:
                counter.advance()
                filling.add(index, report, line, row)
                if filling.full():
                    yield filling.taken()
        filling.close()
        read(report)
    if filling.rows:
        yield filling.taken()


def _opened(
    config: CurateConfig, hub: Callable[[int], Path | None]
) -> Iterator[tuple[int, SourceReport, Rows, int | None]]:
    """(place of the source, report, rows, how many they are where that is known) of each file in order."""
    files = [expand(source.path) if source.path else [] for source in config.sources]
    names = display_names([path for paths in files for path in paths])
    for index, (source, paths) in enumerate(zip(config.sources, files, strict=True)):
        if source.generator:
            yield index, *read_generator(source, config.kind, config.seed), source.rows
        if source.hub:
            yield index, *open_hub(source, config.kind, hub(index)), source.rows
        left = source.rows
        for path in paths:
            if left == 0:
                break
            report, rows = open_file(source, config.kind, path, names[path], left)
            yield index, report, rows, None
            left = None if left is None else left - report.rows


class _Filling:
    """The chunk that is being filled."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self.rows = self._characters = 0
        self._parts: list[Part] = []
        self._open: list[tuple[int, Any]] = []
        self._of: tuple[int, SourceReport] | None = None

    def add(self, source: int, report: SourceReport, line: int, row: Any) -> None:
        self._of = (source, report)
        self._open.append((line, row))
        self.rows += 1
        self._characters += _characters(row)

    def full(self) -> bool:
        return self.rows >= self._sizes.rows or self._characters >= self._sizes.characters

    def close(self) -> None:
        """End the part of the file that is being read; its format is known once a row of it was."""
        if self._open and self._of is not None:
            source, report = self._of
            self._parts.append(Part(source, report.name, report.format, tuple(self._open)))
            self._open = []

    def taken(self) -> Sequence[Part]:
        self.close()
        parts, self._parts = self._parts, []
        self.rows = self._characters = 0
        return parts


def _characters(value: Any) -> int:
    """About how large a row is: the characters of its texts, and a few for everything else."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _characters(item) for key, item in value.items() if isinstance(key, str))
    if isinstance(value, (list, tuple)):
        return sum(map(_characters, value))
    if isinstance(value, BadRow):
        return len(value.raw)
    if isinstance(value, Record):
        return len(value.meta) + sum(len(text) for _, text in value.turns())
    return 8


def in_order(results: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Results by number, from 0, each when those before it are there."""
    early: dict[int, Any] = {}
    for number in count():
        while number not in early:
            found = next(results, None)
            if found is None:
                return
            early[found[0]] = found[1]
        yield early.pop(number)
