"""The quadratic with seed blocks against statsmodels, and the interval of its extremum by scanning."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from numpy.typing import NDArray

from analysis.quadratic import fit

X = np.log2(1 + np.array([0.0, 1, 2, 4, 8, 16]))
MIDDLE = (X[0] + X[-1]) / 2


def reference(values: NDArray[np.float64], middle: float = MIDDLE) -> sm.regression.linear_model.RegressionResults:
    seeds, levels = values.shape
    away = np.tile(X[:levels] - middle, seeds)
    design = np.column_stack([away, away**2, np.repeat(np.eye(seeds), levels, axis=0)])
    return sm.OLS(values.ravel(), design).fit()


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_it_is_least_squares_with_a_constant_for_each_seed(seeds: int) -> None:
    random = np.random.default_rng(seeds)
    values = 0.7 + 0.02 * X - 0.005 * X**2 + random.normal(size=(seeds, 1)) + 0.003 * random.normal(size=(seeds, 6))
    found, expected = fit(values, X), reference(values)
    assert found.freedom == expected.df_resid == 6 * seeds - seeds - 2
    for one, index in ((found.slope, 0), (found.curvature, 1)):
        assert one.value == pytest.approx(expected.params[index], rel=1e-8)
        assert (one.low, one.high) == pytest.approx(tuple(expected.conf_int()[index]), rel=1e-8)
        assert one.p_value == pytest.approx(expected.pvalues[index], rel=1e-6)


def test_the_extremum_and_between_which_x_it_may_lie() -> None:
    """At the ends of the interval, the derivative is just told apart from 0 by statsmodels' t-test."""
    random = np.random.default_rng(0)
    values = 0.7 - 0.02 * (X - 2.5) ** 2 + 0.01 * random.normal(size=(3, 6))
    found, expected = fit(values, X), reference(values)
    assert found.optimum is not None
    low, estimate, high = found.optimum
    assert low < estimate < high
    assert estimate == pytest.approx(2.5, abs=0.2)
    for end in (low, high):
        contrast = np.array([1.0, 2 * (end - MIDDLE), 0, 0, 0])
        assert float(expected.t_test(contrast).pvalue) == pytest.approx(0.05, rel=1e-6)


def test_an_extremum_outside_or_without_support_is_none() -> None:
    random = np.random.default_rng(1)
    noise = 0.01 * random.normal(size=(3, 6))
    assert fit(0.7 - 0.02 * (X - 6) ** 2 + noise, X).optimum is None
    assert fit(0.7 + 0.02 * X + noise, X).optimum is None
    rising = fit(0.7 + 0.02 * X + noise, X)
    assert rising.slope.low is not None
    assert rising.slope.low > 0


def test_an_interval_is_cut_off_at_the_outermost_levels() -> None:
    random = np.random.default_rng(2)
    values = 0.7 - 0.02 * (X - 0.2) ** 2 + 0.02 * random.normal(size=(3, 6))
    found = fit(values, X).optimum
    assert found is not None
    assert found[0] == X[0]


def test_an_exact_quadratic_has_no_p_value() -> None:
    found = fit(np.array([[0.0], [1.0]]) + 1 + 2 * (X - MIDDLE) - 3 * (X - MIDDLE) ** 2, X)
    assert (found.slope.value, found.curvature.value) == (pytest.approx(2), pytest.approx(-3))
    assert (found.slope.low, found.slope.p_value, found.curvature.high, found.optimum) == (None, None, None, None)


@pytest.mark.parametrize("values", [np.zeros((1, 6)), np.zeros((2, 2))])
def test_too_little_is_refused(values: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="2 seeds and 3 levels"):
        fit(values, X[: values.shape[1]])
