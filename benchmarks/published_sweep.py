"""A finished sweep of any size that nobody has run: as its trials publish it, and the same in MLflow's SQLite store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.schemas import METRICS, TOKEN_NORMS
from orchestrator.tracking_records import filter_key, params
from trainers.config import resolve

REGISTERS, RATE = "model.num_registers", "optim.lr"
SEEDS = 5  # trials of a cell
OUTLIERS, TOP1 = "tokens/last/outlier_fraction", "test/linear/top1"
LAYERS, TOKENS = 13, ("cls", "patch", "register_0")  # of token_norms: 12 blocks and what enters them
BINS = 190  # occupied ones of a histogram; trials of quickstart.yaml have as many on average
_COUNTS = (0, 1, 2, 4, 8, 16)
_STARTED_MS = 1_700_000_000_000


@dataclass(frozen=True)
class Size:
    """How many trials there are, and metrics and steps of each; whether trials have token norms too."""

    trials: int
    metrics: int
    steps: int
    norms: bool = True

    @property
    def names(self) -> list[str]:
        """The names of the metrics, in rising order."""
        return sorted([OUTLIERS, TOP1, *(f"val/metric_{number:02d}" for number in range(self.metrics - 2))])


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep."""

    trial_id: str
    cell: Mapping[str, Any]
    seed: int
    config: Mapping[str, Any]  # resolved


def trials(size: Size) -> Iterator[Trial]:
    """Cells of numbers of registers × learning rates, with five seeds each."""
    config = resolve({"method": "deit3", "preset": "short", "model": {"size": "nano"}}).model_dump(mode="json")
    for number in range(size.trials):
        place, seed = divmod(number, SEEDS)
        rate, count = divmod(place, len(_COUNTS))
        cell = {REGISTERS: _COUNTS[count], RATE: round(1e-4 * (rate + 1), 6)}
        model, optim = {**config["model"], "num_registers": cell[REGISTERS]}, {**config["optim"], "lr": cell[RATE]}
        settings = {**config, "model": model, "optim": optim, "seed": seed}
        yield Trial(filter_key("trial", str(number))[:16], cell, seed, settings)


def values(size: Size, number: int) -> Any:
    """The values of the metrics of trial `number`, [steps, metrics]: the same on disk and in MLflow."""
    return np.random.default_rng(number).random((size.steps, size.metrics))


