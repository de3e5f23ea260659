"""What the judgements amount to: win rates, a table, the judges' own faults, and how far they agree. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.agreement import UndefinedAgreement, cohen_kappa, krippendorff_alpha, percent_agreement
from eval.bradley_terry import ratings
from eval.judging.asking import STATUSES
from eval.judging.contest import Match
from eval.judging.length_control import length_controlled_win_rate
from eval.judging.pairwise import Judgement
from eval.judging.parsing import speaks_to_the_judge
from eval.statistics import correlation, mean_standard_error, proportion_interval
from eval.statistics.power import prompts_for_win_rate
from eval.statistics.sequential import decide
from eval.win_rate import counted_win_rate

FEWEST_IN_A_CATEGORY = 5
LABELS = {1.0: "first", 0.5: "tie", 0.0: "second"}


@dataclass(frozen=True)
class How:
    """Level and size of intervals, and what the planning is for."""

    confidence: float = 0.95
    samples: int = 1000
    seed: int = 0
    margin: float = 0.03
    power: float = 0.8

    @property
    def resampling(self) -> dict[str, Any]:
        return {"confidence": self.confidence, "samples": self.samples, "seed": self.seed}


def judge_report(judgements: Sequence[Judgement], how: How, anchor: str | None) -> dict[str, Any]:
    """Everything about one judge. anchor: model whose Elo is 1000, None for the mean."""
    statuses: Counter[str] = Counter(judgement.status for judgement in judgements)
    report: dict[str, Any] = {
        "judgements": len(judgements),
        "without_outcome": {
            status: statuses[status] for status in STATUSES if status != "ok" and statuses[status]
        },
        "pairs": [],
        "table": None,
    }
    pairs = dict.fromkeys((j.match.first, j.match.second) for j in judgements)
    for first, second in pairs:
        mine = [j for j in judgements if (j.match.first, j.match.second) == (first, second)]
        report["pairs"].append({"first": first, "second": second} | pair_report(mine, how))
    decided = _decided(judgements)
    if decided:
        report |= _table(decided, how, anchor)
        report["length_bias"] = length_bias(decided, how)
        report["suspicious"] = suspicious(decided)
    report["position"] = position_bias(judgements, how)
    report["annotators"] = annotators(judgements, how)
    return report


def pair_report(judgements: Sequence[Judgement], how: How) -> dict[str, Any]:
    """One pair: win rate of the first, raw, at equal length, by category, and what is still to collect."""
    decided = _decided(judgements)
    statuses = Counter(judgement.status for judgement in judgements if judgement.outcome is None)
    report: dict[str, Any] = {
        "judgements": len(judgements),
        "without_outcome": dict(statuses),
        "win_rate": None,
    }
    if not decided:
        return report
    outcomes, clusters = _outcomes(decided), _clusters(decided)
    lengths = _length_differences(decided)
    controlled = length_controlled_win_rate(outcomes, lengths, clusters, **how.resampling)
    categories: dict[str, list[Judgement]] = {}
    for judgement in decided:
        categories.setdefault(judgement.match.question.category, []).append(judgement)
    rate = counted_win_rate(outcomes, clusters, how.confidence)
    choices = Counter(judgement.choice for judgement in decided)
    return report | {
        "win_rate": rate.as_dict(),
        "both_bad": choices["both_bad"],
        "length_controlled": None if controlled is None else controlled.as_dict(),
        "mean_length_difference": float(lengths.mean()),
        "categories": {
            name: proportion_interval(_outcomes(some), _clusters(some), how.confidence).as_dict()
            for name, some in sorted(categories.items())
            if len(categories) > 1 and len(some) >= FEWEST_IN_A_CATEGORY
        },
        "prompts": len(set(clusters)),
        "prompts_needed": prompts_needed(outcomes, clusters, how),
        "enough": decide(outcomes, clusters, margin=how.margin, confidence=how.confidence).as_dict(),
    }


def prompts_needed(outcomes: np.ndarray, clusters: Sequence[str], how: How) -> int | None:
    """Prompts that show a win rate `margin` off one half, with as many ties and judgements per prompt, as
    alike, as here; None where there are too many ties for such a rate.
    """
    ties = float((outcomes == 0.5).mean())
    if ties > 1 - 2 * how.margin:
        return None
    per_prompt = outcomes.size / len(set(clusters))
    likeness = 0.0
    if per_prompt > 1:
        together, apart = mean_standard_error(outcomes, clusters), mean_standard_error(outcomes)
        effect = (together / apart) ** 2 if apart > 0 and np.isfinite(together) else per_prompt
        likeness = float(np.clip((effect - 1) / (per_prompt - 1), 0.0, 1.0))
    return prompts_for_win_rate(how.margin, ties, per_prompt, likeness, how.power, 1 - how.confidence)


def _table(decided: Sequence[Judgement], how: How, anchor: str | None) -> dict[str, Any]:
    first, second = [j.match.first for j in decided], [j.match.second for j in decided]
    if anchor is not None and anchor not in {*first, *second}:
        anchor = None
    arguments = (first, second, _outcomes(decided), _clusters(decided))
    for prior in (0.0, 1.0):
        try:
            rows = ratings(*arguments, **how.resampling, prior=prior, anchor=anchor)
        except ValueError:
            continue
        return {"table": [row.as_dict() for row in rows], "table_prior": prior}
    return {"table": None}


def position_bias(judgements: Sequence[Judgement], how: How) -> dict[str, Any] | None:
    """Of a judge asked in both orders: how often the orders agree, and how often what stands first wins.

    consistency: share of comparisons with the same outcome in both orders. first_wins: share, among single
    verdicts that are no tie, for the answer shown first; 0.5 without a bias. None where nothing was
    asked twice.
    """
    asked = [j for j in judgements if len(j.orders) == 2 and None not in j.orders]
    if not asked:
        return None
    clusters = _clusters(asked)
    same = [float(j.orders[0] == j.orders[1]) for j in asked]
    shown_first, places = [], []
    for judgement, cluster in zip(asked, clusters, strict=True):
        forward, backward = judgement.orders
        for value in (forward, None if backward is None else 1.0 - backward):
            if value is not None and value != 0.5:
                shown_first.append(value)
                places.append(cluster)
    first_wins = proportion_interval(shown_first, places, how.confidence).as_dict() if shown_first else None
    return {
        "consistency": proportion_interval(same, clusters, how.confidence).as_dict(),
        "first_wins": first_wins,
    }


def length_bias(decided: Sequence[Judgement], how: How) -> dict[str, Any]:
    """How often the longer answer wins, where there is a longer one and a winner; and the correlation."""
    outcomes, lengths = _outcomes(decided), _length_differences(decided)
    clusters = np.array(_clusters(decided))
    counted = (lengths != 0) & (outcomes != 0.5)
    longer = np.where(lengths > 0, outcomes, 1.0 - outcomes)[counted]
    wins = proportion_interval(longer, clusters[counted], how.confidence).as_dict() if counted.any() else None
    return {"longer_wins": wins, "correlation": correlation(outcomes, lengths)}


def suspicious(decided: Sequence[Judgement]) -> dict[str, Any]:
    """Answers that speak to the judge, and how often they beat one that does not.

    A win rate far above the judge's general one says that the judge was talked into it.
    """
    outcomes = []
    for judgement in decided:
        flagged = [speaks_to_the_judge(answer.shown) for answer in judgement.match.answers]
        if flagged[0] != flagged[1] and judgement.outcome is not None:
            outcomes.append(judgement.outcome if flagged[0] else 1.0 - judgement.outcome)
    return {"comparisons": len(outcomes), "win_rate": float(np.mean(outcomes)) if outcomes else None}


def annotators(judgements: Sequence[Judgement], how: How) -> dict[str, Any] | None:
    """Krippendorff's alpha among named annotators, None for fewer than two of them."""
    names = sorted({j.annotator for j in judgements if j.annotator is not None})
    if len(names) < 2:
        return None
    items = list(dict.fromkeys(j.match.key for j in judgements))
    clusters = {j.match.key: j.match.question.cluster for j in judgements}
    table = np.full((len(items), len(names)), np.nan)
    for judgement in judgements:
        if judgement.annotator is not None and judgement.outcome is not None:
            table[items.index(judgement.match.key), names.index(judgement.annotator)] = judgement.outcome
    try:
        alpha = krippendorff_alpha(
            table, "ordinal", [clusters[item] for item in items], **how.resampling
        ).as_dict()
    except ValueError:
        alpha = None  # no comparison with two votes, or all votes alike
    return {"names": names, "alpha": alpha}


