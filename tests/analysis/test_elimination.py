"""Bounds by hand, against scipy and by simulation; which number of registers is the smallest that suffices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from analysis import elimination
from analysis.elimination import FRACTION, Images, images_bound, seeds_bound, share_bound
from analysis.frames import PlannedTrial, SweepPlan
from analysis.scores import Score
from analysis.thresholds import METRIC as FROZEN

REGISTERS = "model.num_registers"


def test_seeds_bound_by_hand() -> None:
    # Mean 0.002, deviation 0.001 is less than the mean, which counts: 0.002 + 2.919986 · 0.002 / √3, but for the
    # zero no log-normal bound.
    assert seeds_bound([0.0, 0.002, 0.004]) == pytest.approx(0.002 + 2.919986 * 0.002 / math.sqrt(3), rel=1e-6)
    # A deviation of 0.006 / √3 is more than the mean, 0.002.
    assert seeds_bound([0.0, 0.0, 0.006]) == pytest.approx(0.002 + 2.919986 * 0.002, rel=1e-6)
    # Logarithms 0, ln 100, 2 ln 100 above ln 1e-6: Cox's bound is far above 1, where a fraction ends.
    assert seeds_bound([1e-6, 1e-4, 1e-2]) == 1.0
    assert seeds_bound([0.0, 0.0, 0.0]) is None
    assert seeds_bound([0.001]) is None


def test_the_log_normal_bound_counts_where_it_is_larger() -> None:
    values = [0.0001, 0.0002, 0.0008, 0.0003, 0.0002]
    logs = np.log(values)
    variance = logs.var(ddof=1)
    reach = stats.t.ppf(0.95, 4) * math.sqrt(variance / 5 + variance**2 / 8)
    expected = math.exp(logs.mean() + variance / 2 + reach)
    assert expected > np.mean(values) * (1 + stats.t.ppf(0.95, 4) / math.sqrt(5))
    assert seeds_bound(values) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [59, 256, 598, 2000])
def test_no_outlier_in_any_image_is_the_binomial_bound(n: int) -> None:
    assert images_bound(0.0, n) == pytest.approx(stats.beta.ppf(0.95, 1, n), rel=1e-9)
    assert images_bound(0.0, n) == pytest.approx(1 - 0.05 ** (1 / n), rel=1e-9)
    assert (images_bound(0.0, n) < 0.005) == (n >= 598)


def test_images_bound_solves_its_equation_and_is_above_clopper_and_pearson() -> None:
    bound = images_bound(0.01, 500)
    assert 500 * stats.entropy([0.01, 0.99], [bound, 1 - bound]) == pytest.approx(-math.log(0.05), rel=1e-9)
    assert bound > stats.beta.ppf(0.95, 6, 495)  # which is exact, for shares alone
    assert images_bound(1.0, 10) == 1.0


def test_images_bound_holds_for_clustered_outliers() -> None:
    """Images of which one in 50 has 20 % of outliers, of 300 images; below the true mean in far fewer than 5 %."""
    random = np.random.default_rng(0)
    means = 0.2 * random.binomial(300, 0.02, size=2_000) / 300
    assert np.mean([images_bound(mean, 300) < 0.004 for mean in means]) <= 0.05


def test_share_bound_is_clopper_and_pearsons() -> None:
    assert share_bound(0, 3) == pytest.approx(1 - 0.05 ** (1 / 3))  # 63 %
    assert share_bound(1, 5) == pytest.approx(stats.binomtest(1, 5, alternative="less").proportion_ci().high, rel=1e-6)
    assert share_bound(3, 3) == 1.0


@pytest.mark.parametrize(("n", "spread"), [(3, 0.3), (3, 0.5), (5, 0.5), (10, 0.5), (3, 1.0)])
def test_a_mean_at_the_limit_is_rarely_claimed_to_be_below(n: int, spread: float) -> None:
    """Log-normal fractions of mean 0.5 %; Student's bound alone is wrong in 9 to 23 %. At a spread of 1 in 11 %."""
    random = np.random.default_rng(1)
    values = 0.005 * np.exp(spread * random.normal(size=(2_000, n)) - spread**2 / 2)
    claimed = np.mean([(seeds_bound(row.tolist()) or 0) < 0.005 for row in values])
    assert claimed <= (0.05 if spread < 1 else 0.12)


def plan(counts: Sequence[int], seeds: int = 3, limit: float = 0.005) -> SweepPlan:
    trials = [
        PlannedTrial(f"{count}-{seed}", "", {REGISTERS: count}, seed) for count in counts for seed in range(seeds)
    ]
    return SweepPlan("s", "", {REGISTERS: tuple(counts)}, {REGISTERS: 0}, (), tuple(trials), outlier_limit=limit)


def scored(values: Mapping[int, Sequence[float]]) -> dict[str, dict[str, Score]]:
    by_trial = {f"{count}-{seed}": Score(1, value) for count, own in values.items() for seed, value in enumerate(own)}
    return {FRACTION: by_trial}


def with_images(trials: Sequence[str], metric: str, mean: float) -> Images | None:
    return Images(mean, 2_000, probe=False)


def no_images(trials: Sequence[str], metric: str, mean: float) -> Images | None:
    return None


