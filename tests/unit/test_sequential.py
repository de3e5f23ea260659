"""Confidence sequences and stopping, against a literal reading of the paper and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.statistics.sequential import capital, confidence_sequence, decide


def capital_by_the_letter(x: list[float], m: float, alpha: float) -> list[float]:
    """The hedged capital of Waudby-Smith and Ramdas (2024), theorem 3, one outcome at a time."""
    up = down = 1.0
    variance, means, seen, found = 0.25, [], [], []
    for t, value in enumerate(x, start=1):
        bet = math.sqrt(2 * math.log(2 / alpha) / (variance * t * math.log(t + 1)))
        up *= 1 + min(bet, 0.5 / m) * (value - m)
        down *= 1 - min(bet, 0.5 / (1 - m)) * (value - m)
        found.append(max(up, down) / 2)
        seen.append(value)
        means.append((0.5 + sum(seen)) / (t + 1))
        variance = (0.25 + sum((s - c) ** 2 for s, c in zip(seen, means, strict=True))) / (t + 1)
    return found


def test_capital_by_the_letter() -> None:
    x = [1.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0, 1.0]
    for m in (0.2, 0.5, 0.9):
        ours = np.exp(capital(x, np.array([m]), 0.05)[:, 0])
        assert ours == pytest.approx(capital_by_the_letter(x, m, 0.05), abs=1e-12)


def test_peeking_after_every_vote_stays_under_five_per_cent() -> None:
    rng = np.random.default_rng(0)
    found = [decide(rng.choice([0, 0.5, 1], p=[0.35, 0.3, 0.35], size=200)).verdict for _ in range(200)]
    wrong = 200 - found.count("undecided")
    assert 0 < wrong <= 0.05 * 200


def test_the_sequence_covers_the_mean_at_all_times() -> None:
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        low, high = confidence_sequence(rng.choice([0, 0.5, 1], p=[0.2, 0.2, 0.6], size=200), grid=200)
        assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all()
        missed += bool(((low > 0.7) | (high < 0.7)).any())
    assert missed <= 10


def test_a_clear_winner_is_found_early() -> None:
    rng = np.random.default_rng(2)
    outcomes = rng.choice([0, 1], p=[0.2, 0.8], size=400)
    found = decide(outcomes)
    assert (found.verdict, found.n) == ("better", 400)
    assert found.decided_at < 60 and found.p_value < 1e-6
    assert 0.5 < found.low < 0.8 < found.high
    mirrored = decide(1 - outcomes)
    assert (mirrored.verdict, mirrored.decided_at) == ("worse", found.decided_at)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-12)


def test_equal_systems_are_equivalent_within_a_margin() -> None:
    outcomes = [0.5, 0.5, 0.5, 1.0, 0.0] * 80
    assert decide(outcomes).verdict == "undecided"
    assert decide(outcomes, margin=0.1).verdict == "equivalent"
    assert decide(outcomes[:20], margin=0.05).verdict == "undecided"


def test_repeated_votes_are_no_new_evidence() -> None:
    outcomes = [1.0] * 6 + [0.0] * 2
    clusters = list("cabdefgh")
    repeated = decide(np.repeat(outcomes, 10), np.repeat(clusters, 10))
    assert repeated == decide(outcomes)
    assert decide(np.repeat(outcomes, 10)).p_value < 1e-3 < repeated.p_value


def test_a_vote_alone_decides_nothing() -> None:
    found = decide([1.0])
    assert (found.verdict, found.decided_at, found.high) == ("undecided", None, 1.0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        decide([2.0])
