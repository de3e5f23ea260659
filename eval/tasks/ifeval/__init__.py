"""IFEval: verifiable instructions, strict and loose verdicts (Zhou et al. 2023, arXiv:2311.07911).

Strict: the response as it is follows the instruction. Loose: it does, or does without Markdown asterisks,
without its first line, without its last, or any combination of those (sec. 2.2). An empty response follows
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.statistics.intervals import Interval
from eval.statistics.proportions import proportion_interval
from eval.tasks.ifeval import form, wording
from eval.tasks.ifeval.registry import INSTRUCTIONS, bound
from posttrain.errors import DataError

__all__ = ["INSTRUCTIONS", "Verdict", "accuracies", "form", "loose_variants", "verdict", "wording"]


@dataclass(frozen=True)
class Verdict:
    """Per instruction of one prompt whether the response follows it, in the order of the data."""

    instructions: tuple[str, ...]
    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def loose_variants(response: str) -> list[str]:
    """The eight texts of which one has to follow the instruction; the response itself is the first."""
    lines = response.split("\n")
    cuts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cuts + [cut.replace("*", "") for cut in cuts]


def verdict(
    response: str, instructions: Sequence[str], parameters: Sequence[Mapping[str, Any] | None]
) -> Verdict:
    """Check one response.

    Args:
        response: the model's answer.
        instructions: `instruction_id_list` of the prompt.
        parameters: `kwargs` of the prompt, one mapping per instruction, nulls ignored.

    Raises DataError for an instruction or parameter that is not known, or lists of different length.
    """
    if len(instructions) != len(parameters):
        raise DataError(
            f"{len(instructions)} instructions but {len(parameters)} kwargs\n"
            "    give one mapping per instruction, {} where it takes no parameter"
        )
    checks = [bound(name, given) for name, given in zip(instructions, parameters, strict=True)]
    variants = [variant for variant in loose_variants(response) if variant.strip()]
    strict = tuple(bool(response.strip()) and check(response) for check in checks)
    loose = tuple(
        passed or any(check(variant) for variant in variants)
        for passed, check in zip(strict, checks, strict=True)
    )
    return Verdict(tuple(instructions), strict, loose)


def accuracies(verdicts: Sequence[Verdict], confidence: float = 0.95) -> dict[str, Interval]:
    """The four accuracies of the paper: per prompt (all instructions followed) and per instruction.

    Instructions of one prompt share a response, so their interval clusters by prompt.
    """
    report = {}
    for mode in ("strict", "loose"):
        followed = [one.strict if mode == "strict" else one.loose for one in verdicts]
        report[f"prompt_{mode}"] = proportion_interval([float(all(f)) for f in followed], None, confidence)
        flat = [float(passed) for f in followed for passed in f]
        prompts = [i for i, f in enumerate(followed) for _ in f]
        report[f"instruction_{mode}"] = proportion_interval(flat, prompts, confidence)
    return report
