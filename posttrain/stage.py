"""Executes one stage in its run directory: plan, lock, run, record; and leaves no half-written run behind."""

from __future__ import annotations

import datetime
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from posttrain.config import StageConfig
from posttrain.context import StageContext, to_json
from posttrain.environment import code_version, hardware, package_versions
from posttrain.errors import PosttrainError, RequeueError, StageFailedError, UserError, explaining_the_disk
from posttrain.inputs import check_same_tokenizer, download, fingerprint_tokenizer
from posttrain.planning import Plan, plan_stage
from posttrain.preflight import Locate, require
from posttrain.registry import load, stage_spec
from posttrain.rundir import SCHEMA_VERSION, RunDir, atomic_write_text, describe_outputs
from posttrain.seeding import seed_everything

__all__ = ["StageContext", "StageResult", "execute_stage"]


@dataclass(frozen=True)
class StageResult:
    """What became of a stage. manifest: empty when it was only planned."""

    status: Literal["skipped", "completed", "planned"]
    manifest: dict[str, Any]
    plan: Plan


def execute_stage(
    kind: str,
    config: StageConfig,
    run_dir: Path,
    *,
    dry_run: bool = False,
    force: bool = False,
    console: Console | None = None,
    preflight: bool = True,
    locate: Locate | None = None,
) -> StageResult:
    """Bring `run_dir` to the state that `config` asks for: nothing when it is there, resuming when it can.

    preflight: look at data and models first (posttrain.preflight). locate: gives what it finds a YAML path.
    Raises UserError for what the user can correct, RequeueError when SIGTERM stopped it, PosttrainError for a
    full disk, and StageFailedError for any other exception of the stage, whose traceback is then in
    `run_dir/error.log`.
    """
    run = RunDir(run_dir)
    console = console or Console(stderr=True)
    if dry_run:
        plan = plan_stage(kind, config, run.path, force=force)
        return StageResult("planned", {}, plan)
    with explaining_the_disk(run.path):
        plan = plan_stage(kind, config, run.path, force=force)
    if plan.action == "skip":
        return StageResult("skipped", run.manifest() or {}, plan)
    if preflight:
        require(kind, config, run.path, plan.inputs, console, locate)
    try:
        with explaining_the_disk(run.path), run.locked():
            # Another process may have finished it between the first look and the lock.
            plan = plan_stage(kind, config, run.path, force=force)
            if plan.action == "skip":
                return StageResult("skipped", run.manifest() or {}, plan)
            manifest = _execute(kind, config, run, plan, console)
    except PosttrainError:
        raise
    except Exception as error:
        raise StageFailedError(
            f"the {kind} stage failed: {type(error).__name__}: {_first_line(error)}\n"
            f"    the traceback is in {run.path / 'error.log'}, or add --debug; the same command resumes"
        ) from error
    return StageResult("completed", manifest, plan)


def _execute(kind: str, config: StageConfig, run: RunDir, plan: Plan, console: Console) -> dict[str, Any]:
    started = time.perf_counter()
    manifest = _begin(kind, config, run, plan)
    context = StageContext(
        run_dir=run.path,
        config=config,
        inputs=plan.inputs,
        console=console,
        timings=manifest["timings"],
        resumed=plan.action == "resume",
    )
    try:
        metrics = _run_stage(kind, config, context, manifest)
        _finish(run, manifest, metrics, started)
    except RequeueError as stop:
        _record_interruption(run, manifest, stop, started)
        raise
    except Exception as error:
        _record_failure(run, manifest, error)
        raise
    return manifest


def _begin(kind: str, config: StageConfig, run: RunDir, plan: Plan) -> dict[str, Any]:
    """Make the directory ready and write config.yaml and the manifest of a run in progress."""
    timings: dict[str, float] = {}
    if plan.action == "resume":
        timings = dict((run.manifest() or {}).get("timings", {}))
        run.remove_staging()
        (run.path / "error.log").unlink(missing_ok=True)
    elif plan.action == "rerun":
        run.clear(keep=stage_spec(kind).keep)
    parents = [
        {
            "field": name,
            "ref": found.ref,
            "stage": (found.manifest or {}).get("stage"),
            "run": (found.manifest or {}).get("name"),
            "content_hash": found.content_hash,
        }
        for name, found in plan.inputs.items()
    ]
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "stage": kind,
        "name": run.path.name,
        "status": "running",
        "inputs_hash": plan.inputs_hash,
        "outputs_hash": None,
        "outputs": {},
        "parents": parents,
        "fingerprints": dict(plan.fingerprints),
        "code": code_version(),
        "packages": package_versions(),
        "hardware": hardware(),
        "seeds": {"stage": config.seed},
        "timings": timings,
        "metrics": {},
        "started": _now(),
        "finished": None,
        "error": None,
    }
    # The manifest first: from here on the directory is recognised as ours.
    run.write_manifest(manifest)
    settings = {"stage": kind, **config.model_dump(mode="json")}
    atomic_write_text(run.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return manifest


def _run_stage(
    kind: str, config: StageConfig, context: StageContext, manifest: dict[str, Any]
) -> dict[str, Any]:
    if any(found.path is None for found in context.inputs.values()):
        with context.phase("download"):
            context.inputs = {
                name: replace(found, path=download(found)) for name, found in context.inputs.items()
            }
            manifest["fingerprints"].update(check_same_tokenizer(context.inputs))
    with context.phase("import"):
        run_function = load(stage_spec(kind).run)
    manifest["hardware"] = hardware()
    seed_everything(config.seed)
    metrics = run_function(config, context)
    if not isinstance(metrics, dict):
        raise TypeError(f"the {kind} stage returned {type(metrics).__name__} instead of a dict of metrics")
    return to_json(metrics)


def _finish(run: RunDir, manifest: dict[str, Any], metrics: dict[str, Any], started: float) -> None:
    """Describe the outputs and write `status: complete`, the last thing that is written."""
    outputs = describe_outputs(run.path)
    if "model" in outputs:
        manifest["fingerprints"]["model"] = fingerprint_tokenizer(run.path / "model")
    _add_total(manifest, started)
    manifest.update(outputs_hash=outputs.pop("hash"), outputs=outputs, metrics=metrics)
    manifest.update(status="complete", finished=_now())
    run.write_manifest(manifest)


def _add_total(manifest: dict[str, Any], started: float) -> None:
    timings = manifest["timings"]
    timings["total"] = round(timings.get("total", 0.0) + time.perf_counter() - started, 3)


def _record_interruption(run: RunDir, manifest: dict[str, Any], stop: RequeueError, started: float) -> None:
    """Not a failure: the next attempt resumes, and adds its seconds to those spent so far. Best effort, as
    below; without this record the manifest still says `running`, which resumes too.
    """
    _add_total(manifest, started)
    record = {**manifest, "status": "interrupted", "finished": _now(), "error": _first_line(stop)}
    try:
        run.remove_staging()
        run.write_manifest(record)
    except OSError:
        return


def _record_failure(run: RunDir, manifest: dict[str, Any], error: Exception) -> None:
    """Best effort: a full or read-only disk cannot take a record, and the run then counts as interrupted."""
    try:
        run.remove_staging()
        run.write_manifest({**manifest, "status": "failed", "finished": _now(), "error": _first_line(error)})
        if not isinstance(error, UserError):
            text = "".join(traceback.format_exception(error))
            atomic_write_text(run.path / "error.log", text)
    except OSError:
        return


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