NONE, FEW, MANY = [0.0, 0.0, 0.0], [0.0002, 0.0003, 0.0002], [0.02, 0.03, 0.025]


def smallest(values: Mapping[int, Sequence[float]]) -> list[int]:
    rows = elimination.elimination(plan(sorted(values)), scored(values), with_images).to_pylist()
    return [row[REGISTERS] for row in rows if row["smallest"]]


def test_the_smallest_number_that_suffices_with_all_larger_ones() -> None:
    assert smallest({0: MANY, 1: MANY, 2: FEW, 4: NONE, 8: NONE}) == [2]
    assert smallest({0: MANY, 1: NONE, 2: MANY, 4: NONE}) == [4]  # 1 is not tested any more
    assert smallest({0: NONE, 1: FEW}) == [0]
    assert smallest({0: NONE, 1: MANY}) == []
    assert smallest({0: MANY, 1: NONE, 2: []}) == []  # nothing is known of 2


def test_the_numbers_of_a_row() -> None:
    values = {0: MANY, 1: FEW, 2: NONE}
    many, few, none = elimination.elimination(plan((0, 1, 2)), scored(values), with_images).to_pylist()
    assert (many["below"], many["upper_images"], many["method"]) == (False, None, "t over seeds")
    assert (many["runs_above"], many["runs_above_upper"]) == (3, 1.0)
    assert (few["n"], few["mean"], few["limit"]) == (3, pytest.approx(0.0007 / 3), 0.005)
    assert few["upper_seeds"] == seeds_bound(FEW)
    assert few["upper_images"] == images_bound(few["mean"], 2_000)
    assert (few["upper"], few["below"]) == (max(few["upper_seeds"], few["upper_images"]), True)
    assert (few["n_images"], few["method"]) == (2_000, "t over seeds and Hoeffding over images")
    assert (none["upper_seeds"], none["upper"]) == (None, images_bound(0.0, 2_000))
    assert (none["flags"], none["method"]) == (["no_variance"], "Hoeffding over images")
    assert none["runs_above_upper"] == pytest.approx(0.6316, abs=1e-4)


def test_without_images_seeds_alone_decide_or_nothing_does() -> None:
    few, none = elimination.elimination(plan((1, 2)), scored({1: FEW, 2: NONE}), no_images).to_pylist()
    assert (few["below"], few["flags"], few["method"]) == (True, ["no_images"], "t over seeds")
    assert (none["upper"], none["below"], none["flags"]) == (None, None, ["no_images", "no_variance"])
    assert few["smallest"] is False  # 2, which is larger, is not known to suffice


def test_one_seed_is_bounded_over_images() -> None:
    sweep, values = plan((1,), seeds=1), scored({1: [0.001]})
    (row,) = elimination.elimination(sweep, values, with_images).to_pylist()
    assert (row["n"], row["upper"], row["flags"]) == (1, images_bound(0.001, 2_000), ["one_seed"])


def test_few_probe_images_cannot_show_absence() -> None:
    sweep, values = plan((1,)), scored({1: NONE})
    (row,) = elimination.elimination(sweep, values, lambda *_: Images(0.0, 256, probe=True)).to_pylist()
    assert (row["below"], row["flags"]) == (False, ["no_variance", "probe_images"])


def test_both_fractions_have_rows_and_a_missing_threshold_is_said() -> None:
    values = scored({0: NONE, 1: NONE})
    values[FROZEN] = {trial: Score(1, math.nan, "no_frozen_threshold") for trial in values[FRACTION]}
    rows = elimination.elimination(plan((0, 1)), values, with_images).to_pylist()
    assert [(row[REGISTERS], row["metric"]) for row in rows] == [(c, m) for c in (0, 1) for m in (FRACTION, FROZEN)]
    assert (rows[1]["n"], rows[1]["below"], rows[1]["flags"]) == (0, None, ["no_frozen_threshold"])
    assert elimination.elimination(plan((0, 1)), {}, with_images).num_rows == 0


def test_without_an_axis_of_registers_none_is_the_smallest() -> None:
    sweep = SweepPlan("s", "", {"method": ()}, None, (), (PlannedTrial("a", "", {"method": "dino"}, 0),))
    (row,) = elimination.elimination(sweep, {FRACTION: {"a": Score(1, 0.0)}}, with_images).to_pylist()
    assert (row["below"], row["smallest"]) == (True, None)


def test_seeds_that_were_added_by_variance_are_left_out() -> None:
    sweep = replace(plan((1,)), first_seeds=(0, 1))
    (row,) = elimination.elimination(sweep, scored({1: FEW}), with_images).to_pylist()
    assert (row["n"], row["flags"]) == (2, ["first_seeds"])


def test_the_order_of_trials_changes_nothing() -> None:
    sweep, values = plan((0, 1, 2, 4)), scored({0: MANY, 1: FEW, 2: FEW, 4: NONE})
    other = {FRACTION: dict(reversed(values[FRACTION].items()))}
    backwards = replace(sweep, trials=tuple(reversed(sweep.trials)))
    assert elimination.elimination(backwards, other, with_images).equals(
        elimination.elimination(sweep, values, with_images)
    )
