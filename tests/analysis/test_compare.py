"""Two sweeps cell by cell: which cells are the same, what changed, and numbers against scipy and by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from analysis import comparison_text, comparisons
from analysis.collect import collect
from analysis.compare import COMPARISON, SAME_TRIALS, WELCH_T, Comparison, compare, welch_t
from analysis.discovery import is_curve
from analysis.results import Results, evaluate
from analysis.statistics import NO_PAIR, ONE_SEED, PAIRED_T
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish

BASELINE = {REGISTERS: 0}
A = {0: (0.50, 0.52, 0.51), 4: (0.60, 0.63, 0.61)}  # top-1 by registers and seed
B = {0: (0.51, 0.52, 0.53), 4: (0.70, 0.72, 0.715)}
Values = dict[int, tuple[float, ...]]


def trials_of(values: Values, seeds: tuple[int, ...] = (0, 1, 2), **changed: Any) -> list[Trial]:
    return [
        Trial({REGISTERS: count}, seed, {TOP1: value}, **{key: dict(given) for key, given in changed.items()})
        for count, of_seeds in values.items()
        for seed, value in zip(seeds, of_seeds, strict=True)
    ]


def results_of(folder: Path, trials: list[Trial], **plan: Any) -> Results:
    return evaluate(collect(publish(folder, trials, **{"baseline": BASELINE, "primary": [TOP1], **plan})))


def later(number: int = 1) -> dict[str, Any]:
    """The result of a trial that ran at another time."""
    return {"started": f"2024-06-0{number}T12:00:00+00:00"}


def methods(comparison: Comparison) -> set[str]:
    return {row["interval_method"] for row in comparison.rows if row["metric"] == TOP1}


@pytest.fixture
def compared(tmp_path: Path) -> Callable[..., Comparison]:
    """Compares sweeps of the given trials."""

    def of(a: list[Trial], b: list[Trial], plan_a: Any = None, plan_b: Any = None) -> Comparison:
        shutil.rmtree(tmp_path, ignore_errors=True)
        return compare(results_of(tmp_path / "a", a, **(plan_a or {})), results_of(tmp_path / "b", b, **(plan_b or {})))

    return of


def test_differences_are_paired_by_seed_and_are_scipys(compared: Callable[..., Comparison]) -> None:
    found = compared(trials_of(A), trials_of(B, result=later()))
    assert found.table.column_names == [REGISTERS, *COMPARISON.names]
    rows = {(row[REGISTERS], row["metric"]): row for row in found.rows}
    for count in (0, 4):
        row, test = rows[count, TOP1], stats.ttest_rel(B[count], A[count])
        interval = test.confidence_interval(0.95)
        assert row["interval_method"] == PAIRED_T
        assert (row["n_a"], row["n_b"], row["n_paired"], row["n_same"], row["primary"]) == (3, 3, 3, 0, True)
        assert row["mean_a"] == pytest.approx(np.mean(A[count]))
        assert row["std_b"] == pytest.approx(np.std(B[count], ddof=1))
        assert row["delta"] == pytest.approx(np.mean(B[count]) - np.mean(A[count]))
        assert (row["delta_low"], row["delta_high"]) == pytest.approx((interval.low, interval.high))
        assert row["p_value"] == pytest.approx(test.pvalue)
    p_values = sorted(rows[count, TOP1]["p_value"] for count in (0, 4))
    adjusted = sorted(rows[count, TOP1]["p_adjusted"] for count in (0, 4))
    assert adjusted == pytest.approx([2 * p_values[0], max(2 * p_values[0], p_values[1])])


def test_declared_metrics_are_corrected_by_holm_and_others_by_benjamini_and_hochberg(
    compared: Callable[..., Comparison],
) -> None:
    """Of two equal p-values Holm doubles both, and Benjamini and Hochberg leave both."""
    twice = [trials_of({0: values[4], 4: values[4]}) for values in (A, B)]
    for trial in twice[1]:
        trial.result = later()
    for trial in (*twice[0], *twice[1]):
        trial.scores["test/knn/top1"] = trial.scores[TOP1]
        # A point of a curve belongs to no family: it would be counted beside the only exploratory metric.
        trial.scores["test/object_discovery/bias_0.0/corloc"] = 0.5 + 1e-3 * trial.seed * trial.scores[TOP1]
    rows = compared(*twice).rows
    p = stats.ttest_rel(B[4], A[4]).pvalue
    assert all((row["p_adjusted"] is None) == is_curve(row["metric"]) for row in rows if row["p_value"] is not None)
    found = {(row["metric"], row["p_adjusted"] / p) for row in rows if row["p_adjusted"] is not None}
    assert {(metric, round(times, 9)) for metric, times in found} == {(TOP1, 2.0), ("test/knn/top1", 1.0)}


def test_the_answer_says_what_is_supported(compared: Callable[..., Comparison]) -> None:
    found = compared(trials_of(A), trials_of(B, result=later()))
    said = comparison_text.answer(found)
    assert said.startswith("a and b have 2 cells in both: top-1 (linear probe, test) is higher in b by 9.83 points [")
    assert said.endswith("in (num_registers = 4); 1 other difference cannot be told from none.")
    nothing = compared(trials_of(A), trials_of(A, result=later()))
    assert "no difference of a primary metric between them is supported" in comparison_text.answer(nothing)


@pytest.mark.parametrize("b", [(0.7, 0.72, 0.715, 0.69), (0.61, 0.61)])
def test_welch_is_scipys(b: tuple[float, ...]) -> None:
    a = (0.6, 0.63, 0.61)
    found = welch_t(a, b)
    if np.ptp(b):
        test = stats.ttest_ind(b, a, equal_var=False)
        interval = test.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert found.p_value == pytest.approx(test.pvalue)
    else:  # of one sample's variance alone, with its degrees of freedom
        t = (np.mean(b) - np.mean(a)) / (np.std(a, ddof=1) / np.sqrt(3))
        assert found.p_value == pytest.approx(2 * stats.t.sf(abs(t), 2))
    assert found.delta == pytest.approx(np.mean(b) - np.mean(a))


def test_welch_without_variance_or_pairs() -> None:
    equal = welch_t([0.5, 0.5], [0.6, 0.6])
    assert (equal.no_variance, equal.p_value) == (True, None)
    assert (equal.low, equal.high) == pytest.approx((0.1, 0.1))
    one = welch_t([0.5], [0.6, 0.7])
    assert (one.method, one.low, one.delta) == (ONE_SEED, None, pytest.approx(0.15))
    assert welch_t([], [0.6]).method == NO_PAIR


def test_other_seeds_and_other_draws_do_not_pair(compared: Callable[..., Comparison]) -> None:
    found = compared(trials_of(A), trials_of(B, seeds=(3, 4, 5), result=later()))
    assert {(row["interval_method"], *row["flags"]) for row in found.rows if row["metric"] == TOP1} == {
        (WELCH_T, "other_seeds")
    }
    found = compared(
        trials_of(A, config={"optim.batch_size": 64}), trials_of(B, result=later(), config={"optim.batch_size": 32})
    )
    assert {(row["interval_method"], *row["flags"]) for row in found.rows if row["metric"] == TOP1} == {
        (WELCH_T, "other_draws")
    }
    other_data = later() | {"data_fingerprint": "f" * 16}
    assert methods(compared(trials_of(A), trials_of(B, result=other_data))) == {WELCH_T}
    another_rate = compared(trials_of(A), trials_of(B, result=later(), config={"optim.lr": 0.01}))
    assert methods(another_rate) == {PAIRED_T}


def test_adopted_trials_are_the_same_by_construction(compared: Callable[..., Comparison]) -> None:
    found = compared(trials_of(A), trials_of(A))
    assert {
        (row["interval_method"], row["n_same"], row["delta"], row["p_value"]) for row in found.rows if row["n_a"]
    } == {(SAME_TRIALS, 3, 0.0, None)}
    assert "of the same trials: their numbers are equal by construction" in comparison_text.answer(found)
    more = compared(trials_of(A), [*trials_of(A), Trial({REGISTERS: 4}, 3, {TOP1: 0.9})])
    (row,) = [row for row in more.rows if row[REGISTERS] == 4 and row["metric"] == TOP1]
    assert (row["interval_method"], row["n_same"], row["n_b"], row["p_value"]) == (SAME_TRIALS, 3, 4, None)
    assert "equal by construction" not in comparison_text.answer(more)
    assert "share trials: differences come from the others, and have no test" in comparison_text.answer(more)


def test_equal_trials_that_ran_twice_are_compared(compared: Callable[..., Comparison]) -> None:
    """Two storages may hold trials of the same id that are not the same run, say of another commit."""
    again = {"git_commit": "def456", "versions": {"torch": "3.0", "timm": "1.0.31", "new": "1"}} | later()
    found = compared(trials_of(A), trials_of(B, result=again))
    assert {row["n_same"] for row in found.rows} == {0}
    assert {(change.kind, change.name): (change.a, change.b) for change in found.changes} == {
        ("provenance", "git_commit"): (("abc123",), ("def456",)),
        ("provenance", "package new"): (("(no such setting)",), ("1",)),
        ("provenance", "package torch"): (("2.14.1",), ("3.0",)),
    }
    assert all(change.everywhere and change.cells == (0, 1) for change in found.changes)


def test_settings_that_differ_are_said_with_their_cells(compared: Callable[..., Comparison]) -> None:
    b = trials_of(B, result=later(), config={"optim.lr": 0.01})
    for trial in b:
        if trial.cell[REGISTERS] == 4:
            trial.config["model.drop_path"] = 0.1
    found = compared(trials_of(A), b)
    changes = {change.name: (change.a, change.b, change.cells, change.everywhere) for change in found.changes}
    assert changes == {
        "optim.lr": (("0.001",), ("0.01",), (0, 1), True),
        "model.drop_path": (("(no such setting)",), ("0.1",), (1,), False),
    }
    table = comparison_text.change_table(found)
    assert ("optim.lr", "all cells") in [names for names, _ in table.rows]


def test_an_axis_of_one_sweep_is_a_setting_of_the_other(compared: Callable[..., Comparison]) -> None:
    only = [Trial({"method": "deit3"}, seed, {TOP1: 0.5 + 0.01 * seed}, result=later()) for seed in (0, 1, 2)]
    found = compared(trials_of(A), only, plan_b={"baseline": None})
    assert found.matched.axes == (REGISTERS,)
    assert [(values, one.values) for values, one, _ in found.matched.both] == [({REGISTERS: 0}, {REGISTERS: 0})]
    assert [cell.values for cell in found.matched.only_a] == [{REGISTERS: 4}]
    assert found.matched.constant_b == {"method": "deit3"}
    notes = comparison_text.change_table(found).notes
    assert "Only b has the axis method, with one value: deit3." in notes
    assert "Only in a: (num_registers = 4)." in notes
    turned = compared(only, trials_of(A), plan_a={"baseline": None})
    assert [(values, other.values) for values, _, other in turned.matched.both] == [({REGISTERS: 0}, {REGISTERS: 0})]


@pytest.mark.parametrize(
    ("b", "said"),
    [
        (trials_of({1: (0.5, 0.5, 0.5)}), "no cell in common: model.num_registers is 0, 4 in a, 1 in b"),
        (
            [Trial({"model.new": new}, 0, {TOP1: 0.5}) for new in (1, 2)],
            "a and b cannot be compared: cells of b differ in model.new, which is neither an axis of a nor known",
        ),
    ],
)
def test_what_cannot_be_compared_is_said(compared: Callable[..., Comparison], b: list[Trial], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compared(trials_of(A), b, plan_b={"baseline": None})


def test_a_half_finished_sweep_is_compared_as_far_as_it_is(compared: Callable[..., Comparison]) -> None:
    b = trials_of(B, result=later())
    for trial in b:
        trial.status = "missing" if trial.cell[REGISTERS] == 4 or trial.seed == 2 else "finished"
    rows = {row[REGISTERS]: row for row in compared(trials_of(A), b).rows if row["metric"] == TOP1}
    assert (rows[0]["n_a"], rows[0]["n_b"], rows[0]["n_paired"], rows[0]["interval_method"]) == (3, 2, 2, PAIRED_T)
    assert rows[0]["delta"] == pytest.approx((0.01 + 0.0) / 2)  # of the seeds that both have
    assert (rows[4]["n_b"], rows[4]["mean_b"], rows[4]["delta"]) == (0, None, None)
    for trial in b:
        trial.status = "missing"
    said = comparison_text.answer(compared(trials_of(A), b))
    assert said.endswith("no primary metric has a score on both sides yet.")


def test_flags_of_either_sweep_and_metrics_of_one_are_kept(compared: Callable[..., Comparison]) -> None:
    a, b = trials_of(A), trials_of(B, result=later())
    a[0].result = {"device": "cuda"}
    for trial in b:
        trial.scores[OUTLIERS] = 0.1
    found = compared(a, b)
    flags = {row[REGISTERS]: row["flags"] for row in found.rows if row["metric"] == TOP1}
    assert flags == {0: ["mixed_device"], 4: []}
    assert OUTLIERS in found.metrics_b and found.metrics_a == ()
    assert "Metrics only in b: " in comparison_text.change_table(found).notes


def test_everything_is_written(compared: Callable[..., Comparison], tmp_path: Path) -> None:
    found = compared(trials_of(A), trials_of(B, result=later()))
    for kind in ("md", "csv", "json", "parquet"):
        assert comparisons.write(tmp_path / f"out.{kind}", found).is_file()
    assert pq.read_table(tmp_path / "out.parquet").equals(found.table)
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["answer"] == comparison_text.answer(found)
    assert [row["cell"] for row in document["rows"] if row["primary"]] == [{REGISTERS: 0}, {REGISTERS: 4}]
    assert document["rows"][0]["delta"] == found.rows[0]["delta"]
    text = (tmp_path / "out.md").read_text()
    assert "| 4 | 3 | 3 | 61.33 ± 1.53 | 71.17 ± 1.04 | **+9.83 " in text
    assert "No setting, commit, package, data or device differs." in text
    with pytest.raises(ValueError, match=r"allowed: \.md, \.csv, \.json, \.parquet"):
        comparisons.write(tmp_path / "out.doc", found)
    with pytest.raises(ValueError, match=f"do not both have nothing; allowed: {TOP1}"):
        comparisons.terminal_text(found, ["nothing"])
    assert "B − A [95 %]" in comparisons.terminal_text(found)


def test_the_order_of_trials_does_not_matter(tmp_path: Path) -> None:
    a, b = trials_of(A), trials_of(B, result=later())
    tables = [
        compare(results_of(tmp_path / name / "a", one), results_of(tmp_path / name / "b", other)).table
        for name, one, other in (("x", a, b), ("y", a[::-1], b[::-1]))
    ]
    assert tables[0].equals(tables[1])
