"""The tests of drift: against other ways to compute them, and on samples of one distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist, jensenshannon

from serving.drift import statistics as tests


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def test_psi_is_the_sum_over_cells():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    expected = ((q - p) * np.log(q / p)).sum()
    assert tests.psi(1e6 * p, 1e6 * q) == pytest.approx(expected, rel=1e-4)
    assert tests.psi([10, 10], [1000, 1000]) == 0
    assert np.isfinite(tests.psi([100, 0], [0, 100]))


def test_psi_grows_with_few_records_and_its_p_value_does_not_shrink(rng):
    """The same null distribution: at 60 records the index alone would alarm, its p-value does not."""
    shares, indices, p_values = np.full(10, 0.1), [], []
    for _ in range(60):
        counts = rng.multinomial(2000, shares), rng.multinomial(60, shares)
        indices.append(float(tests.psi(*counts)))
        p_values.append(tests.psi_p_value(*counts, rng, draws=199))
    assert np.mean(np.array(indices) > 0.1) > 0.5
    assert np.mean(np.array(p_values) < 0.05) < 0.2
    assert tests.psi_p_value([500, 500], [400, 100], rng) == pytest.approx(0.001)


def test_cohens_h_of_known_shares():
    assert tests.cohen_h(0.5, 0.5) == 0
    assert tests.cohen_h(0.0, 1.0) == pytest.approx(np.pi)
    assert tests.cohen_h(0.01, 0.05) == pytest.approx(0.2507, abs=1e-4)


def test_rare_labels_are_pooled_and_a_new_frequent_one_is_not():
    reference = ["en"] * 1980 + ["de"] * 12 + ["fr"] * 8
    today = ["en"] * 400 + ["zh"] * 95 + ["it"] * 5
    labels, table = tests.pooled_table(reference, today)
    assert labels == ["en", "zh", "other"]
    assert table.tolist() == [[1980, 0, 20], [400, 95, 5]]
    labels, table = tests.pooled_table(["a"] * 100 + ["b"] * 50 + ["c"], ["a"] * 100 + ["b"] * 50)
    assert (labels, table.tolist()) == (["a", "b"], [[101, 50], [100, 50]])
    labels, table = tests.pooled_table(["no"] * 100, ["no"] * 99 + ["yes"])
    assert (labels, table.tolist()) == (["no", "yes"], [[100, 0], [99, 1]])


def test_chi_squared_is_pearsons_and_fishers_where_cells_are_small():
    table = np.array([[300.0, 200.0], [200.0, 300.0]])
    statistic, p = tests.chi_squared(table)
    assert statistic == pytest.approx(40.0) and p == pytest.approx(stats.chi2.sf(40, 1))
    small = np.array([[198.0, 2.0], [45.0, 5.0]])
    assert tests.chi_squared(small)[1] == pytest.approx(stats.fisher_exact(small).pvalue)
    assert tests.chi_squared(np.array([[5.0], [9.0]])) == (0.0, 1.0)


def test_mmd_is_the_unbiased_estimate(rng):
    """Against the sums of Gretton et al. (2012), equation 3, written out."""
    x, y = rng.normal(size=(30, 4)), rng.normal(0.5, 1, size=(20, 4))
    both = np.concatenate([x, y])
    distances = cdist(both, both, "sqeuclidean")
    kernel = np.exp(-distances / (2 * np.median(distances[np.triu_indices(50, 1)])))
    xx = [kernel[i, j] for i in range(30) for j in range(30) if i != j]
    yy = [kernel[i, j] for i in range(30, 50) for j in range(30, 50) if i != j]
    expected = np.mean(xx) + np.mean(yy) - 2 * kernel[:30, 30:].mean()
    found = tests.maximum_mean_discrepancy(x, y, rng, 99)
    assert found.statistic == pytest.approx(expected, rel=1e-4)
    assert found.effect == pytest.approx(np.sqrt(expected / (1 - np.mean(xx))), rel=1e-4)


def test_permutation_tests_keep_their_level_and_see_a_shift(rng):
    below: dict[str, int] = {"mmd": 0, "tokens": 0}
    topics = rng.dirichlet(np.full(50, 0.2), size=8)
    for _ in range(100):
        x, y = rng.normal(size=(60, 3)), rng.normal(size=(40, 3))
        below["mmd"] += tests.maximum_mean_discrepancy(x, y, rng, 99).p < 0.05
        rows = [rng.multinomial(rng.integers(5, 60), topics[rng.integers(8)]) for _ in range(100)]
        below["tokens"] += (
            tests.token_divergence(csr_matrix(rows[:60]), csr_matrix(rows[60:]), rng, 99).p < 0.05
        )
    # 100 days at 5 %: more than 11 in one of ten thousand of such runs (binomial).
    assert max(below.values()) <= stats.binom.isf(1e-3, 100, 0.05)
    assert tests.maximum_mean_discrepancy(x, y + 1, rng, 99).p == 0.01
    other = csr_matrix([rng.multinomial(30, rng.dirichlet(np.full(50, 0.2))) for _ in range(40)])
    assert tests.token_divergence(csr_matrix(rows[:60]), other, rng, 99).p == 0.01


def test_tokens_of_one_text_are_no_independent_draws(rng):
    """Texts of one word each: chi-squared over tokens alarms on the null, the permutation does not."""
    words = rng.integers(0, 10, size=100)
    rows = csr_matrix(np.eye(10)[words] * 50)
    pooled = np.stack([np.asarray(rows[:60].sum(axis=0))[0], np.asarray(rows[60:].sum(axis=0))[0]])
    assert stats.chi2_contingency(pooled).pvalue < 1e-6
    assert tests.token_divergence(rows[:60], rows[60:], rng, 199).p > 0.02


def test_token_divergence_is_jensen_shannons(rng):
    x, y = csr_matrix([[3.0, 1.0, 0.0], [1.0, 1.0, 0.0]]), csr_matrix([[0.0, 1.0, 1.0]])
    expected = jensenshannon([0.625, 0.375, 0], [0, 0.5, 0.5], base=2) ** 2
    assert tests.token_divergence(x, y, rng, 9).statistic == pytest.approx(expected)


def test_corrections_of_a_family():
    assert tests.corrected([0.01, 0.04, 0.03], "holm") == pytest.approx([0.03, 0.06, 0.06])
    assert tests.corrected([0.01, 0.04, 0.03], "bh") == pytest.approx([0.03, 0.04, 0.04])
    assert tests.corrected([0.9, 0.8], "holm") == [1.0, 1.0]
    assert tests.corrected([], "bh") == []
