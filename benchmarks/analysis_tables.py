"""From what trials have published, or from MLflow, to a sweep's tables: against MLflow's own calls, and in seconds."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.published_sweep import Size, write_folder, write_store
from benchmarks.report import Comparison, Goal, Report, Settings

TRACKED = Size(trials=1_000, metrics=50, steps=200)  # as published records and in MLflow's SQLite store
MANY = Size(trials=10_000, metrics=10, steps=20)
SMALL = Size(trials=30, metrics=2, steps=2)
MAX_SECONDS, MAX_SECONDS_AGAIN = 10.0, 1.0
MOST_PAIRS = 3
SAMPLED_RUNS = 20  # whose histories are read by MLflow's client; all are with ANALYSIS_TABLES_ALL_RUNS=1


def measure(settings: Settings) -> Report:
    """Seconds of MLflow's client for all runs and histories : seconds of our tables; seconds of 10,000 trials' tables.

    "Cold" means that nothing is kept of an earlier analysis; the files themselves are in the system's cache.
    """
    pairs = min(settings.pairs, MOST_PAIRS)
    sampled = TRACKED.trials if os.environ.get("ANALYSIS_TABLES_ALL_RUNS") == "1" else SAMPLED_RUNS
    theirs, ours, from_mlflow = [], [], []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        _tables(write_folder(Path(name) / "small", SMALL))  # imports are not measured
        folder = write_folder(Path(name) / "tracked", TRACKED)
        uri = write_store(Path(name) / "mlflow.db", folder.name, TRACKED)
        for pair in range(pairs):
            ours.append(cold(folder))
            theirs.append(mlflow_seconds(uri, folder.name, sampled, pair))
            from_mlflow.append(collected_from_mlflow(uri, folder.name))
    first, again = [], []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = write_folder(Path(name) / "many", MANY)
        for _ in range(pairs):
            first.append(cold(folder))
            again.append(timed(lambda: _tables(folder)))
    size = f"{TRACKED.trials:,} runs × {TRACKED.metrics} metrics × {TRACKED.steps} steps"
    how = "measured" if sampled == TRACKED.trials else f"histories of {sampled} runs, times {TRACKED.trials // sampled}"
    side = f"mlflow.search_runs and MlflowClient.get_metric_history from SQLite: {how}"
    kept = f"tables of {MANY.trials:,} trials"
    return Report(
        [
            Comparison(
                "time to tables",
                (side, f"all tables from published records: {size}"),
                theirs,
                ours,
                "s",
                Goal(20, at_most=False),
            ),
            Comparison(
                "time from MLflow", (side, "collect_mlflow from the same SQLite store"), theirs, from_mlflow, "s", None
            ),
            Comparison("many trials", (f"{kept}, cold", "the goal"), first, [MAX_SECONDS] * pairs, "s", Goal(1.0)),
            Comparison(
                "many trials again",
                (f"{kept}, nothing changed", "the goal"),
                again,
                [MAX_SECONDS_AGAIN] * pairs,
                "s",
                Goal(1.0),
            ),
        ],
        {"runs_sampled": sampled, "histories": TRACKED.trials * TRACKED.metrics, "trials": MANY.trials},
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cold(folder: Path) -> float:
    """Seconds to all tables of the sweep in `folder`, without what an earlier analysis has left."""
    for left in (".analysis", "tables"):
        shutil.rmtree(folder / left, ignore_errors=True)
    return timed(lambda: _tables(folder))


def _tables(folder: Path) -> None:
    from analysis.run import tables

    tables(folder)


def mlflow_seconds(uri: str, sweep: str, sampled: int, seed: int) -> float:
    """Seconds of MLflow's calls for all runs and their histories; histories of `sampled` runs stand for all."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    runs = mlflow.search_runs(
        experiment_names=[sweep], filter_string="tags.role = 'trial'", max_results=100_000, output_format="list"
    )
    searched = timed(lambda: mlflow.search_runs(experiment_names=[sweep], max_results=100_000))
    chosen = np.random.default_rng(seed).choice(len(runs), sampled, replace=False)

    def histories() -> None:
        for place in chosen:
            for name in runs[place].data.metrics:
                client.get_metric_history(runs[place].info.run_id, name)

    return searched + timed(histories) * len(runs) / sampled


def collected_from_mlflow(uri: str, sweep: str) -> float:
    """Seconds to the frames of a sweep from MLflow alone."""
    from analysis.collect_mlflow import collect_mlflow

    return timed(lambda: collect_mlflow(uri, sweep))
