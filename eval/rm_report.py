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
from scipy import stats

from eval.rm_baselines import shorter_wins, tfidf_bradley_terry
from eval.rm_breakdown import (
    accuracy_by_confidence,
    accuracy_by_subset,
    classification,
    judge_outcomes,
    length_controlled_accuracy,
)
from eval.statistics import Interval, correlation, proportion_interval
from posttrain.calibration import calibration_report, cross_fitted_temperature, fit_temperature, pair_auc

HISTOGRAM_BINS = 24


@dataclass(frozen=True)
class PairScores:
    """Scores and texts of n pairs, chosen first as labelled; gold scores may be absent.

    Intervals take pairs on one of `prompts` as one piece of evidence; cross-validation keeps `groups` apart.
    `subsets` names the part of the data of each pair.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    chosen_text: Sequence[str]
    rejected_text: Sequence[str]
    prompts: Sequence[str]
    groups: Sequence[str]
    gold_chosen: np.ndarray | None = None
    gold_rejected: np.ndarray | None = None
    subsets: Sequence[str] | None = None


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
        winner = _gold_winner(pairs, settings)
        if (winner != 0).any():
            report["gold"] = _against(pairs, winner, settings)
            report["gold"]["label_noise"] = float((winner[winner != 0] < 0).mean())
    return report


def out_of_distribution_report(pairs: PairScores, home: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The report on pairs of another kind than the model was trained for, beside the one at `home`.

    Adds `transferred` to `labels` and `gold`: the calibration at the temperature fitted at home, which is
    what a user of these pairs would have; and `drop`, accuracy at home less accuracy here, with the interval
    of two independent samples (standard errors added in squares, normal quantile).
    """
    report = reward_report(pairs, settings)
    for against in ("labels", "gold"):
        if report[against] is None or home[against] is None:
            continue
        winner = np.ones(len(pairs.chosen)) if against == "labels" else _gold_winner(pairs, settings)
        margins = ((pairs.chosen - pairs.rejected) * winner)[winner != 0]
        report[against]["transferred"] = calibration_report(
            margins, home[against]["temperature"], settings.bins
        )
        report[against]["drop"] = _drop(home[against]["accuracy"], report[against]["accuracy"], settings)
    return report


def _drop(home: dict[str, Any], away: dict[str, Any], settings: Settings) -> dict[str, Any]:
    error = float(np.hypot(home["standard_error"] or 0.0, away["standard_error"] or 0.0))
    half = float(stats.norm.ppf(0.5 + settings.confidence / 2)) * error
    value = home["value"] - away["value"]
    return Interval(value, value - half, value + half, away["n"], "normal", error).as_dict()


def _gold_winner(pairs: PairScores, settings: Settings) -> np.ndarray:
    """+1 where gold prefers the chosen answer, -1 the rejected one, 0 where it does not tell."""
    assert pairs.gold_chosen is not None and pairs.gold_rejected is not None
    difference = pairs.gold_chosen - pairs.gold_rejected
    return np.where(np.abs(difference) <= settings.tie_tolerance, 0.0, np.sign(difference))


def _against(pairs: PairScores, winner: np.ndarray, settings: Settings) -> dict[str, Any]:
    """Accuracy and calibration against `winner` per pair: +1 chosen, -1 rejected, 0 neither (left out)."""
    kept = np.flatnonzero(winner).tolist()
    margins = ((pairs.chosen - pairs.rejected) * winner)[kept]
    margins = np.where(np.abs(margins) <= settings.tie_tolerance, 0.0, margins)
    groups = [pairs.groups[i] for i in kept]
    prompts = [pairs.prompts[i] for i in kept]
    better = [pairs.chosen_text[i] if winner[i] > 0 else pairs.rejected_text[i] for i in kept]
    worse = [pairs.rejected_text[i] if winner[i] > 0 else pairs.chosen_text[i] for i in kept]
    scores = np.where(winner > 0, [pairs.chosen, pairs.rejected], [pairs.rejected, pairs.chosen])[:, kept]
    longer = np.array([len(a) - len(b) for a, b in zip(better, worse, strict=True)], dtype=np.float64)
    crossed = cross_fitted_temperature(margins, groups, settings.seed)
    counts, edges = np.histogram(margins, bins=HISTOGRAM_BINS)
    return {
        **judge_summary(margins, prompts, settings),
        "pairs_without_winner": int(len(winner) - len(kept)),
        "classification": classification(margins, scores[0], scores[1]),
        "by_confidence": accuracy_by_confidence(margins, prompts, settings.confidence),
        "by_subset": accuracy_by_subset(
            margins, [pairs.subsets[i] for i in kept], prompts, settings.confidence
        )
        if pairs.subsets is not None
        else {},
        "length_controlled": length_controlled_accuracy(margins, longer, prompts, settings.confidence),
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
