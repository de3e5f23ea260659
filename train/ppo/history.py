"""The metric rows of a run so far, and the values from which on they are worth a warning (torch-free)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Thresholds:
    """Where a symptom begins. Rules of thumb, each with its reason; set wide, so that a warning means
    something.
    """

    start_rows: int = 5
    """Updates whose mean is "the start": one rollout alone scatters too much to be compared with."""
    recent_rows: int = 5
    """Updates whose mean is "now", for the same reason."""
    quiet_rows: int = 10
    """Updates without a symptom after which it may be reported anew: twice `recent_rows`, so that the means
    share no row with the time it was there."""

    entropy_share: float = 0.2
    """Of the entropy at the start. configs/tiny, healthy, ends at three fifths; below one fifth little is
    left to explore."""
    distinct_share: float = 0.5
    """Of the distinct responses at the start: half of what was said in different words is now the same."""
    length_growth: float = 1.5
    """Times the length at the start. Better answers need some more room; reward models prefer long ones
    anyway (Singhal et al. 2023, A Long Way to Go, arXiv 2310.03716)."""
    score_growth_stds: float = 0.25
    """Standard deviations of the score at the start by which it must have risen to count as rising."""
    length_limit_share: float = 0.9
    """Of max_new_tokens, as the mean length: most responses then end at the limit."""
    eos_enough: float = 0.9
    """End tokens at which answers of nearly max_new_tokens end by themselves after all."""
    eos_drop: float = 0.2
    """One response in five that used to end and no longer does."""
    eos_missing: float = 0.1
    """Fewer than one response in ten ends: the score is then mostly that of a missing end token."""
    kl_over_target: float = 1.2
    """Times the target: there the adaptive controller's error is at its clip (0.2, Ziegler et al. 2019, 2.2)
    and it cannot push harder."""
    kl_per_token: float = 0.5
    """Nats. Without a target: a token of the policy is e^0.5 = 1.6 times as likely as under the reference."""
    kl_growth: float = 1.3
    """Times the mean of the `recent_rows` before: still growing, not settling."""
    value_warmup_rows: int = 10
    """Updates that the value network is given: it starts as a reward model, which is not yet a value."""
    explained_variance: float = -0.1
    """A network no better than a constant scatters around 0 from one rollout to the next."""
    clip_fraction: float = 0.3
    """Of the tokens: the clip is for the few that run ahead; here the batch as a whole wants a larger step
    than it may take."""
    ratio_deviation: float = 10.0
    """A token became 11 times as likely within one update. Single rare tokens of configs/tiny reach 5."""
    first_ratio: float = 0.01
    """Above the rounding of bfloat16. Before the first step of an update it should be 0 to the bit."""
    score_std: float = 1e-3
    """Of max(1, |score|): the responses do not differ in score, and advantages are noise scaled to 1."""
    rollout_gap: float = 0.05
    """Nats per token. configs/tiny in bfloat16 has below 0.001; two engines differ by more, since their
    kernels do, but at 0.05 the responses come from another policy than the one that is trained."""
    gold_errors: float = 5.0
    """Standard errors below its best mean, which is the luckiest of many: of 60 simulated runs of 300 updates
    without a trend, 17 were below by 4 errors in some update, none by 5 in three updates in a row."""


@dataclass
class History:
    """The rows of a run so far, their finite numbers only, and what the thresholds depend on.

    kl_target: nats per response, or None. max_new_tokens: longest response.
    """

    kl_target: float | None
    max_new_tokens: int
    thresholds: Thresholds
    rows: list[dict[str, float]] = field(default_factory=list)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row. null, NaN, infinity and text are left out, as a gap."""
        self.rows.append(
            {
                name: float(value)
                for name, value in row.items()
                if isinstance(value, (int, float)) and math.isfinite(value)
            }
        )

    def last(self, name: str) -> float | None:
        """The value in the last row."""
        return self.rows[-1].get(name)

    def start(self, name: str) -> float | None:
        """The mean over the first rows; None until there are later ones to compare with them."""
        limits = self.thresholds
        if len(self.rows) < limits.start_rows + limits.recent_rows:
            return None
        return _mean([row.get(name) for row in self.rows[: limits.start_rows]])

    def recent(self, name: str) -> float | None:
        """The mean over the last rows; None until there are enough, or when one lacks it."""
        return self._ending(name, len(self.rows))

    def before(self, name: str) -> float | None:
        """The mean over as many rows before those of `recent`."""
        return self._ending(name, len(self.rows) - self.thresholds.recent_rows)

    def _ending(self, name: str, end: int) -> float | None:
        first = end - self.thresholds.recent_rows
        return None if first < 0 else _mean([row.get(name) for row in self.rows[first:end]])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
