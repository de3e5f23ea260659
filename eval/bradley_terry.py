"""Bradley-Terry strengths from pairwise comparisons, a tie counting half a win to each side.

P(i beats j) = 1 / (1 + exp(strength_j - strength_i)) (Bradley and Terry 1952). Strengths are log-odds with
mean 0; the Elo scale is 400 / ln 10 of them per point. The likelihood is concave and is climbed by Newton
steps, for many resampled tables at once, to the same maximum as the minorise-maximise steps of Hunter (2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from eval.statistics.bootstrap import bootstrap_limits
from eval.statistics.intervals import Clusters, Interval, cluster_codes, unit_array

ELO_PER_LOG_ODDS = 400 / np.log(10)
_MAX_STEP = 2.0
_TOLERANCE = 1e-12
_UNCONNECTED_PRIOR = 0.01
"""Games, half-won, added per compared pair to a resample that has no finite maximum of its own."""


@dataclass(frozen=True)
class Rating:
    """One player in the table: strength in log-odds, the same on the Elo scale, and the games behind it."""

    name: str
    strength: Interval
    elo: Interval
    games: int
    win_rate: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def win_table(
    first: Sequence[str], second: Sequence[str], outcomes: Sequence[float] | np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Wins of the row over the column, shape (m, m), ties half to each; outcomes are `first`'s."""
    return _unit_tables(first, second, outcomes, names, np.zeros(len(first), dtype=int))[0]


def fit(wins: np.ndarray, prior: float = 0.0, iterations: int = 200) -> np.ndarray:
    """Maximum-likelihood strengths, mean 0.

    Args:
        wins: wins of row over column, ties half to each, shape (m, m) or a batch (..., m, m).
        prior: games, half-won by each side, added to every pair that met; above 0 it gives a player who
            won or lost everything a finite strength.

    Returns:
        Log-odds, shape (m,) or (..., m).

    Raises ValueError for a table without a finite maximum: where some group of players never lost to (or
    never met) the others (Ford 1957).
    """
    table = np.asarray(wins, dtype=np.float64)
    if table.ndim < 2 or table.shape[-1] != table.shape[-2] or (table < 0).any():
        raise ValueError(f"expected non-negative wins of shape (..., m, m), got shape {table.shape}")
    table = table * (1 - np.eye(table.shape[-1]))
    table = table + prior / 2 * ((table + np.swapaxes(table, -1, -2)) > 0)
    if not _connected(table).all():
        raise ValueError(
            "no finite strengths: some players only ever won (or lost) against the others, or never met "
            "them; set prior above 0, or add comparisons that link them"
        )
    return _climb(table, iterations)


def _connected(table: np.ndarray) -> np.ndarray:
    """Whether everybody beat everybody along some chain of wins, shape of the batch."""
    size = table.shape[-1]
    reach = ((table > 0) | np.eye(size, dtype=bool)).astype(np.float64)
    for _ in range(max(1, int(np.ceil(np.log2(size))))):
        reach = np.minimum(reach @ reach, 1.0)
    return np.asarray((reach > 0).all(axis=(-1, -2)))


def _climb(wins: np.ndarray, iterations: int) -> np.ndarray:
    size = wins.shape[-1]
    games = wins + np.swapaxes(wins, -1, -2)
    strengths = np.zeros(wins.shape[:-1])
    for _ in range(iterations):
        p = expit(strengths[..., :, None] - strengths[..., None, :])
        gradient = (wins - games * p).sum(axis=-1)
        information = _information(games, p) + 1 / size
        step = np.linalg.solve(information, gradient[..., None])[..., 0]
        largest = np.abs(step).max(axis=-1, keepdims=True)
        strengths = strengths + step * np.minimum(1.0, _MAX_STEP / np.maximum(largest, _MAX_STEP))
        strengths -= strengths.mean(axis=-1, keepdims=True)
        if largest.max() < _TOLERANCE:
            break
    return strengths


def _information(games: np.ndarray, p: np.ndarray) -> np.ndarray:
    curvature = games * p * np.swapaxes(p, -1, -2)
    return curvature.sum(axis=-1)[..., None] * np.eye(games.shape[-1]) - curvature