def agreement(by_judge: dict[str, Sequence[Judgement]], how: How) -> list[dict[str, Any]]:
    """Every two judges on the comparisons both decided; several votes on one count as their majority."""
    labels = {name: majority(judgements) for name, judgements in by_judge.items()}
    clusters = {j.match.key: j.match.question.cluster for some in by_judge.values() for j in some}
    rows = []
    names = list(labels)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            both = [key for key in labels[one] if key in labels[other]]
            if not both:
                continue
            a, b = ([labels[name][key] for key in both] for name in (one, other))
            try:
                kappa = cohen_kappa(a, b, None, [clusters[key] for key in both], how.confidence).as_dict()
            except UndefinedAgreement:
                kappa = None
            rows.append(
                {"judges": [one, other], "n": len(both), "agreement": percent_agreement(a, b), "kappa": kappa}
            )
    return rows


def majority(judgements: Iterable[Judgement]) -> dict[tuple[str, str, str], str]:
    """ "first", "tie" or "second" for each comparison with an outcome: by the mean of its votes."""
    votes: dict[tuple[str, str, str], list[float]] = {}
    for judgement in judgements:
        if judgement.outcome is not None:
            votes.setdefault(judgement.match.key, []).append(judgement.outcome)
    return {key: LABELS[float(np.sign(np.mean(values) - 0.5) / 2 + 0.5)] for key, values in votes.items()}


def compared(missing: dict[str, int], matches: Sequence[Match]) -> dict[str, Any]:
    """What was compared, for the record."""
    return {
        "matches": len(matches),
        "prompts": len({m.question.cluster for m in matches}),
        "without_both": missing,
    }


def _decided(judgements: Sequence[Judgement]) -> list[Judgement]:
    return [judgement for judgement in judgements if judgement.outcome is not None]


def _outcomes(decided: Sequence[Judgement]) -> np.ndarray:
    return np.array([judgement.outcome for judgement in decided], dtype=np.float64)


def _clusters(judgements: Sequence[Judgement]) -> list[str]:
    return [judgement.match.question.cluster for judgement in judgements]


def _length_differences(judgements: Sequence[Judgement]) -> np.ndarray:
    pairs = [judgement.match.answers for judgement in judgements]
    return np.array([first.length - second.length for first, second in pairs], dtype=np.float64)
