"""The curate stage: sources -> typed records -> filters -> exact dedup -> operations -> split -> directory.

Nothing is dropped without a reason: rows_in = rows_out + drops (docs/curation.md), and rejects.jsonl holds
every dropped row with its file and line. Nothing is written before all sources were read and the split has
both sides. The same configuration and files give the same bytes, by whatever engine and number of processes.

    posttrain run configs/tiny/pipeline.yaml --only demos
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.card import card_markdown
from data_prep.config import CurateConfig
from data_prep.curate_checks import check_left, check_split
from data_prep.dataset import SPLITS, columns
from data_prep.figures import length_summary
from data_prep.ingest import SourceReport, generator_problem
from data_prep.licences import roll_up
from data_prep.operations.build import problems as operation_problems
from data_prep.operations.engine import Step
from data_prep.operations.personal import scrubber
from data_prep.page import report_html, sample_places
from data_prep.sharded import reading
from data_prep.sharded.code import code_hash
from data_prep.sharded.driver import Curated, Driver
from data_prep.sharded.engines import make_engine
from data_prep.sharded.memory import release_memory, system_memory
from data_prep.sharded.output import content_hash, join_lines, move, samples, write_side
from data_prep.sharded.plan import FORMAT, READ, EngineError, Setup, Sizes
from data_prep.sharded.store import NAME, Store
from posttrain.config import how_fields
from posttrain.errors import ConfigError, DataError, Problem, RequeueError, UserError
from posttrain.hashing import hash_json
from posttrain.preemption import PreemptionFlag
from posttrain.rundir import STAGING_PREFIX

if TYPE_CHECKING:
    from posttrain.stage import StageContext

REVIEW_FILE = "review.jsonl"
"""Rows that an operation lists for a reader, when there are any."""
REJECTED_FILE = "rejected.jsonl"
"""Dropped rows in full, where the configuration asks for them."""


def run(config: CurateConfig, context: StageContext, sizes: Sizes | None = None) -> dict[str, Any]:
    """Curate and write the dataset directory into the run directory.

    sizes: bounds of a chunk, which change nothing but memory and speed. Returns rows_in, rows_out, rows of
    each side, drops by reason and the content hash.
    Raises DataError, nothing being written: a source that cannot be read, too many unusable rows, no row
    left, an empty side of the split. RequeueError after SIGTERM, with what was done kept for the resume.
    """
    sizes = sizes or Sizes()
    setup = Setup(config, context.run_dir / NAME, _inputs(context))
    steps = setup.steps()
    store = Store.opened(setup.root, _plan(config, context, sizes), resume=context.resumed)
    try:
        with (
            system_memory(),
            _cleaning(steps),
            closing(make_engine(config, setup)) as engine,
            PreemptionFlag() as flag,
        ):
            curated = _curate(
                context, Driver(setup, steps, store, engine, _Watch(context, flag)), sizes, flag
            )
            check_left(config, curated.sources, sum(curated.rows.values()), curated.dropped().drops)
            check_split(config, curated.rows, curated.groups)
            release_memory()
            with context.phase("write"):
                info = describe(config, curated, store)
                write_directory(context.run_dir, config, info, curated, store)
    except (ConfigError, EngineError):
        # Of the engine, which is no part of the plan: what was done is gone on with.
        raise
    except UserError:
        # What has to be corrected makes another plan; rows as they were read do not stay here.
        store.remove()
        raise
    store.remove()
    return _metrics(context, info)


def _inputs(context: StageContext) -> dict[str, Path]:
    """Local paths of what the operations and Hub sources read."""
    return {
        name: context.path(name)
        for name in context.inputs
        if name.startswith("operations.") or name.endswith(".hub")
    }


def _plan(config: CurateConfig, context: StageContext, sizes: Sizes) -> str:
    """Hash of all that the files of the work directory depend on."""
    return hash_json(
        {
            "format": FORMAT,
            "code": code_hash(config),
            "config": config.model_dump(mode="json", exclude=how_fields(config)),
            "inputs": {name: found.content_hash for name, found in sorted(context.inputs.items())},
            "sizes": vars(sizes),
        }
    )


@contextmanager
def _cleaning(steps: Sequence[Step]) -> Iterator[None]:
    """Redacts what an error shows of rows where an operation redacts."""
    clean = scrubber([step.operation for step in steps])
    try:
        yield
    except UserError as error:
        # A ConfigError shows the configuration, not rows.
        if clean is None or isinstance(error, (ConfigError, EngineError)):
            raise
        raise DataError("\n".join(map(clean, str(error).split("\n")))) from None


def _curate(context: StageContext, driver: Driver, sizes: Sizes, flag: PreemptionFlag) -> Curated:
    config = driver.config
    reports: list[SourceReport] = []

    def hub(index: int) -> Path | None:
        name = f"sources.{index}.hub"
        return context.path(name) if name in context.inputs else None

    def said(report: SourceReport) -> None:
        _say(context, f"{report.name}: {report.rows:,} rows, format {report.why or report.format}")

    def begun(name: str, total: int | None) -> Any:
        return context.progress(f"reading {name}", total)

    with context.phase("read"):
        chunks = reading.chunks(config, hub, reports, sizes, begun, said)
        rows = driver.read(chunks, reports)
    if not config.operates:
        return driver.curate(rows)
    with context.phase("operations"):
        return driver.curate(rows)


class _Watch:
    """Shows how far a segment is, and stops after SIGTERM."""

    def __init__(self, context: StageContext, flag: PreemptionFlag) -> None:
        self._context, self._flag = context, flag

    def __call__(self, name: str, done: int, chunks: int | None, results: Iterator[Any]) -> Iterator[Any]:
        if done:
            of = f" of {chunks:,}" if chunks is not None else ""
            _say(self._context, f"resuming: {done:,}{of} chunks are done ({name})")
        if chunks is None:
            yield from self._stopping(name, results)
            return
        with self._context.progress(name, chunks) as progress:
            for result in self._stopping(name, results):
                progress.advance()
                yield result

    def _stopping(self, name: str, results: Iterator[Any]) -> Iterator[Any]:
        for number, result in enumerate(results, start=1):
            yield result
            if self._flag.requested:
                raise RequeueError(f"chunk {number:,} ({name})")


def _metrics(context: StageContext, info: dict[str, Any]) -> dict[str, Any]:
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
    """Problems of the generators' options and of the operations, found without making a record."""
    problems = operation_problems(config.operations, where)
    if config.engine == "ray" and importlib.util.find_spec("ray") is None:
        problems.append(
            Problem(
                f"{where}.engine",
                "engine ray needs the package ray, which is not installed",
                "pip install 'posttrain[ray]', or set engine: local",
                here=True,
            )
        )
    for index, source in enumerate(config.sources):
        message = generator_problem(source, config.kind) if source.generator else None
        if message:
            problems.append(
                Problem(f"{where}.sources.{index}.options", message, "correct or remove the option")
            )
    return problems


