"""Stage `export`: a model repository for Triton's vLLM backend, and a manifest of what is in it.

    posttrain run configs/tiny/pipeline.yaml --only export

    RUN/export.json                              sha256 of every file, source, tokenizer and template hashes
    RUN/model_repository/<name>/config.pbtxt     all inputs and outputs of the vLLM backend
    RUN/model_repository/<name>/1/model.json     vLLM engine arguments
    RUN/model_repository/<name>/1/weights/       merged weights, tokenizer, chat template

On a GPU, in the image nvcr.io/nvidia/tritonserver:<yy.mm>-vllm-python-py3:

    docker run --gpus all -v RUN/model_repository:/models IMAGE tritonserver --model-repository=/models

Here: the `serve` stage, which loads the same files with the stand-in backend of serving/backends/vllm.

Where the weights are: model.json holds <mount_path>/<name>/1/weights, which is where vLLM finds them in the
container. The embedded server maps a path that ends in <name>/1/... onto the folder it serves. With
mount_path null the path is `weights`, relative to the version folder, which vLLM itself would look for in its
working directory.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from posttrain.context import StageContext
from posttrain.environment import package_versions
from posttrain.errors import UserError
from posttrain.hashing import fingerprint_tokenizer, hash_file
from posttrain.models import is_adapter, load_causal_lm, load_tokenizer
from posttrain.portable import make_portable, rewrite_json
from posttrain.rundir import atomic_write_json
from serving.config import ExportConfig
from serving.contract import render_config
from serving.portable import make_readable, without_added_tokens

MANIFEST = "export.json"
REPOSITORY = "model_repository"
SCHEMA_VERSION = 1
VERSION = "1"
WEIGHTS = "weights"


def run(config: ExportConfig, context: StageContext) -> dict[str, Any]:
    """Write the repository and its manifest; returns {"files", "bytes", "max_model_len"}."""
    source = context.path("model")
    tokenizer = load_tokenizer(source)
    with context.phase("load"):
        model = load_causal_lm(source, dtype=config.dtype)
    max_model_len = context_length(config, model.config.max_position_embeddings)
    max_output_tokens = min(config.max_output_tokens, max_model_len)

    with context.phase("write"), context.staging(REPOSITORY) as root:
        version_dir = root / config.name / VERSION
        weights = version_dir / WEIGHTS
        weights.mkdir(parents=True)
        model.save_pretrained(weights)
        tokenizer.save_pretrained(weights)
        make_portable(weights, tokenizer.chat_template)
        check_prompt_tokens(weights, tokenizer)
        write_json(version_dir / "model.json", engine_arguments(config, max_model_len))
        limits = {
            "max_prompt_characters": str(config.max_prompt_characters),
            "max_output_tokens": str(max_output_tokens),
            "max_queue": str(config.max_queue),
        }
        (root / config.name / "config.pbtxt").write_text(render_config(config.name, limits), encoding="utf-8")
        make_readable(root)

    found = context.inputs["model"]
    repository = context.run_dir / REPOSITORY
    files = describe_files(repository)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "target": "triton-vllm",
        "name": config.name,
        "version": VERSION,
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "limits": {name: int(value) for name, value in limits.items()},
        "source": {
            "ref": found.ref,
            "path": str(source),
            "relative_path": os.path.relpath(source, context.run_dir),
            "content_hash": found.content_hash,
            "adapter": is_adapter(source),
            "fingerprints": fingerprint_tokenizer(source),
        },
        "fingerprints": fingerprint_tokenizer(repository / config.name / VERSION / WEIGHTS),
        "lineage": lineage(found.manifest),
        "packages": package_versions(),
        "files": files,
    }
    atomic_write_json(context.run_dir / MANIFEST, manifest)
    total = sum(entry["bytes"] for entry in files.values())
    context.console.print(
        f"exported {config.name}: {len(files)} files, {total / 1e6:.1f} MB", highlight=False
    )
    return {"files": len(files), "bytes": total, "max_model_len": max_model_len}


def context_length(config: ExportConfig, allowed: int) -> int:
    """The length to serve, in tokens. Raises UserError when it is more than the model was built for."""
    wanted = config.max_model_len or allowed
    if wanted > allowed:
        raise UserError(
            f"max_model_len: {wanted} tokens, but the model's max_position_embeddings is {allowed}\n"
            f"    lower max_model_len to {allowed} or remove it"
        )
    return wanted


def engine_arguments(config: ExportConfig, max_model_len: int) -> dict[str, Any]:
    """model.json: keyword arguments of vLLM's AsyncEngineArgs."""
    mount = f"{config.mount_path.rstrip('/')}/{config.name}/{VERSION}/" if config.mount_path else ""
    return {
        "model": mount + WEIGHTS,
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        **config.engine_args,
    }


def check_prompt_tokens(weights: Path, tokenizer: Any) -> None:
    """Make sure that the server adds no token to a rendered prompt."""
    probe = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    expected = tokenizer(probe, add_special_tokens=False)["input_ids"]
    if tokenizer(probe)["input_ids"] != expected:
        rewrite_json(weights / "tokenizer.json", without_added_tokens)
    served = load_tokenizer(weights)(probe)["input_ids"]
    if served != expected:
        raise UserError(
            f"{weights}: the server would read a rendered prompt as {served[:8]}..., "
            f"training as {expected[:8]}...\n"
            "    the tokenizer adds special tokens in a way the export cannot undo; "
            "save it with add_bos_token=false"
        )


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe_files(repository: Path) -> dict[str, dict[str, Any]]:
    """{path inside the repository: {"sha256", "bytes"}}, in a fixed order."""
    return {
        file.relative_to(repository).as_posix(): {"sha256": hash_file(file), "bytes": file.stat().st_size}
        for file in sorted(repository.rglob("*"))
        if file.is_file()
    }


def lineage(manifest: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of the run that the model comes from: stage, run, hash, parents, seeds and metrics."""
    if manifest is None:
        return None
    keys = ("stage", "name", "outputs_hash", "parents", "seeds", "metrics", "code")
    return {key: manifest.get(key) for key in keys}


def read_export(export_dir: Path) -> dict[str, Any]:
    """export.json of an export directory. Raises UserError when there is none or a listed file changed."""
    path = export_dir / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{export_dir}: is not an export (no {MANIFEST})\n    make one with `posttrain export`"
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path}: was not written by this version of posttrain (schema {SCHEMA_VERSION})")
    present = describe_files(export_dir / REPOSITORY)
    for name in sorted(manifest["files"].keys() | present.keys()):
        if present.get(name) != manifest["files"].get(name):
            what = "is missing" if name not in present else "is not what was exported"
            raise UserError(f"{export_dir / REPOSITORY / name}: {what}; export again")
    return manifest


def weights_dir(export_dir: Path, manifest: dict[str, Any]) -> Path:
    """Folder of the exported weights and tokenizer."""
    return export_dir / REPOSITORY / manifest["name"] / manifest["version"] / WEIGHTS
