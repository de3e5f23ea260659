"""Decides what is to be done for one stage: skip it, resume it, run it, or run it again, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from posttrain.config import StageConfig, find_references, how_fields
from posttrain.errors import UserError
from posttrain.hashing import hash_json
from posttrain.inputs import ResolvedInput, check_same_tokenizer, resolve
from posttrain.registry import stage_spec
from posttrain.rundir import RunDir, missing_output

Action = Literal["run", "resume", "rerun", "skip"]


@dataclass(frozen=True)
class Plan:
    """What to do for one stage. inputs and inputs_hash are empty while an input is still to be made."""

    action: Action
    reason: str
    inputs: dict[str, ResolvedInput] = field(default_factory=dict)
    inputs_hash: str = ""
    fingerprints: dict[str, dict[str, str]] = field(default_factory=dict)


def plan_stage(
    kind: str,
    config: StageConfig,
    run_dir: Path,
    *,
    force: bool = False,
    pending: Mapping[Path, str] | None = None,
) -> Plan:
    """Compare the run directory with what is asked for. Nothing is written.

    pending: run directories that earlier stages of the same plan will (re)make, with the stage's name.
    Raises UserError for an input that is missing, unfinished or does not fit the others, and for a
    directory that is not ours.
    """
    pending = pending or {}
    run = RunDir(run_dir)
    run.check_ours()
    manifest = run.manifest()
    awaited = awaited_inputs(config, pending)
    if awaited:
        _resolve_all(config, leave_out=awaited)
        action: Action = "run" if manifest is None else "rerun"
        return Plan(action, f"after {', '.join(dict.fromkeys(awaited.values()))}")
    inputs = _resolve_all(config)
    fingerprints = check_same_tokenizer(inputs)
    inputs_hash = hash_inputs(kind, config, inputs)
    action, reason = _compare(run.path, manifest, inputs_hash, inputs, force)
    return Plan(action, reason, inputs, inputs_hash, fingerprints)


def hash_inputs(kind: str, config: StageConfig, inputs: Mapping[str, ResolvedInput]) -> str:
    """Hash of everything that decides a stage's result: its code version, settings, seed and input contents.

    The paths of inputs do not count, their contents do, so a run directory may be moved. Neither do fields
    marked HowOnly.
    """
    settings = config.model_dump(mode="json", exclude=how_fields(config))
    for reference in find_references(config):
        _blank(settings, reference.field.split("."))
    return hash_json(
        {
            "stage": kind,
            "version": stage_spec(kind).version,
            "config": settings,
            "inputs": {name: found.content_hash for name, found in inputs.items()},
        }
    )


def _resolve_all(config: StageConfig, leave_out: Collection[str] = ()) -> dict[str, ResolvedInput]:
    inputs: dict[str, ResolvedInput] = {}
    failures: list[str] = []
    for reference in find_references(config):
        if reference.field in leave_out:
            continue
        try:
            found = resolve(reference.value, reference.kind)
            inputs[reference.field] = replace(found, own_tokenizer=reference.own_tokenizer)
        except UserError as error:
            failures.append(f"input {reference.field}: {error}")
    if failures:
        raise UserError("\n".join(failures))
    return inputs


def awaited_inputs(config: StageConfig, pending: Mapping[Path, str]) -> dict[str, str]:
    """The inputs that are still to be made, by field, with the name of the stage that makes each."""
    awaited: dict[str, str] = {}
    for reference in find_references(config):
        path = Path(reference.value).expanduser().absolute()
        for directory in (path, *path.parents):
            if directory in pending:
                awaited[reference.field] = pending[directory]
    return awaited


def _compare(
    run_dir: Path,
    manifest: dict[str, Any] | None,
    inputs_hash: str,
    inputs: Mapping[str, ResolvedInput],
    force: bool,
) -> tuple[Action, str]:
    if manifest is None:
        return "run", "not run yet"
    if force:
        return "rerun", "forced"
    if manifest["inputs_hash"] != inputs_hash:
        return "rerun", _what_changed(manifest, inputs)
    if manifest["status"] != "complete":
        how = "failed" if manifest["status"] == "failed" else "was interrupted"
        return "resume", f"the last attempt {how}"
    gone = missing_output(run_dir, manifest)
    if gone is not None:
        return "rerun", f"{gone} is missing or has changed"
    return "skip", "complete, same inputs"


def _what_changed(manifest: dict[str, Any], inputs: Mapping[str, ResolvedInput]) -> str:
    if not manifest["inputs_hash"]:
        return "a rerun of it was interrupted"
    before = {parent["field"]: parent["content_hash"] for parent in manifest.get("parents", [])}
    changed = [name for name, found in inputs.items() if before.get(name) != found.content_hash]
    return f"input {', '.join(changed)} changed" if changed else "the configuration changed"


def _blank(settings: Any, parts: list[str]) -> None:
    for part in parts[:-1]:
        settings = settings[int(part)] if isinstance(settings, list) else settings[part]
    last: Any = int(parts[-1]) if isinstance(settings, list) else parts[-1]
    settings[last] = None
