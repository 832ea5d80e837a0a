"""Bands over all thresholds: against the t distribution, by hand, by simulation, and the table that they give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis.cells import cells
from analysis.collect import collect
from analysis.frames import Frames
from analysis.norms import EvaluatedNorms, patches
from analysis.threshold_bands import CellBands, Range, bands, critical, path_length, ranges, thresholds_table
from benchmarks.bands import coverage
from tests.analysis.fabricated import OUTLIERS, REGISTERS, Trial, publish, registers_sweep

BASELINE = {REGISTERS: 0}


def found(frames: Frames) -> dict[object, CellBands]:
    norms = patches(EvaluatedNorms(frames).last_layer())
    return {cell.values[REGISTERS]: bands(frames.plan, norms)[cell.key] for cell in cells(frames.plan)}


@pytest.fixture
def frames(tmp_path: Path) -> Frames:
    """5, 4 and 2 % of outliers at 10, 5 and 1.25 medians; two seeds differ by a few patches of 400."""
    trials = registers_sweep(counts=(0, 1, 4), seeds=(0, 1, 2))
    for trial in trials:
        trial.outliers += trial.seed
    return collect(publish(tmp_path / "s", trials, baseline=BASELINE))


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_of_one_threshold_or_equal_ones_the_constant_is_students(seeds: int) -> None:
    student = stats.t.ppf(0.975, seeds - 1)
    assert critical(np.array([[1.0], [-1.0]]), seeds) == pytest.approx(student, rel=1e-9)
    assert critical(np.outer([1.0, -2.0, 1.0], np.linspace(1, 9, 50)), seeds) == pytest.approx(student, rel=1e-6)


def test_the_constant_by_hand() -> None:
    """A quarter turn and another one: κ = π. With 5 seeds Bonferroni over the 3 τ, t(4) at 0.05 / 6, is smaller."""
    turns = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    assert path_length(turns) == (pytest.approx(np.pi), 3)
    assert critical(turns, 5) == pytest.approx(stats.t.ppf(1 - 0.025 / 3, 4), rel=1e-9)
    # The same turns in 200 steps: now the number of excursions decides, 2 P(t > c) + (1 + c² / 4)^-1.5 = 0.05.
    angles = np.linspace(0, np.pi, 201)
    smooth = np.array([np.cos(angles), np.sin(angles)])
    found = critical(smooth, 5)
    assert 2 * stats.t.sf(found, 4) + (1 + found**2 / 4) ** -1.5 == pytest.approx(0.05, rel=1e-6)
    assert critical(3 * smooth, 5) == pytest.approx(found)  # scale does not matter
    assert critical(np.zeros((3, 50)), 5) == float("inf")


@pytest.mark.parametrize("seeds", [5, 10])
def test_the_constant_bounds_a_gaussian_process(seeds: int) -> None:
    """20,000 smooth Gaussian samples: some τ lies farther than c in at most 5 %, and not far fewer."""
    random = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 101)
    basis = np.array([np.cos(angles), np.sin(angles), np.cos(2 * angles), np.sin(2 * angles)])
    bound = critical(basis, seeds)
    curves = random.standard_normal((20_000, seeds, 4)) @ basis
    t = np.abs(curves.mean(axis=1)) / curves.std(axis=1, ddof=1) * np.sqrt(seeds)
    missed = (t.max(axis=1) > bound).mean()
    assert 0.03 < missed < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 20_000)


def test_fractions_and_differences_of_planted_outliers(frames: Frames) -> None:
    base, one = found(frames)[0], found(frames)[1]
    assert base.fraction is not None
    assert one.delta is not None
    assert (base.delta, base.fraction.n, one.delta.n) == (None, 3, 3)
    at = int(np.searchsorted(base.ratios, 7.0))  # above the outliers of one register, below those of none
    assert base.fraction.middle[at] == pytest.approx(21 / 400)
    assert one.delta.middle[at] == pytest.approx(-21 / 400)
    assert base.fraction.low is not None
    assert base.fraction.high is not None
    assert base.fraction.low[at] < 21 / 400 < base.fraction.high[at]
    assert (base.fraction.low >= 0).all()
    assert (base.fraction.high <= 1).all()


def test_where_the_conclusion_holds(tmp_path: Path) -> None:
    """Ten seeds; between 5 and 10 medians all outliers of the baseline lie above, and none of one register's."""
    trials = [
        Trial({REGISTERS: count}, seed, peak=200.0 / (1 + count), outliers=20 - 4 * count + seed % 3)
        for count in (0, 1)
        for seed in range(10)
    ]
    (holds,) = found(collect(publish(tmp_path / "s", trials, baseline=BASELINE)))[1].holds()
    assert holds.sign == -1
    assert holds.first == pytest.approx(5, rel=0.1)
    assert holds.last == pytest.approx(10, rel=0.1)


