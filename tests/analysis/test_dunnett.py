"""Dunnett's distribution against his tables, Student's t, scipy and a simulation of its definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis import dunnett


@pytest.mark.parametrize(
    ("comparisons", "freedom", "expected"),
    # Two-sided 5 % points of Dunnett's tables.
    [(2, 5, 3.03), (2, 10, 2.57), (3, 20, 2.54), (5, 10, 2.99), (9, 60, 2.77)],
)
def test_critical_values_of_the_tables(comparisons: int, freedom: int, expected: float) -> None:
    assert dunnett.critical(comparisons, freedom, 0.95) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("confidence", [0.95, 0.995])
def test_one_comparison_is_students_t(freedom: int, confidence: float) -> None:
    expected = float(stats.t.ppf((1 + confidence) / 2, freedom))
    assert dunnett.critical(1, freedom, confidence) == pytest.approx(expected, rel=1e-6)


def test_p_values_equal_scipys_of_the_same_data() -> None:
    random = np.random.default_rng(3)
    baseline, *cells = random.normal(size=(4, 6)) + np.array([[0.0], [0.5], [1.0], [1.5]])
    reference = stats.dunnett(*cells, control=baseline, rng=np.random.default_rng(0))
    for t, p in zip(reference.statistic, reference.pvalue, strict=True):
        assert dunnett.p_value(float(t), 3, 20) == pytest.approx(p, abs=2e-4)


@pytest.mark.parametrize(("comparisons", "freedom"), [(5, 2), (5, 20), (40, 78)])
def test_probability_is_that_of_its_definition(comparisons: int, freedom: int) -> None:
    random = np.random.default_rng(0)
    draws = 40_000
    noise = random.normal(size=(draws, comparisons + 1))
    scale = np.sqrt(random.chisquare(freedom, size=draws) / freedom)
    largest = np.abs(noise[:, 1:] - noise[:, :1]).max(axis=1) / np.sqrt(2) / scale
    for t in (1.5, 2.5, 5.0):
        assert dunnett.probability(t, comparisons, freedom) == pytest.approx((largest <= t).mean(), abs=0.01)


def test_p_values_stay_between_one_comparisons_and_bonferronis() -> None:
    single = 2 * float(stats.t.sf(60, 10))
    assert single < 1e-12
    assert single <= dunnett.p_value(-60.0, 5, 10) <= 5 * single
    assert dunnett.p_value(0.0, 5, 10) == 1.0
    assert dunnett.p_value(1e6, 5, 1000) >= 0.0
