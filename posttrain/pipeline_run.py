"""Plans and executes a pipeline: in process, one stage after another, each from what is on the disk.

What has to be done again follows from content hashes alone; see posttrain.planning.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from posttrain.errors import (
    ConfigError,
    PreflightError,
    Problem,
    RequeueError,
    UserError,
    explaining_the_disk,
)
from posttrain.pipeline import Pipeline
from posttrain.planning import Plan, plan_stage
from posttrain.preflight import NO_CHECK, look
from posttrain.registry import load
from posttrain.rundir import SCHEMA_VERSION, atomic_write_json, read_manifest
from posttrain.stage import StageResult, execute_stage

REPORT = "eval.report:write_report"


def plan_pipeline(pipeline: Pipeline, selected: Sequence[str], *, force: bool = False) -> dict[str, Plan]:
    """What each selected stage needs, looking only at what is on the disk now.

    Raises UserError or ConfigError with the mistakes of all stages: inputs that do not exist, and what the
    `check` hooks say.
    """
    plans: dict[str, Plan] = {}
    pending: dict[Path, str] = {}
    failures: list[str] = []
    problems: list[Problem] = []
    for name in selected:
        block = pipeline.stages[name]
        left_out = [
            other
            for other in pipeline.depends[name]
            if other not in selected and not _complete(pipeline, other)
        ]
        if left_out:
            failures.append(
                f"{name}: needs {', '.join(left_out)}, which is not complete\n"
                "    leave out --only, or run that stage first"
            )
            continue
        try:
            plan = plan_stage(block.kind, block.config, block.run_dir, force=force, pending=pending)
        except UserError as error:
            failures.append(f"{name}: {error}")
            continue
        plans[name] = plan
        if plan.action != "skip":
            pending[block.run_dir.absolute()] = name
            problems += block.check()
    if problems:
        raise ConfigError(problems)
    if failures:
        raise UserError("\n".join(failures))
    return plans


def _complete(pipeline: Pipeline, name: str) -> bool:
    manifest = read_manifest(pipeline.stages[name].run_dir)
    return manifest is not None and manifest["status"] == "complete"


def run_pipeline(
    pipeline: Pipeline,
    *,
    only: Collection[str] = (),
    until: str | None = None,
    force: bool = False,
    console: Console | None = None,
    preflight: bool = True,
) -> dict[str, StageResult]:
    """Execute the selected stages, skipping what is complete with the same inputs; then write the report.

    preflight: look at the data and models of each training stage before it starts, and at those that are
    there already before anything starts. Raises PreflightError with what speaks against it.
    """
    console = console or Console(stderr=True)
    selected = pipeline.select(only, until)
    plans = plan_pipeline(pipeline, selected, force=force)
    looked_at = _look_ahead(pipeline, plans, console) if preflight else set(selected)
    record = _Record(pipeline)
    results: dict[str, StageResult] = {}
    with explaining_the_disk(pipeline.directory):
        for index, name in enumerate(selected, start=1):
            label = f"[{index}/{len(selected)}] {name}"
            results[name] = _run_one(
                pipeline, name, label, force, record, console, preflight=name not in looked_at
            )
        ran = any(result.status == "completed" for result in results.values())
        _write_report(pipeline, ran, record, console)
    return results


def _look_ahead(pipeline: Pipeline, plans: Mapping[str, Plan], console: Console) -> set[str]:
    """Look at the stages whose inputs are there, and return their names. Raises PreflightError."""
    ready = [name for name, plan in plans.items() if plan.action != "skip" and plan.inputs_hash]
    problems: list[Problem] = []
    for name in ready:
        block = pipeline.stages[name]
        inputs = plans[name].inputs
        problems += look(block.kind, block.config, block.run_dir, inputs, console, block.locate)
    if problems:
        raise PreflightError(problems, NO_CHECK)
    return set(ready)


def _run_one(
    pipeline: Pipeline,
    name: str,
    label: str,
    force: bool,
    record: _Record,
    console: Console,
    *,
    preflight: bool,
) -> StageResult:
    block = pipeline.stages[name]
    plan = plan_stage(block.kind, block.config, block.run_dir, force=force)
    if plan.action != "skip":
        _say(console, f"{label}: {plan.action} ({plan.reason})")
        record.write("running", current=name)
    try:
        result = execute_stage(
            block.kind,
            block.config,
            block.run_dir,
            force=force,
            console=console,
            preflight=preflight,
            locate=block.locate,
        )
    except RequeueError:
        record.write_best_effort("interrupted", current=name)
        raise
    except BaseException:
        record.write_best_effort("failed", current=name)
        raise
    if result.status == "skipped":
        _say(console, f"{label}: skipped ({result.plan.reason})")
    else:
        _say(console, f"{label}: done in {result.manifest['timings']['total']:.1f} s")
    return result


def _write_report(pipeline: Pipeline, ran: bool, record: _Record, console: Console) -> None:
    statuses = record.statuses()
    complete = all(status == "complete" for status in statuses.values())
    report = pipeline.directory / "report.html"
    if ran or record.status() != ("complete" if complete else "partial"):
        record.write("complete" if complete else "partial")
    if pipeline.config.report and complete and (ran or not report.is_file()):
        load(REPORT)([pipeline.directory], report)
    if report.is_file():
        _say(console, f"report: {report}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Record:
    """pipeline.json: the stages in order and how far they are."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._path = pipeline.directory / "pipeline.json"

    def statuses(self) -> dict[str, str]:
        manifests = {name: read_manifest(block.run_dir) for name, block in self._pipeline.stages.items()}
        return {name: manifest["status"] if manifest else "not run" for name, manifest in manifests.items()}

    def status(self) -> str | None:
        return json.loads(self._path.read_text(encoding="utf-8"))["status"] if self._path.is_file() else None

    def write(self, status: str, current: str | None = None) -> None:
        pipeline, statuses = self._pipeline, self.statuses()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "schema_version": SCHEMA_VERSION,
            "name": pipeline.config.name,
            "config": str(pipeline.document.path),
            "overrides": list(pipeline.document.overrides.values()),
            "status": status,
            "current": current,
            "updated": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "stages": list(pipeline.stages),
            "details": {
                name: {"stage": block.kind, "status": statuses[name], "depends": pipeline.depends[name]}
                for name, block in pipeline.stages.items()
            },
        }
        atomic_write_json(self._path, record)

    def write_best_effort(self, status: str, current: str) -> None:
        """While another error is on its way out: a disk that cannot be written must not hide it."""
        try:
            self.write(status, current)
        except OSError:
            return
