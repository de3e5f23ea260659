"""The curate stage: sources -> typed records -> filters -> exact dedup -> operations -> split -> directory.

Nothing is dropped without a reason: rows_in = rows_out + drops (docs/curation.md), and rejects.jsonl holds
every dropped row with its file and line. Nothing is written before all sources were read and the split has
both sides. The same configuration and files give the same bytes.

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

from data_prep.card import card_markdown
from data_prep.config import CurateConfig
from data_prep.curate_checks import check_rows, check_split
from data_prep.dataset import DATASET_FILES, SPLITS, Split, columns, content_hash, to_row, write_split
from data_prep.dedup import SeenContent, content_key
from data_prep.figures import Figures, figures_of, length_summary
from data_prep.files import display_names, expand
from data_prep.ingest import Reject, SourceReport, generator_problem, read_file, read_generator, read_hub
from data_prep.operations.base import Row
from data_prep.operations.build import Surroundings, build
from data_prep.operations.build import problems as operation_problems
from data_prep.operations.engine import Ran, Step
from data_prep.operations.stage import clean_rejects, conserved, operate, operations_info
from data_prep.page import report_html, sample_places
from data_prep.projections import from_last_user_turns
from data_prep.records import Record, excerpt
from data_prep.split import default_group, side
from posttrain.errors import Problem
from posttrain.rundir import STAGING_PREFIX

if TYPE_CHECKING:
    from posttrain.stage import StageContext

REVIEW_FILE = "review.jsonl"
"""Rows that an operation lists for a reader, when there are any."""


@dataclass
class Curated:
    """Everything that is written: rows by side, what was dropped and why, and the sources' reports.

    pending: rows that wait for the operations, which begin once all were read. mixture: by side and source,
    rows and shares.
    """

    sources: list[SourceReport] = field(default_factory=list)
    rows: dict[Split, list[dict[str, Any]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: list[Reject] = field(default_factory=list)
    seen: SeenContent = field(default_factory=SeenContent)
    ids: Counter[str] = field(default_factory=Counter)
    pending: list[Row] = field(default_factory=list)
    operated: Ran | None = None
    operation_drops: list[Reject] = field(default_factory=list)
    mixture: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows_in(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def drops(self) -> dict[str, int]:
        counts = Counter(drop.reason for drop in (*self.dropped, *self.operation_drops))
        return dict(sorted(counts.items()))


def run(config: CurateConfig, context: StageContext) -> dict[str, Any]:
    """Curate and write the dataset directory into the run directory.

    Returns rows_in, rows_out, rows of each side, drops by reason and the content hash.
    Raises DataError, nothing being written: a source that cannot be read, too many unusable rows, no row
    left, an empty side of the split.
    """
    curated = Curated()
    steps = build(config.operations, Surroundings(context.path, config.split.by == "cluster"))
    with context.phase("read"):
        for file, line, record, source in read_sources(config, context, curated):
            add(config, curated, file, line, record, source)
    if config.operates:
        curated.dropped = clean_rejects(curated.dropped, steps)
        check_rows(config, curated)
        with context.phase("operations"):
            _operate(config, context, curated, steps)
    check_rows(config, curated)
    check_split(config, curated)
    figures = figures_of(config.kind, curated.rows)
    info = describe(config, curated, figures)
    with context.phase("write"):
        write_directory(context.run_dir, info, curated, figures)
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


def _operate(config: CurateConfig, context: StageContext, curated: Curated, steps: list[Step]) -> None:
    with context.progress("operations", len(curated.pending) * len(steps)) as progress:

        def tick(step: Step, rows: int) -> None:
            progress.update(step.name)
            progress.advance(rows)

        operate(config, curated, steps, lambda wanted: unique_id(curated.ids, wanted), tick)
    assert conserved(curated.rows_in, curated)


def check(config: CurateConfig, where: str) -> list[Problem]:
    """Problems of the generators' options and of the operations, found without making a record."""
    problems = operation_problems(config.operations, where)
    for index, source in enumerate(config.sources):
        message = generator_problem(source, config.kind) if source.generator else None
        if message:
            problems.append(
                Problem(f"{where}.sources.{index}.options", message, "correct or remove the option")
            )
    return problems


