"""The tests and effect sizes. Every p-value is of the null hypothesis that traffic and the held-out half of
the reference come from one distribution; with Monte Carlo it is (1 + exceedances) / (1 + draws), which is
exact (Phipson and Smyth 2010, Permutation P-values Should Never Be Zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats
from scipy.sparse import csr_matrix, vstack

Correction = Literal["holm", "bh"]
Array = NDArray[np.float64]
POOLED = "other"
SMALLEST_CELL, SMALLEST_POOL = 5.0, 1.0


@dataclass(frozen=True)
class Test:
    """One test: its statistic, the effect size that goes with it, and the p-value before correction."""

    statistic: float
    effect: float
    p: float


def kolmogorov_smirnov(reference: ArrayLike, today: ArrayLike) -> tuple[float, float]:
    """(D, p) of the two-sample Kolmogorov-Smirnov test (scipy). With ties, p errs on the safe side."""
    found = stats.ks_2samp(reference, today, method="asymp")
    return float(found.statistic), float(found.pvalue)


def pooled_table(reference: Sequence[str], today: Sequence[str]) -> tuple[list[str], Array]:
    """(labels, (2, labels) counts), rare labels pooled into "other" by the rules of Cochran (1954).

    Rare: expected fewer than 5 times on the smaller side. Where the pool itself is expected less than once
    there, it counts with the most frequent label. Two labels stay two: Fisher's test needs no minimum. What
    is pooled depends on both sides together, so the test stays valid.
    """
    labels = sorted({*reference, *today})
    place = {label: i for i, label in enumerate(labels)}
    counts = np.array(
        [np.bincount([place[x] for x in side], minlength=len(labels)) for side in (reference, today)],
        dtype=np.float64,
    )
    expected = counts.sum(axis=0) * counts.sum(axis=1).min() / counts.sum()
    rare = expected < SMALLEST_CELL
    if len(labels) <= 2 or not rare.any():
        return labels, counts
    kept = [i for i in np.argsort(-expected, kind="stable") if not rare[i]]
    names, columns = [labels[i] for i in kept], counts[:, kept]
    other = counts[:, rare].sum(axis=1)
    if kept and expected[rare].sum() < SMALLEST_POOL:
        columns[:, 0] += other
        return names, columns
    return [*names, POOLED], np.column_stack([columns, other])


def chi_squared(table: Array) -> tuple[float, float]:
    """(statistic, p) of a (2, labels) table: Pearson's chi-squared, or Fisher's exact test for a 2 x 2 table
    with a cell expected fewer than 5 times. One label: (0, 1)."""
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2:
        return 0.0, 1.0
    found = stats.chi2_contingency(table, correction=False)
    if table.shape[1] == 2 and found.expected_freq.min() < SMALLEST_CELL:
        return float(found.statistic), float(stats.fisher_exact(table).pvalue)
    return float(found.statistic), float(found.pvalue)


def psi(reference: ArrayLike, today: ArrayLike) -> Array:
    """Population stability index of counts (..., cells): sum (q - p) ln(q / p), Jeffreys' divergence.

    Half a record is added to every cell, so empty cells do not make it infinite. Usual reading (Siddiqi 2006,
    Credit Risk Scorecards): below 0.1 stable, 0.1 to 0.25 some shift, above a large one. On equal
    distributions it is not 0 but about (cells - 1)(1/n + 1/m) (Yurdakul 2018, Statistical Properties of
    Population Stability Index), hence `psi_p_value`.
    """
    p = np.asarray(reference, dtype=np.float64) + 0.5
    q = np.asarray(today, dtype=np.float64) + 0.5
    p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
    return ((q - p) * np.log(q / p)).sum(axis=-1)


def psi_p_value(reference: ArrayLike, today: ArrayLike, rng: np.random.Generator, draws: int = 999) -> float:
    """The p-value of a PSI: how often two samples of these sizes from the pooled shares have one as large."""
    p, q = np.asarray(reference, dtype=np.int64), np.asarray(today, dtype=np.int64)
    shares = (p + q) / (p + q).sum()
    null = psi(
        rng.multinomial(p.sum(), shares, size=draws),
        rng.multinomial(q.sum(), shares, size=draws),
    )
    return float((1 + (null >= psi(p, q) - 1e-12).sum()) / (1 + draws))


def cohen_h(p: float, q: float) -> float:
    """Difference of two shares, |2 asin sqrt p - 2 asin sqrt q|: 0.2 small, 0.5 medium, 0.8 large (Cohen
    1988, Statistical Power Analysis for the Behavioral Sciences, chapter 6)."""
    return abs(2 * np.arcsin(np.sqrt(p)) - 2 * np.arcsin(np.sqrt(q)))


def maximum_mean_discrepancy(
    reference: ArrayLike, today: ArrayLike, rng: np.random.Generator, permutations: int
) -> Test:
    """MMD between (m, d) and (n, d) vectors with a Gaussian kernel, and its permutation p-value.

    statistic: the unbiased estimate of MMD^2 (Gretton et al. 2012, A Kernel Two-Sample Test, equation 3); the
    bandwidth is the median distance in the pooled sample, which no permutation changes. effect: sqrt(MMD^2 /
    (1 - mean kernel within the reference)), 0 when the estimate is negative: the distance between the two
    means in the kernel's space, in units of the spread of the reference there.
    """
    pooled = np.concatenate([np.asarray(reference), np.asarray(today)]).astype(np.float32)
    m, n = len(np.asarray(reference)), len(np.asarray(today))
    squares = (pooled * pooled).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * pooled @ pooled.T, 0)
    median = float(np.median(distances[np.triu_indices(m + n, 1)]))
    if median == 0:
        median = float(distances.mean()) or 1.0
    kernel = np.exp(distances / np.float32(-2 * median))
    np.fill_diagonal(kernel, 0)

    is_today = _assignments(m, n, permutations, rng)
    product = kernel @ is_today
    within_today = (is_today * product).sum(axis=0, dtype=np.float64)
    touching = kernel.sum(axis=1, dtype=np.float64) @ is_today
    within_reference = kernel.sum(dtype=np.float64) - 2 * touching + within_today
    across = touching - within_today
    squared = within_reference / (m * (m - 1)) + within_today / (n * (n - 1)) - 2 * across / (m * n)
    spread = 1 - within_reference[0] / (m * (m - 1))
    effect = float(np.sqrt(max(squared[0], 0.0) / spread)) if spread > 0 else 0.0
    return Test(float(squared[0]), effect, _permutation_p(squared))


def token_divergence(
    reference: csr_matrix, today: csr_matrix, rng: np.random.Generator, permutations: int
) -> Test:
    """Jensen-Shannon divergence (bits) between the token distributions of two sets of texts.

    reference, today: (texts, bins) counts. Each text counts once whatever its length, and texts are permuted,
    not tokens: the tokens of one text are no independent draws, and a test that takes them so always alarms.
    effect: the divergence beyond its mean under permutation, so that it does not depend on the sample sizes.
    """
    rows = vstack([reference, today]).tocsr().astype(np.float64)
    rows = rows[:, np.asarray(rows.sum(axis=0)).ravel() > 0]
    lengths = np.maximum(np.asarray(rows.sum(axis=1)).ravel(), 1)
    rows = rows.multiply(1 / lengths[:, None]).tocsr()
    m, n = reference.shape[0], today.shape[0]
    is_today = _assignments(m, n, permutations, rng)
    totals = np.asarray(rows.sum(axis=0)).ravel()
    q = np.asarray(rows.T @ is_today.astype(np.float64)).T
    p = totals[None, :] - q
    divergence = _jensen_shannon(p, q)
    null = divergence[1:].mean()
    return Test(float(divergence[0]), float(max(divergence[0] - null, 0)), _permutation_p(divergence))


def _jensen_shannon(p: Array, q: Array) -> Array:
    """(rows,) divergences in bits of two (rows, bins) arrays of weights."""
    p = p / np.maximum(p.sum(axis=1, keepdims=True), 1e-300)
    q = q / np.maximum(q.sum(axis=1, keepdims=True), 1e-300)
    entropy = special.entr
    mixed = entropy((p + q) / 2).sum(axis=1)
    return (mixed - (entropy(p).sum(axis=1) + entropy(q).sum(axis=1)) / 2) / np.log(2)


def _assignments(m: int, n: int, permutations: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(m + n, 1 + permutations) zeros and ones: who is of today. The first column is how it was."""
    column = np.concatenate([np.zeros(m, np.float32), np.ones(n, np.float32)])
    return np.column_stack([column, rng.permuted(np.tile(column, (permutations, 1)), axis=1).T])


def _permutation_p(values: Array) -> float:
    slack = 1e-9 * max(abs(values[0]), 1e-12)
    return float((1 + (values[1:] >= values[0] - slack).sum()) / len(values))


def corrected(p_values: Sequence[float], method: Correction) -> list[float]:
    """p-values for a family of tests: Holm (1979), so that all tests together alarm falsely with probability
    alpha at most, or Benjamini and Hochberg (1995), which bounds the share of false ones among the alarms."""
    if not p_values:
        return []
    if method == "bh":
        return [float(p) for p in stats.false_discovery_control(p_values, method="bh")]
    p = np.asarray(p_values)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    result = np.empty_like(steps)
    result[order] = np.minimum(steps, 1)
    return result.tolist()
