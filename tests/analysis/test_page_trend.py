"""Page's test against scipy, against all permutations where values tie, and by hand."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from analysis.page_trend import MOST_EXACT, doubled_ranks, page_trend


@pytest.mark.parametrize(("seeds", "levels"), [(2, 3), (3, 6), (5, 4), (4, 6)])
def test_without_ties_it_is_scipys(seeds: int, levels: int) -> None:
    random = np.random.default_rng(seeds)
    for _ in range(5):
        values = random.normal(size=(seeds, levels)) + 0.3 * np.arange(levels)
        rising = stats.page_trend_test(values, method="exact")
        falling = stats.page_trend_test(values[:, ::-1], method="exact")
        found = page_trend(values)
        assert found.l == rising.statistic
        assert found.p_value == pytest.approx(min(1, 2 * min(rising.pvalue, falling.pvalue)), rel=1e-9)
        assert found.exact


def test_by_hand() -> None:
    # Ranks 1 2 3 in both seeds: L = 2 · (1 + 4 + 9) = 28, the largest of 36 equally likely pairs of orders.
    found = page_trend(np.array([[0.1, 0.2, 0.3], [5.0, 6.0, 9.0]]))
    assert (found.l, found.direction, found.p_value) == (28.0, "rises", pytest.approx(2 / 36))
    assert page_trend(np.array([[3.0, 2.0, 1.0], [9.0, 6.0, 5.0]])).direction == "falls"
    # Orders 1 2 3 and 3 2 1 give L = 14 + 10 = 24, its mean: neither rises nor falls.
    even = page_trend(np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    assert (even.l, even.direction, even.p_value) == (24.0, None, 1.0)


def test_ties_are_exact_by_all_permutations() -> None:
    values = np.array([[0.05, 0.01, 0.0, 0.0], [0.04, 0.04, 0.0, 0.01]])
    ranks = np.array([stats.rankdata(row) for row in values])
    position = np.arange(1, 5)
    observed = float((ranks @ position).sum())
    orders = product(permutations(ranks[0]), permutations(ranks[1]))
    everything = np.array([np.dot(a, position) + np.dot(b, position) for a, b in orders])
    tail = min((everything <= observed + 1e-9).mean(), (everything >= observed - 1e-9).mean())
    found = page_trend(values)
    assert found.l == observed
    assert found.p_value == pytest.approx(min(1, 2 * tail), rel=1e-12)
    assert found.direction == "falls"


def test_doubled_ranks_are_midranks() -> None:
    values = np.array([[0.0, 3.0, 0.0, 1.0], [2.0, 2.0, 2.0, 1.0]])
    assert (doubled_ranks(values) / 2).tolist() == [stats.rankdata(row).tolist() for row in values]


def test_many_levels_by_the_normal_distribution() -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=(6, MOST_EXACT + 1)) + 0.05 * np.arange(MOST_EXACT + 1)
    found = page_trend(values)
    reference = stats.page_trend_test(values, method="asymptotic")
    assert not found.exact
    assert found.p_value == pytest.approx(2 * min(reference.pvalue, 1 - reference.pvalue), rel=1e-6)


def test_the_largest_exact_case_adds_up_and_meets_the_normal_distribution() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=(6, MOST_EXACT)) + 0.05 * np.arange(MOST_EXACT)
    reference = stats.page_trend_test(values, method="asymptotic")
    found = page_trend(values)
    assert found.exact
    assert found.p_value == pytest.approx(2 * min(reference.pvalue, 1 - reference.pvalue), abs=0.01)


def test_equal_values_say_nothing() -> None:
    found = page_trend(np.zeros((3, 4)))
    assert (found.l, found.p_value, found.direction) == (None, None, None)


@pytest.mark.parametrize("shape", [(0, 3), (3, 2)])
def test_too_little_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="needs 1 seed and 3 levels"):
        page_trend(np.zeros(shape))


def test_null_sweeps_are_rejected_as_often_as_said() -> None:
    """2,000 null sweeps of 6 levels and 3 seeds: at most 5 %, but for four binomial standard errors (0.0195)."""
    random = np.random.default_rng(2)
    rejected = [(page_trend(random.normal(size=(3, 6))).p_value or 0) <= 0.05 for _ in range(2_000)]
    assert np.mean(rejected) == pytest.approx(0.048, abs=0.0195)