def write_folder(folder: Path, size: Size) -> Path:
    """The sweep as its trials publish it."""
    planned = list(trials(size))
    steps = np.repeat(np.arange(1, size.steps + 1) * 10, size.metrics)
    for number, trial in enumerate(planned):
        place = folder / "trials" / trial.trial_id
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(trial.config, indent=1))
        (place / "result.json").write_text(json.dumps(_result(trial, size), indent=1))
        columns = {"step": steps, "name": size.names * size.steps, "value": values(size, number).ravel()}
        schema = pa.schema([METRICS.field(name) for name in columns])
        pq.write_table(pa.table(columns, schema=schema), place / "metrics.parquet")
        if size.norms:
            norms = _norms(trial.trial_id, size.steps * 10, number)
            pq.write_table(norms, place / "token_norms.parquet")  # snappy, as trainers write it
    axes = {axis: list(dict.fromkeys(trial.cell[axis] for trial in planned)) for axis in (REGISTERS, RATE)}
    plan = {
        "sweep": folder.name,
        "question": "What do tables cost?",
        "axes": axes,
        "seeds": list(range(SEEDS)),
        "baseline": {REGISTERS: 0},
        "primary": [TOP1, OUTLIERS],
        "scheduler": None,
        "trials": [{"trial_id": t.trial_id, "cell": t.cell, "seed": t.seed} for t in planned],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    return folder


def write_store(database: Path, sweep: str, size: Size) -> str:
    """The sweep in a SQLite store whose schema MLflow makes; rows are inserted at once, as MLflow would take an hour.

    Returns:
        The tracking URI.
    """
    from mlflow import MlflowClient

    uri = f"sqlite:///{database}"
    client = MlflowClient(tracking_uri=uri)
    experiment = int(client.create_experiment(sweep, artifact_location=(database.parent / "artifacts").as_uri()))
    key = filter_key("storage", sweep)
    parent = client.create_run(
        str(experiment), tags={"role": "sweep", "sweep": sweep, "sweep_key": key, "storage": "storage"}
    )
    with closing(sqlite3.connect(database)) as store, store:
        store.execute("PRAGMA synchronous = OFF")
        indexes = store.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql NOT NULL").fetchall()
        ours = [(name, sql) for name, sql in indexes if name.startswith("index_metrics_")]
        for name, _ in ours:  # made at the end, which is faster
            store.execute(f"DROP INDEX {name}")
        for trial in trials(size):
            _insert(store, experiment, parent.info.run_id, key, trial, size)
        _insert_points(store, size)
        for _, sql in ours:
            store.execute(sql)
        store.execute("ANALYZE")
    return uri


def _insert(store: sqlite3.Connection, experiment: int, parent: str, key: str, trial: Trial, size: Size) -> None:
    run_id = filter_key("run", trial.trial_id)
    ends = (_STARTED_MS, _STARTED_MS + 60_000, "active", f"artifacts/{run_id}", experiment)
    store.execute(
        """INSERT INTO runs (run_uuid, name, user_id, source_type, status, start_time, end_time, lifecycle_stage,
            artifact_uri, experiment_id) VALUES (?, ?, 'nobody', 'LOCAL', 'FINISHED', ?, ?, ?, ?, ?)""",
        (run_id, trial.trial_id, *ends),
    )
    tags = {"role": "trial", "sweep_key": key, "trial_id": trial.trial_id, "seed": str(trial.seed), "generation": "0"}
    tags |= {"cell": json.dumps(trial.cell, sort_keys=True), "mlflow.parentRunId": parent}
    result = _result(trial, size)
    tags |= {n: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for n, v in result.items() if v is not None}
    for table, texts in (("tags", tags), ("params", params(trial.config)[0])):
        rows = [(name, text, run_id) for name, text in texts.items() if name != "started"]
        store.executemany(f"INSERT INTO {table} (key, value, run_uuid) VALUES (?, ?, ?)", rows)


def _insert_points(store: sqlite3.Connection, size: Size) -> None:
    """All points in the order of MLflow's primary key, which fills its index from one end: minutes less."""
    drawn = np.stack([values(size, number) for number in range(size.trials)])  # [trials, steps, metrics]
    run_ids = [filter_key("run", trial.trial_id) for trial in trials(size)]
    order = sorted(range(size.trials), key=run_ids.__getitem__)
    ids = [run_ids[number] for number in order]
    columns = "(key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, ?, 0, ?)"
    for place, name in enumerate(size.names):
        for step in range(size.steps):
            at = _STARTED_MS + step, 10 * (step + 1)
            of_runs = drawn[order, step, place].tolist()
            points = [(name, value, *at, run_id) for value, run_id in zip(of_runs, ids, strict=True)]
            store.executemany(f"INSERT INTO metrics {columns}", points)
            if step == size.steps - 1:
                store.executemany(f"INSERT INTO latest_metrics {columns}", points)


def _result(trial: Trial, size: Size) -> dict[str, Any]:
    return {
        "trial_id": trial.trial_id,
        "status": "finished",
        "attempts": 1,
        "started": "2023-11-14T22:13:20+00:00",  # _STARTED_MS
        "seconds": 60.0,
        "gpu_seconds": 0.0,
        "images_per_second": 1000.0,
        "steps": size.steps * 10,
        "device": "cpu",
        "threads": 1,
        "git_commit": "0" * 40,
        "versions": {"torch": "2.14.1", "timm": "1.0.31"},
        "data_fingerprint": "0123456789abcdef",
        "error": None,
    }


def _norms(trial_id: str, step: int, number: int) -> pa.Table:
    """A row for each layer and kind of token, with histograms that no other trial has."""
    rng = np.random.default_rng([1, number])
    rows = LAYERS * len(TOKENS)
    bins = np.sort(rng.permuted(np.tile(np.arange(4 * BINS), (rows, 1)), axis=1)[:, :BINS]) + 1_500
    counts = rng.poisson(20, (rows, BINS)) + 1
    entries = pa.StructArray.from_arrays(
        [pa.array(bins.ravel(), pa.int32()), pa.array(counts.ravel())], ["bin", "count"]
    )
    histogram = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * BINS, pa.int32()), entries)
    keys: dict[str, Sequence[Any]] = {
        "trial_id": [trial_id] * rows,
        "step": [step] * rows,
        "layer": np.repeat(np.arange(LAYERS), len(TOKENS)).tolist(),
        "token": list(TOKENS) * LAYERS,
        "source": ["probe"] * rows,
        "weights": ["raw"] * rows,
        "count": counts.sum(axis=1).tolist(),
    }
    columns = [
        histogram
        if field.name == "histogram"
        else pa.array(keys[field.name] if field.name in keys else rng.random(rows), field.type)
        for field in TOKEN_NORMS
    ]
    return pa.table(columns, schema=TOKEN_NORMS)
