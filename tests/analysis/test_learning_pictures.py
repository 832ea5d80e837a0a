"""Learning curves: which metrics and trials they show, and at which steps."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.schemas import METRICS
from tests.analysis.drawing import leave_out_rendering, named, pictures_of
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep

VAL = "val/linear/top1"


@pytest.fixture(autouse=True)
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_rendering(monkeypatch)


def write_metrics(folder: Path, trial: Trial, rows: list[tuple[int, str, float]]) -> None:
    columns = list(zip(*rows, strict=True))
    schema = pa.schema([METRICS.field(name) for name in ("step", "name", "value")])
    table = pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema)
    pq.write_table(table, folder / "trials" / trial.trial_id / "metrics.parquet")


def test_curves_are_means_of_finished_seeds_at_their_common_steps(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1, 2))
    trials[2].status = "diverged"
    folder = publish(tmp_path / "s", trials)
    for trial, steps in zip(trials[:3], ((5, 10, 20), (10, 20, 30), (10, 20)), strict=True):
        rows = [(step, VAL, step / 100 + 0.01 * trial.seed * (step > 10)) for step in steps]
        write_metrics(folder, trial, rows[::-1])  # in no order
    drawn = named(pictures_of(folder))["learning_curves"]
    # 0.1 and 0.1 at step 10, 0.2 and 0.21 at step 20; the third seed, 0.22, has not finished.
    assert "top-1 (linear probe, validation), %, first and last mean: 0 registers from 10.00 to 20.50" in (
        drawn.alternative
    )
    assert "(2 to 3 each)" in drawn.caption


def test_metrics_are_primary_ones_then_tokens_then_other_probes(tmp_path: Path) -> None:
    trial = Trial({REGISTERS: 0}, 0, dict.fromkeys((TOP1, OUTLIERS, "train/loss"), 0.5))
    trial.scores |= dict.fromkeys(("val/knn/top1", "val/knn/k10/top1", VAL, "tokens/last/max_over_median"), 0.5)
    words = named(pictures_of(publish(tmp_path / "s", [trial], primary=("test/knn/top1",))))
    parts = words["learning_curves"].alternative.split("; ")
    assert [part.split(", first")[0] for part in parts] == [
        "top-1 (k-NN, k = 20, validation), %",
        "outlier fraction (last layer), %",
        "maximum / median norm (last layer)",
        "top-1 (linear probe, validation), %",
    ]


def test_one_evaluation_or_values_that_are_not_finite_make_no_curve(tmp_path: Path) -> None:
    trial = Trial({REGISTERS: 0}, 0, {TOP1: 0.5})
    folder = publish(tmp_path / "s", [trial])
    write_metrics(folder, trial, [(10, VAL, 0.5), (20, VAL, float("nan")), (20, TOP1, 0.5)])
    assert "learning_curves" not in named(pictures_of(folder))


def test_each_series_has_its_own_and_cells_left_out_are_said(tmp_path: Path) -> None:
    trials = [
        Trial({"method": method, REGISTERS: count}, 0, {VAL: 0.1 * count, "train/loss": 1.0})
        for method in ("deit3", "dinov2")
        for count in range(9)
    ]
    drawn = named(pictures_of(publish(tmp_path / "s", trials)))
    assert drawn["learning_curves"].title == "Learning curves: deit3"
    assert drawn["learning_curves_2"].title == "Learning curves: dinov2"
    assert "The first 7 of 9 cells are drawn." in drawn["learning_curves_2"].caption
    assert "6 registers" in drawn["learning_curves"].alternative
    assert "7 registers" not in drawn["learning_curves"].alternative
    assert "The first 7 of 9 cells are drawn." in drawn["train_loss"].caption
