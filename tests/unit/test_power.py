"""Sample sizes, against statsmodels, hand arithmetic and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import normal_sample_size_one_tail

from eval.statistics.power import (
    _outcomes,
    design_effect,
    detectable_difference,
    outcome_variance,
    prompts_for_paired_rates,
    prompts_for_win_rate,
)


def test_three_points_by_hand() -> None:
    # No ties: (1.959964 * 0.5 + 0.841621 * sqrt(0.53 * 0.47))^2 / 0.03^2 = 2177.2.
    assert prompts_for_win_rate(0.03) == 2178
    assert prompts_for_win_rate(-0.03) == 2178
    assert prompts_for_win_rate(0.03, tie_share=0.2) == 1742


@pytest.mark.parametrize(("power", "alpha"), [(0.8, 0.05), (0.9, 0.01)])
def test_the_number_equals_statsmodels(power: float, alpha: float) -> None:
    null, other = math.sqrt(0.25 - 0.05), math.sqrt(outcome_variance(0.55, 0.2))
    oracle = normal_sample_size_one_tail(0.05, power, alpha / 2, std_null=null, std_alternative=other)
    assert _outcomes(0.05, null, other, power, alpha) == pytest.approx(oracle, abs=1e-9)
    assert prompts_for_win_rate(0.05, 0.2, power=power, alpha=alpha) == math.ceil(oracle)


def test_variance_of_outcomes_by_counting() -> None:
    outcomes = np.repeat([1.0, 0.5, 0.0], [50, 20, 30])
    assert outcome_variance(0.6, 0.2) == pytest.approx(outcomes.var())


def test_clusters_cost_prompts_and_votes_save_them() -> None:
    assert design_effect(4, 0.3) == pytest.approx(1.9)
    assert prompts_for_win_rate(0.03, 0.2, per_prompt=4) == math.ceil(1741.35 / 4)
    assert prompts_for_win_rate(0.03, 0.2, per_prompt=4, icc=0.3) == math.ceil(1741.35 * 1.9 / 4)
    # Votes that all say the same are one vote.
    assert prompts_for_win_rate(0.03, 0.2, per_prompt=4, icc=1) == prompts_for_win_rate(0.03, 0.2)


def test_detectable_difference_is_the_inverse() -> None:
    found = detectable_difference(1742, tie_share=0.2)
    assert found == pytest.approx(0.03, abs=1e-5)
    with pytest.raises(ValueError, match="cannot show any"):
        detectable_difference(3)


def test_mcnemar_sample_size_by_hand() -> None:
    # 20 % discordant, rates 3 points apart: (1.959964 sqrt(0.2) + 0.841621 sqrt(0.1991))^2 / 0.0009.
    assert prompts_for_paired_rates(0.03, 0.2) == math.ceil(
        (1.959964 * 0.2**0.5 + 0.841621 * 0.1991**0.5) ** 2 / 9e-4
    )
    with pytest.raises(ValueError, match="cannot differ by 0.3"):
        prompts_for_paired_rates(0.3, 0.2)


def test_the_power_is_reached_in_simulation() -> None:
    n = prompts_for_win_rate(0.1, tie_share=0.3)
    rng = np.random.default_rng(0)
    outcomes = rng.choice([1, 0.5, 0], p=[0.45, 0.3, 0.25], size=(4000, n))
    z = (outcomes.mean(axis=1) - 0.5) / (outcomes.std(axis=1, ddof=1) / n**0.5)
    assert (np.abs(z) > stats.norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difference": 0}, "other than 0"),
        ({"difference": 0.6}, "cannot be 1.1"),
        ({"difference": 0.1, "icc": 2}, "icc"),
    ],
)
def test_impossible_questions_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts_for_win_rate(**arguments)
