"""Preference pairs: sides that say the same, prompts rendered in two ways, and length as a shortcut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import TaskType
from transformers import PreTrainedTokenizerBase

from posttrain.errors import DataError, UserError
from posttrain.preflight import Findings
from train.config import CpoConfig, DpoConfig, KtoConfig, OrpoConfig, RewardConfig
from train.encode import identical_sides, open_ended, render_whole
from train.preflight.models import check_length
from train.preflight.rendered import check_fits, check_prompts, render_prompts
from train.preflight.rows import Sample, all_alike, judge, read_samples
from train.preflight.tokens import (
    check_added_bos,
    doubled_bos,
    pieces,
    read_model,
    rendering,
)
from train.preflight.trained import check_trained
from train.reward_folds import assign_folds
from train.reward_pairs import read_margins

MAX_PROMPT_MISMATCH = 0.01
EXTREME = 0.9
"""A side that is longer, or one text that is an answer, in more than this share of pairs is a warning."""

FEW = 20
"""Fewer pairs than this say nothing about length."""

Pair = tuple[list[int], list[int]]
PairsConfig = RewardConfig | DpoConfig | KtoConfig | OrpoConfig | CpoConfig


def check_pairs(config: PairsConfig, paths: Mapping[str, Path], run_dir: Path) -> Findings:
    """Everything about a stage that is trained on preference pairs."""
    findings = Findings()
    samples = read_samples(paths["data"], "preference", config.seed, findings) if "data" in paths else []
    for sample in samples:
        check_one_class(sample, findings)
    task = TaskType.SEQ_CLS if isinstance(config, RewardConfig) else TaskType.CAUSAL_LM
    check_trained(config, task, paths, samples, run_dir, findings)
    if isinstance(config, RewardConfig):
        _check_folds(config, samples, findings)
        _check_margins(config, samples, findings)
    if "model" not in paths:
        return findings
    read = read_model(paths["model"], findings)
    if read is None:
        return findings
    model, tokenizer = read
    max_length = check_length(model, config.trainer.get("max_length"), findings)
    for sample in samples:
        with rendering(tokenizer, sample.where, "data", findings):
            pairs, prompts = _render(tokenizer, sample)
            check_rendered(tokenizer, sample, pairs, max_length, findings)
            # A reward model never sees a prompt alone.
            limit = 1.0 if isinstance(config, RewardConfig) else MAX_PROMPT_MISMATCH
            check_prompts(sample, pairs, "pairs", prompts, limit, findings)
            if sample.split == "train":
                check_length_bias(sample, pairs, findings)
            if not findings.example:
                findings.example = _example(config, tokenizer, pairs[0][0], prompts[0])
                check_added_bos(tokenizer, pairs[0][0], findings)
    if isinstance(config, RewardConfig) and "calibration_data" in paths:
        _check_calibration(config, paths["calibration_data"], tokenizer, findings)
    return findings


def _render(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> tuple[list[Pair], list[list[int]]]:
    """Token ids of both sides, prompt included, and of the first prompts up to the assistant's turn."""
    chosen = render_whole(tokenizer, [row["prompt"] + row["chosen"] for row in sample.rows])
    rejected = render_whole(tokenizer, [row["prompt"] + row["rejected"] for row in sample.rows])
    return list(zip(chosen, rejected, strict=True)), render_prompts(tokenizer, sample)


def check_one_class(sample: Sample, findings: Findings) -> None:
    """A problem for pairs without two classes: all the same, or every pair there the other way round as well.

    A warning where one text makes up nearly a whole side: a model can tell such pairs apart by that text.
    """
    pairs = [(_text(row["prompt"]), _text(row["chosen"]), _text(row["rejected"])) for row in sample.rows]
    all_alike(findings.fail, sample, "pairs", pairs, "curate pairs that differ")
    there = set(pairs)
    mirrored = sum((prompt, rejected, chosen) in there for prompt, chosen, rejected in pairs)
    if mirrored == len(pairs):
        findings.fail(
            "data",
            f"{sample.where}: each of {len(pairs)} pairs is there with its sides swapped too, so that "
            "neither side is preferred",
            "keep one label of each pair in the source, and curate again",
        )
    elif mirrored:
        findings.warn(
            "data",
            f"{sample.where}: {mirrored} of {len(pairs)} pairs ({mirrored / len(pairs):.1%}) are there with "
            "their sides swapped too",
            "keep one label of each pair in the source, and curate again",
        )
    for index, side in ((1, "chosen"), (2, "rejected")):
        text, count = Counter(pair[index] for pair in pairs).most_common(1)[0]
        if len(pairs) >= FEW and count > EXTREME * len(pairs):
            findings.warn(
                "data",
                f"{sample.where}: {side} is the same text in {count} of {len(pairs)} pairs "
                f"({count / len(pairs):.1%}): {text[:60]!r}",
                "a reward model needs only to know this text; use pairs with other answers",
            )


