"""Labelled answers for KTO: both labels, the same answer labelled both ways, and the weight of each label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import TaskType
from transformers import PreTrainedTokenizerBase

from data_prep.dataset import read_kind
from posttrain.errors import DataError
from posttrain.preflight import Findings
from train.config import KtoConfig
from train.encode import open_ended, render_whole
from train.preflight.models import check_length
from train.preflight.pairs import EXTREME, FEW, MAX_PROMPT_MISMATCH, check_pairs
from train.preflight.rendered import check_fits, check_prompts, render_prompts
from train.preflight.rows import Sample, all_alike, judge, read_samples
from train.preflight.tokens import check_added_bos, doubled_bos, pieces, read_model, rendering
from train.preflight.trained import check_trained
from train.trainer_args import build_args

LOWEST, HIGHEST = 1.0, 4 / 3
"""Desirable weight x answers over undesirable weight x answers (KTO, 2402.01306, equation 8)."""


def check_kto(config: KtoConfig, paths: Mapping[str, Path], run_dir: Path) -> Findings:
    """Everything about a kto stage, of whichever kind its data are."""
    try:
        labelled = "data" in paths and read_kind(paths["data"]) == "unpaired_preference"
    except DataError:
        labelled = False  # reported where the rows are read
    if labelled:
        return _check_answers(config, paths, run_dir)
    findings = check_pairs(config, paths, run_dir)
    if "data" in paths:
        check_weights(build_args(config, Path("unused")), 1, 1, "each pair", findings)
    return findings


def _check_answers(config: KtoConfig, paths: Mapping[str, Path], run_dir: Path) -> Findings:
    findings = Findings()
    samples = read_samples(paths["data"], "unpaired_preference", config.seed, findings)
    for sample in samples:
        check_labels(sample, findings)
        good = sum(row["label"] for row in sample.rows)
        bad = len(sample.rows) - good
        if sample.split == "train" and good and bad:
            args = build_args(config, Path("unused"))
            check_weights(args, good, bad, sample.where, findings)
            _check_last_batch(args, sample, findings)
    check_trained(config, TaskType.CAUSAL_LM, paths, samples, run_dir, findings)
    read = read_model(paths["model"], findings) if "model" in paths else None
    if read is None:
        return findings
    model, tokenizer = read
    max_length = check_length(model, config.trainer.get("max_length"), findings)
    for sample in samples:
        with rendering(tokenizer, sample.where, "data", findings):
            _check_rendered(tokenizer, sample, max_length, findings)
    return findings


def check_labels(sample: Sample, findings: Findings) -> None:
    """A problem for answers of one label, or each labelled both ways; a warning for some of the latter, and
    for one text that makes up nearly all answers of a label.
    """
    texts = [(str(row["prompt"]), row["completion"][0]["content"], row["label"]) for row in sample.rows]
    all_alike(findings.fail, sample, "answers", texts, "curate answers that differ")
    labels = Counter(label for _, _, label in texts)
    if len(labels) == 1:
        add = findings.fail if sample.split == "train" else findings.warn
        add(
            "data",
            f"{sample.where}: all {len(texts)} answers are labelled {str(texts[0][2]).lower()}: KTO learns "
            "from what tells good answers from bad ones",
            "curate answers with both labels, or learn from good ones alone with the sft stage",
        )
    there = set(texts)
    both = sum((prompt, answer, not label) in there for prompt, answer, label in texts)
    if both:
        add = findings.fail if both == len(texts) else findings.warn
        add(
            "data",
            f"{sample.where}: {both} of {len(texts)} answers ({both / len(texts):.1%}) are there with the "
            "other label too",
            "keep one label of each answer in the source, and curate again",
        )
    for label, total in labels.items():
        text, count = Counter(answer for _, answer, other in texts if other == label).most_common(1)[0]
        if total >= FEW and count > EXTREME * total:
            findings.warn(
                "data",
                f"{sample.where}: {count} of {total} answers labelled {str(label).lower()} "
                f"({count / total:.1%}) are the same text: {text[:60]!r}",
                "a policy needs only to learn this text; use other answers",
            )


def check_weights(args: Any, good: int, bad: int, where: str, findings: Findings) -> None:
    """A warning where weights and numbers of the labels leave the range that the KTO paper recommends.

    args: TRL's KTOConfig. good, bad: desirable and undesirable answers.
    """
    for field in ("desirable_weight", "undesirable_weight"):
        if vars(args)[field] <= 0:
            message = f"{vars(args)[field]:g}: answers of this label then carry no loss"
            findings.warn(f"trainer.{field}", message, "use more than 0")
            return
    ratio = args.desirable_weight * good / (args.undesirable_weight * bad)
    if 0.99 * LOWEST <= ratio <= 1.01 * HIGHEST:
        return
    even_good, even_bad = args.undesirable_weight * bad / good, args.desirable_weight * good / bad
    findings.warn(
        "trainer.desirable_weight",
        f"{where}: {good} desirable answers x desirable_weight {args.desirable_weight:g} to {bad} "
        f"undesirable x undesirable_weight {args.undesirable_weight:g} is {ratio:.3g}:1; the KTO paper "
        "recommends 1:1 to 4:3",
        f"set trainer.desirable_weight to between {even_good:.3g} and {even_good * HIGHEST:.3g}, or "
        f"trainer.undesirable_weight to between {even_bad / HIGHEST:.3g} and {even_bad:.3g}",
    )


def _check_last_batch(args: Any, sample: Sample, findings: Findings) -> None:
    """A warning where the last batch is one answer, whose KL term is then estimated from itself."""
    size, total = args.per_device_train_batch_size, sample.total
    if args.loss_type != "kto" or args.dataloader_drop_last or size < 2 or total % size != 1:
        return
    other = next(number for number in range(size + 1, total + 2) if total % number != 1)
    findings.warn(
        "trainer.per_device_train_batch_size",
        f"{size} leaves one of {sample.where}'s {total} answers alone in the last batch, and the KL term "
        "needs another beside it",
        f"use {other}, or set trainer.dataloader_drop_last: true",
    )


def _check_rendered(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, max_length: int | None, findings: Findings
) -> None:
    whole = render_whole(tokenizer, [row["prompt"] + row["completion"] for row in sample.rows])
    prompts = render_prompts(tokenizer, sample)
    judge(findings, "model", sample.where, open_ended(tokenizer, whole, sample.ids))
    judge(findings, "model", sample.where, doubled_bos(tokenizer, whole, sample.ids))
    sides = [(ids,) for ids in whole]
    check_fits(sample, sides, "answers", max_length, findings)
    check_prompts(sample, sides, "answers", prompts, MAX_PROMPT_MISMATCH, findings)
    if not findings.example:
        findings.example = _example(tokenizer, whole[0], prompts[0])
        check_added_bos(tokenizer, whole[0], findings)


def _example(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt: Sequence[int]
) -> list[tuple[str, bool]]:
    return pieces(tokenizer, ids, [index >= len(prompt) for index in range(len(ids))])
