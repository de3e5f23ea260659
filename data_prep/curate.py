"""The curate stage: sources -> typed records -> filters -> exact dedup -> split -> dataset directory.

Nothing is dropped without a reason: rows_in = rows_out + drops, and rejects.jsonl holds every dropped row
with its file and line. Nothing is written before all sources were read and the split has both sides. The
same configuration and files give the same bytes.

    posttrain run configs/tiny/pipeline.yaml --only demos
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.card import card_markdown, length_summary, report_html
from data_prep.config import CurateConfig
from data_prep.dataset import DATASET_FILES, SPLITS, Split, columns, content_hash, to_row, write_split
from data_prep.dedup import SeenContent, content_key
from data_prep.files import display_names, expand
from data_prep.ingest import Reject, SourceReport, generator_problem, read_file, read_generator, read_hub
from data_prep.projections import from_last_user_turns
from data_prep.records import Record, excerpt
from data_prep.split import default_group, side
from posttrain.errors import DataError, Problem
from posttrain.rundir import STAGING_PREFIX

if TYPE_CHECKING:
    from posttrain.stage import StageContext

FILTERED = ("duplicate", "too_short", "too_long")
"""Drops that the configuration asked for. Every other reason is a row that could not be used: a reject."""


@dataclass
class Curated:
    """Everything that is written: rows by side, what was dropped and why, and the sources' reports."""

    sources: list[SourceReport] = field(default_factory=list)
    rows: dict[Split, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: list[Reject] = field(default_factory=list)
    seen: SeenContent = field(default_factory=SeenContent)
    ids: Counter[str] = field(default_factory=Counter)

    @property
    def rows_in(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def drops(self) -> dict[str, int]:
        return dict(sorted(Counter(drop.reason for drop in self.dropped).items()))


def run(config: CurateConfig, context: StageContext) -> dict[str, Any]:
    """Curate and write the dataset directory into the run directory.

    Returns rows_in, rows_out, rows of each side, drops by reason and the content hash.
    Raises DataError, nothing being written: a source that cannot be read, too many unusable rows, no row
    left, an empty side of the split.
    """
    curated = Curated()
    with context.phase("read"):
        for file, line, record in read_sources(config, context, curated):
            add(config, curated, file, line, record)
    check_rows(config, curated)
    check_split(config, curated)
    info = describe(config, curated)
    with context.phase("write"):
        write_directory(context.run_dir, info, curated)
    for reason, count in info["drops"].items():
        _say(context, f"dropped {count:,} of {info['rows_in']:,} rows: {reason} (see rejects.jsonl)")
    train, held_out = info["rows_out"]["train"], info["rows_out"]["eval"]
    _say(context, f"kept {train:,} rows to train on and {held_out:,} to evaluate on")
    return {
        "rows_in": info["rows_in"],
        "rows_out": train + held_out,
        "train_rows": train,
        "eval_rows": held_out,
        "drops": info["drops"],
        "content_hash": info["content_hash"],
    }


def check(config: CurateConfig, where: str) -> list[Problem]:
    """Problems of the generators' options, found without making a record."""
    problems = []
    for index, source in enumerate(config.sources):
        message = generator_problem(source, config.kind) if source.generator else None
        if message:
            problems.append(
                Problem(f"{where}.sources.{index}.options", message, "correct or remove the option")
            )
    return problems


def read_sources(
    config: CurateConfig, context: StageContext, curated: Curated
) -> Iterator[tuple[str, int, Record | Reject]]:
    """(file, line, record or reject) of every source in order; says what was read and in which format."""
    files = [expand(source.path) if source.path else [] for source in config.sources]
    names = display_names([path for paths in files for path in paths])
    for index, (source, paths) in enumerate(zip(config.sources, files, strict=True)):
        if source.generator:
            report, pairs = read_generator(source, config.kind, config.seed)
            yield from _consume(context, curated, report, pairs, source.rows)
        if source.hub:
            found = context.inputs.get(f"sources.{index}.hub")
            report, pairs = read_hub(source, config.kind, found.path if found else None)
            yield from _consume(context, curated, report, pairs, source.rows)
        left = source.rows
        for path in paths:
            if left == 0:
                break
            report, pairs = read_file(source, config.kind, path, names[path], left)
            yield from _consume(context, curated, report, pairs, None)
            left = None if left is None else left - report.rows


def _consume(
    context: StageContext,
    curated: Curated,
    report: SourceReport,
    pairs: Iterator[tuple[int, Record | Reject]],
    total: int | None,
) -> Iterator[tuple[str, int, Record | Reject]]:
    curated.sources.append(report)
    with context.progress(f"reading {report.name}", total) as progress:
        for line, record in pairs:
            progress.advance()
            yield report.name, line, record
    _say(context, f"{report.name}: {report.rows:,} rows, format {report.why or report.format}")


def _say(context: StageContext, line: str) -> None:
    context.console.print(line, markup=False, highlight=False, soft_wrap=True)


def add(config: CurateConfig, curated: Curated, file: str, line: int, record: Record | Reject) -> None:
    """Put one record through the filters, the dedup and the split, or note why it is dropped."""
    if isinstance(record, Reject):
        curated.dropped.append(record)
        return
    group = record.group or default_group(record)
    if config.last_user_turns is not None:
        record = from_last_user_turns(record, config.last_user_turns)
    key = content_key(record)
    verdict = _filtered(config, curated, key, f"{file}:{line}", record)
    if verdict is not None:
        reason, detail = verdict
        text = record.turns()[0][1]
        curated.dropped.append(Reject(file, line, reason, detail, excerpt(text)))
        return
    if config.split.by == "record":
        group = key[:16]
    row = to_row(replace(record, id=_unique_id(curated.ids, record.id or key[:16]), group=group))
    curated.rows[side(group, config.split.salt, config.split.eval_fraction)].append(row)


def _filtered(
    config: CurateConfig, curated: Curated, key: str, place: str, record: Record
) -> tuple[str, str] | None:
    """(reason, detail) when a filter or the dedup drops the record."""
    chars = sum(len(text) for _, text in record.turns())
    shortest, longest = config.filters.min_chars, config.filters.max_chars
    if shortest is not None and chars < shortest:
        return "too_short", f"{chars} characters, filters.min_chars is {shortest}"
    if longest is not None and chars > longest:
        return "too_long", f"{chars} characters, filters.max_chars is {longest}"
    first = curated.seen.first_place(key, place) if config.dedup else None
    return None if first is None else ("duplicate", f"same content as {first}")


def _unique_id(ids: Counter[str], wanted: str) -> str:
    name = wanted
    while ids[name]:
        ids[wanted] += 1
        name = f"{wanted}-{ids[wanted]}"
    ids[name] += 1
    return name


def check_rows(config: CurateConfig, curated: Curated) -> None:
    """Raises DataError when there are no rows, too many unusable ones, or none left."""
    total, names = curated.rows_in, ", ".join(source.name for source in curated.sources)
    if total == 0:
        raise DataError(f"{names}: no rows\n    give files that hold rows")
    rejects = [drop for drop in curated.dropped if drop.reason not in FILTERED]
    if len(rejects) > config.max_reject_fraction * total:
        raise DataError(_too_many_rejects(config, rejects, total))
    if not any(curated.rows.values()):
        drops = ", ".join(f"{reason} {count:,}" for reason, count in curated.drops.items())
        raise DataError(
            f"{names}: none of the {total:,} rows is left ({drops})\n"
            "    relax `filters`, or give other sources"
        )


def _too_many_rejects(config: CurateConfig, rejects: list[Reject], total: int) -> str:
    counts = Counter(reject.reason for reject in rejects)
    first = {reason: next(reject for reject in rejects if reject.reason == reason) for reason in counts}
    lines = [
        f"{len(rejects):,} of {total:,} rows cannot be used, "
        f"more than max_reject_fraction {config.max_reject_fraction} allows"
    ]
    for reason, count in counts.most_common(8):
        at = first[reason]
        lines.append(f"    {reason} ({count:,}), first at {at.file}:{at.line}: {at.detail}")
    lines.append(f"    row: {first[counts.most_common(1)[0][0]].excerpt}")
    lines.append("    correct the rows, or raise max_reject_fraction to drop and count them")
    return "\n".join(lines)


def check_split(config: CurateConfig, curated: Curated) -> None:
    """Raises DataError when all rows landed on one side."""
    for split in SPLITS:
        if curated.rows[split]:
            continue
        rows = [row for others in curated.rows.values() for row in others]
        groups = len({row["group"] for row in rows})
        remedy = (
            "a split by group needs several groups: give more varied rows, or set split.by: record"
            if groups < 2
            else f"{'raise' if split == 'eval' else 'lower'} split.eval_fraction, "
            "change split.salt, or give more rows"
        )
        raise DataError(
            f"split.eval_fraction {config.split.eval_fraction} leaves the {split} side empty: "
            f"all {len(rows):,} rows ({groups:,} groups) fall on the other\n    {remedy}"
        )


def describe(config: CurateConfig, curated: Curated) -> dict[str, Any]:
    """What dataset.json says. It holds no times and no folders, so equal data give equal bytes."""
    split = config.split
    groups = {side_: len({row["group"] for row in rows}) for side_, rows in curated.rows.items()}
    return {
        "schema_version": 1,
        "kind": config.kind,
        "rows_in": curated.rows_in,
        "rows_out": {name: len(rows) for name, rows in curated.rows.items()},
        "drops": curated.drops,
        "sources": [
            {"name": at.name, "format": at.format, "rows": at.rows, "sha256": at.sha256, **at.details}
            for at in curated.sources
        ],
        "last_user_turns": config.last_user_turns,
        "dedup": config.dedup,
        "filters": config.filters.model_dump(),
        "split": {"by": split.by, "salt": split.salt, "eval_fraction": split.eval_fraction, "groups": groups},
        "columns": columns(config.kind),
        "lengths": length_summary(config.kind, curated.rows),
        "content_hash": content_hash(curated.rows),
    }


def write_directory(directory: Path, info: dict[str, Any], curated: Curated) -> None:
    """Write DATASET_FILES into `directory`: first all aside, then renamed into place, dataset.json last."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=STAGING_PREFIX) as name:
        staging = Path(name)
        for split in SPLITS:
            write_split(staging / f"{split}.parquet", info["kind"], curated.rows[split])
        rejects = (json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in curated.dropped)
        texts = {
            "rejects.jsonl": "".join(rejects),
            "card.md": card_markdown(info),
            "report.html": report_html(info, curated.rows, curated.dropped),
            "dataset.json": json.dumps(info, indent=2, ensure_ascii=False) + "\n",
        }
        for file, text in texts.items():
            (staging / file).write_text(text, encoding="utf-8")
        for file in DATASET_FILES:
            os.replace(staging / file, directory / file)
