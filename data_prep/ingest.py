"""Sources -> a stream of records and rejects, each with the file and line it came from.

Files are read row by row. What is wrong with one row is a `Reject`; what is wrong with a whole file or source
(missing, unreadable, in no known format) is a `DataError`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.columns import lookup, prepared
from data_prep.config import GENERATORS, SourceConfig
from data_prep.detection import LOOKED_AT, detect_rows
from data_prep.files import BadRow, read_rows, sha256_file
from data_prep.formats import FORMATS
from data_prep.hub import hub_rows
from data_prep.projections import PROJECTIONS, project
from data_prep.records import InvalidRecord, Kind, Record, check_unicode, excerpt, printable
from data_prep.split import default_group
from posttrain.errors import DataError

LARGEST_BEGINNING = 64 << 20
"""Characters of rows that are held to detect the format."""


@dataclass(frozen=True)
class Reject:
    """One row that did not become a row of the data set. line counts from 1, as do items of a .json list."""

    file: str
    line: int
    reason: str
    detail: str
    excerpt: str


@dataclass
class SourceReport:
    """What dataset.json says of one file or generator. rows: read; sha256: of the bytes, or the records.

    why: the reason for the format where it was detected, for people; not in dataset.json.
    """

    name: str
    format: str
    sha256: str
    rows: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    why: str = ""


RawRows = Iterator[tuple[int, dict[str, Any] | BadRow]]
"""(line, row as its file holds it) pairs."""


def read_file(
    source: SourceConfig, kind: Kind, path: Path, name: str, limit: int | None
) -> tuple[SourceReport, Iterator[tuple[int, Record | Reject]]]:
    """(line, record or reject) pairs of one file, at most `limit`.

    Records are of `kind`, with source and group. The report fills while the pairs are consumed.
    Raises DataError: unreadable, no format fits or several do, or the format cannot feed `kind`.
    """
    report, rows = open_file(source, kind, path, name, limit)
    return report, ((line, parsed(source, kind, report.name, report.format, line, row)) for line, row in rows)


def open_file(
    source: SourceConfig, kind: Kind, path: Path, name: str, limit: int | None
) -> tuple[SourceReport, RawRows]:
    """The rows of one file as it holds them, at most `limit`; what `parsed` makes records of.

    The report fills while they are consumed: its format is there when the first good row is. Raises as
    `read_file`.
    """
    report = SourceReport(name, source.format, sha256_file(path), details=_licence(source))
    return report, _fitting(source, kind, str(path), read_rows(path, source.read), limit, report)


def open_hub(source: SourceConfig, kind: Kind, directory: Path | None = None) -> tuple[SourceReport, RawRows]:
    """The same of a Hub data set. The report's sha256, of the rows read, is set at the end.

    directory: where it was downloaded to. Raises DataError: it cannot be loaded, and as `read_file`.
    """
    place = str(source.hub)
    name = f"{Path(place).name if Path(place).is_dir() else place}/{source.split}"
    report = SourceReport(name, source.format, "", details=_licence(source))
    return report, _hashed(source, kind, directory or Path(place).expanduser(), report)


def _hashed(source: SourceConfig, kind: Kind, directory: Path, report: SourceReport) -> RawRows:
    digest = hashlib.sha256()

    def rows() -> RawRows:
        for line, row in hub_rows(source, directory):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
            yield line, row

    yield from _fitting(source, kind, report.name, rows(), source.rows, report)
    report.sha256 = digest.hexdigest()


def _licence(source: SourceConfig) -> dict[str, Any]:
    return {} if source.licence is None else {"licence": source.licence}


def _fitting(
    source: SourceConfig, kind: Kind, place: str, rows: RawRows, limit: int | None, report: SourceReport
) -> RawRows:
    """The rows, counted, up to `limit`, once it is known that their format can feed `kind`."""
    fits = False
    for line, row in _detected(source, kind, place, rows, report):
        if report.rows == limit:
            return
        report.rows += 1
        if not fits and not isinstance(row, BadRow):
            _check_feeds(place, report.format, kind)
            if FORMATS[report.format].native == "preference" and kind in ("conversation", "text"):
                report.details["use"] = source.use
            fits = True
        yield line, row


def parsed(
    source: SourceConfig, kind: Kind, name: str, form: str, line: int, row: dict[str, Any] | BadRow
) -> Record | Reject:
    """One row of a file called `name`, in the format `form`, as a record of `kind` with source and group."""
    if isinstance(row, BadRow):
        return Reject(name, line, row.reason, printable(row.detail), excerpt(row.raw))
    row = prepared(row, source)
    try:
        record = FORMATS[form].parse(row)
        # The group is that of the source record, so that all kinds made from one file split alike.
        group = _group(row, source.group_column) if source.group_column else default_group(record)
        meta = _with_columns(record.meta, row, source.meta_columns)
        own = _id(row, source.id_column) if source.id_column else record.id
        for where, value in (("the id", own), ("the group", group), ("the meta", meta)):
            check_unicode(value, where)
        record = replace(record, id=own, source=f"{name}:{line}", group=group, meta=meta)
        return project(record, kind, source.use)
    except InvalidRecord as error:
        return Reject(name, line, error.reason, printable(str(error)), excerpt(row))


def _detected(source: SourceConfig, kind: Kind, place: str, rows: RawRows, report: SourceReport) -> RawRows:
    """The same rows, after the report was given the format that the first LOOKED_AT of them are in."""
    if source.format != "auto":
        yield from rows
        return
    while first := _beginning(rows):
        good = [(line, prepared(row, source)) for line, row in first if not isinstance(row, BadRow)]
        if good:
            found = detect_rows(good, place, kind)
            report.format, report.why = found.format, found.why()
        yield from first
        if good:
            break
    yield from rows


def _beginning(rows: RawRows) -> list[tuple[int, dict[str, Any] | BadRow]]:
    """The first LOOKED_AT rows, fewer where they are large."""
    first, size = [], 0
    for line, row in islice(rows, LOOKED_AT):
        first.append((line, row))
        size += len(repr(row))
        if size > LARGEST_BEGINNING:
            break
    return first


def _id(row: dict[str, Any], column: str) -> str:
    """The row's own id; empty, to be filled with a hash of the content, where it has none."""
    value = lookup(row, column)
    return "" if value is None or isinstance(value, (list, dict)) else str(value).strip()


