"""How many prompts a comparison needs, and what a given number can show. Normal approximation throughout.

    >>> prompts_for_win_rate(0.03, tie_share=0.2)
    1742

n = ((z_(1 - alpha / 2) sd_0 + z_power sd_1) / difference)^2, sd_0 and sd_1 the standard deviation of one
outcome without and with the difference, times the design effect 1 + (m - 1) icc of m outcomes per prompt
(Kish 1965), divided by m.
"""

from __future__ import annotations

import math

from scipy import optimize, stats


def outcome_variance(win_rate: float, tie_share: float = 0.0) -> float:
    """Variance of one outcome (1, 0.5, 0): p (1 - p) - t / 4 with win rate p, ties counting half, and ties t.

    Raises ValueError where no such outcomes exist: p has to lie in [t / 2, 1 - t / 2].
    """
    if not 0 <= tie_share <= 1 or not tie_share / 2 <= win_rate <= 1 - tie_share / 2:
        raise ValueError(f"with {tie_share:.3g} ties the win rate cannot be {win_rate:.3g}")
    return win_rate * (1 - win_rate) - tie_share / 4


def design_effect(per_prompt: float = 1.0, icc: float = 0.0) -> float:
    """By how much outcomes that share a prompt inflate the variance; `icc` is their correlation."""
    if per_prompt < 1 or not 0 <= icc <= 1:
        raise ValueError(
            f"expected at least one outcome per prompt and 0 <= icc <= 1, got {per_prompt:g} and {icc:g}"
        )
    return 1 + (per_prompt - 1) * icc


def prompts_for_win_rate(
    difference: float,
    tie_share: float = 0.0,
    per_prompt: float = 1.0,
    icc: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
) -> int:
    """Prompts that show a win rate of 0.5 + `difference` to differ from one half.

    Args:
        difference: in win rate, 0.03 for three points.
        tie_share: share of outcomes that are ties, the same with and without the difference.
        per_prompt, icc: outcomes (answers, votes) per prompt and their correlation.
        power: chance to see the difference; alpha: two-sided level of the test.
    """
    null, alternative = outcome_variance(0.5, tie_share), outcome_variance(0.5 + abs(difference), tie_share)
    n = _outcomes(difference, math.sqrt(null), math.sqrt(alternative), power, alpha)
    return math.ceil(n * design_effect(per_prompt, icc) / per_prompt)


def detectable_difference(
    prompts: int,
    tie_share: float = 0.0,
    per_prompt: float = 1.0,
    icc: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
) -> float:
    """The smallest difference from 0.5 in win rate that `prompts` prompts show; the inverse of the above.

    Raises ValueError where even winning everything that is no tie would not be enough.
    """
    outcomes = prompts * per_prompt / design_effect(per_prompt, icc)
    null = math.sqrt(outcome_variance(0.5, tie_share))

    def missing(difference: float) -> float:
        alternative = math.sqrt(max(outcome_variance(0.5 + difference, tie_share), 0.0))
        return _outcomes(difference, null, alternative, power, alpha) - outcomes

    largest = (1 - tie_share) / 2 - 1e-9
    if largest <= 1e-9 or missing(largest) > 0:
        raise ValueError(f"{prompts} prompts with {tie_share:.3g} ties cannot show any difference")
    return float(optimize.brentq(missing, 1e-9, largest, xtol=1e-12))


def prompts_for_paired_rates(
    difference: float, discordant_share: float, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Items on which two systems' rates of right answers differ by `difference` by McNemar's test.

    `discordant_share` is the share of items on which exactly one of the two is right (Connor 1987).
    """
    if not abs(difference) <= discordant_share <= 1:
        raise ValueError(
            f"rates cannot differ by {abs(difference):g} when the systems differ on "
            f"{discordant_share:g} of items"
        )
    spread = math.sqrt(discordant_share - difference**2)
    return math.ceil(_outcomes(difference, math.sqrt(discordant_share), spread, power, alpha))


def _outcomes(difference: float, null: float, alternative: float, power: float, alpha: float) -> float:
    if difference == 0 or not 0 < alpha < 1 or not alpha < power < 1:
        raise ValueError(
            f"expected a difference other than 0 and 0 < alpha < power < 1, got difference {difference:g}, "
            f"alpha {alpha:g}, power {power:g}"
        )
    z_alpha, z_power = stats.norm.ppf(1 - alpha / 2), stats.norm.ppf(power)
    return float(((z_alpha * null + z_power * alternative) / difference) ** 2)
