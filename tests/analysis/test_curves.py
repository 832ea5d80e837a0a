"""Learning curves as data: means over finished trials, thinning, and what is left out of large sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.collect import collect
from analysis.curves import Curves, curves, thinned
from analysis.results import evaluate
from analysis.schemas import METRICS
from tests.analysis.fabricated import REGISTERS, TOP1, Trial, publish

STEPS = (0, 10, 20, 30)


def sweep(folder: Path, values: dict[tuple[int, int], dict[str, list[float]]], **status: str) -> Path:
    """A sweep with the curves of each (registers, seed), at STEPS; `status` of trials as r0s1="failed"."""
    trials = [Trial({REGISTERS: r}, s, {TOP1: 0.5}, status=status.get(f"r{r}s{s}", "finished")) for r, s in values]
    publish(folder, trials, baseline={REGISTERS: 0})
    for trial, by_name in zip(trials, values.values(), strict=True):
        rows = [(step, name, value) for name, own in by_name.items() for step, value in zip(STEPS, own, strict=False)]
        columns = dict(zip(("step", "name", "value"), zip(*rows, strict=True), strict=True))
        schema = pa.schema([METRICS.field(name) for name in columns])
        pq.write_table(pa.table(columns, schema=schema), folder / "trials" / trial.trial_id / "metrics.parquet")
    return folder


def curves_of(folder: Path, **limits: Any) -> Curves:
    results = evaluate(collect(folder))
    return curves(results.frames, results.cells, results.varying, **limits)


def drawn(found: Curves, name: str) -> dict[tuple[int, int | None], tuple[list[int], list[float]]]:
    (metric,) = [metric for metric in found.data["metrics"] if metric["name"] == name]
    return {(cell, seed): (found.data["steps"][at], values) for cell, seed, at, values in metric["curves"]}


def test_means_are_over_finished_trials_at_steps_that_all_have(tmp_path: Path) -> None:
    loss = {(0, 0): [4.0, 3.0, 2.0, 1.0], (0, 1): [2.0, 1.0, 0.0], (0, 2): [9.0, 9.0], (4, 0): [1.0]}
    folder = sweep(tmp_path / "s", {at: {"train/loss": own} for at, own in loss.items()}, r0s2="diverged")
    found = curves_of(folder)
    assert found.data["cells"] == ["0 registers", "4 registers"]
    assert drawn(found, "train/loss") == {
        (0, None): ([0, 10, 20], [3.0, 2.0, 1.0]),
        (0, 0): ([0, 10, 20, 30], [4.0, 3.0, 2.0, 1.0]),
        (0, 1): ([0, 10, 20], [2.0, 1.0, 0.0]),
        (0, 2): ([0, 10], [9.0, 9.0]),
        (1, None): ([0], [1.0]),
        (1, 0): ([0], [1.0]),
    }
    assert found.left_out == ()


def test_metrics_come_in_order_in_their_units_and_without_what_is_not_finite(tmp_path: Path) -> None:
    own = {
        "zebra": [1.0, 2.0],
        "val/knn/top1": [0.25, 0.5],
        "val/linear/top1": [0.1, 0.2, float("nan")],
        "train/loss": [1.0, float("inf"), 3.0],
        "once": [1.0],
    }
    found = curves_of(sweep(tmp_path / "s", {(0, 0): own, (4, 0): own}))
    names = [metric["name"] for metric in found.data["metrics"]]
    assert names == ["train/loss", "val/linear/top1", "val/knn/top1", "zebra"]
    assert drawn(found, "val/linear/top1")[0, 0] == ([0, 10], [10.0, 20.0])  # percent
    assert drawn(found, "train/loss")[0, 0] == ([0, 20], [1.0, 3.0])


def test_large_sweeps_lose_seeds_then_points_then_metrics(tmp_path: Path) -> None:
    own = {"train/loss": [1.0, 2.0, 3.0, 4.0], "zebra": [1.0, 2.0, 3.0, 4.0]}
    folder = sweep(tmp_path / "s", {(r, s): own for r in (0, 4) for s in (0, 1)})
    assert curves_of(folder, most=48).left_out == ()  # 2 metrics × 2 cells × (1 mean + 2 seeds) × 4 points
    means = curves_of(folder, most=47)
    assert means.left_out == ("curves of single seeds",)
    assert list(drawn(means, "zebra")) == [(0, None), (1, None)]
    one = curves_of(folder, most=15)
    assert one.left_out == ("curves of single seeds", "1 metrics with many curves")
    assert [metric["name"] for metric in one.data["metrics"]] == ["train/loss"]


def test_thinning_keeps_both_ends() -> None:
    steps, values = thinned((np.arange(101), np.arange(101) / 2), 5)
    assert (steps.tolist(), values.tolist()) == ([0, 25, 50, 75, 100], [0.0, 12.5, 25.0, 37.5, 50.0])
    assert thinned((np.arange(5), np.arange(5.0)), 5)[0].tolist() == [0, 1, 2, 3, 4]