def _with_columns(meta: str, row: dict[str, Any], names: list[str]) -> str:
    """The meta text with these columns of the row added. Raises InvalidRecord: missing_field."""
    if not names:
        return meta
    values = {name: lookup(row, name) for name in names}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise InvalidRecord("missing_field", f"meta_columns: the row has no {', '.join(map(repr, missing))}")
    return json.dumps({**json.loads(meta), **values}, ensure_ascii=False, sort_keys=True, default=str)


def _group(row: dict[str, Any], column: str) -> str:
    """The row's own group. Raises InvalidRecord: missing_group."""
    value = lookup(row, column)
    if value is None or isinstance(value, (list, dict)) or not str(value).strip():
        raise InvalidRecord(
            "missing_group", f"group_column {column!r} holds {excerpt(value, 40)}, not a name or number"
        )
    return str(value)


def _check_feeds(place: str, form: str, kind: Kind) -> None:
    native = FORMATS[form].native
    if kind in PROJECTIONS[native]:
        return
    remedy = f"set kind to one of {', '.join(PROJECTIONS[native])}, or choose other sources"
    if native == "unpaired_preference" and kind == "conversation":
        remedy += "; for demonstrations keep only the rows labelled true and set `format`"
    message = f"{place}: format {form} holds {native} rows, which cannot become kind {kind}"
    raise DataError(f"{message}\n    {remedy}")


def load_generator(name: str) -> Any:
    """The function that GENERATORS names."""
    module, function = GENERATORS[name].split(":")
    return getattr(importlib.import_module(module), function)


def generator_problem(source: SourceConfig, kind: Kind) -> str | None:
    """What is wrong with the options of a generator source, judged by its signature; None when nothing is."""
    signature = inspect.signature(load_generator(source.generator or ""))
    try:
        signature.bind(kind, source.rows, 0, **source.options)
    except TypeError as error:
        known = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        return f"generator {source.generator}: {error}; its options are: {', '.join(known) or 'none'}"
    return None


def read_generator(
    source: SourceConfig, kind: Kind, seed: int
) -> tuple[SourceReport, Iterator[tuple[int, Record | Reject]]]:
    """(number, record) pairs of a named generator. The report's sha256, of the records, is set at the end.

    Raises DataError: options the generator refuses, or it does not make records of `kind`.
    """
    seed = seed if source.seed is None else source.seed
    details = {"generator": source.generator, "seed": seed, "options": source.options}
    report = SourceReport(str(source.generator), "generator", "", details=details)
    return report, _generated(source, kind, seed, report)


def _generated(
    source: SourceConfig, kind: Kind, seed: int, report: SourceReport
) -> Iterator[tuple[int, Record | Reject]]:
    digest = hashlib.sha256()
    problem = generator_problem(source, kind)
    if problem:
        raise DataError(f"{problem}\n    correct the source's `options`")
    records = load_generator(report.name)(kind, source.rows, seed, **source.options)
    while True:
        try:
            record = next(records, None)
        except InvalidRecord:
            raise
        except ValueError as error:
            raise DataError(
                f"generator {report.name}: {error}\n    correct the source's `options` or `kind`"
            ) from error
        if record is None:
            break
        report.rows += 1
        digest.update(json.dumps([record.meta, record.content_columns()], sort_keys=True).encode())
        yield report.rows, record
    report.sha256 = digest.hexdigest()
