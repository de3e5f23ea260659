"""Where a stage's input is: a run directory, a local path, or a model or data set of the Hugging Face Hub.

This is the one place that decides; every stage gets a `ResolvedInput`.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.hashing import fingerprint_tokenizer, hash_dataset, hash_json, hash_path
from posttrain.patterns import is_pattern, matching_files
from posttrain.rundir import missing_output, read_manifest

__all__ = ["ResolvedInput", "check_same_tokenizer", "download", "fingerprint_tokenizer", "resolve"]

_HUB_ID = re.compile(r"^(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?$")
_FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".yaml", ".yml", ".txt", ".csv", ".safetensors", ".bin")


@dataclass(frozen=True)
class ResolvedInput:
    """One input of a stage. Either `path` (local) or `hub_id` ("org/name" or "org/name@revision") is set.

    manifest: that of the run directory the input comes from, None for anything else. own_tokenizer: a
    model whose tokenizer need not be that of the stage's other models.
    """

    ref: str
    kind: str
    path: Path | None
    hub_id: str | None
    content_hash: str
    manifest: dict[str, Any] | None = None
    own_tokenizer: bool = False


def resolve(ref: str, kind: str) -> ResolvedInput:
    """Find the input `ref` of the given kind ("model", "dataset", "run" or "file").

    A run directory must be complete; for kind "model" its `model/` is meant. Raises UserError, with the
    remedy, for anything that is not there or not finished.
    """
    path = Path(ref).expanduser()
    if not path.exists():
        return _from_pattern(ref, path) if kind == "file" and is_pattern(ref) else _from_hub(ref, kind, path)
    path = path.absolute()
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is not None and kind != "file":
        return _from_run(ref, kind, path, manifest)
    if kind == "run":
        raise UserError(
            f"{ref}: is not a run directory (no manifest.json); name the directory of a finished stage"
        )
    if kind == "model":
        _check_model_dir(ref, path)
    try:
        content = hash_dataset(path) if kind == "dataset" else hash_path(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return ResolvedInput(ref, kind, path, None, content)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{error.filename or path}: cannot be read ({error.strerror or error})\n"
        "    check the file and its rights"
    )


def _from_run(ref: str, kind: str, path: Path, manifest: dict[str, Any]) -> ResolvedInput:
    stage, status = manifest.get("stage", "?"), manifest["status"]
    if status != "complete":
        raise UserError(
            f"{ref}: this {stage} run is not complete (status: {status})\n"
            "    run that stage to its end first; the same command resumes it"
        )
    gone = missing_output(path, manifest)
    if gone is not None:
        raise UserError(
            f"{ref}: {gone} is missing or has changed since this run finished; rerun the {stage} stage"
        )
    outputs = manifest["outputs"]
    if kind == "run":
        return ResolvedInput(ref, kind, path, None, manifest["outputs_hash"], manifest)
    if kind not in outputs:
        raise UserError(
            f"{ref}: a {stage} run holds no {kind}; name a run that writes one, or a {kind} directory"
        )
    return ResolvedInput(
        ref, kind, path / "model" if kind == "model" else path, None, outputs[kind], manifest
    )


def _from_pattern(ref: str, path: Path) -> ResolvedInput:
    """The files that a glob matches, as one input; `path` stays the pattern."""
    path = path.absolute()
    files = matching_files(str(path))
    if not files:
        raise UserError(
            f"{ref}: no file matches this pattern\n    {_remedy(Path(str(path).split('*')[0]), 'file')}"
        )
    root = os.path.commonpath([file.parent for file in files])
    try:
        content = hash_json({file.relative_to(root).as_posix(): hash_path(file) for file in files})
    except OSError as error:
        raise _unreadable(path, error) from error
    return ResolvedInput(ref, "file", path, None, content)


def _from_hub(ref: str, kind: str, path: Path) -> ResolvedInput:
    match = _HUB_ID.match(ref)
    local = path.suffix in _FILE_SUFFIXES or path.parent.is_dir() or kind not in ("model", "dataset")
    if match is None or local:
        raise UserError(
            f"{ref}: no such {'file or directory' if kind == 'file' else kind}\n    {_remedy(path, kind)}"
        )
    return ResolvedInput(ref, kind, None, ref, hash_json({"hub": ref, "kind": kind}))


def _remedy(path: Path, kind: str) -> str:
    ancestor, missing = path.absolute(), "the pattern"
    while not ancestor.exists():
        missing, ancestor = ancestor.name, ancestor.parent
    close = difflib.get_close_matches(missing, [item.name for item in ancestor.iterdir()], n=1)
    if close:
        return f"did you mean {ancestor / close[0]}?"
    accepted = {"run": "a run directory", "file": "an existing path"}.get(
        kind, "a run directory, a path, or org/name"
    )
    return f"{ancestor} exists, {missing} in it does not; this input takes {accepted}"


def _check_model_dir(ref: str, path: Path) -> None:
    if path.is_file():
        raise UserError(f"{ref}: is a file; a model is a directory with config.json or adapter_config.json")
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(
            f"{ref}: holds neither config.json nor adapter_config.json, so it is not a model directory"
        )


def download(found: ResolvedInput) -> Path:
    """The local directory of an input, downloaded from the Hub (or taken from its cache) when it is there."""
    if found.path is not None:
        return found.path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    match = _HUB_ID.match(found.hub_id or "")
    assert match is not None
    try:
        directory = snapshot_download(
            match["id"],
            revision=match["revision"],
            repo_type="dataset" if found.kind == "dataset" else "model",
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{found.ref}: is not a local path, and the Hugging Face Hub did not give it "
            f"({_first_line(error)})\n"
            "    check the spelling, the network and `hf auth login`, or name a local directory"
        ) from None
    return Path(directory)


def check_same_tokenizer(inputs: dict[str, ResolvedInput]) -> dict[str, dict[str, str]]:
    """Fingerprints of the models among a stage's inputs, by field; Hub ids are checked once downloaded.

    Raises UserError when two of them differ in tokenizer or chat template: their token ids would not
    mean the same. Those with `own_tokenizer` are fingerprinted and not compared.
    """
    fingerprints: dict[str, dict[str, str]] = {}
    for field, found in inputs.items():
        if found.kind == "model" and found.path is not None:
            fingerprints[field] = fingerprint_tokenizer(found.path)
    fields = [field for field in fingerprints if not inputs[field].own_tokenizer]
    for field in fields[1:]:
        first, second = fingerprints[fields[0]], fingerprints[field]
        differing = [what for what in ("tokenizer", "chat_template") if first[what] != second[what]]
        if differing:
            names = " and ".join(what.replace("_", " ") for what in differing)
            hashes = "; ".join(f"{what} {first[what][:12]} against {second[what][:12]}" for what in differing)
            raise UserError(
                f"{fields[0]} ({inputs[fields[0]].ref}) and {field} ({inputs[field].ref}) "
                f"differ in {names}: {hashes}\n"
                "    models of one stage must share both; train them from the same base model, or copy the "
                "tokenizer files and retrain the one that is wrong"
            )
    return fingerprints


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
