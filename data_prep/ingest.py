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
from pathlib import Path
from typing import Any

from data_prep.config import GENERATORS, SourceConfig
from data_prep.files import BadRow, read_rows, sha256_file
from data_prep.formats import FORMATS, detect
from data_prep.projections import PROJECTIONS, project
from data_prep.records import InvalidRecord, Kind, Record, excerpt
from data_prep.split import default_group
from posttrain.errors import DataError


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
    """What dataset.json says of one file or generator. rows: read; sha256: of the bytes, or the records."""

    name: str
    format: str
    sha256: str
    rows: int = 0
    details: dict[str, Any] = field(default_factory=dict)


def read_file(
    source: SourceConfig, kind: Kind, path: Path, name: str, limit: int | None
) -> tuple[SourceReport, Iterator[tuple[int, Record | Reject]]]:
    """(line, record or reject) pairs of one file, at most `limit`.

    Records are of `kind`, with source and group. The report fills while the pairs are consumed.
    Raises DataError: unreadable, no format fits, or the format cannot feed `kind`.
    """
    report = SourceReport(name, source.format, sha256_file(path))
    return report, _from_file(source, kind, path, limit, report)


def _from_file(
    source: SourceConfig, kind: Kind, path: Path, limit: int | None, report: SourceReport
) -> Iterator[tuple[int, Record | Reject]]:
    for line, row in read_rows(path):
        if report.rows == limit:
            return
        report.rows += 1
        if isinstance(row, BadRow):
            yield line, Reject(report.name, line, row.reason, row.detail, excerpt(row.raw))
            continue
        row = {**row, **{ours: row.get(theirs) for ours, theirs in source.columns.items()}}
        if report.format == "auto":
            report.format = _detect(path, line, row, kind)
        _check_feeds(path, report.format, kind)
        if FORMATS[report.format].native == "preference" and kind in ("conversation", "text"):
            report.details["use"] = source.use
        try:
            record = FORMATS[report.format].parse(row)
            # The group is that of the source record, so that all kinds made from one file split alike.
            group = _group(row, source.group_column) if source.group_column else default_group(record)
            meta = _with_columns(record.meta, row, source.meta_columns)
            record = replace(record, source=f"{report.name}:{line}", group=group, meta=meta)
            yield line, project(record, kind, source.use)
        except InvalidRecord as error:
            yield line, Reject(report.name, line, error.reason, str(error), excerpt(row))


def _with_columns(meta: str, row: dict[str, Any], names: list[str]) -> str:
    """The meta text with these columns of the row added. Raises InvalidRecord: missing_field."""
    if not names:
        return meta
    missing = [name for name in names if row.get(name) is None]
    if missing:
        raise InvalidRecord("missing_field", f"meta_columns: the row has no {', '.join(map(repr, missing))}")
    kept = {**json.loads(meta), **{name: row[name] for name in names}}
    return json.dumps(kept, ensure_ascii=False, sort_keys=True)


def _group(row: dict[str, Any], column: str) -> str:
    """The row's own group. Raises InvalidRecord: missing_group."""
    value = row.get(column)
    if value is None or isinstance(value, (list, dict)) or not str(value).strip():
        raise InvalidRecord(
            "missing_group", f"group_column {column!r} holds {excerpt(value, 40)}, not a name or number"
        )
    return str(value)


def _detect(path: Path, line: int, row: dict[str, Any], kind: Kind) -> str:
    found = detect(row, kind)
    if found is not None:
        return found
    needs = "\n".join(f"      {name}: {form.needs}" for name, form in FORMATS.items())
    fields = ", ".join(map(str, row)) or "none"
    raise DataError(
        f"{path}:{line}: cannot tell the format from the fields {fields}\n"
        f"    set `format`, and `columns` to rename fields. What each format needs:\n{needs}"
    )


def _check_feeds(path: Path, form: str, kind: Kind) -> None:
    native = FORMATS[form].native
    if kind in PROJECTIONS[native]:
        return
    remedy = f"set kind to one of {', '.join(PROJECTIONS[native])}, or choose other sources"
    if native == "unpaired_preference" and kind == "conversation":
        remedy += "; for demonstrations keep only the rows labelled true and set `format`"
    message = f"{path}: format {form} holds {native} rows, which cannot become kind {kind}"
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
