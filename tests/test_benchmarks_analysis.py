"""The sweep that the benchmark of tables makes up is the same on disk and in MLflow, and is one that MLflow reads."""

from pathlib import Path

import pyarrow.compute as pc
import pytest

from analysis.collect import collect
from analysis.collect_mlflow import collect_mlflow
from benchmarks import analysis_tables
from benchmarks.published_sweep import BINS, LAYERS, TOKENS, Size, values, write_folder, write_store
from benchmarks.report import Settings

SMALL = Size(trials=30, metrics=3, steps=4)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_folder_and_store_hold_the_same_sweep(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = write_folder(tmp_path / "made", SMALL)
    uri = write_store(tmp_path / "mlflow.db", "made", SMALL)
    published, tracked = collect(folder), collect_mlflow(uri, "made")
    assert published.problems == ()
    assert published.metrics.num_rows == 30 * 3 * 4
    assert tracked.metrics.equals(published.metrics)
    for name in set(published.runs.column_names) - {"mlflow_run_id"}:
        assert tracked.runs[name].equals(published.runs[name]), name
    assert published.token_norms.num_rows == 30 * LAYERS * len(TOKENS)
    assert set(pc.list_value_length(published.token_norms["histogram"]).to_pylist()) == {BINS}
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("made").experiment_id], "tags.role = 'trial'")
    assert len(runs) == 30
    run = next(run for run in runs if run.data.tags["trial_id"] == published.plan.trials[7].trial_id)
    history = client.get_metric_history(run.info.run_id, SMALL.names[1])
    assert [(m.step, m.value) for m in history] == [(10 * (s + 1), values(SMALL, 7)[s, 1]) for s in range(4)]
    assert run.data.metrics[SMALL.names[1]] == values(SMALL, 7)[3, 1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_the_benchmark_says_how_many_runs_it_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("TRACKED", Size(40, 3, 4)), ("MANY", SMALL), ("SMALL", SMALL)):
        monkeypatch.setattr(analysis_tables, name, size)
    report = analysis_tables.measure(Settings(threads=1, pairs=1))
    assert report.counts["runs_sampled"] == 20
    first, *others = report.comparisons
    assert "20 runs, times 2" in first.sides[0]
    assert [str(comparison.goal) for comparison in (first, *others)] == [">= 20", "None", "<= 1", "<= 1"]
    assert others[-1].first[0] < others[-2].first[0]  # the second time is faster