def standard_errors(wins_by_cluster: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Standard errors of mean-0 strengths, robust to dependence within clusters; shape (m,).

    The sandwich H^-1 (G / (G - 1) sum_g s_g s_g') H^-1, s_g the gradient of cluster g: it is right for
    half-weighted ties, whose variance the model's own information overstates.
    """
    wins = np.asarray(wins_by_cluster, dtype=np.float64)
    clusters, size = wins.shape[0], wins.shape[-1]
    games = wins + np.swapaxes(wins, -1, -2)
    p = expit(strengths[:, None] - strengths[None, :])
    scores = (wins - games * p).sum(axis=-1)
    inverse = np.linalg.inv(_information(games.sum(axis=0), p) + 1 / size)
    middle = clusters / max(clusters - 1, 1) * scores.T @ scores
    return np.sqrt(np.diag(inverse @ middle @ inverse))


def ratings(
    first: Sequence[str],
    second: Sequence[str],
    outcomes: Sequence[float] | np.ndarray,
    clusters: Clusters | None = None,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    prior: float = 0.0,
    anchor: str | None = None,
    base_elo: float = 1000.0,
) -> list[Rating]:
    """The table of players, best first, intervals by bootstrap over whole clusters.

    Args:
        first, second: the players of each comparison, shape (n,).
        outcomes: of `first`: 1 won, 0.5 tied, 0 lost, shape (n,).
        clusters: prompt of each comparison; without it each comparison is drawn by itself.
        prior: see `fit`.
        anchor: player whose strength is 0 and whose Elo is `base_elo`; without one the mean player.

    With a prior, a player who won (or lost) every game does so in every resample too: the interval then only
    shows what varies in the others' games, and has no width between two players. Read the win rate's instead.

    Raises ValueError where there is no finite table (see `fit`) or `anchor` did not play.
    """
    names = sorted({*first, *second})
    if anchor is not None and anchor not in names:
        raise ValueError(f"the anchor {anchor!r} is not among the players {', '.join(names)}")
    codes = cluster_codes(clusters, len(first))
    by_cluster = _unit_tables(first, second, outcomes, names, codes)
    table = by_cluster.sum(axis=0)
    met = (table + table.T > 0) / 2
    reference = names.index(anchor) if anchor is not None else None

    def shifted(strengths: np.ndarray) -> np.ndarray:
        return strengths if reference is None else strengths - strengths[..., reference : reference + 1]

    def statistic(weights: np.ndarray) -> np.ndarray:
        wins = np.tensordot(weights, by_cluster, axes=1) + prior * met
        wins += (_UNCONNECTED_PRIOR * met) * ~_connected(wins)[:, None, None]
        return shifted(_climb(wins, 50))

    values = shifted(fit(table, prior))
    low, high, error = bootstrap_limits(statistic, len(by_cluster), confidence, samples, seed)
    games = (table + table.T).sum(axis=1)
    rows = []
    for k in np.argsort(-values, kind="stable"):
        n = int(round(games[k]))
        strength = Interval(
            float(values[k]), float(low[k]), float(high[k]), n, "bootstrap-bca", float(error[k])
        )
        rows.append(Rating(names[k], strength, elo(strength, base_elo), n, float(table[k].sum() / games[k])))
    return rows


def elo(strength: Interval, base: float = 1000.0) -> Interval:
    """A strength in log-odds on the Elo scale: 400 points are odds of 10 to 1."""
    scale = float(ELO_PER_LOG_ODDS)
    error = None if strength.standard_error is None else strength.standard_error * scale
    value, low, high = (base + scale * end for end in (strength.value, strength.low, strength.high))
    return Interval(value, low, high, strength.n, strength.method, error)


def _unit_tables(
    first: Sequence[str],
    second: Sequence[str],
    outcomes: Sequence[float] | np.ndarray,
    names: Sequence[str],
    codes: np.ndarray,
) -> np.ndarray:
    """Win tables by cluster, shape (clusters, m, m)."""
    values = unit_array(outcomes, "outcomes")
    if not len(first) == len(second) == values.size:
        raise ValueError(f"{len(first)} first players, {len(second)} second ones, {values.size} outcomes")
    position = {name: k for k, name in enumerate(names)}
    i, j = (np.array([position[name] for name in side]) for side in (first, second))
    if (i == j).any():
        raise ValueError(f"comparison {int(np.flatnonzero(i == j)[0])} is of a player with itself")
    tables = np.zeros((codes.max() + 1, len(names), len(names)))
    np.add.at(tables, (codes, i, j), values)
    np.add.at(tables, (codes, j, i), 1 - values)
    return tables
