"""`posttrain data show`: records of a curated data set or of any data file, as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from data_prep.columns import prepared
from data_prep.config import SourceConfig
from data_prep.dataset import COMMON_COLUMNS, SPLITS, columns
from data_prep.doctor.examine import beginning
from data_prep.doctor.suggest import suggest
from data_prep.export import side_files
from data_prep.files import BadRow, expand, read_rows
from data_prep.formats import FORMATS
from data_prep.records import (
    KINDS,
    ConversationRecord,
    InvalidRecord,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedPreferenceRecord,
    excerpt,
)
from data_prep.rendering import Rendered, Renderer, visible
from posttrain.errors import DataError, UserError

_TYPES: dict[str, type[Record]] = {
    "text": TextRecord,
    "conversation": ConversationRecord,
    "preference": PreferenceRecord,
    "unpaired_preference": UnpairedPreferenceRecord,
    "prompt": PromptRecord,
}
_STYLES = {"user": "cyan", "assistant": "green", "chosen": "green", "desirable": "green", "system": "magenta"}


@dataclass(frozen=True)
class Shown:
    """One record, or with `problem` a row that is none. number: counts from 1 over all that was named."""

    number: int
    place: str
    record: Record | None
    problem: str = ""
    raw: str = ""
    rendered: list[Rendered] = field(default_factory=list)

    def holds(self, text: str) -> bool:
        """Whether the record's turns, or the row's text, hold `text`, whatever the case."""
        texts = [content for _, content in self.record.turns()] if self.record else [self.raw]
        return any(text.casefold() in content.casefold() for content in texts)

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        if self.record is None:
            return {"number": self.number, "place": self.place, "problem": self.problem, "row": self.raw}
        return {
            "number": self.number,
            "place": self.place,
            "kind": self.record.kind,
            "id": self.record.id,
            "meta": json.loads(self.record.meta),
            **self.record.content_columns(),
            **({"rendered": [part.as_json() for part in self.rendered]} if self.rendered else {}),
        }

    def print(self, console: Console) -> None:
        """Write the record for a terminal."""
        name = f" {self.record.id}" if self.record and self.record.id else ""
        console.print(Text(f"{self.number}{name} ({self.place})", "bold"))
        if self.record is None:
            console.print(Text(f"  rejected: {visible(self.problem)}", "red"))
            console.print(Text(f"  {visible(self.raw)}"))
        elif self.rendered:
            for part in self.rendered:
                part.print(console)
        else:
            for role, content in self.record.turns():
                console.print(Text(f"  {role} ({len(content):,} characters)", _STYLES.get(role, "dim")))
                console.print(Text(visible(content)), soft_wrap=True)
        if self.record is not None and self.record.meta != "{}":
            console.print(Text(f"  meta: {excerpt(self.record.meta, 300)}", "dim"))
        console.print()


def browse(
    data: str,
    *,
    rows: int = 5,
    start: int = 1,
    grep: str | None = None,
    split: str = "train",
    tokenizer: str | None = None,
) -> list[Shown]:
    """`rows` records from the `start`-th on, only those that hold `grep` where it is given.

    data: a dataset directory, the run directory of a curate stage, or a file, folder or glob. tokenizer: a
    model or tokenizer directory, a run, or a Hub id. Raises DataError when there is nothing to show,
    UserError for a tokenizer that cannot be loaded or has no chat template.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}\n    give --split {' or '.join(SPLITS)}")
    renderer = Renderer(tokenizer) if tokenizer else None
    found: list[Shown] = []
    count = 0
    for number, (place, record, problem, raw) in enumerate(_records(data, split), start=1):
        count = number
        shown = Shown(number, place, record, problem, raw)
        if number < start or (grep is not None and not shown.holds(grep)):
            continue
        if renderer is not None and record is not None:
            shown.rendered.extend(renderer.render(record))
        found.append(shown)
        if len(found) == rows:
            return found
    if not found:
        what = f"no record from number {start} on" + (f" holds {grep!r}" if grep is not None else "")
        raise DataError(f"{data}: {what}, of {count:,}\n    lower --from, or choose another text")
    return found


_Row = tuple[str, Record | None, str, str]


def _records(data: str, split: str) -> Iterator[_Row]:
    directory = Path(data).expanduser()
    if (directory / f"{split}.parquet").is_file() or any(directory.glob(f"{split}-*-of-*.parquet")):
        for file in side_files(directory, split):  # type: ignore[arg-type]
            yield from _curated(file)
        return
    for path in expand(data):
        yield from _raw(path)


def _curated(file: Path) -> Iterator[_Row]:
    for number, row in read_rows(file):
        if isinstance(row, BadRow):
            raise DataError(f"{file}: row {number}: {row.detail}\n    run the curate stage again")
        kind = next((kind for kind in reversed(KINDS) if _fits(kind, row)), None)
        if kind is None:
            raise DataError(
                f"{file}: holds no known kind of rows (columns {', '.join(row)})\n"
                "    point to a directory written by the curate stage"
            )
        yield f"{file.name}:{number}, from {row['source']}", _typed(kind, row), "", ""


def _fits(kind: str, row: dict[str, Any]) -> bool:
    return set(row) == set(columns(kind))  # type: ignore[arg-type]


def _typed(kind: str, row: dict[str, Any]) -> Record:
    content: dict[str, Any] = {
        name: [Message(**turn) for turn in value] if isinstance(value, list) else value
        for name, value in row.items()
        if name not in COMMON_COLUMNS
    }
    return _TYPES[kind](**{name: row[name] for name in COMMON_COLUMNS}, **content)


def _raw(path: Path) -> Iterator[_Row]:
    pairs = read_rows(path)
    first = beginning(pairs)
    good: Sequence[tuple[int, Any]] = [(line, row) for line, row in first if not isinstance(row, BadRow)]
    chosen = suggest(good, str(path))
    if chosen is None and good:
        raise DataError(
            f"{path}: no known format, and no column with text\n    `posttrain data doctor {path}` says more"
        )
    source = SourceConfig.model_validate({"path": str(path), **(chosen.settings if chosen else {})})
    for line, row in chain(first, pairs):
        place = f"{path.name}:{line}"
        if isinstance(row, BadRow):
            yield place, None, f"{row.reason}: {row.detail}", excerpt(row.raw, 400)
            continue
        try:
            yield place, FORMATS[source.format].parse(prepared(row, source)), "", ""
        except InvalidRecord as error:
            yield place, None, f"{error.reason}: {error}", excerpt(row, 400)
