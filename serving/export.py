"""Stage `export`: a trained model as a versioned repository for a server, and a manifest of what is in it.

    posttrain run configs/tiny/pipeline.yaml --only export

    RUN/export.json                              versions, sources, lineage, evaluation, sha256 of every file
    RUN/model_repository/<name>/config.pbtxt     what Triton is told (not for every target)
    RUN/model_repository/<name>/1/               one version: weights, engine arguments, golden.json
    RUN/deploy/                                  Dockerfile, docker run, Kubernetes, alerts: newest version

A rerun with other inputs adds the next version and touches none that is there. What each target writes is in
serving/targets.py; golden.json is what `posttrain parity` holds a server to.

Where the weights are: model.json holds <mount_path>/<name>/1/weights, which is where vLLM finds them in the
container. The embedded server maps a path that ends in <name>/1/... onto the folder it serves. With
mount_path null the path is `weights`, relative to the version folder, which vLLM itself would look for in its
working directory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.context import StageContext
from posttrain.errors import PosttrainError
from posttrain.models import load_tokenizer
from posttrain.rundir import STAGING_PREFIX
from serving.adapters import check_adapters, write_adapters
from serving.columns import compare_columns, explain, table, tie_margin
from serving.config import ExportConfig
from serving.deploy import write_deployment
from serving.golden import GoldenMaker, GoldenSet, golden_conversations, make_golden, write_golden
from serving.manifest import adapter_behind, content_of, describe_export
from serving.onnx_graph import export_onnx
from serving.parity import LOGPROB_BOUNDS
from serving.portable import make_readable
from serving.repository import (
    MANIFEST,
    REPOSITORY,
    WEIGHTS,
    check_same_model,
    choose_version,
    describe_files,
    find_same,
    publish,
    read_export,
    read_index,
    weights_dir,
    write_config,
    write_index,
)
from serving.targets import Layout, write_target
from serving.weights import context_length, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["MANIFEST", "REPOSITORY", "describe_files", "read_export", "run", "weights_dir"]


def run(config: ExportConfig, context: StageContext) -> dict[str, Any]:
    """Write a version and its manifest; returns {"version", "files", "bytes", ...}."""
    index = read_index(context.run_dir)
    check_same_model(index, config.name, config.target, context.run_dir)
    model_dir = context.run_dir / REPOSITORY / config.name
    content = content_of(config, context)
    same = find_same(context.run_dir, index, content) if config.version is None else None
    if index is not None and same is not None:
        manifest = index["versions"][same]
        onnx = manifest["onnx"]
        scores = (onnx["output"], onnx["size"]) if onnx else None
        layout = Layout(config, same, manifest["max_model_len"], manifest["max_lora_rank"], scores)
        write_config(model_dir, layout.config_pbtxt())
        write_index(context.run_dir, index["versions"])
        context.console.print(f"version {same} of {config.name} has this content already", highlight=False)
    else:
        version = choose_version(index, model_dir, config.version)
        with _staging(context.run_dir) as staged:
            layout, details = write_version(config, context, staged, version)
            manifest = describe_export(config, context, layout, details | {"content": content}, staged)
            manifest = publish(context.run_dir, staged, version, manifest, index, layout.config_pbtxt())
    with context.staging("deploy") as folder:
        write_deployment(folder, layout)
        make_readable(folder)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    context.console.print(
        f"exported {config.name}, version {manifest['version']}, for {config.target}: "
        f"{len(manifest['files'])} files, {total / 1e6:.1f} MB",
        highlight=False,
    )
    return {
        "version": int(manifest["version"]),
        "files": len(manifest["files"]),
        "bytes": total,
        "max_model_len": manifest["max_model_len"],
        **{f"golden_{key}": value for key, value in (manifest["golden"] or {}).items()},
        **({"onnx_max_difference": manifest["onnx"]["max_difference"]} if manifest["onnx"] else {}),
    }


def write_version(
    config: ExportConfig, context: StageContext, staged: Path, version: str
) -> tuple[Layout, dict[str, Any]]:
    """Fill a staged version folder; what was learned on the way goes to the manifest.

    Raises UserError for adapters that cannot be served unmerged, too large a max_model_len, or a tokenizer
    that would read a served prompt otherwise than training did; PosttrainError when what was written does not
    answer the golden prompts as the model does.
    """
    source = context.path("model")
    if config.target == "triton-onnx":
        return _write_onnx(config, context, source, staged, version)
    adapters = {name: context.path(f"adapters.{name}") for name in config.adapters}
    rank = None
    if adapters:
        rank = check_adapters(source, context.inputs["model"].content_hash, adapters)
    with context.phase("write"):
        allowed = write_model(config, source, staged / WEIGHTS)
        layout = Layout(config, version, context_length(config, allowed), rank)
        if adapters:
            write_adapters(staged, adapters, layout.mount)
        write_target(staged, layout)
    golden = None
    if config.golden_prompts:
        with context.phase("golden"):
            golden = _write_golden(config, context, layout, source, adapters, staged)
    make_readable(staged)
    return layout, {"golden": golden, "onnx": None}


def _write_onnx(
    config: ExportConfig, context: StageContext, source: Path, staged: Path, version: str
) -> tuple[Layout, dict[str, Any]]:
    with context.phase("write"):
        made = export_onnx(source, staged, config.seed)
    make_readable(staged)
    context.console.print(
        f"ONNX Runtime agrees with torch within {made['max_difference']:.1e}", highlight=False
    )
    length = context_length(config, made["max_model_len"])
    layout = Layout(config, version, length, None, (made["output"], made["size"]))
    return layout, {"golden": None, "onnx": made}


def _write_golden(
    config: ExportConfig,
    context: StageContext,
    layout: Layout,
    source: Path,
    adapters: dict[str, Path],
    staged: Path,
) -> dict[str, Any]:
    tokenizer = load_tokenizer(source)
    room = min(config.golden_tokens, layout.max_output_tokens, layout.max_model_len // 2)
    conversations = golden_conversations(config, context, tokenizer, layout.max_model_len - room - 1)
    maker = GoldenMaker(tokenizer, conversations, room, context)
    trained = adapter_behind(context.inputs["model"]) or source
    golden = make_golden(maker, config, trained, adapters, staged)
    identical, largest = _compare_golden(golden, config, context, tokenizer)
    write_golden(staged, golden)
    return {
        "prompts": len(golden.prompts),
        "max_new_tokens": room,
        "identical": identical,
        "max_logprob_delta": largest,
    }


def _compare_golden(
    golden: GoldenSet, config: ExportConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, float]:
    """Print what was written against what was trained; the fewest identical answers, the largest difference.

    Raises PosttrainError unless every comparison passes: such a version must not be served.
    """
    bound, tie = LOGPROB_BOUNDS[config.dtype], tie_margin(config.dtype)
    identical, largest = len(golden.prompts), 0.0
    for name, columns in golden.served.items():
        (first, reference), (second, written) = columns.items()
        compared = compare_columns(first, reference, second, written, tie=tie)
        shown = "\n".join(table(name or config.name, [compared], bound))
        context.console.print(shown, highlight=False, markup=False, soft_wrap=True)
        delta = compared.max_logprob_delta
        if delta is None or not compared.passed(bound):
            lines = explain(compared, reference, written, lambda token: tokenizer.decode([token]))
            if delta is None or delta > bound:
                size = "not finite" if delta is None else f"{delta:.2g} nats"
                lines.append(f"largest difference of a log-probability: {size}, allowed is {bound:g}")
            raise PosttrainError(
                f"{name or config.name}: what was written ({second}) does not answer as the model does "
                f"({first}); nothing was published\n    "
                + "\n    ".join(lines)
                + ("" if config.dtype == "float32" else "\n    dtype: float32 rounds least")
                + "\n    golden_prompts: 0 publishes a version without this comparison"
            )
        identical, largest = min(identical, compared.identical), max(largest, delta)
    return identical, largest


@contextmanager
def _staging(run_dir: Path) -> Iterator[Path]:
    """A folder beside the repository, gone afterwards unless it was moved into place."""
    staged = Path(tempfile.mkdtemp(dir=run_dir, prefix=f"{STAGING_PREFIX}version-"))
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
