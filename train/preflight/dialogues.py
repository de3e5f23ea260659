"""Demonstrations: what carries loss once the template and the truncation have done their work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import TaskType
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.preflight import Findings
from train.config import SftConfig
from train.encode import (
    IGNORED,
    MAX_UNSUPERVISED,
    Encoded,
    Fault,
    label_conversations,
    never_ending,
    unsupervised,
)
from train.preflight.models import check_length, skeleton
from train.preflight.rows import MAX_LOST, Sample, all_alike, judge, read_samples
from train.preflight.tokens import (
    check_added_bos,
    doubled_bos,
    pieces,
    read_model,
    rendering,
)
from train.preflight.trained import check_trained


def check_sft(config: SftConfig, paths: Mapping[str, Path], run_dir: Path) -> Findings:
    """Everything about an sft stage."""
    findings = Findings()
    samples = read_samples(paths["data"], "conversation", config.seed, findings) if "data" in paths else []
    for sample in samples:
        answers = [row["messages"] for row in sample.rows]
        all_alike(findings.fail, sample, "dialogues", answers, "curate demonstrations that differ")
    check_trained(config, TaskType.CAUSAL_LM, paths, samples, run_dir, findings)
    if "model" not in paths:
        return findings
    read = read_model(paths["model"], findings)
    if read is None:
        return findings
    model, tokenizer = read
    _warn_of_state(config, model, findings)
    max_length = check_length(model, config.trainer.get("max_length"), findings)
    for sample in samples:
        with rendering(tokenizer, sample.where, "data", findings):
            _check_sample(config, tokenizer, sample, max_length, findings)
    return findings


def _warn_of_state(config: SftConfig, model_config: PreTrainedConfig, findings: Findings) -> None:
    """A recurrent model may carry its state from one row of a sequence to the next."""
    shared = next((name for name in ("packing", "padding_free") if config.trainer.get(name)), None)
    if shared is None:
        return
    model = skeleton(model_config, TaskType.CAUSAL_LM, "model", Findings())
    if isinstance(model, PreTrainedModel) and model._is_stateful:
        findings.warn(
            f"trainer.{shared}",
            f"true, and {model_config.model_type} is recurrent: its state may run on from one dialogue into "
            "the next. The stage measures that before it trains, and stops if it is so",
            f"set {shared}: false",
        )


def _check_sample(
    config: SftConfig,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    max_length: int | None,
    findings: Findings,
) -> None:
    conversations = [row["messages"] for row in sample.rows]
    try:
        encoded = label_conversations(
            tokenizer, conversations, config.trainer.get("assistant_only_loss", True)
        )
    except UserError as error:
        message, _, remedy = str(error).partition(" Add them")
        if sample.split == "train":
            findings.fail("trainer.assistant_only_loss", f"true: {message}", f"add them{remedy}")
        return
    splits = config.trainer.get("packing") and config.trainer.get("packing_strategy") == "bfd_split"
    check_supervision(tokenizer, sample, encoded, None if splits else max_length, findings)
    if not findings.example:
        first = encoded[0]
        kept = [label != IGNORED for label in first.labels]
        findings.example = pieces(tokenizer, first.input_ids[:max_length], kept[:max_length])
        check_added_bos(tokenizer, first.input_ids, findings)


def check_supervision(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    encoded: Sequence[Encoded],
    max_length: int | None,
    findings: Findings,
) -> None:
    """Rows without loss, without a supervised end of turn, with a doubled BOS, or with a cut answer.

    max_length: None where nothing is cut.
    """
    ids, place = sample.ids, sample.where
    judge(findings, "data", place, unsupervised([row.labels for row in encoded], ids), MAX_UNSUPERVISED)
    judge(findings, "data", place, never_ending(tokenizer, encoded, ids))
    judge(findings, "model", place, doubled_bos(tokenizer, [row.input_ids for row in encoded], ids))
    if max_length is not None:
        where, longest = "trainer.max_length", max(len(row.input_ids) for row in encoded)
        gone, cut = truncated(encoded, ids, max_length, longest)
        judge(findings, where, place, gone, MAX_UNSUPERVISED)
        judge(findings, where, place, cut, MAX_LOST)


def truncated(
    encoded: Sequence[Encoded], ids: Sequence[str], max_length: int, longest: int
) -> tuple[Fault | None, Fault | None]:
    """The dialogues that lose every supervised token at `max_length`, and those that lose some of them."""
    gone: list[str] = []
    cut: list[str] = []
    for name, row in zip(ids, encoded, strict=True):
        if any(label != IGNORED for label in row.labels[max_length:]):
            rest = any(label != IGNORED for label in row.labels[:max_length])
            (cut if rest else gone).append(name)
    remedy = f"raise trainer.max_length (the longest dialogue has {longest} tokens), or curate shorter ones"
    limit = f"at trainer.max_length={max_length}"
    return (
        Fault(gone, len(encoded), "dialogues", f"keep no token to learn from {limit}", remedy)
        if gone
        else None,
        Fault(cut, len(encoded), "dialogues", f"have their answer cut {limit}", remedy) if cut else None,
    )
