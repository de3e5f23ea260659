"""The arithmetic of best-of-n sampling: expected scores without bias, and how far it is from the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n in nats per answer: what KL(best of n || policy) is at most.

    The policy is what was sampled from, temperature and top_p included. Used as the KL itself by Stiennon et
    al. 2020 (2009.01325, appendix G.3); Beirami et al. 2024 (2401.01879) show that it is an upper bound,
    close where no single answer is likely.
    """
    return math.log(n) - (n - 1) / n


def expected_best(scores: Sequence[float], k: int, values: Sequence[float] | None = None) -> float:
    """Expected value of the highest-scoring of k answers, over all ways to draw k of these m without
    replacement: an unbiased estimate of best-of-k of the policy from m >= k independent samples.

    values: what is averaged, the scores themselves where None (a watched score, to see what selecting by
    another one does to it). The i-th of the scores in ascending order is the highest of k in
    C(i - 1, k - 1) of the C(m, k) draws, i from 1; answers with equal scores share what they get.
    """
    m = len(scores)
    assert 1 <= k <= m, (k, m)
    taken = scores if values is None else values
    order = sorted(range(m), key=lambda index: scores[index])
    total, below = 0.0, 0
    for _, tied in groupby(order, key=lambda index: scores[index]):
        indices = list(tied)
        share = (math.comb(below + len(indices), k) - math.comb(below, k)) / math.comb(m, k)
        total += share * sum(taken[index] for index in indices) / len(indices)
        below += len(indices)
    return total


def steps(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval by the normal approximation; None of a single value."""
    if len(values) < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values)))
