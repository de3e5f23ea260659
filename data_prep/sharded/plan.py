"""What is done in which segment, and what a process needs to know to do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import CurateConfig
from data_prep.ingest import BadRow
from data_prep.operations.base import MapOperation
from data_prep.operations.build import Surroundings, build
from data_prep.operations.engine import Step
from data_prep.records import Record
from posttrain.errors import UserError

FORMAT = 2
"""Of the files in the work directory: those of another version are not gone on with."""
READ = 0
"""Number of the segment that reads."""
Result = tuple[int, dict[str, Any]]
"""A chunk and what is said of it."""


class EngineError(UserError):
    """What runs the tasks is not to be had. Nothing is wrong with the rows, so what is done stays."""


@dataclass(frozen=True)
class Sizes:
    """Bounds of a chunk: rows, and characters of text."""

    rows: int = 5_000
    characters: int = 8 << 20


@dataclass(frozen=True)
class Setup:
    """What every process is given. inputs: local paths of the stage's inputs, by field."""

    config: CurateConfig
    root: Path
    inputs: Mapping[str, Path]

    def steps(self) -> list[Step]:
        """The operations. Raises as `build`."""
        around = Surroundings(lambda field: self.inputs[field], self.config.split.by == "cluster")
        return build(self.config.operations, around)


@dataclass(frozen=True)
class Part:
    """Rows of one file, or records of a generator, inside a chunk. source: its place in the configuration."""

    source: int
    name: str
    format: str
    rows: Sequence[tuple[int, dict[str, Any] | BadRow | Record]]


@dataclass(frozen=True)
class Task:
    """One chunk in one segment. parts: what is read; writes: rows are put on their sides right after."""

    segment: int
    chunk: int
    parts: Sequence[Part] = ()
    writes: bool = False


@dataclass(frozen=True)
class Segment:
    """A pass over the chunks.

    decided: the step, from 1, whose decision is applied first, 0 for exact duplicates and ids. maps: the map
    operations after it. viewed: the corpus operation whose views are made then, None in the last one.
    """

    number: int
    decided: int
    maps: tuple[int, ...]
    viewed: int | None


def segments(steps: Sequence[Step]) -> list[Segment]:
    """The segments between reading and writing."""
    found: list[Segment] = []
    decided, maps = 0, []
    for number, step in enumerate(steps, start=1):
        if isinstance(step.operation, MapOperation):
            maps.append(number)
        else:
            found.append(Segment(len(found) + 1, decided, tuple(maps), number))
            decided, maps = number, []
    return [*found, Segment(len(found) + 1, decided, tuple(maps), None)]
