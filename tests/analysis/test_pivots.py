"""Pivots: where cells stand, what they say, and which may be bold; over sweeps whose numbers are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.collect import collect
from analysis.directions import HIGHER, LOWER, direction
from analysis.pivots import Pivot, entry_lines, legend, notes, pivot, tidy, usual_seeds
from analysis.results import Results, evaluate
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep

BASELINE = {REGISTERS: 0}
# Of two methods: top-1 of each cell, to which seeds add 0, 0.001 and 0.003 (and to the baseline 0, 0.002, 0.004).
MEANS = {("deit3", 0): 0.5, ("deit3", 4): 0.6, ("deit3", 8): 0.7, ("dino", 0): 0.6, ("dino", 4): 0.4, ("dino", 8): 0.5}


def two_methods(**changed: Any) -> list[Trial]:
    return [
        Trial({"method": method, REGISTERS: count}, seed, {TOP1: mean + (0.001, 0.002)[count == 0] * seed, **changed})
        for (method, count), mean in MEANS.items()
        for seed in (0, 1, 2)
    ]


def results_of(folder: Path, trials: list[Trial], **plan: Any) -> Results:
    return evaluate(collect(publish(folder, trials, **{"baseline": BASELINE, "primary": [TOP1], **plan})))


def bold(found: Pivot) -> set[tuple[Any, ...]]:
    return {
        (*found.row_keys[row], *found.column_keys[column])
        for (row, column), entry in found.entries.items()
        if entry.best
    }


def test_registers_stand_in_the_columns_and_the_rest_in_the_rows(tmp_path: Path) -> None:
    found = pivot(results_of(tmp_path / "s", two_methods()), TOP1)
    assert (found.rows, found.columns) == (("method",), (REGISTERS,))
    assert found.row_keys == (("deit3",), ("dino",))
    assert found.column_keys == ((0,), (4,), (8,))
    assert {at: round(entry.row["mean"], 3) for at, entry in found.entries.items()} == {
        (0, 0): 0.502,
        (0, 1): 0.601,
        (0, 2): 0.701,
        (1, 0): 0.602,
        (1, 1): 0.401,
        (1, 2): 0.501,
    }


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ([REGISTERS], None, ((REGISTERS,), ("method",))),
        (["num_registers"], ["method"], ((REGISTERS,), ("method",))),
        (None, ["method"], ((REGISTERS,), ("method",))),
        (["method", "num_registers"], None, (("method", REGISTERS), ())),
        (None, [REGISTERS, "method"], ((), (REGISTERS, "method"))),
    ],
)
def test_axes_are_chosen(tmp_path: Path, rows: Any, columns: Any, expected: Any) -> None:
    found = pivot(results_of(tmp_path / "s", two_methods()), TOP1, rows, columns)
    assert (found.rows, found.columns) == expected
    assert len(found.entries) == 6
    one = {(*found.row_keys[r], *found.column_keys[c]): entry.row["mean"] for (r, c), entry in found.entries.items()}
    assert len(one) == 6


@pytest.mark.parametrize(
    ("metric", "rows", "columns", "said"),
    [
        ("test/top1", None, None, f"s has no metric 'test/top1'; allowed: {TOP1}"),
        (TOP1, ["size"], None, f"'size' is not an axis; allowed: method, {REGISTERS}"),
        (TOP1, ["method"], ["method"], "method can stand only once"),
        (TOP1, ["method"], [], f"cells differ in {REGISTERS} too"),
    ],
)
def test_what_cannot_be_is_said_with_what_can(tmp_path: Path, metric: str, rows: Any, columns: Any, said: str) -> None:
    results = results_of(tmp_path / "s", two_methods())
    with pytest.raises(ValueError) as error:
        pivot(results, metric, rows, columns)
    assert str(error.value).startswith(said)


def test_bold_is_the_best_of_those_with_the_same_baseline_where_it_is_supported(tmp_path: Path) -> None:
    """DeiT-III gains with registers and DINO loses: the best of DINO is its baseline, which is not bold."""
    results = results_of(tmp_path / "s", two_methods())
    assert bold(pivot(results, TOP1)) == {("deit3", 8)}
    assert bold(pivot(results, TOP1, rows=[REGISTERS])) == {(8, "deit3")}


def test_every_baseline_has_a_best_of_its_own(tmp_path: Path) -> None:
    """DINO gains with 4 registers, and stays below all of DeiT-III."""
    trials = two_methods()
    for trial in trials:
        if trial.cell["method"] == "dino":
            trial.scores[TOP1] = {0: 0.2, 4: 0.3, 8: 0.25}[trial.cell[REGISTERS]] + 0.0011 * trial.seed
            trial.scores[TOP1] += 0.0005 * (trial.seed == 1 and trial.cell[REGISTERS] > 0)
    assert bold(pivot(results_of(tmp_path / "s", trials), TOP1)) == {("deit3", 8), ("dino", 4)}


def test_lower_is_better_for_outliers_and_nothing_is_for_other_metrics(tmp_path: Path) -> None:
    trials = registers_sweep()
    for trial in trials:  # a description that falls as the outliers do
        trial.scores["tokens/onset_layer"] = trial.scores[OUTLIERS]
    results = results_of(tmp_path / "s", trials, primary=[TOP1, OUTLIERS, "tokens/onset_layer"])
    assert bold(pivot(results, OUTLIERS)) == {(4,)}
    assert bold(pivot(results, TOP1)) == set()  # differs by noise alone
    assert bold(pivot(results, "tokens/onset_layer")) == set()
    assert "no direction of this metric" in legend(pivot(results, "tokens/onset_layer"))
    assert "no cell is supported" in legend(pivot(results, TOP1))


def test_an_exploratory_metric_has_no_bold(tmp_path: Path) -> None:
    found = pivot(results_of(tmp_path / "s", registers_sweep(), primary=[TOP1]), OUTLIERS)
    assert bold(found) == set()
    assert "not declared primary" in legend(found)


def test_the_best_mean_without_support_leaves_nothing_bold(tmp_path: Path) -> None:
    """8 registers have the best mean by one lucky seed; 4 are supported to be better than 0, but not the best."""
    trials = [t for t in two_methods() if t.cell["method"] == "deit3"]
    for trial in trials:
        if trial.cell[REGISTERS] == 8:
            trial.scores[TOP1] = (0.2, 0.3, 2.0)[trial.seed]
    found = pivot(results_of(tmp_path / "s", trials), TOP1)
    assert bold(found) == set()


def test_lost_trials_are_words(tmp_path: Path) -> None:
    trials = two_methods()
    lost = {
        ("deit3", 4, 0): "failed",
        ("deit3", 8, 0): "failed",
        ("deit3", 8, 1): "diverged",
        ("deit3", 8, 2): "failed",
    }
    for trial in trials:
        trial.status = lost.get((trial.cell["method"], trial.cell[REGISTERS], trial.seed), "finished")
        trial.status = "missing" if trial.cell == {"method": "dino", REGISTERS: 8} else trial.status
    found = pivot(results_of(tmp_path / "s", trials), TOP1)
    usual = usual_seeds(found)
    assert usual == 3
    said = {at: entry_lines(entry, "both", usual) for at, entry in found.entries.items()}
    assert said[0, 0] == ("50.20 ± 0.20", "baseline")
    assert said[0, 1][0] == "60.15 ± 0.07 (n = 2, 1 failed)"  # of 0.601 and 0.602
    assert said[0, 2] == ("2 failed, 1 diverged",)
    assert said[1, 2] == ("3 missing",)
    assert entry_lines(found.entries[0, 1], "spread", usual) == said[0, 1][:1]
    (difference,) = entry_lines(found.entries[0, 1], "difference", usual)
    assert difference.startswith("+9.85 [")  # 0.6015 − (0.502 + 0.504) / 2
    assert difference.endswith("] (n = 2, 1 failed)")
    assert entry_lines(found.entries[0, 0], "difference", usual) == ("baseline",)


def test_one_seed_has_no_spread_and_other_numbers_of_seeds_are_said(tmp_path: Path) -> None:
    trials = [t for t in two_methods() if t.cell["method"] == "deit3" and (t.cell[REGISTERS] != 8 or t.seed == 0)]
    found = pivot(results_of(tmp_path / "s", trials), TOP1)
    assert usual_seeds(found) == 3
    assert entry_lines(found.entries[0, 2], "spread", 3) == ("70.00 (n = 1)",)
    assert "over 3 seeds unless n is given" in legend(found)


def test_flags_are_numbered_and_those_of_all_cells_are_said_once(tmp_path: Path) -> None:
    trials = two_methods()
    for number, trial in enumerate(trials):
        trial.result = {"threads": trial.seed}
        if trial.cell == {"method": "dino", REGISTERS: 4}:
            trial.result["device"] = f"gpu {number}"
    found = pivot(results_of(tmp_path / "s", trials), TOP1)
    assert notes(found) == {"mixed_device": 1}
    said = legend(found)
    assert "All cells: trials ran with different numbers of threads." in said
    assert "(1) trials ran on different kinds of devices." in said
    marked = [at for at, entry in found.entries.items() if "(1)" in entry_lines(entry, "both", 3, notes(found))[0]]
    assert marked == [(1, 1)]


def test_the_legend_names_the_baseline_and_settings_of_all(tmp_path: Path) -> None:
    trials = [t for t in two_methods() if t.cell["method"] == "deit3"]
    found = pivot(results_of(tmp_path / "s", trials), TOP1)
    said = legend(found)
    assert said.startswith("All cells: deit3. Mean ± standard deviation over 3 seeds")
    assert "difference to num_registers = 0, paired by seed" in said
    assert "Δ" not in legend(found, "spread")
    none = pivot(results_of(tmp_path / "none", trials, baseline=None), TOP1)
    assert "No baseline is declared" in legend(none)
    assert bold(none) == set()


def test_tidy_numbers_are_those_of_the_ablation_table(tmp_path: Path) -> None:
    results = results_of(tmp_path / "s", two_methods())
    table = tidy(pivot(results, TOP1, rows=[REGISTERS]))
    rows = table.to_pylist()
    assert [(row[REGISTERS], row["method"]) for row in rows[:3]] == [(0, "deit3"), (0, "dino"), (4, "deit3")]
    assert [row["best"] for row in rows] == [False, False, False, False, True, False]
    own = {(row["method"], row[REGISTERS]): row for row in results.rows if row["metric"] == TOP1}
    for row in rows:
        assert {name: row[name] for name in own["dino", 4]} == own[row["method"], row[REGISTERS]]


def test_sizes_stand_from_the_smallest_and_excluded_cells_are_empty(tmp_path: Path) -> None:
    trials = [
        Trial({"model.size": size, REGISTERS: count}, 0, {TOP1: 0.5})
        for size, count in (("tiny", 0), ("tiny", 4), ("base", 0), ("nano", 0), ("nano", 4))
    ]
    found = pivot(results_of(tmp_path / "s", trials), TOP1)
    assert found.row_keys == (("nano",), ("tiny",), ("base",))
    assert (2, 1) not in found.entries


def test_directions() -> None:
    assert {direction(name) for name in (TOP1, "val/segmentation/miou", "test/object_discovery/corloc")} == {HIGHER}
    assert {direction(name) for name in ("test/depth/rmse", "train/loss", OUTLIERS, "tokens/last/max_over_median")} == {
        LOWER
    }
    assert {direction(name) for name in ("mine", "tokens/onset_layer", "locality/position/normal/top1")} == {None}
