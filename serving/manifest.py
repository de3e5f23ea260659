"""What the manifest of an exported version says: sources by content hash, lineage, evaluation, versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.environment import code_version, package_versions
from posttrain.errors import UserError
from posttrain.hashing import adapter_base, fingerprint_tokenizer, hash_path
from posttrain.inputs import ResolvedInput, resolve
from posttrain.models import is_adapter
from posttrain.planning import hash_inputs
from posttrain.rundir import read_manifest
from serving.config import ExportConfig
from serving.onnx_graph import TOKENIZER
from serving.repository import WEIGHTS
from serving.targets import Layout


def content_of(config: ExportConfig, context: StageContext) -> str:
    """Hash of everything that decides the files of a version but its number."""
    return hash_inputs(
        "export",
        config.model_copy(update={"version": None, "num_versions": 1, "image": None}),
        context.inputs,
    )


def describe_export(
    config: ExportConfig, context: StageContext, layout: Layout, details: dict[str, Any], staged: Path
) -> dict[str, Any]:
    """The manifest of a version, without its files. `details` is added to it."""
    source = context.path("model")
    found = context.inputs["model"]
    return {
        "target": config.target,
        "name": config.name,
        "version": layout.version,
        "dtype": config.dtype,
        "max_model_len": layout.max_model_len,
        "max_lora_rank": layout.max_lora_rank,
        "limits": layout.limits,
        "source": {
            **_identity(found),
            "path": str(source),
            "relative_path": os.path.relpath(source, context.run_dir),
            "adapter": is_adapter(source),
            "fingerprints": fingerprint_tokenizer(source),
        },
        "base": _base(source),
        "adapters": {
            name: _identity(context.inputs[f"adapters.{name}"])
            | {"lineage": lineage(context.inputs[f"adapters.{name}"].manifest)}
            for name in config.adapters
        },
        "fingerprints": fingerprint_tokenizer(
            staged / (TOKENIZER if config.target == "triton-onnx" else WEIGHTS)
        ),
        "lineage": lineage(found.manifest),
        "evaluation": evaluations(context),
        "code": code_version(),
        "packages": package_versions(),
        **details,
    }


def _identity(found: ResolvedInput) -> dict[str, Any]:
    return {
        "ref": found.ref,
        "run": (found.manifest or {}).get("name"),
        "stage": (found.manifest or {}).get("stage"),
        "content_hash": found.content_hash,
    }


def _base(source: Path) -> dict[str, Any] | None:
    """The base model that an adapter was merged into."""
    if not is_adapter(source):
        return None
    base = adapter_base(source)
    return {"path": str(base), "content_hash": hash_path(base)}


def lineage(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of the run that the model comes from: stage, run, hash, parents, seeds and metrics."""
    if manifest is None:
        return None
    keys = ("stage", "name", "outputs_hash", "parents", "seeds", "metrics", "code")
    return {key: manifest.get(key) for key in keys}


def evaluations(context: StageContext) -> list[dict[str, Any]]:
    """What finished `eval` runs beside the model's run measured of it, or of the adapter merged into it."""
    found = context.inputs["model"]
    if found.manifest is None or found.path is None:
        return []
    hashes = {found.content_hash, *(parent["content_hash"] for parent in _merged_from(found.manifest))}
    results = []
    for path in sorted(found.path.parent.parent.glob("*/manifest.json")):
        try:
            manifest = read_manifest(path.parent)
        except UserError:
            continue  # Another program's manifest.json.
        if manifest is None or (manifest["stage"], manifest["status"]) != ("eval", "complete"):
            continue
        fields = [parent["field"] for parent in manifest["parents"] if parent["content_hash"] in hashes]
        models = [field.removeprefix("models.") for field in fields if field.startswith("models.")]
        results += [
            {"run": manifest["name"], "model": model, "metrics": manifest["metrics"]} for model in models
        ]
    return results


def _merged_from(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    if manifest["stage"] != "merge":
        return []
    return [parent for parent in manifest["parents"] if parent["field"] == "model"]


def adapter_behind(found: ResolvedInput) -> Path | None:
    """The adapter that a `merge` run merged, where it is still there unchanged; None otherwise."""
    if found.manifest is None or found.path is None:
        return None
    for parent in _merged_from(found.manifest):
        run_dir = found.path.parent
        for ref in (str(parent["ref"]), str(run_dir.parent / Path(str(parent["ref"])).name)):
            try:
                source = resolve(ref, "model")
            except UserError:
                continue
            if source.path is not None and source.content_hash == parent["content_hash"]:
                return source.path if is_adapter(source.path) else None
    return None
