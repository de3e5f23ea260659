"""Plain text for `pretrain`: is there something to learn, and does the model fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft import TaskType
from transformers import PreTrainedTokenizerBase

from posttrain.preflight import Findings
from train.config import PretrainConfig
from train.encode import encode_texts, windows_of
from train.preflight.models import check_length
from train.preflight.rows import Sample, all_alike, judge, read_samples
from train.preflight.tokens import doubled_bos, pieces, read_model
from train.preflight.trained import check_trained

MOSTLY, FEW = 0.5, 20
"""One text that makes up more than this share of that many rows, or more, is a warning."""


def check_pretrain(config: PretrainConfig, paths: Mapping[str, Path], run_dir: Path) -> Findings:
    """Everything about a pretrain stage."""
    findings = Findings()
    samples = read_samples(paths["data"], "text", config.seed, findings) if "data" in paths else []
    for sample in samples:
        check_repeats(sample, [row["text"] for row in sample.rows], "texts", findings)
    read = read_model(paths["model"], findings) if "model" in paths else None
    rows: int | None = None
    if read is not None:
        model, tokenizer = read
        max_length = check_length(model, config.trainer.get("max_length"), findings)
        for sample in samples if max_length is not None else []:
            seen = _check_windows(config, tokenizer, sample, max_length or 0, findings)
            rows = seen if sample.split == "train" else rows
    check_trained(config, TaskType.CAUSAL_LM, paths, samples, run_dir, findings, rows=rows)
    return findings


def _check_windows(
    config: PretrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    max_length: int,
    findings: Findings,
) -> int:
    """Look at the texts as they are trained on. Returns the rows that the trainer sees (packed: about)."""
    documents = encode_texts(tokenizer, [row["text"] for row in sample.rows])
    doubled = doubled_bos(tokenizer, documents, sample.ids)
    remedy = f"The tokenizer adds {tokenizer.bos_token}: take it out of the texts."
    judge(findings, "data", sample.where, replace(doubled, remedy=remedy) if doubled else None)
    windows = windows_of(documents, max_length)
    if not windows:
        findings.fail(
            "trainer.max_length",
            f"{max_length}: no window of {sample.where} has a second token, and the first has no loss",
            "use 2 or more",
        )
        return 0
    if sample.split == "train":
        ids = windows[0]
        findings.example = pieces(tokenizer, ids, [index > 0 for index in range(len(ids))])
    packed = -(-sum(map(len, windows)) // max_length)
    return (packed if config.trainer.get("packing") else len(windows)) * sample.total // len(sample.rows)


def check_repeats(sample: Sample, texts: Sequence[str], noun: str, findings: Findings) -> None:
    """A problem where all rows are one text, a warning where most are."""
    all_alike(findings.fail, sample, noun, texts, "curate texts that differ")
    text, count = Counter(texts).most_common(1)[0]
    if len(texts) >= FEW and MOSTLY * len(texts) < count < len(texts):
        findings.warn(
            "data",
            f"{sample.where}: one text makes up {count} of {len(texts)} {noun} ({count / len(texts):.1%}): "
            f"{text[:60]!r}",
            "curate with dedup: true, or other sources",
        )
