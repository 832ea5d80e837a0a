"""The table of trends: which cells are in a row, what is left out and said, corrections, and order of input."""

from __future__ import annotations

import random as stdlib_random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from analysis.frames import PlannedTrial, SweepPlan
from analysis.scores import Score
from analysis.trends import ordered, trends

REGISTERS = "model.num_registers"
TOP1 = "test/linear/top1"


def plan(
    cells: Sequence[dict[str, Any]], seeds: Sequence[int] = (0, 1, 2), primary: tuple[str, ...] = (), **more: Any
) -> SweepPlan:
    trials = [PlannedTrial(f"t{number}-{seed}", "", cell, seed) for number, cell in enumerate(cells) for seed in seeds]
    return SweepPlan("s", "", dict.fromkeys(cells[0], ()), None, primary, tuple(trials), **more)


def scores(values: dict[str, float]) -> dict[str, Score]:
    return {trial: Score(20, value) for trial, value in values.items()}


def rows_of(sweep: SweepPlan, by_metric: dict[str, dict[str, Score]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = trends(sweep, by_metric).to_pylist()
    return rows


COUNTS = [{REGISTERS: count} for count in (0, 1, 2, 4, 8, 16)]


def test_a_metric_with_an_optimum_and_one_that_falls() -> None:
    random = np.random.default_rng(0)
    peak, falling = {}, {}
    for number, count in enumerate((0, 1, 2, 4, 8, 16)):
        for seed in range(3):
            x = np.log2(1 + count)
            peak[f"t{number}-{seed}"] = 0.5 - 0.02 * (x - np.log2(5)) ** 2 + 0.001 * random.normal()
            falling[f"t{number}-{seed}"] = 1.0 / (1 + number) + 0.01 * seed
    found = {row["metric"]: row for row in rows_of(plan(COUNTS), {"a": scores(peak), "b": scores(falling)})}
    assert found["a"]["optimum"] == pytest.approx(4, rel=0.05)  # log2(1 + 4) is where the planted maximum lies
    assert found["a"]["optimum_low"] < 4 < found["a"]["optimum_high"]
    assert (found["a"]["extremum"], found["a"]["flags"]) == ("highest", [])
    # Ranks 6 5 4 3 2 1 in each of 3 seeds: L = 3 · (6 + 10 + 12 + 12 + 10 + 6), the smallest of 720³.
    assert (found["b"]["page_l"], found["b"]["direction"]) == (168.0, "falls")
    assert found["b"]["page_p"] == pytest.approx(2 / 720**3)
    assert (found["b"]["n_levels"], found["b"]["n_seeds"]) == (6, 3)
    assert found["b"]["slope_high"] < 0


def test_families_are_corrected_apart() -> None:
    """Holm over two primary metrics doubles the smaller p; of three others Benjamini and Hochberg take thirds."""
    random = np.random.default_rng(1)
    trials = [f"t{number}-{seed}" for number in range(6) for seed in range(3)]
    by_metric = {name: scores({trial: float(random.normal()) for trial in trials}) for name in "abcde"}
    found = {row["metric"]: row for row in rows_of(plan(COUNTS, primary=("a", "b")), by_metric)}
    for name in ("page_p", "curvature_p"):
        first, second = sorted((found["a"], found["b"]), key=lambda row: row[name])
        assert first[f"{name}_adjusted"] == pytest.approx(min(1, 2 * first[name]))
        assert second[f"{name}_adjusted"] == pytest.approx(max(second[name], first[f"{name}_adjusted"]))
        others = sorted((found[metric] for metric in "cde"), key=lambda row: row[name])
        assert others[2][f"{name}_adjusted"] == pytest.approx(others[2][name])
        assert others[0][f"{name}_adjusted"] == pytest.approx(
            min(3 * others[0][name], 1.5 * others[1][name], others[2][name])
        )


def test_settings_that_have_no_effect_are_the_first_level_of_every_row() -> None:
    std = "model.reg_init_std"
    cells = [{REGISTERS: 0, std: None}, *({REGISTERS: c, std: s} for c in (1, 4) for s in (0.02, 1e-6))]
    found = ordered(plan(cells))
    assert [(one.axis, one.others[std], [level for level, _ in one.levels]) for one in found] == [
        (REGISTERS, 1e-6, [0, 1, 4]),
        (REGISTERS, 0.02, [0, 1, 4]),
    ]
    assert ordered(plan([*cells, {REGISTERS: 0, std: 0.02}]))[1].levels[0][1].values[std] == 0.02  # an exact one first


def test_only_axes_of_numbers_with_three_levels_are_ordered() -> None:
    cells = [{"method": m, "flag": f, "two": n} for m in ("a", "b", "c") for f in (True, False) for n in (1, 2)]
    assert ordered(plan(cells)) == ()
    assert ordered(plan([{REGISTERS: None}, {REGISTERS: 1}, {REGISTERS: 2}])) == ()


def some(missing: Sequence[str]) -> dict[str, Score]:
    values = {
        f"t{number}-{seed}": number * 7 % 5 + seed + 0.1 * (number * seed % 3)
        for number in range(4)
        for seed in range(3)
    }
    return scores({trial: value for trial, value in values.items() if trial not in missing})


@pytest.mark.parametrize(
    ("missing", "levels", "seeds", "flags"),
    [
        (["t1-0"], 4, 2, ["incomplete_seeds"]),
        (["t1-0", "t1-1", "t1-2"], 3, 3, ["missing_level"]),
        (["t1-0", "t2-1"], 4, 1, ["incomplete_seeds", "one_seed"]),
        (["t1-0", "t2-1", "t3-2"], 4, 0, ["incomplete_seeds", "no_complete_seed"]),
        ([f"t{n}-{s}" for n in (0, 1) for s in range(3)], 2, 3, ["fewer_than_3_levels", "missing_level"]),
    ],
)
def test_what_is_missing_is_left_out_and_said(missing: list[str], levels: int, seeds: int, flags: list[str]) -> None:
    (row,) = rows_of(plan(COUNTS[:4]), {"a": some(missing)})
    assert (row["n_levels"], row["n_seeds"], row["flags"]) == (levels, seeds, flags)
    tested = levels >= 3 and seeds >= 2
    assert (row["page_p"] is not None, row["slope"] is not None) == (tested, tested)


def test_a_primary_metric_without_scores_and_one_that_is_constant() -> None:
    constant = scores({f"t{n}-{s}": 0.0 for n in range(6) for s in range(3)})
    found = {row["metric"]: row for row in rows_of(plan(COUNTS, primary=(TOP1,)), {"a": constant})}
    assert (found[TOP1]["n_levels"], found[TOP1]["flags"]) == (0, ["fewer_than_3_levels", "missing_level"])
    assert (found["a"]["page_p"], found["a"]["slope"], found["a"]["slope_p"]) == (None, 0.0, None)
    assert found["a"]["flags"] == ["no_variance"]


def test_values_that_are_not_finite_are_missing() -> None:
    with_nan = some([]) | {"t0-0": Score(20, float("nan"))}
    assert rows_of(plan(COUNTS[:4]), {"a": with_nan})[0]["n_seeds"] == 2


def test_seeds_that_were_added_by_variance_are_left_out() -> None:
    (row,) = rows_of(plan(COUNTS[:4], first_seeds=(0, 1)), {"a": some([])})
    assert (row["n_seeds"], row["flags"]) == (2, ["first_seeds"])


def test_levels_below_zero_have_a_trend_but_no_logarithm() -> None:
    (row,) = rows_of(plan([{"data.shift": shift} for shift in (-1.0, 0.0, 1.0)]), {"a": some([])})
    assert (row["flags"], row["slope"], row["page_p"] is None) == (["no_logarithm"], None, False)


def test_points_of_a_curve_have_no_row() -> None:
    assert rows_of(plan(COUNTS[:4]), {"test/object_discovery/bias_0.0/corloc": some([])}) == []


def test_the_order_of_trials_changes_nothing() -> None:
    sweep = plan([{"method": m, **cell} for m in ("dino", "deit3") for cell in COUNTS[:4]])
    random = np.random.default_rng(3)
    values = scores({trial.trial_id: float(random.normal()) for trial in sweep.trials})
    first = trends(sweep, {"a": values, "b": values})
    shuffled = list(sweep.trials)
    stdlib_random.Random(0).shuffle(shuffled)
    other = {trial.trial_id: values[trial.trial_id] for trial in shuffled}
    assert trends(replace(sweep, trials=tuple(shuffled)), {"b": other, "a": other}).equals(first)
    assert first.num_rows == 4
