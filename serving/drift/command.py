"""What `posttrain drift` does: find reference and traffic, compare them, write what was asked for."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import DataError, UserError
from posttrain.hashing import hash_json
from posttrain.rundir import atomic_write_json
from serving.drift import baseline as baselines
from serving.drift.baseline import Baseline
from serving.drift.compare import MIN_RECORDS, Comparison, compare
from serving.drift.instruments import Instruments, Settings, load_instruments
from serving.drift.measure import Columns, measure
from serving.drift.records import (
    Record,
    Selection,
    days_of,
    is_database,
    read_jsonl,
    read_reference,
    read_samples,
)
from serving.drift.report import WORDS, Trend, write_report
from serving.drift.statistics import Correction
from serving.drift.unusual import farthest

MAX_RECORDS = 5000
TREND_DAYS = 14
_DURATION = re.compile(r"(\d+)([hdw])")
_SECONDS = {"h": 3600, "d": 86_400, "w": 604_800}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Things:
    """Paths of --tokenizer, --embedding and --reward-model, and --tag as name -> module:function."""

    tokenizer: Path | None = None
    embedding: Path | None = None
    reward_model: Path | None = None
    tags: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Outcome:
    """What was compared with what, and the result."""

    comparison: Comparison
    baseline: Baseline
    source: str
    selection: Selection
    unusual: list[dict[str, Any]]
    trend: Trend

    @property
    def drifted(self) -> bool:
        return bool(self.comparison.alarms)

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "selection": str(self.selection),
            "model": self.selection.model,
            "version": self.selection.version,
            "reference": self.baseline.source | {"rows": self.baseline.rows},
            **self.comparison.as_json(),
            "trend": self.trend.as_json(),
        }


def make_baseline(
    reference: Path, output: Path, things: Things, selection: Selection, seed: int = 0
) -> Baseline:
    """Measure a dataset directory, a jsonl file or days of the gateway's database that were good, and write
    the baseline. Raises UserError."""
    baseline, _ = _fitted(reference, things, seed, selection)
    baselines.save(baseline, output)
    return baseline


def _fitted(
    reference: Path, things: Things, seed: int, selection: Selection | None = None
) -> tuple[Baseline, Instruments]:
    if not reference.exists():
        raise UserError(
            f"--reference {reference}: no such file or directory\n"
            "    name a dataset directory of the curate stage, a jsonl file, or a saved baseline (.json)"
        )
    if reference.is_file() and is_database(reference):
        selection = selection or Selection()
        records = _chosen(read_samples(reference, selection), selection)
        content = hash_json([[record.messages, record.answer] for record in records])
        source = {"path": str(reference), "kind": f"samples ({selection})", "content_hash": content}
    else:
        records, source = read_reference(reference)
    settings = Settings.of(things.tokenizer, things.embedding, things.reward_model, things.tags)
    instruments = load_instruments(settings)
    return baselines.fit(records, source, instruments, seed=seed), instruments


def load_reference(reference: Path, things: Things, seed: int = 0) -> tuple[Baseline, Instruments]:
    """A saved baseline (a .json file) and its instruments, or one made of a data set. Raises UserError."""
    if not reference.is_file() or reference.suffix != ".json":
        return _fitted(reference, things, seed)
    baseline = baselines.load(reference)
    settings = baseline.settings.moved_to(things.tokenizer, things.embedding, things.reward_model)
    if things.tags and dict(things.tags) != dict(settings.tags):
        raise UserError(
            f"--tag: {reference} was made with the tags {dict(settings.tags) or 'none'}\n"
            "    make the baseline again with these, or leave the option out"
        )
    return replace(baseline, settings=settings), load_instruments(settings)


def run(
    source: Path,
    reference: Path,
    selection: Selection,
    *,
    things: Things,
    alpha: float = 0.05,
    correction: Correction = "holm",
    output: Path | None = None,
    prometheus: Path | None = None,
    seed: int = 0,
    say: Say = print,
) -> Outcome:
    """Compare the selected records of `source` with `reference`. Writes a report into `output`, metrics to
    `prometheus`. Raises UserError for bad input and for too few records."""
    if not 0 < alpha < 1:
        raise UserError(f"--alpha {alpha}: choose a probability between 0 and 1, such as 0.05")
    everything, selection = read_traffic(source, selection)
    records = _chosen(everything, selection)
    if len(records) < MIN_RECORDS:
        days = {day: len(found) for day, found in days_of(everything).items()}
        raise DataError(
            f"{source}: {len(records)} records for {selection}, at least {MIN_RECORDS} are needed\n"
            f"    there are: {_listed(days) or f'{len(everything)} without a day'}"
        )
    baseline, instruments = load_reference(reference, things, seed)
    records = _sample(records, seed)
    say(f"comparing {len(records)} records ({selection}) with {baseline.held_out.size} of {reference}")
    columns = baseline.complete(measure(records, instruments))
    comparison = compare(baseline, columns, alpha=alpha, correction=correction, seed=seed)
    trend = _trend(everything, selection, baseline, instruments, comparison, seed)
    unusual = farthest(baseline.held_out, columns, records)
    outcome = Outcome(comparison, baseline, str(source), selection, unusual, trend)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        atomic_write_json(output / "drift.json", outcome.as_json())
        write_report(
            output / "report.html", comparison, baseline, str(source), str(selection), unusual, trend
        )
        say(f"report: {output / 'report.html'}")
    if prometheus is not None:
        from serving.drift.textfile import write_metrics

        write_metrics(prometheus, comparison, selection)
    return outcome


def read_traffic(source: Path, selection: Selection) -> tuple[list[Record], Selection]:
    """Records of every day for the model and version, and the selection with the newest day filled in where
    a database has days and none was chosen. Raises UserError."""
    if not source.is_file():
        raise UserError(
            f"{source}: no such file\n    name the gateway's monitoring.database, or a jsonl file of "
            '{"messages": [...], "answer": "..."}'
        )
    if not is_database(source):
        if selection.since is not None or selection.model or selection.version:
            raise UserError(
                f"{source}: --since, --last, --model and --version need the gateway's database\n"
                "    in a jsonl file, --day chooses by the key `day`"
            )
        return read_jsonl(source), selection
    records = read_samples(source, selection)
    if selection.day is None and selection.since is None and records:
        selection = replace(selection, day=max(days_of(records)))
    return records, selection


def _chosen(records: Sequence[Record], selection: Selection) -> list[Record]:
    if selection.day is not None:
        return [record for record in records if record.day == selection.day]
    if selection.since is not None:
        return [record for record in records if record.time is not None and record.time >= selection.since]
    return list(records)


def _listed(days: Mapping[str, int], count: int = 7) -> str:
    return ", ".join(f"{day}: {n}" for day, n in list(days.items())[-count:])


def _sample(records: Sequence[Record], seed: int) -> list[Record]:
    if len(records) <= MAX_RECORDS:
        return list(records)
    rows = np.random.default_rng(seed).choice(len(records), MAX_RECORDS, replace=False)
    return [records[i] for i in sorted(rows)]


def _trend(
    records: Sequence[Record],
    selection: Selection,
    baseline: Baseline,
    instruments: Instruments,
    today: Comparison,
    seed: int,
) -> Trend:
    """Each of the last days that has enough records, by the same tests."""
    days = {day: found for day, found in days_of(records).items() if len(found) >= MIN_RECORDS}
    if selection.day is not None:
        days = {day: found for day, found in days.items() if day <= selection.day}
    compared: dict[str, Comparison] = {}
    for day in list(days)[-TREND_DAYS:]:
        if day == selection.day:
            compared[day] = today
            continue
        columns: Columns = baseline.complete(measure(_sample(days[day], seed), instruments))
        compared[day] = compare(baseline, columns, alpha=today.alpha, correction=today.correction, seed=seed)
    return Trend(compared if len(compared) > 1 else {})


def parse_selection(
    day: str | None, since: str | None, last: str | None, model: str | None, version: str | None
) -> Selection:
    """A selection from the command's options; at most one of day, since and last. Raises UserError."""
    given = {"--day": day, "--since": since, "--last": last}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)}: choose one of them")
    if day is not None:
        try:
            day = date.fromisoformat(day).isoformat()
        except ValueError:
            raise UserError(f"--day {day}: is no date\n    write it as 2026-01-31 (UTC)") from None
    start: float | None = None
    if since is not None:
        try:
            moment = datetime.fromisoformat(since)
        except ValueError:
            raise UserError(
                f"--since {since}: is no time\n    write 2026-01-31 or 2026-01-31T12:00"
            ) from None
        start = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if last is not None:
        match = _DURATION.fullmatch(last)
        if match is None:
            raise UserError(f"--last {last}: is no duration\n    write 24h, 7d or 2w")
        start = time.time() - int(match[1]) * _SECONDS[match[2]]
    return Selection(day, start, model, version)


def lines(outcome: Outcome) -> list[str]:
    """The result for a terminal: the verdict, then a line per feature, alarms first."""
    findings = sorted(outcome.comparison.findings, key=lambda f: (f.verdict != "drift", f.p_corrected))
    names = [finding.feature for finding in outcome.comparison.alarms]
    verdict = f"DRIFT: {', '.join(names)}" if names else "no drift"
    table = [
        f"{f.feature:<18} {WORDS[f.verdict]:<18} {f.effect_name} {f.effect:.3g} (floor {f.floor:g}), "
        f"p {f.p_corrected:.3g}: {f.reference} -> {f.today}"
        for f in findings
    ]
    return [verdict, *table]
