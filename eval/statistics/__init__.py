"""Intervals, tests and power for evaluation. Pure functions over numpy arrays.

Every estimate is an `Interval` that says how it was made. Whole clusters (prompts) are the unit of
resampling and of standard errors, so several answers to one prompt do not count as independent evidence.
"""

from eval.statistics.bootstrap import (
    bootstrap_distribution,
    bootstrap_interval,
    bootstrap_limits,
    bootstrap_means,
)
from eval.statistics.intervals import (
    Clusters,
    Interval,
    Values,
    correlation,
    mean_standard_error,
    t_interval,
)
from eval.statistics.paired import (
    Significance,
    benjamini_hochberg,
    holm,
    mcnemar,
    paired_difference,
    permutation_test,
    sign_test,
    wilcoxon,
)
from eval.statistics.proportions import clopper_pearson_interval, proportion_interval, wilson_interval

__all__ = [
    "Clusters",
    "Interval",
    "Significance",
    "Values",
    "benjamini_hochberg",
    "bootstrap_distribution",
    "bootstrap_interval",
    "bootstrap_limits",
    "bootstrap_means",
    "clopper_pearson_interval",
    "correlation",
    "holm",
    "mcnemar",
    "mean_standard_error",
    "paired_difference",
    "permutation_test",
    "proportion_interval",
    "sign_test",
    "t_interval",
    "wilcoxon",
    "wilson_interval",
]