def read_sources(
    config: CurateConfig, context: StageContext, curated: Curated
) -> Iterator[tuple[str, int, Record | Reject, str]]:
    """(file, line, record or reject, name of the source) of every source in order; says what was read and in
    which format.
    """
    files = [expand(source.path) if source.path else [] for source in config.sources]
    names = display_names([path for paths in files for path in paths])
    for index, (source, paths) in enumerate(zip(config.sources, files, strict=True)):
        if source.generator:
            report, pairs = read_generator(source, config.kind, config.seed)
            yield from _consume(context, curated, report, pairs, source.rows, source.label)
        if source.hub:
            found = context.inputs.get(f"sources.{index}.hub")
            report, pairs = read_hub(source, config.kind, found.path if found else None)
            yield from _consume(context, curated, report, pairs, source.rows, source.label)
        left = source.rows
        for path in paths:
            if left == 0:
                break
            report, pairs = read_file(source, config.kind, path, names[path], left)
            yield from _consume(context, curated, report, pairs, None, source.label)
            left = None if left is None else left - report.rows


def _consume(
    context: StageContext,
    curated: Curated,
    report: SourceReport,
    pairs: Iterator[tuple[int, Record | Reject]],
    total: int | None,
    source: str,
) -> Iterator[tuple[str, int, Record | Reject, str]]:
    curated.sources.append(report)
    with context.progress(f"reading {report.name}", total) as progress:
        for line, record in pairs:
            progress.advance()
            yield report.name, line, record, source
    _say(context, f"{report.name}: {report.rows:,} rows, format {report.why or report.format}")


def _say(context: StageContext, line: str) -> None:
    context.console.print(line, markup=False, highlight=False, soft_wrap=True)


def add(
    config: CurateConfig,
    curated: Curated,
    file: str,
    line: int,
    record: Record | Reject,
    source: str = "",
) -> None:
    """Put one record through the filters, the dedup and the split, or note why it is dropped.

    With operations the record waits for them in `curated.pending`. source: its name in the configuration.
    """
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
    record = replace(record, id=unique_id(curated.ids, record.id or key[:16]), group=group)
    if config.operates:
        curated.pending.append(Row(record, file, line, source))
        return
    row = to_row(record)
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


def unique_id(ids: Counter[str], wanted: str) -> str:
    """`wanted`, or with a number where that id is taken; the id is then taken."""
    name = wanted
    while ids[name]:
        ids[wanted] += 1
        name = f"{wanted}-{ids[wanted]}"
    ids[name] += 1
    return name


def describe(config: CurateConfig, curated: Curated, figures: Figures) -> dict[str, Any]:
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
        "lengths": length_summary(figures),
        **operations_info(config, curated),
        "content_hash": content_hash(curated.rows),
    }


def write_directory(directory: Path, info: dict[str, Any], curated: Curated, figures: Figures) -> None:
    """Write DATASET_FILES into `directory`: first all aside, then renamed into place, dataset.json last."""
    with tempfile.TemporaryDirectory(dir=directory, prefix=STAGING_PREFIX) as name:
        staging = Path(name)
        for split in SPLITS:
            write_split(staging / f"{split}.parquet", info["kind"], curated.rows[split])
        dropped = [*curated.dropped, *curated.operation_drops]
        first: dict[str, Reject] = {}
        for drop in dropped:
            first.setdefault(drop.reason, drop)
        found = curated.drops
        counts = {reason: found[reason] for reason in first}
        train = curated.rows["train"]
        samples = [train[place] for place in sample_places(len(train))]
        rejects = (json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in dropped)
        texts = {
            "rejects.jsonl": "".join(rejects),
            "card.md": card_markdown(info),
            "report.html": report_html(info, figures, samples, first, counts),
            "dataset.json": json.dumps(info, indent=2, ensure_ascii=False) + "\n",
        }
        if curated.operated is not None and curated.operated.review:
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in curated.operated.review)
            texts = {REVIEW_FILE: "".join(lines), **texts}
        for file, text in texts.items():
            (staging / file).write_text(text, encoding="utf-8")
        for file in (*(name for name in texts if name == REVIEW_FILE), *DATASET_FILES):
            os.replace(staging / file, directory / file)
