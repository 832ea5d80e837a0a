"""Published files in, frames out: whatever is missing or broken stays a row and is said."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.collect import collect
from analysis.schemas import METRICS, RUNS, TOKEN_NORMS, TOKEN_STATISTICS, setting_column, setting_type
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep


def rows_by_id(table: pa.Table) -> dict[str, dict[str, object]]:
    return {row["trial_id"]: row for row in table.to_pylist()}


def test_a_whole_sweep(tmp_path: Path) -> None:
    trials = registers_sweep()
    frames = collect(publish(tmp_path / "whole", trials, baseline={REGISTERS: 0}))
    assert frames.problems == ()
    assert frames.plan.primary == (TOP1, OUTLIERS)
    assert frames.runs.schema.names[: len(RUNS)] == RUNS.names
    assert frames.metrics.schema == METRICS
    assert frames.token_norms.schema == TOKEN_NORMS
    assert frames.metrics.num_rows == 12 * 2 * 3  # trials, steps, names
    row = rows_by_id(frames.runs)["id-4-1"]
    assert row["started"] == datetime(2024, 5, 1, 12, tzinfo=UTC)
    assert row["versions"] == '{"timm":"1.0.31","torch":"2.14.1"}'
    assert (row["sweep"], row["mlflow_run_id"], row["steps"]) == ("whole", "run-id-4-1", 20)
    assert (row[REGISTERS], row["model.reg_init_std"], row["seed"]) == (4, 0.02, 1)
    assert row["evaluation.probes"] == '["linear","knn"]'
    keys = [(r["trial_id"], r["step"], r["name"]) for r in frames.metrics.to_pylist()]
    assert keys == sorted(keys)


def test_trials_outside_the_plan_are_left_out(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep())
    plan = json.loads((folder / "plan.json").read_text())
    plan["trials"] = [trial for trial in plan["trials"] if trial["cell"][REGISTERS] != 4]
    (folder / "plan.json").write_text(json.dumps(plan))
    frames = collect(folder)
    assert frames.runs.num_rows == 9
    assert not any("id-4" in trial_id for trial_id in frames.metrics["trial_id"].unique().to_pylist())


def test_missing_and_broken_pieces_are_rows_and_said(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1))
    trials[5].status = "missing"
    trials[3].result = {"threads": "many", "started": "yesterday", "images_per_second": None}
    trials[4].status = "failed"
    trials[4].result = {"error": {"type": "RuntimeError", "message": "out of memory", "traceback": "…"}, "steps": None}
    folder = publish(tmp_path / "s", trials) / "trials"
    (folder / "id-0-0" / "result.json").write_text("{broken")
    (folder / "id-0-1" / "metrics.parquet").write_bytes(b"PAR1 but not really")
    (folder / "id-0-1" / "config.json").unlink()
    (folder / "id-0-2" / "token_norms.parquet").unlink()
    (folder / "id-0-2" / "result.json").write_text('{"status": "perfect"}')
    frames = collect(folder.parent)
    runs = rows_by_id(frames.runs)
    assert len(runs) == 6
    assert {name: row["status"] for name, row in runs.items()} == {
        "id-0-0": "missing",
        "id-0-1": "finished",
        "id-0-2": "missing",
        "id-1-0": "finished",
        "id-1-1": "failed",
        "id-1-2": "missing",
    }
    assert runs["id-1-1"]["error"] == "RuntimeError: out of memory"
    assert runs["id-1-2"]["seconds"] is None
    assert (runs["id-1-0"]["threads"], runs["id-1-0"]["started"], runs["id-1-0"]["seconds"]) == (None, None, 36.0)
    assert (runs["id-0-1"][REGISTERS], runs["id-0-1"]["seed"]) == (0, 1)  # the plan still knows
    said = "\n".join(frames.problems)
    assert len(frames.problems) == 6
    for text in (
        *(
            "id-0-0: result.json is unreadable",
            "id-0-1: metrics.parquet is unreadable",
            "id-0-1: config.json is missing",
        ),
        *("'perfect'", "id-1-0: started in result.json", "id-1-0: threads in result.json"),
    ):
        assert text in said
    assert str(runs["id-0-0"]["error"]).startswith("result.json is unreadable")


def test_a_table_without_a_key_column_is_a_problem(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(0,), seeds=(0,)))
    pq.write_table(pa.table({"name": ["a"], "value": [1.0]}), folder / "trials" / "id-0-0" / "metrics.parquet")
    frames = collect(folder)
    assert frames.metrics.num_rows == 0
    assert frames.problems == ("trial id-0-0: metrics.parquet is unreadable: it has no column step",)


def test_absent_statistics_are_null(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(0,), seeds=(0,)))
    path = folder / "trials" / "id-0-0" / "token_norms.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["kurtosis", "histogram", "trial_id"]), path)
    frames = collect(folder)
    assert frames.problems == ()
    assert frames.token_norms.schema == TOKEN_NORMS
    assert frames.token_norms["kurtosis"].null_count == frames.token_norms.num_rows > 0
    assert set(frames.token_norms["trial_id"].to_pylist()) == {"id-0-0"}


def test_rows_are_sorted_however_a_file_has_them(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(counts=(4,), seeds=(0,)))
    whole = collect(folder)
    for name in ("metrics", "token_norms"):
        path = folder / "trials" / "id-4-0" / f"{name}.parquet"
        table = pq.read_table(path)
        pq.write_table(table.take(np.random.default_rng(0).permutation(table.num_rows)), path)
    shuffled = collect(folder)
    assert shuffled.metrics.equals(whole.metrics)
    assert shuffled.token_norms.equals(whole.token_norms)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no plan.json"),
        ("[1, 2]", "not a readable plan"),
        ('{"sweep": "s"}', "'trials' is missing"),
        (
            '{"sweep": "s", "axes": {}, "trials": [{"trial_id": "../../etc", "cell": {}, "seed": 0}]}',
            "not a trial's id",
        ),
        ('{"sweep": "s", "axes": {}, "trials": [], "baseline": {"nope": 1}}', "'nope' is not an axis"),
        ('{"sweep": "s", "axes": {}, "trials": [], "primary": "test/top1"}', "primary is not a list"),
        ('{"sweep": "s", "axes": {}, "trials": [], "outlier_limit": NaN}', "outlier_limit is nan"),
        (
            '{"sweep": "s", "axes": {}, "trials": [{"trial_id": "a", "cell": {}, "seed": 0}, '
            '{"trial_id": "a", "cell": {}, "seed": 1}]}',
            "'a' is there twice",
        ),
    ],
)
def test_without_a_plan_there_is_no_sweep(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        collect(tmp_path)


def test_a_password_in_the_tracking_address_is_dropped(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", [Trial({REGISTERS: 0}, 0)])
    (folder / "mlflow.json").write_text('{"tracking_uri": "https://me:secret@host:5000/x?key=secret", "runs": null}')
    mlflow = collect(folder).mlflow
    assert mlflow is not None
    assert mlflow.tracking_uri == "https://host:5000/x?key=***"


def test_settings_are_typed_from_their_values() -> None:
    assert setting_type([None, 1, 2]) == pa.int64()
    assert setting_type([1, 0.5, None]) == pa.float64()
    assert setting_type([True, None]) == pa.bool_()
    assert setting_type([None]) == setting_type(["a", None]) == pa.string()
    assert setting_column([True, 1]).to_pylist() == ["true", "1"]
    assert setting_column(["auto", 64, None]).to_pylist() == ['"auto"', "64", None]
    assert setting_column([[0.8, 1.0], None]).to_pylist() == ["[0.8,1.0]", None]


def test_statistics_of_tokens_are_collected_with_null_first(tmp_path: Path) -> None:
    trial = registers_sweep(counts=(1,), seeds=(0,), details=True)[0]
    folder = publish(tmp_path / "s", [trial])
    path = folder / "trials" / "id-1-0" / "token_statistics.parquet"
    table = pq.read_table(path)
    extra = {**table.slice(4, 1).to_pylist()[0], "layer": None, "value": 7.0}  # kurtosis of no layer
    shuffled = pa.concat_tables([table.slice(3), pa.Table.from_pylist([extra], table.schema), table.slice(0, 3)])
    pq.write_table(shuffled.drop_columns(["trial_id"]), path)
    frames = collect(folder)
    assert frames.problems == ()
    assert frames.token_statistics.schema == TOKEN_STATISTICS
    rows = frames.token_statistics.to_pylist()
    assert [(row["name"], row["layer"], row["head"], row["value"]) for row in rows] == [
        *(("attention/cls/outliers", layer, head, 0.1 * head) for layer in (1, 2) for head in (0, 1)),
        ("channels/kurtosis", None, None, 7.0),
        *(("channels/kurtosis", layer, None, 2.0 * layer) for layer in range(5)),
        ("location/row_cv", 4, None, 0.5),
    ]
    assert {row["trial_id"] for row in rows} == {"id-1-0"}


def test_trials_of_older_versions_have_no_statistics(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0,))
    trials[1].details = True
    frames = collect(publish(tmp_path / "s", trials))
    assert frames.problems == ()
    assert set(frames.token_statistics["trial_id"].to_pylist()) == {"id-1-0"}
    (tmp_path / "s" / "trials" / "id-1-0" / "token_statistics.parquet").write_bytes(b"PAR1 but not really")
    frames = collect(tmp_path / "s")
    assert frames.token_statistics.num_rows == 0
    assert [problem[:50] for problem in frames.problems] == ["trial id-1-0: token_statistics.parquet is unreadab"]
