"""Statistics against hand-worked numbers, scipy, published tables and a small simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from analysis import statistics
from tests.analysis.least_squares import numbers, pooled


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


def covers_zero(difference: statistics.Difference) -> bool:
    assert difference.low is not None
    assert difference.high is not None
    return difference.low <= 0 <= difference.high


def grown(random: np.random.Generator, deviations: Sequence[float], seeds: int) -> dict[int, dict[int, float]]:
    values = random.normal(size=(len(deviations), seeds)) * np.array(deviations)[:, None] + random.normal(size=seeds)
    return {name: dict(enumerate(row.tolist())) for name, row in enumerate(values)}


def test_cells_that_scatter_alike_are_pooled() -> None:
    cells = grown(np.random.default_rng(0), [1.0] * 6, 5)
    found = statistics.compare(cells, 0)
    assert {one.method for one in found.values()} == {"pooled_dunnett"}
    assert numbers(found) == {name: pytest.approx(values) for name, values in numbers(pooled(cells, 0)).items()}


def test_two_cells_are_paired() -> None:
    cells = grown(np.random.default_rng(0), [1.0, 1.0], 5)
    assert statistics.compare(cells, 0) == {1: statistics.paired_t(cells[1], cells[0])}
    # A third one without a pair is no comparison that has to be paid for.
    found = statistics.compare({**cells, 2: {9: 1.0}, 3: {0: 1.0}}, 0)
    assert found[1] == statistics.paired_t(cells[1], cells[0])
    assert (found[2].method, found[3].method) == (statistics.NO_PAIR, statistics.ONE_SEED)


@pytest.mark.parametrize(
    "deviations", [[30.0, 1.0, 1.0, 1.0], [1.0, 1.0, 30.0, 1.0], [1.0, 1.0, 1.0, 0.0]], ids=["base", "cell", "none"]
)
def test_unequal_variances_are_paired_at_bonferronis_level(deviations: list[float]) -> None:
    cells = grown(np.random.default_rng(0), deviations, 5)
    cells[3] = dict.fromkeys(range(5), 0.0) if deviations[3] == 0 else cells[3]
    for name, found in statistics.compare(cells, 0).items():
        reference = stats.ttest_rel(list(cells[name].values()), list(cells[0].values()))
        interval = reference.confidence_interval(1 - 0.05 / 3)
        assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
        assert (found.method, found.p_value) == ("paired_t_bonferroni", pytest.approx(reference.pvalue))


def test_a_cell_equal_to_the_baseline_is_no_noise_to_pool() -> None:
    cells = grown(np.random.default_rng(0), [1.0] * 4, 5)
    found = statistics.compare({**cells, 3: dict(cells[0])}, 0)
    assert found[3].no_variance and found[3].p_value is None
    assert found[1].method == statistics.PAIRED_BONFERRONI


def test_nothing_varies() -> None:
    cells = {name: {0: 0.1 * name, 1: 0.1 * name + 0.2, 2: 0.1 * name + 0.7} for name in range(3)}
    found = statistics.compare(cells, 0)
    assert all(one.no_variance and one.low == one.delta == one.high for one in found.values())


def test_a_lost_trial_costs_its_cell_that_seed_alone() -> None:
    cells = grown(np.random.default_rng(7), [1.0] * 5, 5)
    whole = statistics.compare(cells, 0)
    lost = {name: {s: v for s, v in values.items() if (name, s) != (4, 2)} for name, values in cells.items()}
    found = statistics.compare(lost, 0)
    # The others are compared over 5 seeds, but without the fifth cell: 3 · 4 degrees; their intervals are still four.
    assert [(one.n_paired, one.freedom) for one in found.values()] == [(5, 12)] * 3 + [(4, 12)]
    assert {one.method for one in found.values()} == {"pooled_dunnett"}
    over_four = {n: {s: v for s, v in values.items() if s != 2} for n, values in cells.items()}
    reference = {name: pytest.approx(values) for name, values in numbers(pooled(over_four, 0)).items()}
    assert numbers(found)[4] == reference[4]
    assert found[1].delta == whole[1].delta
    without = {name: values for name, values in cells.items() if name != 4}
    assert found[1].t == pytest.approx(pooled(without, 0)[1].t)
    # A baseline that lost one costs all cells that seed.
    lost = {**cells, 0: {s: v for s, v in cells[0].items() if s != 2}}
    assert numbers(statistics.compare(lost, 0)) == reference


def test_the_order_of_cells_and_seeds_changes_no_digit() -> None:
    random = np.random.default_rng(4)
    for deviations, method in (([1.0] * 9, "pooled_dunnett"), ([1.0, 0.1, 30.0, 1.0, 0.7], "paired_t_bonferroni")):
        cells = grown(random, deviations, 4)
        assert {found.method for found in statistics.compare(cells, 0).values()} == {method}
        for _ in range(20):
            order = random.permutation(len(cells)).tolist()
            turned = {name: {s: cells[name][s] for s in random.permutation(4).tolist()} for name in order}
            assert statistics.compare(turned, 0) == statistics.compare(cells, 0)


def test_two_seeds_are_pooled_unless_one_cell_has_nearly_all_scatter() -> None:
    # Scatter 0.045, 0.041, 0.017, 0.042, 0.182, 0.108: with one degree each, by chance (0.066 · 5 above 0.25).
    values = [(0.4635, 0.5085), (0.4875, 0.5285), (0.511, 0.494), (0.497, 0.5395), (0.3145, 0.4965), (0.521, 0.4135)]
    cells = {name: dict(enumerate(pair)) for name, pair in enumerate(values)}
    assert {found.method for found in statistics.compare(cells, 0).values()} == {"pooled_dunnett"}
    cells[4][0] = -20.0
    assert {found.method for found in statistics.compare(cells, 0).values()} == {"paired_t_bonferroni"}


def test_one_cells_share_of_the_squares_is_exact() -> None:
    """Of equal variances, the baseline alone is found at its level 0.1 / 4 and one of 5 others at 0.5 / 4 or less."""
    random = np.random.default_rng(0)
    draws = 4_000
    differ = 0
    for _ in range(draws):
        centred = random.normal(size=(6, 5)) + random.normal(size=5)
        centred -= centred.mean(axis=1, keepdims=True)
        differ += statistics.variances_differ(centred - centred.mean(axis=0))
    # Five tests of which two seldom find something at once: between 1 - (1 - .025)^5 (1 - .025) and the sum.
    assert 0.125 < differ / draws < 0.15 + 0.02


@pytest.mark.parametrize(
    ("deviations", "alone", "together"),
    [([1.0] * 6, 0.975, 0.94), ([3.0, *[1.0] * 5], 0.93, 0.88), ([1.0, 0.7, 0.5, 0.3, 0.1, 0.01], 0.93, 0.89)],
    ids=["equal", "baseline", "falling"],
)
def test_chosen_intervals_cover(deviations: list[float], alone: float, together: float) -> None:
    """Nominal 95 % over 2,000 null sweeps of 6 cells and 3 seeds, with the variances that are hard to tell apart."""
    random = np.random.default_rng(0)
    covered = np.array(
        [
            [covers_zero(found) for found in statistics.compare(grown(random, deviations, 3), 0).values()]
            for _ in range(2_000)
        ]
    )
    error = 0.015  # three binomial standard errors, about
    assert covered.mean(axis=0).min() >= alone - error
    assert covered.all(axis=1).mean() >= together - error


def test_paired_intervals_cover_at_their_level() -> None:
    random = np.random.default_rng(0)
    draws = 1_500
    covered = sum(covers_zero(statistics.paired_t(*grown(random, [1.0, 2.0], 3).values())) for _ in range(draws))
    assert covered / draws == pytest.approx(0.95, abs=0.0225)  # four binomial standard errors
