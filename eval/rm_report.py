"""How good a reward model is, from its scores of held-out preference pairs. Pure functions.

Measured twice where the data allow it: against the labels as they were given, noise included, and against
the noiseless gold winner. Pairs whose gold scores are equal have no winner; they are left out of the gold
numbers and counted. A pair the model scores equally counts as half correct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.rm_baselines import shorter_wins, tfidf_bradley_terry
from eval.statistics import correlation, proportion_interval
from posttrain.calibration import calibration_report, cross_fitted_temperature, fit_temperature, pair_auc

HISTOGRAM_BINS = 24


@dataclass(frozen=True)
class PairScores:
    """Scores and texts of n pairs, chosen first as labelled; gold scores may be absent.

    Intervals resample `prompts` (pairs on one prompt go together); cross-validation keeps `groups` apart.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_text: Sequence[str]
    rejected_text: Sequence[str]
    prompts: Sequence[str]
    groups: Sequence[str]
    gold_chosen: np.ndarray | None = None
    gold_rejected: np.ndarray | None = None


@dataclass(frozen=True)
class Settings:
    """How intervals, ties and bins are made; see EvalConfig for the meaning of each."""

    confidence: float = 0.95
    samples: int = 2000
    seed: int = 0
    bins: int = 10
    tie_tolerance: float = 1e-9
    baselines: bool = True


def reward_report(pairs: PairScores, settings: Settings) -> dict[str, Any]:
    """All numbers about a reward model, JSON-able: `labels`, `gold` (or None), `length`, `scores`."""
    report: dict[str, Any] = {
        "pairs": len(pairs.chosen),
        "labels": _against(pairs, np.ones(len(pairs.chosen)), settings),
        "gold": None,
        "length": length_effects(pairs),
        "scores": {
            "chosen_mean": float(pairs.chosen.mean()),
            "rejected_mean": float(pairs.rejected.mean()),
            "std": float(np.concatenate([pairs.chosen, pairs.rejected]).std()),
        },
    }
    if pairs.gold_chosen is not None and pairs.gold_rejected is not None:
        difference = pairs.gold_chosen - pairs.gold_rejected
        winner = np.where(np.abs(difference) <= settings.tie_tolerance, 0.0, np.sign(difference))
        if (winner != 0).any():
            report["gold"] = _against(pairs, winner, settings)
            report["gold"]["label_noise"] = float((winner[winner != 0] < 0).mean())
    return report


def _against(pairs: PairScores, winner: np.ndarray, settings: Settings) -> dict[str, Any]:
    """Accuracy and calibration against `winner` per pair: +1 chosen, -1 rejected, 0 neither (left out)."""
    kept = np.flatnonzero(winner).tolist()
    margins = ((pairs.chosen - pairs.rejected) * winner)[kept]
    margins = np.where(np.abs(margins) <= settings.tie_tolerance, 0.0, margins)
    groups = [pairs.groups[i] for i in kept]
    prompts = [pairs.prompts[i] for i in kept]
    better = [pairs.chosen_text[i] if winner[i] > 0 else pairs.rejected_text[i] for i in kept]
    worse = [pairs.rejected_text[i] if winner[i] > 0 else pairs.chosen_text[i] for i in kept]
    crossed = cross_fitted_temperature(margins, groups, settings.seed)
    counts, edges = np.histogram(margins, bins=HISTOGRAM_BINS)
    return {
        **judge_summary(margins, prompts, settings),
        "pairs_without_winner": int(len(winner) - len(kept)),
        "margin_mean": float(margins.mean()),
        "margin_std": float(margins.std()),
        "margin_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "temperature": fit_temperature(margins),
        "before": calibration_report(margins, 1.0, settings.bins),
        "after": calibration_report(margins, crossed, settings.bins),
        "baselines": {
            name: judge_summary(other, prompts, settings)
            for name, other in baseline_margins(better, worse, groups).items()
        }
        if settings.baselines
        else {},
    }


def judge_outcomes(margins: np.ndarray) -> np.ndarray:
    """Whether each pair is judged right: 1, 0, or 0.5 where both answers score equally."""
    return np.where(margins == 0, 0.5, (margins > 0).astype(np.float64))


def judge_summary(margins: np.ndarray, prompts: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Accuracy with interval (equal scores half correct, and counted) and AUC of any judge's margins."""
    outcomes = judge_outcomes(margins)
    accuracy = proportion_interval(outcomes, prompts, settings.confidence)
    return {"accuracy": accuracy.as_dict(), "ties": int((margins == 0).sum()), "auc": pair_auc(margins)}


def baseline_margins(
    better: Sequence[str], worse: Sequence[str], groups: Sequence[str], fold: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Margins of judges without understanding (`eval.rm_baselines`), by judge.

    `fold`: of each pair, where the judge beside them was cross-validated; the one that is fitted then is too.
    """
    margins = {"shorter_wins": shorter_wins(better, worse)}
    fitted = tfidf_bradley_terry(better, worse, groups, fold)
    return margins if fitted is None else margins | {"tfidf_bradley_terry": fitted}


def length_effects(pairs: PairScores) -> dict[str, Any]:
    """Whether the model pays for length: correlation of margin with length difference, score with length."""
    chosen = np.array([len(text) for text in pairs.chosen_text], dtype=np.float64)
    rejected = np.array([len(text) for text in pairs.rejected_text], dtype=np.float64)
    return {
        "margin_vs_length_difference": correlation(pairs.chosen - pairs.rejected, chosen - rejected),
        "score_vs_length": correlation(
            np.concatenate([pairs.chosen, pairs.rejected]), np.concatenate([chosen, rejected])
        ),
        "unit": "characters",
    }
