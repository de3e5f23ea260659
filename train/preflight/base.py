"""The corpus and the architecture of `base`, which has no model to start from and no tokenizer yet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.dataset import read_kind
from data_prep.records import Kind
from posttrain.errors import DataError, free_bytes
from posttrain.preflight import Findings
from posttrain.preflight_report import Piece
from train.base_config import BaseConfig
from train.preflight.disk import ADAM, WEIGHT, gigabytes
from train.preflight.rows import Sample, read_samples
from train.preflight.texts import check_repeats


def check_base(config: BaseConfig, paths: Mapping[str, Path], run_dir: Path) -> Findings:
    """Everything about a base stage. Lengths in tokens are not known before its tokenizer is trained."""
    findings = Findings()
    _check_architecture(config, findings)
    _check_disk(config, run_dir, findings)
    samples = _read_corpus(config, paths["data"], findings) if "data" in paths else []
    for sample in samples:
        texts = [row["text"] if "text" in row else _joined(row["messages"]) for row in sample.rows]
        check_repeats(sample, texts, "rows", findings)
        if sample.split == "train":
            _check_corpus(config, sample, texts, findings)
            findings.example = _pieces(sample.rows[0])
    return findings


def _read_corpus(config: BaseConfig, path: Path, findings: Findings) -> list[Sample]:
    try:
        kind = read_kind(path)
    except DataError as error:
        findings.fail_with("data", error)
        return []
    if kind not in (None, "text", "conversation"):
        findings.fail(
            "data",
            f"{path}: holds {kind} rows, but the base stage reads kind text or conversation",
            "curate the sources with `kind: text` or `kind: conversation`",
        )
        return []
    wanted: Kind = "text" if kind == "text" else "conversation"
    return read_samples(path, wanted, config.seed, findings)


def _check_architecture(config: BaseConfig, findings: Findings) -> None:
    size = config.architecture
    if size.hidden_size % (2 * size.num_attention_heads):
        findings.fail(
            "architecture.num_attention_heads",
            f"{size.num_attention_heads} heads do not divide hidden_size {size.hidden_size} into an even "
            "number of columns each, which rotary positions need",
            f"use a hidden_size that is a multiple of {2 * size.num_attention_heads}",
        )
    if config.max_length > size.max_position_embeddings:
        findings.fail(
            "max_length",
            f"{config.max_length} tokens, but architecture.max_position_embeddings is "
            f"{size.max_position_embeddings}",
            "lower it, or raise architecture.max_position_embeddings",
        )
    if config.warmup_steps >= config.steps:
        findings.warn(
            "warmup_steps",
            f"{config.warmup_steps} of {config.steps} steps: the learning rate is never reached",
            "lower it",
        )


def _check_disk(config: BaseConfig, run_dir: Path, findings: Findings) -> None:
    """One checkpoint is kept while the next is written; the model follows."""
    weights = parameters(config)
    needed, free = weights * (2 * (WEIGHT + ADAM) + WEIGHT), free_bytes(run_dir)
    if needed > free:
        findings.fail(
            "",
            f"two checkpoints and the model ({weights:,} parameters) need {gigabytes(needed)}, {run_dir} has "
            f"{gigabytes(free)} free",
            "choose a smaller architecture, or another disk: output_dir=/path (pipeline), --output /path "
            "(stage)",
        )


def parameters(config: BaseConfig) -> int:
    """Weights of the model, but for the embeddings of what `keep_whole` adds."""
    size = config.architecture
    layer = 4 * size.hidden_size**2 + 3 * size.hidden_size * size.intermediate_size + 2 * size.hidden_size
    return config.vocab_size * size.hidden_size + size.num_hidden_layers * layer + size.hidden_size


def _check_corpus(config: BaseConfig, sample: Sample, texts: Sequence[str], findings: Findings) -> None:
    if sample.total < config.batch_size:
        findings.warn(
            "batch_size",
            f"{config.batch_size} sequences a step, more than the {sample.total} of the train split: every "
            "epoch is one step",
            "lower it",
        )
    if config.keep_whole is None:
        return
    try:
        pattern = re.compile(config.keep_whole)
    except re.error as error:
        findings.fail(
            "keep_whole", f"{config.keep_whole!r} is not a regular expression ({error})", "correct it"
        )
        return
    if not any(map(pattern.search, texts)):
        message = f"{config.keep_whole!r} matches nothing in {sample.where}"
        findings.warn("keep_whole", message, "correct it, or leave it out")


def _joined(messages: Sequence[dict[str, str]]) -> str:
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def _pieces(row: dict[str, object]) -> list[Piece]:
    """The row as text, what carries the full loss marked; the tokenizer does not exist yet."""
    if isinstance(row.get("text"), str):
        return [(str(row["text"]), True)]
    messages: list[dict[str, str]] = row["messages"]  # type: ignore[assignment]
    shown: list[Piece] = []
    for turn in messages:
        shown += [(f"{turn['role']}\n", False), (turn["content"], turn["role"] == "assistant"), ("\n", False)]
    return shown
