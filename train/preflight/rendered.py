"""What is looked at in any answer to a prompt, once rendered: its length, and how the prompt begins it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.preflight import Findings
from train.encode import Fault
from train.preflight.rows import MAX_LOST, Sample, judge

PROMPTS = 1_000
"""Prompts rendered alone: how they differ from what precedes an answer follows from the template."""

Sides = tuple[list[int], ...]
"""Token ids of the answers to one prompt, each with the prompt before it."""


def render_prompts(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> list[list[int]]:
    """Token ids of the first prompts, up to where the assistant begins."""
    batch: Any = tokenizer.apply_chat_template(
        [row["prompt"] for row in sample.rows[:PROMPTS]], add_generation_prompt=True, return_dict=True
    )
    ids: list[list[int]] = batch["input_ids"]
    return ids


def check_fits(
    sample: Sample, rows: Sequence[Sides], noun: str, max_length: int | None, findings: Findings
) -> None:
    """Rows that would be left out because one of their sides is longer than `max_length`."""
    lengths = [max(map(len, sides)) for sides in rows]
    if max_length is None or max(lengths) <= max_length:
        return
    long = [name for name, length in zip(sample.ids, lengths, strict=True) if length > max_length]
    what = f"are longer than trainer.max_length={max_length} and would be left out"
    remedy = f"raise trainer.max_length (the longest has {max(lengths)} tokens), or curate shorter ones"
    fault = Fault(long, len(rows), noun, what, remedy)
    judge(findings, "trainer.max_length", sample.where, fault, MAX_LOST)


def check_prompts(
    sample: Sample,
    rows: Sequence[Sides],
    noun: str,
    prompts: Sequence[list[int]],
    limit: float,
    findings: Findings,
) -> None:
    """Rows whose prompt is not rendered alike alone and before an answer; up to `limit` of them warned of."""
    off = [
        name
        for name, prompt, sides in zip(sample.ids, prompts, rows, strict=False)
        if any(side[: len(prompt)] != prompt for side in sides)
    ]
    if not off:
        return
    what = "have a prompt whose tokens, rendered alone, are not those it has before an answer"
    remedy = (
        "use a chat template whose generation prompt is how it begins the assistant's turn; a policy would "
        "answer another prompt than it was trained on"
    )
    judge(findings, "model", sample.where, Fault(off, len(prompts), noun, what, remedy), limit)
