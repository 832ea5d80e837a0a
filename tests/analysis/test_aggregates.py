"""Interquartile means against scipy and by hand, and the table's rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from analysis.aggregates import aggregates, interquartile_mean
from analysis.frames import PlannedTrial, SweepPlan
from analysis.scores import Score

REGISTERS = "model.num_registers"


@pytest.mark.parametrize("n", [4, 5, 7, 8, 11, 40])
def test_it_is_scipys_trimmed_mean(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    assert interquartile_mean(values.tolist()) == pytest.approx(stats.trim_mean(values, 0.25), rel=1e-12)


def test_by_hand() -> None:
    assert interquartile_mean([100.0, 1.0, 3.0, -50.0]) == 2.0
    assert interquartile_mean([1.0, 2.0, 3.0]) is None


def test_rows_of_cells_and_differences() -> None:
    """Five seeds of which one went astray; the baseline lacks one: differences 1, 1, 1 and -9 have the middle 1."""
    trials = [PlannedTrial(f"{count}-{seed}", "", {REGISTERS: count}, seed) for count in (0, 4) for seed in range(5)]
    plan = SweepPlan("s", "", {REGISTERS: (0, 4)}, {REGISTERS: 0}, ("b",), tuple(trials))
    values = {"0-0": 1.0, "0-1": 2.0, "0-2": 3.0, "0-3": float("nan"), "0-4": 10.0}
    values |= {"4-0": 2.0, "4-1": 3.0, "4-2": 4.0, "4-3": 5.0, "4-4": 1.0}
    scores = {"a": {trial: Score(1, value) for trial, value in values.items()}}
    rows = aggregates(plan, scores).to_pylist()
    assert [(row[REGISTERS], row["metric"]) for row in rows] == [(0, "a"), (0, "b"), (4, "a"), (4, "b")]
    assert (rows[0]["n"], rows[0]["iqm"], rows[0]["n_paired"], rows[0]["iqm_delta"]) == (4, 2.5, 0, None)
    assert (rows[2]["n"], rows[2]["iqm"], rows[2]["n_paired"], rows[2]["iqm_delta"]) == (5, 3.0, 4, 1.0)
    assert (rows[1]["n"], rows[1]["iqm"], rows[1]["flags"]) == (0, None, [])
    del scores["a"]["4-0"], scores["a"]["4-1"]
    few = aggregates(plan, scores).to_pylist()[2]
    assert (few["n"], few["iqm"], few["flags"]) == (3, None, ["fewer_than_4_seeds"])
