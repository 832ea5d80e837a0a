"""Statistics against hand-worked numbers, scipy, published tables and a small simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis import statistics


def test_summary_by_hand() -> None:
    assert statistics.summarise([]) == statistics.Summary(0, None, None)
    assert statistics.summarise([0.5]) == statistics.Summary(1, 0.5, None)
    found = statistics.summarise([1.0, 2.0, 6.0])
    assert found.mean == 3.0
    assert found.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))  # ddof 1


def test_paired_t_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, std 1, standard error 1/√3; t(0.975, 2) = 4.302653 from the usual table.
    found = statistics.paired_t({0: 11.0, 1: 22.0, 2: 33.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert (found.n_paired, found.baseline_mean, found.delta, found.method) == (3, 20.0, 2.0, "paired_t")
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.p_value == pytest.approx(0.0741799, abs=1e-7)  # t = 3.464, 2 degrees


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_paired_t_equals_scipy(n: int) -> None:
    random = np.random.default_rng(n)
    cell, baseline = random.normal(size=n), random.normal(size=n)
    reference = stats.ttest_rel(cell, baseline)
    interval = reference.confidence_interval(0.95)
    found = statistics.paired_t(dict(enumerate(cell)), dict(enumerate(baseline)))
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_only_common_seeds_are_paired() -> None:
    found = statistics.paired_t({0: 1.0, 1: 2.0, 7: 100.0}, {1: 1.0, 0: 0.5, 9: -50.0})
    assert (found.n_paired, found.delta, found.baseline_mean) == (2, 0.75, 0.75)


def test_one_pair_and_none() -> None:
    one = statistics.paired_t({0: 3.0}, {0: 1.0})
    assert (one.delta, one.low, one.high, one.p_value, one.method) == (2.0, None, None, None, "none: one seed")
    none = statistics.paired_t({0: 3.0}, {1: 1.0})
    assert (none.n_paired, none.delta, none.baseline_mean, none.method) == (0, None, None, "none: no pair")


@pytest.mark.parametrize(("cell", "delta"), [({0: 0.1, 1: 0.2, 2: 0.7}, 0.0), ({0: 0.2, 1: 0.3, 2: 0.8}, 0.1)])
def test_equal_differences_have_no_p_value(cell: dict[int, float], delta: float) -> None:
    # 0.2 - 0.1, 0.3 - 0.2 and 0.8 - 0.7 differ in the last binary digit: that is rounding, not variance.
    found = statistics.paired_t(cell, {0: 0.1, 1: 0.2, 2: 0.7})
    assert found.no_variance
    assert found.p_value is None
    assert found.low == found.delta == found.high
    assert found.delta == pytest.approx(delta)


def test_small_but_real_variance_is_kept() -> None:
    assert not statistics.paired_t({0: 1e-9, 1: 2e-9}, {0: 0.0, 1: 0.0}).no_variance


def test_stein_keeps_the_first_blocks_variance_and_degrees_by_hand() -> None:
    # Differences 1, 2, 3 of the first block: s = 1, t(0.975, 2) = 4.302653; with 10 and 14 the mean of five is 6.
    cell = dict(enumerate([1.0, 2.0, 3.0, 10.0, 14.0]))
    found = statistics.stein_t(cell, dict.fromkeys(range(9), 0.0), first=(0, 1, 2))
    assert (found.n_paired, found.delta, found.method) == (5, 6.0, "stein two-stage t")
    assert found.low == pytest.approx(6 - 4.302653 / math.sqrt(5), abs=1e-6)
    assert found.high == pytest.approx(6 + 4.302653 / math.sqrt(5), abs=1e-6)
    assert found.p_value == pytest.approx(2 * float(stats.t.sf(6 * math.sqrt(5), 2)))


def test_stein_without_more_seeds_is_the_paired_t() -> None:
    cell, baseline = {0: 1.0, 1: 2.5, 2: 2.0}, {0: 0.5, 1: 0.0, 2: 0.25}
    ours, plain = statistics.stein_t(cell, baseline, (0, 1, 2)), statistics.paired_t(cell, baseline)
    assert (ours.delta, ours.low, ours.high, ours.p_value) == (plain.delta, plain.low, plain.high, plain.p_value)


@pytest.mark.parametrize("cell", [{0: 1.0, 3: 2.0, 4: 5.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0}])
def test_a_first_block_without_variance_gives_no_interval(cell: dict[int, float]) -> None:
    found = statistics.stein_t(cell, dict.fromkeys(range(9), 0.0), (0, 1, 2))
    assert (found.n_paired, found.delta) == (len(cell), sum(cell.values()) / len(cell))
    assert (found.low, found.high, found.p_value, found.no_variance) == (None, None, None, False)
    assert found.method == "none: the first seeds show no variance"


def test_stein_says_as_paired_t_what_too_few_or_equal_pairs_lack() -> None:
    one = statistics.stein_t({0: 3.0}, {0: 1.0}, (0, 1))
    assert (one.delta, one.low, one.method) == (2.0, None, "none: one seed")
    assert statistics.stein_t({5: 3.0}, {0: 1.0}, (0, 1)).method == "none: no pair"
    equal = statistics.stein_t({0: 1.0, 1: 1.0, 2: 1.0}, {0: 0.5, 1: 0.5, 2: 0.5}, (0, 1))
    assert (equal.no_variance, equal.low, equal.high) == (True, 0.5, 0.5)


def test_holm_by_hand() -> None:
    # Sorted: .01, .02, .03, .04, times 4, 3, 2, 1 = .04, .06, .06, .04; made monotone: .04, .06, .06, .06.
    assert statistics.holm([0.04, None, 0.01, 0.03, 0.02]) == pytest.approx([0.06, None, 0.04, 0.06, 0.06], abs=1e-12)
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([None]) == [None]
    assert statistics.holm([]) == []


@pytest.mark.parametrize(
    ("comparisons", "freedom", "critical"),
    # Two-sided 5 % points of Dunnett's table; one comparison is Student's t.
    [(2, 10, 2.57), (5, 10, 2.99), (3, 20, 2.54), (9, 60, 2.77), (2, 5, 3.03), (1, 5, stats.t.ppf(0.975, 5))],
)
def test_dunnett_critical_values(comparisons: int, freedom: int, critical: float) -> None:
    assert statistics.dunnett_critical(comparisons, freedom) == pytest.approx(critical, abs=0.006)


def test_pooled_intervals_by_hand() -> None:
    # Two cells, three seeds: pooling is the paired t-test, whose numbers are known.
    cells = {"base": {0: 10.0, 1: 20.0, 2: 30.0}, "other": {0: 11.0, 1: 22.0, 2: 33.0}}
    pooled = statistics.pooled_dunnett(cells, "base")["other"]
    paired = statistics.paired_t(cells["other"], cells["base"])
    assert (pooled.delta, pooled.p_value) == (paired.delta, pytest.approx(paired.p_value))
    assert (pooled.low, pooled.high) == pytest.approx((paired.low, paired.high), rel=1e-6)
    assert pooled.method == "pooled_dunnett"


def test_pooling_needs_something_to_pool() -> None:
    with pytest.raises(ValueError, match="2 common seeds"):
        statistics.pooled_dunnett({"a": {0: 1.0}, "b": {0: 2.0}}, "a")
    with pytest.raises(ValueError, match="no variance"):
        statistics.pooled_dunnett({"a": {0: 1.0, 1: 2.0}, "b": {0: 2.0, 1: 3.0}}, "a")


def covers_zero(difference: statistics.Difference) -> bool:
    assert difference.low is not None
    assert difference.high is not None
    return difference.low <= 0 <= difference.high


def test_intervals_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nominal 95 % over 1,500 null sweeps of 6 cells and 3 seeds: single for paired t, simultaneous for Dunnett."""
    critical = statistics.dunnett_critical(5, 10)  # once, as it is the same for all draws
    monkeypatch.setattr(statistics, "dunnett_critical", lambda *_: critical)
    random = np.random.default_rng(0)
    single = simultaneous = 0
    draws = 1_500
    for _ in range(draws):
        values = random.normal(size=(6, 3)) + random.normal(size=3)
        cells = {name: dict(enumerate(row)) for name, row in enumerate(values)}
        paired = statistics.paired_t(cells[1], cells[0])
        single += covers_zero(paired)
        simultaneous += all(map(covers_zero, statistics.pooled_dunnett(cells, 0).values()))
    # Four binomial standard errors at 95 % are 0.0225.
    assert single / draws == pytest.approx(0.95, abs=0.0225)
    assert simultaneous / draws == pytest.approx(0.95, abs=0.0225)