def _say(context: StageContext, line: str) -> None:
    context.console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe(config: CurateConfig, curated: Curated, store: Store) -> dict[str, Any]:
    """What dataset.json says. It holds no times and no folders, so equal data give equal bytes."""
    split = config.split
    return {
        "schema_version": 1,
        "kind": config.kind,
        "rows_in": curated.rows_in,
        "rows_out": curated.rows,
        "drops": dict(sorted(curated.dropped().drops.items())),
        "sources": [
            {"name": at.name, "format": at.format, "rows": at.rows, "sha256": at.sha256, **at.details}
            for at in curated.sources
        ],
        "last_user_turns": config.last_user_turns,
        "dedup": config.dedup,
        "filters": config.filters.model_dump(),
        "split": {
            "by": split.by,
            "salt": split.salt,
            "eval_fraction": split.eval_fraction,
            "groups": curated.groups,
        },
        "columns": columns(config.kind),
        "lengths": length_summary(curated.figures),
        **_operations_info(config, curated),
        "content_hash": content_hash(store, curated.last, curated.chunks),
    }


def _operations_info(config: CurateConfig, curated: Curated) -> dict[str, Any]:
    """What dataset.json says beyond its other keys; nothing without operations."""
    if not config.operates:
        return {}
    rows = sum(curated.mixture.values(), Counter())
    licences = [
        (source.label, "generated" if source.generator else source.licence) for source in config.sources
    ]
    return {
        "mixture": {split: _shares(counts) for split, counts in curated.mixture.items()},
        "licences": {"marked_commercial": config.commercial, **roll_up(licences, rows)},
        "rows_repeated": sum(ledger.tally.repeated for ledger in curated.ledgers),
        "operations": [ledger.as_json() for ledger in curated.ledgers],
    }


def _shares(counts: Counter[str]) -> dict[str, Any]:
    """Rows and exact share of every source."""
    total = counts.total()
    return {name: {"rows": count, "share": count / total} for name, count in sorted(counts.items())}


def write_directory(
    directory: Path, config: CurateConfig, info: dict[str, Any], curated: Curated, store: Store
) -> None:
    """Write the files of the data set into `directory`: first all aside, then renamed into place,
    dataset.json last.
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix=STAGING_PREFIX) as name:
        staging = Path(name)
        names: list[str] = []
        for split in SPLITS:
            rows = curated.sides[split]
            names += write_side(staging, store, curated.last, rows, split, config.kind, config.shard_rows)
        passes = range(READ + 1, curated.last + 1)
        join_lines(staging / "rejects.jsonl", store, "rejects", passes, curated.chunks)
        if join_lines(staging / REVIEW_FILE, store, "reviews", passes, curated.chunks):
            names.insert(0, REVIEW_FILE)
        if config.rejected_rows:
            join_lines(staging / REJECTED_FILE, store, "dropped_rows", passes, curated.chunks)
            names.insert(0, REJECTED_FILE)
        dropped = curated.dropped()
        places = sample_places(curated.rows["train"])
        shown = samples(store, curated.last, curated.sides["train"], config.kind, places)
        texts = {
            "card.md": card_markdown(info),
            "report.html": report_html(info, curated.figures, shown, dropped.first, dropped.drops),
            "dataset.json": json.dumps(info, indent=2, ensure_ascii=False) + "\n",
        }
        for file, text in texts.items():
            (staging / file).write_text(text, encoding="utf-8")
        move(staging, directory, [*names, "rejects.jsonl", *texts])
