"""The bootstrap over images against the normal approximation, by simulation, and what may be paired at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy import stats

from analysis import image_bootstrap
from analysis.answer import supported
from analysis.collect import collect
from analysis.image_bootstrap import METHOD, Interval, PerImage, generator
from analysis.results import evaluate
from analysis.statistics import Difference
from tests.analysis.fabricated import REGISTERS, TOP1, Trial, publish


def interval(values: NDArray[np.float64]) -> Interval | None:
    return image_bootstrap.interval(values, generator())


def difference(cell: Sequence[PerImage], baseline: Sequence[PerImage]) -> Interval | None:
    return image_bootstrap.difference(cell, baseline, generator())


def paired(
    cell: PerImage | None, baseline: PerImage | None, cell_score: float, baseline_score: float
) -> Difference | None:
    return image_bootstrap.paired(cell, baseline, cell_score, baseline_score, generator())


def images(values: NDArray[np.float64], data: str = "d") -> PerImage:
    return PerImage(np.arange(len(values)), values, data)


def test_means_of_many_images_are_nearly_normal() -> None:
    random = np.random.default_rng(0)
    for values in (random.normal(size=2_000), random.choice([-1.0, 0.0, 1.0], p=[0.1, 0.75, 0.15], size=2_000)):
        found = interval(values)
        assert found is not None
        reach = 1.96 * values.std() / np.sqrt(2_000)
        assert found.mean == pytest.approx(values.mean())
        assert found.low == pytest.approx(values.mean() - reach, abs=0.1 * reach)
        assert found.high == pytest.approx(values.mean() + reach, abs=0.1 * reach)


def test_it_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).exponential(size=300)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=2_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    found = interval(values)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.02)


def test_distinct_values_and_images_are_resampled_alike() -> None:
    """64 distinct values are drawn by their counts, 65 as images: the same interval within Monte Carlo error."""
    values = np.repeat(np.random.default_rng(3).normal(size=64), 20)
    few, many = interval(values), interval(np.append(values[1:], values[0] + 1e-9))
    assert few is not None
    assert many is not None
    assert (few.low, few.high) == pytest.approx((many.low, many.high), abs=0.004)


def test_pairing_by_image_takes_away_what_images_share() -> None:
    random = np.random.default_rng(4)
    hard = random.normal(size=1_000)
    cell, baseline = hard + 0.1 + 0.05 * random.normal(size=1_000), hard + 0.05 * random.normal(size=1_000)
    found = paired(images(cell), images(baseline), float(cell.mean()), float(baseline.mean()))
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert (found.n_paired, found.method, found.p_value) == (1, METHOD, None)
    assert found.delta == pytest.approx(cell.mean() - baseline.mean())
    assert found.high - found.low < 0.01 < np.ptp(stats.t.interval(0.95, 999, scale=cell.std() / np.sqrt(1_000)))


def test_only_means_over_the_same_images_are_paired() -> None:
    values = np.random.default_rng(5).normal(size=100)
    one, score = images(values), float(values.mean())
    assert paired(one, one, score, score) is not None
    assert paired(None, one, score, score) is None
    assert paired(one, one, score + 0.01, score) is None  # such as mIoU over the whole set
    assert paired(one, replace(one, data="other"), score, score) is None
    assert paired(one, replace(one, index=one.index + 1), score, score) is None
    with_nan = values.copy()
    with_nan[3] = np.nan
    assert paired(images(with_nan), one, float(np.nanmean(with_nan)), score) is None
    both = paired(images(with_nan), images(with_nan), float(np.nanmean(with_nan)), float(np.nanmean(with_nan)))
    assert both is not None
    assert both.delta == 0


def test_several_seeds_are_averaged_image_by_image() -> None:
    random = np.random.default_rng(6)
    runs = random.normal(size=(4, 200))
    found = difference([images(runs[0]), images(runs[1])], [images(runs[2]), images(runs[3])])
    assert found is not None
    assert found == interval(runs[:2].mean(axis=0) - runs[2:].mean(axis=0))
    assert difference([], [images(runs[0])]) is None


def test_the_order_of_images_changes_nothing_to_the_bit() -> None:
    random = np.random.default_rng(7)
    for values in (random.normal(size=3_000), random.choice([0.0, 1.0], size=3_000)):
        assert interval(values) == interval(values[::-1]) == interval(random.permutation(values))
    assert interval(np.array([1.0])) is None


def test_intervals_cover() -> None:
    """300 images of log-normal values, 200 times: nominal 95 % but for four binomial standard errors (0.062)."""
    random = np.random.default_rng(8)
    draws = [interval(random.lognormal(sigma=0.5, size=300)) for _ in range(200)]
    covered = [one is not None and one.low <= np.exp(0.125) <= one.high for one in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.062)


def test_ten_thousand_images_take_less_than_a_second() -> None:
    values = np.random.default_rng(9).normal(size=10_000)
    started = time.process_time()
    interval(values)
    assert time.process_time() - started < 1


def test_rows_of_released_weights_are_bounded_over_images_and_never_claimed(tmp_path: Path) -> None:
    weights, random = "model.weights", np.random.default_rng(5)
    right = {"dinov2": random.random(500) < 0.6, "dinov2_reg4": random.random(500) < 0.8}
    trials = [Trial({weights: name}, 0, {TOP1: float(own.mean())}) for name, own in right.items()]
    folder = publish(tmp_path / "s", trials, baseline={weights: "dinov2"}, primary=[TOP1])
    for trial, own in zip(trials, right.values(), strict=True):
        columns = {"metric": [TOP1] * 500, "index": np.arange(500), "value": own.astype(float)}
        pq.write_table(pa.table(columns), folder / "trials" / trial.trial_id / "per_image.parquet")
    rows = {row[weights]: row for row in evaluate(collect(folder)).rows if row["metric"] == TOP1}
    row, expected = rows["dinov2_reg4"], interval(right["dinov2_reg4"].astype(float) - right["dinov2"])
    assert expected is not None
    assert (row["delta_low"], row["delta_high"]) == (expected.low, expected.high)
    assert row["delta_low"] > 0
    assert row["interval_method"] == METHOD
    assert {"observational", "one_seed", "over_images"} <= set(row["flags"])
    assert row["p_value"] is None
    assert not supported(row)
    assert rows["dinov2"]["delta_low"] is None
    # One trained seed has no such interval: what is asked there is what further runs would show.
    trained = [Trial({REGISTERS: count}, 0, {TOP1: float(own.mean())}) for count, own in enumerate(right.values())]
    folder = publish(tmp_path / "t", trained, baseline={REGISTERS: 0}, primary=[TOP1])
    for trial, own in zip(trained, right.values(), strict=True):
        columns = {"metric": [TOP1] * 500, "index": np.arange(500), "value": own.astype(float)}
        pq.write_table(pa.table(columns), folder / "trials" / trial.trial_id / "per_image.parquet")
    assert all(row["delta_low"] is None for row in evaluate(collect(folder)).rows)
