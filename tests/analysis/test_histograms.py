"""Histograms against the norms behind them: by hand, against numpy, and planted outliers of known number."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from analysis import histograms
from analysis.histograms import Distribution, Histogram, mixture, pooled, read
from analysis.schemas import TOKEN_NORMS
from tests.analysis.fabricated import sparse

BIN = 10 ** (1 / 512) - 1  # the width of a bin, 0.45 %


def histogram_of(norms: NDArray[np.float64]) -> Histogram:
    column = pa.array([sparse(norms)], TOKEN_NORMS.field("histogram").type)
    (found,) = read(column, [float(norms.max())])
    assert found is not None
    return found


def bulk_with(outliers: int, at: float, total: int = 51_200) -> NDArray[np.float64]:
    bulk = np.random.default_rng(0).normal(20, 1.5, total - outliers)
    return np.concatenate([bulk, np.full(outliers, at)])


def test_a_distribution_by_hand() -> None:
    # A quarter of all norms evenly in 1 … 2, none in 2 … 4, three quarters evenly in 4 … 5.
    found = Distribution(np.array([1.0, 2.0, 4.0, 5.0]), np.array([0.0, 0.25, 0.25, 1.0]))
    assert found.quantiles([0, 0.125, 0.25, 0.625, 1]).tolist() == [1, 1.5, 3, 4.5, 5]
    assert found.fraction_above(np.array([0.5, 1.5, 3, 4.8, 9])).tolist() == pytest.approx([1, 0.875, 0.75, 0.15, 0])
    assert found.median() == pytest.approx(4 + 1 / 3)
    # Within 1/3 of the median lies 0.25 (below it) + 0.25 (above it).
    assert found.median_absolute_deviation() == pytest.approx(1 / 3)
    assert found.rule3_threshold() == pytest.approx(4 + 1 / 3 + 5 * 1.4826 / 3)  # more than 1.5 medians
    narrow = Distribution(np.array([9.0, 11.0]), np.array([0.0, 1.0]))  # of which the spread alone gives 13.7
    assert narrow.rule3_threshold() == 15.0


def test_quantiles_are_numpys_within_a_bin() -> None:
    norms = bulk_with(1_213, 200.0)
    levels = [0.001, 0.1, 0.5, 0.9, 0.97, 0.98, 0.999, 1.0]
    assert histogram_of(norms).distribution().quantiles(levels) == pytest.approx(np.quantile(norms, levels), rel=BIN)


@pytest.mark.parametrize(("outliers", "at"), [(1_213, 200.0), (154, 32.0), (5, 400.0), (0, 20.0)])
def test_planted_outliers_are_counted_exactly_above_rule_3(outliers: int, at: float) -> None:
    norms = bulk_with(outliers, at)
    found = histogram_of(norms).distribution()
    median = np.median(norms)
    exact = max(median + 5 * 1.4826 * np.median(np.abs(norms - median)), 1.5 * median)
    assert found.rule3_threshold() == pytest.approx(exact, rel=BIN)
    above = found.fraction_above(found.rule3_threshold()) * len(norms)
    assert above == pytest.approx((norms > exact).sum(), abs=2)
    assert above > outliers - 1e-6
    ratios = np.array([2.0, 5.0])
    expected = (norms[:, None] > ratios * median).mean(axis=0)
    assert found.over_median().fraction_above(ratios) == pytest.approx(expected, abs=1e-9)


def test_pooling_is_counting_once() -> None:
    first, second = bulk_with(50, 100.0, 1_000), bulk_with(3, 900.0, 500)
    together = pooled([histogram_of(first), histogram_of(second)])
    once = histogram_of(np.concatenate([first, second]))
    assert (together.bins.tolist(), together.counts.tolist()) == (once.bins.tolist(), once.counts.tolist())
    assert (together.total, together.maximum) == (1_500, 900.0)
    mixed = mixture([histogram_of(first).distribution(), histogram_of(second).distribution()], [1_000, 500])
    levels = [0.1, 0.5, 0.95, 0.999]
    assert mixed.quantiles(levels) == pytest.approx(once.distribution().quantiles(levels), rel=BIN)


def test_the_maximum_closes_the_topmost_bin() -> None:
    assert histogram_of(np.full(10, 7.0)).distribution().quantiles([1.0]).tolist() == [7.0]
    assert histogram_of(np.full(10, 7.0)).distribution().median() == pytest.approx(7.0, rel=BIN)


def test_norms_off_the_grid() -> None:
    column = pa.array([[{"bin": 0, "count": 3}, {"bin": 4097, "count": 1}]], TOKEN_NORMS.field("histogram").type)
    (found,) = read(column, [float("inf")])
    assert found is not None
    distribution = found.distribution()
    assert distribution.median() == pytest.approx(2 / 3 * 1e-3)
    assert distribution.fraction_above(np.array([1.0, 99_000.0, 1.1e5])).tolist() == [0.25, 0.25, 0.0]
    column = pa.array([[{"bin": 0, "count": 3}]], column_type())
    (zeros,) = read(column, [0.0])
    assert zeros is not None
    assert np.isfinite(zeros.distribution().over_median().knots).all()


def test_rows_without_norms_have_no_histogram() -> None:
    rows = [
        [{"bin": 5, "count": 2}],
        [],
        None,
        [{"bin": 9, "count": 0}],
        [{"bin": 7, "count": 1}, {"bin": 5, "count": 1}],
    ]
    column = pa.chunked_array([pa.array(rows[:2], TOKEN_NORMS.field("histogram").type), rows[2:]], column_type())
    found = read(column, [1.0, None, 1.0, 1.0, 2.0])
    assert [None if one is None else one.bins.tolist() for one in found] == [[5], None, None, None, [5, 7]]


def column_type() -> pa.DataType:
    return TOKEN_NORMS.field("histogram").type


def test_coarse_bins_keep_every_norm() -> None:
    edges, counts = histogram_of(np.array([1.0, 1.0, 1.01, 3.0, 1e6])).coarse(16)
    assert counts.sum() == 5
    assert len(edges) == len(counts) + 1
    assert counts[0] == 3 and edges[0] <= 1.0 < edges[1]
    assert edges[1] / edges[0] == pytest.approx(10 ** (16 / 512))
    assert counts[-1] == 1 and edges[-1] == pytest.approx(1e5)
    assert histograms.edge(np.array([0, 4096])).tolist() == pytest.approx([1e-3, 1e5])
