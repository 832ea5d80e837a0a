"""Compact tables of measurements: which cells and metrics they have, and their texts."""

from __future__ import annotations

from pathlib import Path

from analysis.cells import cells
from analysis.collect import collect
from analysis.group_tables import MeasuredTable, cost_table, measured_tables
from analysis.results import evaluate
from tests.analysis.fabricated import REGISTERS, Trial, publish


def tables_of(folder: Path, trials: list[Trial]) -> dict[str, MeasuredTable]:
    frames = collect(publish(folder, trials, baseline={REGISTERS: 0}))
    found = measured_tables(evaluate(frames))
    return {table.title.split(":")[0]: table for table in found}


def test_cells_in_rows_and_metrics_in_columns(tmp_path: Path) -> None:
    top1 = "locality/position/normal/top1"
    trials = [
        Trial({REGISTERS: r}, s, {top1: 0.5 + 0.1 * s, "single_token/cls/top1": 0.8}) for r in (0, 4) for s in (0, 1)
    ]
    for trial in trials[2:]:
        del trial.scores["single_token/cls/top1"]
        trial.scores["single_token/register_0/top1"] = 0.25
    found = tables_of(tmp_path / "s", trials)
    assert list(found) == ["Local information", "Global information"]
    assert found["Local information"].row_headings == ("num_registers",)
    assert found["Local information"].columns == (("top-1 of the position probe, normal patches, %", top1),)
    assert found["Local information"].rows == ((("0",), ("55.00 ± 7.07",)), (("4",), ("55.00 ± 7.07",)))
    assert found["Global information"].rows == ((("0",), ("80.00 ± 0.00", "–")), (("4",), ("–", "25.00 ± 0.00")))


def test_interventions_have_a_row_for_what_was_done(tmp_path: Path) -> None:
    done = {
        "interventions/registers_zeroed/test/linear/top1": 0.3,
        "interventions/registers_zeroed/change/test/linear/top1": -0.2,
        "interventions/registers_zeroed/change/tokens/last/outlier_fraction": 0.01,
        "interventions/registers_mean/change/test/linear/top1": 0.005,
        "interventions/layer": 3.0,
    }
    trials = [Trial({REGISTERS: 0}, 0, {}), Trial({REGISTERS: 4}, 0, done)]
    table = tables_of(tmp_path / "s", trials)["Interventions"]
    assert table.row_headings == ("num_registers", "what is done")
    assert [label for label, _ in table.columns] == [
        "top-1 (linear probe, test), points",
        "outlier fraction (last layer), points",
    ]
    assert table.rows == ((("4", "registers mean"), ("+0.50", "–")), (("4", "registers zeroed"), ("−20.00", "+1.00")))


def test_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    scores = {f"attention/last/own_{number:02d}": 0.5 for number in range(15)}
    table = tables_of(tmp_path / "s", [Trial({REGISTERS: 0}, 0, scores)])["Attention and similarity"]
    assert (len(table.columns), len(table.rows[0][1]), table.left_out) == (12, 12, 3)


def test_nothing_measured_gives_no_table(tmp_path: Path) -> None:
    assert tables_of(tmp_path / "s", [Trial({REGISTERS: 0}, 0, {"test/linear/top1": 0.5})]) == {}


def test_recurrence_has_a_row_for_each_view(tmp_path: Path) -> None:
    scores = {
        "recurrence/shift/content": 0.5,
        "recurrence/shift/place": 0.25,
        "recurrence/shift/base_rate": 0.01,
        "recurrence/scale_1_5/antialias/content": 1.0,
    }
    table = tables_of(tmp_path / "s", [Trial({REGISTERS: 0}, 0, scores)])["Position or content"]
    assert [label for label, _ in table.columns] == [
        "outliers among all patches afterwards, %",
        "outliers that recur at the same content, %",
        "outliers that recur at the same place, %",
    ]
    assert table.rows == (
        (("scale 1.5, antialiased",), ("–", "100.00", "–")),
        (("shift",), ("1.00", "50.00", "25.00")),
    )


def test_the_cost_of_cells_is_what_their_trials_recorded(tmp_path: Path) -> None:
    trials = [
        Trial({REGISTERS: 0}, 0, result={"seconds": 5400.0, "gpu_seconds": 2700.0}),
        Trial({REGISTERS: 0}, 1, result={"seconds": 1800.0, "gpu_seconds": 900.0}),
        Trial({REGISTERS: 4}, 0, result={"seconds": 36.0, "gpu_seconds": None}),
        Trial({REGISTERS: 4}, 1, status="missing"),
    ]
    frames = collect(publish(tmp_path / "s", trials))
    table = cost_table(cells(frames.plan), frames.runs.to_pylist(), [REGISTERS])
    assert [label for label, _ in table.columns] == ["trials with a recorded cost", "trial hours", "GPU hours"]
    assert table.rows == ((("0",), ("2 of 2", "2", "1")), (("4",), ("1 of 2", "0.01", "–")))
