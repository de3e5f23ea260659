"""Traffic against a baseline: every feature that both have, one family of tests, one verdict.

An alarm needs both: a corrected p-value below alpha (it is no accident) and an effect over its floor (it is
not trivial). With enough traffic anything is significant; with little, anything can look large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from posttrain.errors import DataError
from serving.drift import statistics as tests
from serving.drift.baseline import Baseline
from serving.drift.measure import Columns

MIN_RECORDS = 50
KERNEL_ROWS = 1000
FLOORS = {"PSI": 0.1, "Cohen's h": 0.2, "MMD": 0.06, "JS divergence": 0.01}


@dataclass(frozen=True)
class Finding:
    """One feature: what it was, what it is, how different, how surely.

    kind: number, category, flag, tokens or embedding. verdict: drift, small (significant, under the floor) or
    none. psi and psi_p: of numbers and categories, in cells fixed by the reference; psi_p is not corrected.
    chart: {"labels", "reference", "today"} with shares.
    """

    feature: str
    kind: str
    test: str
    reference: str
    today: str
    statistic: float
    effect_name: str
    effect: float
    p: float
    p_corrected: float = 1.0
    verdict: str = "none"
    psi: float | None = None
    psi_p: float | None = None
    chart: dict[str, Any] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        return FLOORS[self.effect_name]


@dataclass(frozen=True)
class Comparison:
    """All findings, and the features that were left out with the reason."""

    records: int
    reference_records: int
    alpha: float
    correction: tests.Correction
    findings: list[Finding]
    left_out: dict[str, str]

    @property
    def alarms(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == "drift"]

    def as_json(self) -> dict[str, Any]:
        return {
            "drift": bool(self.alarms),
            "alarms": [finding.feature for finding in self.alarms],
            "records": self.records,
            "reference_records": self.reference_records,
            "alpha": self.alpha,
            "correction": self.correction,
            "features": [asdict(finding) | {"floor": finding.floor} for finding in self.findings],
            "left_out": self.left_out,
        }


def compare(
    baseline: Baseline,
    today: Columns,
    *,
    alpha: float = 0.05,
    correction: tests.Correction = "holm",
    seed: int = 0,
) -> Comparison:
    """Compare completed columns (`Baseline.complete`) with the held-out half of a baseline.

    Raises DataError when there are fewer than 50 records.
    """
    if today.size < MIN_RECORDS:
        raise DataError(
            f"{today.size} records are too few to compare (at least {MIN_RECORDS})\n"
            "    take a longer time (--last 7d), or raise the gateway's number of samples per day"
        )
    reference, rng = baseline.held_out, np.random.default_rng(seed)
    findings, left_out = [], {}
    # The smallest p-value that a permutation test can give must survive the correction of the family.
    family = sum(len(group) for group in (today.numbers, today.categories, today.tokens, today.vectors))
    permutations = max(999, math.ceil(2 * family / alpha))
    for feature, run in _features(baseline, today, permutations):
        if run is None:
            left_out[feature] = "the reference lacks it" if _has(today, feature) else "these records lack it"
            continue
        found = run(rng)
        if found is None:
            left_out[feature] = "too few values, or the same everywhere"
        else:
            findings.append(found)
    corrected = tests.corrected([finding.p for finding in findings], correction)
    judged = [_judged(finding, p, alpha) for finding, p in zip(findings, corrected, strict=True)]
    return Comparison(today.size, reference.size, alpha, correction, judged, left_out)


def _judged(finding: Finding, p: float, alpha: float) -> Finding:
    verdict = "none"
    if p < alpha:
        verdict = "drift" if finding.effect >= finding.floor else "small"
    return replace(finding, p_corrected=p, verdict=verdict)


Run = Callable[[np.random.Generator], Finding | None]


def _features(baseline: Baseline, today: Columns, permutations: int) -> Iterable[tuple[str, Run | None]]:
    """Every feature of either side with its test, None where one side lacks it."""
    held = baseline.held_out
    for name in _names(held.numbers, today.numbers):
        both = name in held.numbers and name in today.numbers
        yield name, partial(_number, baseline, today, name) if both else None
    for name in _names(held.categories, today.categories):
        both = name in held.categories and name in today.categories
        yield name, partial(_category, held, today, name) if both else None
    for name in _names(held.tokens, today.tokens):
        both = name in held.tokens and name in today.tokens
        yield f"{name}_words", partial(_tokens, held, today, name, permutations) if both else None
        yield f"{name}_embedding", partial(_embedding, held, today, name, permutations) if both else None


def _names(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))


def _has(columns: Columns, feature: str) -> bool:
    side = feature.split("_")[0]
    derived = feature.endswith(("_words", "_embedding")) and side in columns.tokens
    return feature in columns.numbers or feature in columns.categories or derived


def _number(baseline: Baseline, today: Columns, name: str, rng: np.random.Generator) -> Finding | None:
    before, now = (side.numbers[name] for side in (baseline.held_out, today))
    before, now = before[~np.isnan(before)], now[~np.isnan(now)]
    if min(len(before), len(now)) < MIN_RECORDS or np.ptp(np.concatenate([before, now])) == 0:
        return None
    statistic, p = tests.kolmogorov_smirnov(before, now)
    edges = np.array(baseline.edges[name])
    counts = [
        np.bincount(np.searchsorted(edges, x, "right"), minlength=len(edges) + 1) for x in (before, now)
    ]
    index = float(tests.psi(*counts))
    return Finding(
        name,
        "number",
        "Kolmogorov-Smirnov",
        _spread(before),
        _spread(now),
        statistic,
        "PSI",
        index,
        p,
        psi=index,
        psi_p=tests.psi_p_value(counts[0], counts[1], rng),
        chart=_histogram(before, now),
    )


def _spread(values: Any) -> str:
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def _histogram(before: Any, now: Any, cells: int = 20) -> dict[str, Any]:
    """Shares in equal cells over the middle 98 % of both sides; what lies outside counts in the end cells."""
    both = [np.quantile(side, (0.01, 0.99)) for side in (before, now)]
    low, high = min(float(q[0]) for q in both), max(float(q[1]) for q in both)
    if high <= low:
        low, high = float(min(before.min(), now.min())), float(max(before.max(), now.max()))
    edges = np.linspace(low, high, cells + 1)
    shares = [np.histogram(np.clip(side, low, high), edges)[0] / len(side) for side in (before, now)]
    return {"labels": edges.tolist(), "reference": shares[0].tolist(), "today": shares[1].tolist()}


def _category(held: Columns, today: Columns, name: str, rng: np.random.Generator) -> Finding | None:
    before, now = held.categories[name], today.categories[name]
    labels, table = tests.pooled_table(before, now)
    if len({*before, *now}) < 2:
        return None
    statistic, p = tests.chi_squared(table)
    shares = table / table.sum(axis=1, keepdims=True)
    is_flag = {*before, *now} <= {"yes", "no"}
    index = float(tests.psi(table[0], table[1]))
    chart = {"labels": labels, "reference": shares[0].tolist(), "today": shares[1].tolist()}
    if is_flag:
        old, new = (side.count("yes") / len(side) for side in (before, now))
        texts, effect = (f"{old:.1%}", f"{new:.1%}"), ("Cohen's h", float(tests.cohen_h(old, new)))
    else:
        texts, effect = (_top(labels, shares[0]), _top(labels, shares[1])), ("PSI", index)
    return Finding(
        name,
        "flag" if is_flag else "category",
        "chi-squared",
        *texts,
        statistic,
        *effect,
        p,
        psi=index,
        psi_p=tests.psi_p_value(table[0], table[1], rng),
        chart=chart,
    )


def _top(labels: list[str], shares: Any, count: int = 3) -> str:
    order = np.argsort(-shares, kind="stable")[:count]
    return ", ".join(f"{labels[i]} {shares[i]:.1%}" for i in order if shares[i] > 0)


def _tokens(
    held: Columns, today: Columns, name: str, permutations: int, rng: np.random.Generator
) -> Finding | None:
    rows = [_some(side.size, rng) for side in (held, today)]
    before, now = held.tokens[name][rows[0]], today.tokens[name][rows[1]]
    if before.nnz + now.nnz == 0:
        return None
    found = tests.token_divergence(before, now, rng, permutations)
    return Finding(
        f"{name}_words",
        "tokens",
        "permutation of JS divergence",
        f"{before.shape[0]} texts",
        f"{now.shape[0]} texts, {found.statistic:.3g} bits apart",
        found.statistic,
        "JS divergence",
        found.effect,
        found.p,
    )


def _embedding(
    held: Columns, today: Columns, name: str, permutations: int, rng: np.random.Generator
) -> Finding | None:
    before, now = (side.vectors[name][_some(side.size, rng)] for side in (held, today))
    if np.ptp(np.concatenate([before, now]), axis=0).max() == 0:
        return None
    found = tests.maximum_mean_discrepancy(before, now, rng, permutations)
    gap = float(np.linalg.norm(before.mean(axis=0) - now.mean(axis=0)))
    return Finding(
        f"{name}_embedding",
        "embedding",
        "permutation of MMD",
        f"{len(before)} texts",
        f"{len(now)} texts, centroids {gap:.3g} apart",
        found.statistic,
        "MMD",
        found.effect,
        found.p,
    )


def _some(size: int, rng: np.random.Generator) -> Any:
    """At most KERNEL_ROWS row numbers, so that a kernel matrix fits in memory and time."""
    return np.arange(size) if size <= KERNEL_ROWS else rng.choice(size, KERNEL_ROWS, replace=False)