def _text(messages: list[dict[str, str]]) -> str:
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def check_rendered(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    pairs: Sequence[Pair],
    max_length: int | None,
    findings: Findings,
) -> None:
    """Pairs that are identical, do not end their turn, have a doubled BOS, or do not fit."""
    ids, place = sample.ids, sample.where
    chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    judge(findings, "data", place, identical_sides(pairs, ids))
    judge(
        findings, "model", place, open_ended(tokenizer, chosen, ids) or open_ended(tokenizer, rejected, ids)
    )
    judge(findings, "model", place, doubled_bos(tokenizer, chosen, ids))
    check_fits(sample, pairs, "pairs", max_length, findings)


def check_length_bias(sample: Sample, pairs: Sequence[Pair], findings: Findings) -> None:
    """A warning when chosen is the longer, or the shorter, side in an extreme share of the pairs."""
    differences = [len(chosen) - len(rejected) for chosen, rejected in pairs if len(chosen) != len(rejected)]
    if len(differences) < FEW:
        return
    longer = sum(difference > 0 for difference in differences)
    for share, count, word in (
        (longer / len(differences), longer, "longer"),
        (1 - longer / len(differences), len(differences) - longer, "shorter"),
    ):
        if share > EXTREME:
            findings.warn(
                "data",
                f"{sample.where}: chosen is the {word} side in {count} of {len(differences)} pairs of "
                f"unequal length ({share:.1%}): length alone tells the sides apart, or they are swapped",
                "look at a few pairs; balance the lengths, or expect a reward for length",
            )


def _check_folds(config: RewardConfig, samples: Sequence[Sample], findings: Findings) -> None:
    train = [sample for sample in samples if sample.split == "train" and len(sample.rows) == sample.total]
    for sample in train if config.folds else []:
        try:
            assign_folds([row["group"] for row in sample.rows], config.folds or 0, config.seed)
        except UserError as error:
            message, _, remedy = str(error).removeprefix("folds: ").partition("; ")
            findings.fail("folds", message, remedy)


def _check_margins(config: RewardConfig, samples: Sequence[Sample], findings: Findings) -> None:
    for sample in samples if config.margin is not None else []:
        try:
            read_margins(sample.rows, config.margin or "")
        except DataError as error:
            message, _, remedy = str(error).removeprefix("margin: ").partition("\n    ")
            findings.fail("margin", f"{sample.where}: {message}", remedy)


def _check_calibration(
    config: RewardConfig, path: Path, tokenizer: PreTrainedTokenizerBase, findings: Findings
) -> None:
    where = "calibration_data"
    for sample in read_samples(path, "conversation", config.seed, findings, where, ("train",)):
        rows = sample.rows[: config.calibration_rows]
        with rendering(tokenizer, sample.where, where, findings):
            rendered = render_whole(tokenizer, [row["messages"] for row in rows])
            judge(findings, where, sample.where, open_ended(tokenizer, rendered, sample.ids[: len(rows)]))


def _example(
    config: PairsConfig, tokenizer: PreTrainedTokenizerBase, chosen: list[int], prompt: list[int]
) -> list[tuple[str, bool]]:
    """The chosen side: of a policy its answer carries loss, of a reward model the last token is scored."""
    start = len(chosen) - 1 if isinstance(config, RewardConfig) else len(prompt)
    return pieces(tokenizer, chosen, [index >= start for index in range(len(chosen))])
