"""What is said about the policies, from their scored answers. Pure functions: no model is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.generation import Generation
from eval.statistics import (
    bootstrap_interval,
    correlation,
    paired_difference,
    proportion_interval,
    t_interval,
)
from eval.win_rate import counted_win_rate, outcomes_of

SCORE_BINS = 8
"""Quantile bins of the reward-model score in the over-optimisation view."""


@dataclass
class Answers:
    """The answers of one policy to the held-out prompts; score arrays have one entry per answer, in order."""

    generations: list[Generation]
    gold: np.ndarray | None = None
    gold_parts: dict[str, np.ndarray] = field(default_factory=dict)
    rm: np.ndarray | None = None
    kl: dict[str, np.ndarray] = field(default_factory=dict)
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def judges(self) -> dict[str, np.ndarray]:
        """Scores by judge, the most trusted first: `gold`, then `rm`."""
        named = {"gold": self.gold, "rm": self.rm}
        return {name: scores for name, scores in named.items() if scores is not None}


@dataclass(frozen=True)
class Comparison:
    """Against what and how policies are compared."""

    baseline: str
    prompts: Sequence[str]
    tie_tolerance: float = 1e-9
    confidence: float = 0.95
    samples: int = 2000
    seed: int = 0

    @property
    def resampling(self) -> dict[str, Any]:
        return {
            "clusters": self.prompts,
            "confidence": self.confidence,
            "samples": self.samples,
            "seed": self.seed,
        }


def policy_report(answers: dict[str, Answers], comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Numbers per policy name: scores, rates, lengths, KL, and the comparison with the baseline."""
    return {
        name: _alone(mine, comparison) | _against(name, answers, comparison) for name, mine in answers.items()
    }


def _alone(mine: Answers, comparison: Comparison) -> dict[str, Any]:
    report: dict[str, Any] = {"perplexity": mine.perplexity}
    if not mine.generations:
        return report
    how = comparison.resampling
    for judge, scores in mine.judges.items():
        report[judge] = bootstrap_interval(scores, **how).as_dict()
    if mine.gold_parts:
        report["gold_parts"] = {
            part: bootstrap_interval(values, **how).as_dict() for part, values in mine.gold_parts.items()
        }
    for estimator, values in mine.kl.items():
        report[f"kl_{estimator}"] = bootstrap_interval(values, **how).as_dict()
    finished = [float(generation.finished) for generation in mine.generations]
    report["eos_rate"] = proportion_interval(finished, comparison.prompts, comparison.confidence).as_dict()
    lengths = [len(generation.ids) for generation in mine.generations]
    report["tokens"] = t_interval(lengths, comparison.confidence).as_dict()
    texts = [generation.text for generation in mine.generations]
    report["distinct_answers"] = len(set(texts)) / len(texts)
    return report


def _against(name: str, answers: dict[str, Answers], comparison: Comparison) -> dict[str, Any]:
    report: dict[str, Any] = {}
    if name == comparison.baseline:
        return report
    theirs = answers[comparison.baseline].judges
    for judge, scores in answers[name].judges.items():
        outcomes = outcomes_of(scores, theirs[judge], comparison.tie_tolerance)
        rate = counted_win_rate(outcomes, comparison.prompts, comparison.confidence)
        report[f"{judge}_win_rate"] = rate.as_dict()
        report[f"{judge}_gain"] = paired_difference(scores, theirs[judge], **comparison.resampling).as_dict()
    return report


def over_optimisation(
    answers: dict[str, Answers], report: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Reward-model score against gold, per policy (Gao et al. 2022).

    `over_optimised` is true where the reward-model score rose against the baseline while gold fell, both
    beyond their paired intervals; it is absent for the baseline itself.
    """
    view: dict[str, dict[str, Any]] = {}
    for name, mine in answers.items():
        if mine.gold is None or mine.rm is None:
            continue
        view[name] = {
            "correlation": correlation(mine.rm, mine.gold),
            "bins": score_bins(mine.rm, mine.gold),
        }
        if "rm_gain" in report[name]:
            rm_rose = report[name]["rm_gain"]["low"] > 0
            view[name]["over_optimised"] = bool(rm_rose and report[name]["gold_gain"]["high"] < 0)
    return view


def score_bins(rm: np.ndarray, gold: np.ndarray, bins: int = SCORE_BINS) -> list[dict[str, float | int]]:
    """Mean gold score in quantile bins of the reward-model score, lowest first."""
    chunks = np.array_split(np.argsort(rm, kind="stable"), min(bins, len(rm)))
    return [
        {"rm": float(rm[chunk].mean()), "gold": float(gold[chunk].mean()), "count": len(chunk)}
        for chunk in chunks
    ]
