"""Bradley-Terry strengths, against statsmodels, Hunter's algorithm and hand arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.special import expit

from eval.bradley_terry import elo, fit, ratings, standard_errors, win_table
from eval.statistics import Interval


def votes(
    n: int = 600, seed: int = 0, players: int = 4
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """n comparisons on n / 6 prompts between players whose true strengths are 0, 0.5, 1, 1.5."""
    rng = np.random.default_rng(seed)
    first, second = np.array([rng.choice(players, 2, replace=False) for _ in range(n)]).T
    outcomes = (rng.random(n) < expit((first - second) / 2)).astype(float)
    outcomes[rng.random(n) < 0.2] = 0.5
    return [f"p{i}" for i in first], [f"p{i}" for i in second], outcomes, np.arange(n) // 6


def hunter(wins: np.ndarray, iterations: int = 20_000) -> np.ndarray:
    """Minorise-maximise of Hunter (2004), written independently of the Newton steps."""
    games, p = wins + wins.T, np.ones(len(wins))
    for _ in range(iterations):
        p = wins.sum(axis=1) / (games / (p[:, None] + p[None, :])).sum(axis=1)
        p /= np.exp(np.log(p).mean())
    return np.log(p)


def test_two_players_by_hand() -> None:
    # 3 wins and 2 ties against 1 loss: 4 of 6, log-odds log 2, half of it on each side of 0.
    strengths = fit(np.array([[0.0, 4.0], [2.0, 0.0]]))
    assert strengths == pytest.approx([np.log(2) / 2, -np.log(2) / 2], abs=1e-12)
    rows = ratings(["a"] * 6, ["b"] * 6, [1, 1, 1, 0.5, 0.5, 0], samples=50, anchor="b")
    assert [row.name for row in rows] == ["a", "b"]
    assert rows[0].elo.value == pytest.approx(1000 + 400 * np.log10(2))
    assert (rows[1].elo.value, rows[1].elo.low, rows[1].elo.high) == (1000, 1000, 1000)
    assert (rows[0].games, rows[0].win_rate) == (6, pytest.approx(4 / 6))


def test_strengths_equal_statsmodels_and_hunter() -> None:
    first, second, outcomes, clusters = votes()
    names = sorted(set(first))
    wins = win_table(first, second, outcomes, names)
    strengths = fit(wins)
    design = np.array([[(f == n) - (s == n) for n in names] for f, s in zip(first, second, strict=True)])
    # The reference player's column is dropped; mean 0 is restored afterwards.
    logit = sm.GLM(outcomes, design[:, 1:].astype(float), family=sm.families.Binomial())
    found = np.concatenate([[0.0], logit.fit(tol=1e-14).params])
    assert strengths == pytest.approx(found - found.mean(), abs=1e-9)
    assert strengths == pytest.approx(hunter(wins), abs=1e-9)


def test_errors_equal_statsmodels_cluster_sandwich() -> None:
    first, second, outcomes, clusters = votes()
    names = sorted(set(first))
    design = np.array([[(f == n) - (s == n) for n in names] for f, s in zip(first, second, strict=True)])
    logit = sm.GLM(outcomes, design[:, 1:].astype(float), family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False}, tol=1e-14
    )
    centre = np.vstack([np.zeros(3), np.eye(3)]) - 1 / 4
    oracle = np.sqrt(np.diag(centre @ logit.cov_params() @ centre.T) * 100 / 99)
    by_cluster = np.array(
        [
            win_table(
                *(np.array(side)[clusters == c] for side in (first, second)), outcomes[clusters == c], names
            )
            for c in range(100)
        ]
    )
    found = standard_errors(by_cluster, fit(by_cluster.sum(axis=0)))
    assert found == pytest.approx(oracle, abs=1e-9)
    table = {row.name: row for row in ratings(first, second, outcomes, clusters)}
    booted = [table[name].strength.standard_error for name in names]
    assert booted == pytest.approx(found, rel=0.1)


def test_a_batch_is_fitted_as_each_table_alone() -> None:
    tables = np.random.default_rng(0).integers(1, 30, size=(7, 5, 5)).astype(float)
    together = fit(tables)
    for table, strengths in zip(tables, together, strict=True):
        assert strengths == pytest.approx(fit(table), abs=1e-12)


def test_lopsided_tables_converge() -> None:
    wins = np.array([[0, 9999, 10], [1, 0, 1], [1, 9999, 0.0]])
    strengths = fit(wins)
    # At the maximum every player's expected wins are his wins.
    expected = (wins + wins.T) * expit(strengths[:, None] - strengths[None, :])
    assert expected.sum(axis=1) == pytest.approx(wins.sum(axis=1), abs=1e-8)


def test_an_unbeaten_player_is_refused_without_a_prior() -> None:
    wins = np.array([[0, 5, 4], [0, 0, 3], [0, 2, 0.0]])
    with pytest.raises(ValueError, match="set prior above 0"):
        fit(wins)
    strengths = fit(wins, prior=0.5)
    assert np.isfinite(strengths).all() and strengths.argmax() == 0
    assert fit(wins + 0.25 * ((wins + wins.T) > 0)) == pytest.approx(strengths)


def test_players_who_never_met_are_refused() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 3
    with pytest.raises(ValueError, match="never met"):
        fit(wins)


def test_a_win_for_everyone_in_a_ring_is_even() -> None:
    wins = np.zeros((3, 3))
    for i, j in itertools.pairwise([0, 1, 2, 0]):
        wins[i, j] = 1
    assert fit(wins) == pytest.approx([0, 0, 0], abs=1e-12)


def test_intervals_hold_when_a_resample_is_unconnected() -> None:
    # The weak player's one win is missing from a third of the resamples.
    outcomes = [1.0] * 19 + [0.0]
    rows = ratings(["a"] * 20, ["b"] * 20, outcomes, samples=400)
    assert rows[0].strength.value == pytest.approx(np.log(19) / 2)
    assert np.isfinite([rows[0].strength.low, rows[0].strength.high]).all()


def test_elo_scale() -> None:
    found = elo(Interval(np.log(10), 0.0, 2 * np.log(10), 5, "x", np.log(10)), base=1500)
    assert (found.value, found.low, found.high, found.standard_error) == pytest.approx(
        (1900, 1500, 2300, 400)
    )


@pytest.mark.parametrize(
    ("first", "second", "outcomes", "message"),
    [
        (["a"], ["a"], [1], "with itself"),
        (["a"], ["b"], [2], "lie in"),
        (["a", "b"], ["b"], [1], "2 first players, 1 second"),
    ],
)
def test_bad_comparisons_are_named(first, second, outcomes, message) -> None:
    with pytest.raises(ValueError, match=message):
        win_table(first, second, outcomes, ["a", "b"])


def test_an_absent_anchor_is_named() -> None:
    with pytest.raises(ValueError, match="'c' is not among"):
        ratings(["a", "b"], ["b", "a"], [1, 1], anchor="c")
