"""The baseline's frozen threshold on planted norms, and its rows of the ablation table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import thresholds
from analysis.cells import cells
from analysis.collect import Frames, collect
from analysis.norms import EvaluatedNorms, patches
from analysis.schemas import TOKEN_NORMS
from analysis.scores import last_scores
from analysis.tables import ablation
from analysis.thresholds import FLAG, METRIC, curve, frozen, threshold
from tests.analysis.fabricated import REGISTERS, TOP1, Trial, norm_row, patch_norms, publish, registers_sweep

BASELINE = {REGISTERS: 0}


def rows_of(frames: Frames, metric: str = METRIC) -> dict[object, dict[str, object]]:
    return {row[REGISTERS]: row for row in ablation(frames).to_pylist() if row["metric"] == metric}


def test_the_threshold_of_the_baseline_decides_for_all(tmp_path: Path) -> None:
    """5, 4, 3 and 2 % of patches at 10, 5, 2.5 and 1.25 times the bulk, whose spread is narrow: τ is 1.5 medians."""
    frames = collect(publish(tmp_path / "s", registers_sweep(), baseline=BASELINE))
    rows = rows_of(frames)
    assert {count: row["mean"] for count, row in rows.items()} == pytest.approx({0: 0.05, 1: 0.04, 2: 0.03, 4: 0.0})
    assert rows[4]["delta"] == pytest.approx(-0.05)
    assert rows[0]["interval_method"] == "none: baseline"
    assert {row["n"] for row in rows.values()} == {3}
    (ratio,) = set(frozen(frames).thresholds.values())
    assert ratio == pytest.approx(1.5, rel=1e-9)


def test_scale_moves_no_frozen_threshold(tmp_path: Path) -> None:
    """A seed or a cell whose norms are all 7 times as large counts the same patches."""
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1))
    folder = publish(tmp_path / "s", trials, baseline=BASELINE)
    before = frozen(collect(folder))
    for trial in (trials[0], trials[2]):
        norms = 7 * patch_norms(trial)
        row = norm_row(norms, trial_id=trial.trial_id, step=20, layer=4, token="patch")
        write(folder, trial, [row])
    after = frozen(collect(folder))
    assert after.thresholds == pytest.approx(before.thresholds, rel=1e-3)
    assert {t: f for t, (_, f) in after.fractions.items()} == pytest.approx(
        {t: f for t, (_, f) in before.fractions.items()}
    )


def write(folder: Path, trial: Trial, rows: list[dict[str, object]]) -> None:
    path = folder / "trials" / trial.trial_id / "token_norms.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=TOKEN_NORMS), path)


def test_a_wide_bulk_raises_the_threshold(tmp_path: Path) -> None:
    """Norms evenly from 10 to 30 have a MAD of 5: τ = 20 + 5 · 1.4826 · 5 = 57.065, 2.853 medians."""
    trials = [Trial({REGISTERS: count}, 0) for count in (0, 4)]
    folder = publish(tmp_path / "s", trials, baseline=BASELINE)
    bulk = np.linspace(10, 30, 20_000)
    for trial, outliers in ((trials[0], np.full(400, 80.0)), (trials[1], np.array([56.0] * 100 + [58.5] * 50))):
        norms = np.concatenate([bulk, outliers])
        write(folder, trial, [norm_row(norms, trial_id=trial.trial_id, step=5, layer=1, token="patch")])
    found = frozen(collect(folder))
    # The outliers shift the median of all 20,400 by 1 % of the bulk's width, to 20.2, and widen the MAD as little.
    assert found.thresholds['{"model.num_registers":4}'] == pytest.approx(2.853, rel=0.015)
    assert found.fractions["id-4-0"] == (5, pytest.approx(50 / 20_150, rel=0.02))


def test_a_baseline_without_outliers_has_no_threshold(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1))
    for trial in trials:
        trial.outliers = 2 if trial.cell[REGISTERS] == 0 else 100  # 0.5 % of 400 in the baseline
    frames = collect(publish(tmp_path / "s", trials, baseline=BASELINE))
    rows = rows_of(frames)
    for row in rows.values():
        assert (row["n"], row["mean"], row["delta"], row["n_missing"]) == (0, None, None, 2)
        assert FLAG in row["flags"]  # type: ignore[operator]
        assert not {"missing", "not_finite"} & set(row["flags"])  # type: ignore[call-overload]
    assert FLAG not in rows_of(frames, TOP1)[4]["flags"]  # type: ignore[operator]
    trials[0].outliers = 3  # 5 of 800 patches are more than 0.5 %
    rows = rows_of(collect(publish(tmp_path / "more", trials, baseline=BASELINE)))
    assert rows[0]["mean"] == pytest.approx((3 / 400 + 2 / 400) / 2)


def test_a_trial_that_is_missing_is_still_said(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1))
    for trial in trials:
        trial.outliers = 0
    trials[3].status = "missing"
    row = rows_of(collect(publish(tmp_path / "s", trials, baseline=BASELINE)))[4]
    assert (row["n_missing"], row["flags"]) == (2, ["missing", FLAG])


def test_cells_without_a_finished_baseline_have_no_threshold(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1))
    for trial in trials[:2]:
        trial.status = "failed"
    frames = collect(publish(tmp_path / "s", trials, baseline=BASELINE))
    assert rows_of(frames)[4]["flags"] == [FLAG]
    frames = collect(publish(tmp_path / "none", trials, baseline=None))
    assert METRIC not in last_scores(frames)


def test_each_method_has_the_threshold_of_its_own_baseline(tmp_path: Path) -> None:
    outliers = {"deit3": 20, "dino": 0}
    trials = [
        Trial({"method": method, REGISTERS: count}, 0, {TOP1: 0.5}, peak=100.0, outliers=outliers[method])
        for method in outliers
        for count in (0, 4)
    ]
    frames = collect(publish(tmp_path / "s", trials, baseline=BASELINE))
    found = {cell.values["method"]: frozen(frames).thresholds[cell.key] for cell in cells(frames.plan)}
    assert found == {"deit3": pytest.approx(1.5), "dino": None}


def test_evaluated_weights_last_step_and_last_layer_decide(tmp_path: Path) -> None:
    trial = Trial({REGISTERS: 0}, 0, peak=100.0, outliers=20)
    folder = publish(tmp_path / "s", [trial], baseline=BASELINE)
    keys = {"trial_id": trial.trial_id, "step": 20, "layer": 4, "token": "patch"}
    outliers, none = patch_norms(trial), np.linspace(18, 22, 400)
    rows = [
        norm_row(none, **keys | {"layer": 3}, weights="teacher"),
        norm_row(none, **keys | {"step": 10}, weights="teacher"),
        norm_row(outliers, **keys, weights="teacher"),
        norm_row(none, **keys, weights="raw"),
        norm_row(none, **keys, weights="teacher", source="train"),
        norm_row(none, **keys | {"token": "cls"}, weights="teacher"),
    ]
    write(folder, trial, rows)
    assert frozen(collect(folder)).fractions == {trial.trial_id: (20, pytest.approx(0.05))}
    write(folder, trial, [row for row in rows if row["weights"] != "teacher"])
    assert frozen(collect(folder)).fractions == {trial.trial_id: (20, None)}


def test_the_fraction_for_every_threshold(tmp_path: Path) -> None:
    frames = collect(publish(tmp_path / "s", registers_sweep(seeds=(0,)), baseline=BASELINE))
    norms = patches(EvaluatedNorms(frames).last_layer())
    ratios = np.array([1.0, 1.2, 4.9, 5.2, 9.8, 10.3])
    for trial_id, expected in {
        "id-0-0": [0.5, 0.05, 0.05, 0.05, 0.05, 0.0],
        "id-1-0": [0.5, 0.04, 0.04, 0.0, 0.0, 0.0],
    }.items():
        median = norms[trial_id].histogram.distribution().median() / 20  # outliers shift it a little
        assert curve(norms[trial_id], ratios) == pytest.approx(expected, abs=2e-3), median
    assert threshold(cells(frames.plan)[0], {}) is None
    assert thresholds.RATIOS[0] == 1.0
