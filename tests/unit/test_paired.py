"""Paired tests and corrections for many comparisons, against statsmodels, scipy and hand arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.descriptivestats import sign_test as statsmodels_sign_test
from statsmodels.stats.multitest import multipletests

from eval.statistics import benjamini_hochberg, holm, mcnemar, permutation_test, sign_test, wilcoxon


def verdicts(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, first, second, neither)
    return np.repeat([1, 1, 0, 0], counts), np.repeat([1, 0, 1, 0], counts)


@pytest.mark.parametrize("table", [(50, 12, 4, 30), (3, 5, 5, 1), (10, 0, 7, 10), (0, 1, 0, 0)])
def test_mcnemar_equals_statsmodels(table: tuple[int, int, int, int]) -> None:
    both, first, second, neither = table
    oracle = statsmodels_mcnemar([[both, first], [second, neither]], exact=True)
    found = mcnemar(*verdicts(*table))
    assert (found.p_value, found.statistic) == pytest.approx((oracle.pvalue, oracle.statistic), abs=1e-9)


def test_mid_p_by_hand() -> None:
    # 1 against 5 of 6: exact 2 * (1 + 6) / 64; the observed table has probability 6 / 64 on each side.
    assert mcnemar(*verdicts(9, 1, 5, 9)).p_value == pytest.approx(14 / 64)
    assert mcnemar(*verdicts(9, 1, 5, 9), mid_p=True).p_value == pytest.approx(8 / 64)
    assert mcnemar(*verdicts(9, 2, 2, 9), mid_p=True).p_value == pytest.approx(1 - 6 / 16 / 2)


def test_no_disagreement_is_no_evidence() -> None:
    assert mcnemar(*verdicts(5, 0, 0, 5)).p_value == 1.0
    assert wilcoxon([1.0, 2.0], [1.0, 2.0]).p_value == 1.0


def test_mcnemar_refuses_ties() -> None:
    with pytest.raises(ValueError, match="sign test"):
        mcnemar([1, 0.5], [0, 1])


def test_sign_and_wilcoxon_equal_their_oracles() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, size=40), rng.normal(size=40)
    a[:5] = b[:5]
    assert sign_test(a, b).p_value == pytest.approx(statsmodels_sign_test(a - b)[1], abs=1e-9)
    assert wilcoxon(a, b).p_value == pytest.approx(stats.wilcoxon(a, b).pvalue, abs=1e-9)


def test_permutation_test_is_near_the_exact_one() -> None:
    # Six differences of equal size and sign: only 2 of 64 sign patterns are as far out.
    assert permutation_test([1.0] * 6, [0.0] * 6).p_value == pytest.approx(2 / 64, abs=0.006)
    # Three clusters of two flip together: 2 of 8.
    clustered = permutation_test([1.0] * 6, [0.0] * 6, clusters=list("aabbcc"))
    assert clustered.p_value == pytest.approx(2 / 8, abs=0.015)


def test_corrections_equal_statsmodels() -> None:
    p = np.random.default_rng(3).random(25) ** 3
    p[7] = p[11]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-9)
    assert benjamini_hochberg(p) == pytest.approx(multipletests(p, method="fdr_bh")[1], abs=1e-9)


def test_holm_by_hand_and_its_bounds() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]).max() == 1.0
    with pytest.raises(ValueError, match="p-values lie in"):
        holm([1.2])