def test_three_seeds_do_not_suffice_for_so_few_patches(frames: Frames) -> None:
    assert found(frames)[1].holds() == ()


def test_ranges_are_stretches_of_one_sign() -> None:
    low, high = np.array([-1.0, 0.1, 0.2, -3, -2, -1, -1]), np.array([1.0, 1, 1, -1, -1, 0, 1])
    ratios = np.arange(1.0, 8.0)
    assert ranges(ratios, low, high) == (Range(2.0, 3.0, 1), Range(4.0, 5.0, -1))
    assert ranges(ratios, low - 9, high + 9) == ()


def test_one_seed_has_no_band(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1, 4), seeds=(0,))
    one = found(collect(publish(tmp_path / "s", trials, baseline=BASELINE)))[1]
    assert one.fraction is not None
    assert one.delta is not None
    assert (one.fraction.n, one.fraction.low, one.delta.high, one.holds()) == (1, None, None, ())


def test_the_table_has_a_row_for_each_cell_and_threshold(frames: Frames) -> None:
    table = thresholds_table(frames.plan, bands(frames.plan, patches(EvaluatedNorms(frames).last_layer())))
    assert table.num_rows == 3 * 200
    first, last = table.slice(0, 1).to_pylist()[0], table.slice(599, 1).to_pylist()[0]
    assert (first[REGISTERS], first["ratio"], first["n"], first["n_paired"], first["delta"]) == (0, 1.0, 3, 0, None)
    assert (last[REGISTERS], last["ratio"], last["n_paired"]) == (4, pytest.approx(30.0), 3)
    assert last["delta_low"] < 0 < last["delta_high"]  # no patch of any is so large: at most one patch's scatter


def test_a_sweep_without_norms_has_no_rows(tmp_path: Path) -> None:
    trials = [Trial({REGISTERS: count}, 0, {OUTLIERS: 0.0}, status="failed") for count in (0, 1)]
    frames = collect(publish(tmp_path / "s", trials, baseline=BASELINE))
    assert thresholds_table(frames.plan, bands(frames.plan, {})).num_rows == 0


def test_seeds_that_were_added_by_variance_are_left_out(frames: Frames) -> None:
    sweep = replace(frames, plan=replace(frames.plan, first_seeds=(0, 1)))
    band = found(sweep)[1].fraction
    assert band is not None
    assert band.n == 2


def test_the_order_of_trials_changes_nothing(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1, 4), seeds=(0, 1, 2))
    for trial in trials:
        trial.outliers += trial.seed
    tables = []
    for name, order in (("s", trials), ("t", list(reversed(trials)))):
        frames = collect(publish(tmp_path / name / "s", order, baseline=BASELINE))
        norms = patches(EvaluatedNorms(frames).last_layer())
        tables.append(thresholds_table(frames.plan, bands(frames.plan, norms)))
    assert tables[0].equals(tables[1])


@pytest.mark.slow
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_bands_cover_all_thresholds_together(seeds: int, skewed: bool) -> None:
    """Six cells of 5 to 0 % outliers, 4,096 patches a run: nominal 95 %, but for the error of 100 sweeps."""
    assert min(coverage(seeds, 100, skewed).values()) >= 0.9
