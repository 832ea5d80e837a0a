"""Collects a sweep from an MLflow store alone, for those who cannot read the storage that its trials publish to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis import cells
from analysis.frames import Frames, Mlflow, PlannedTrial, SweepPlan, redact, runs_table, short
from analysis.mlflow_store import Run, RunStore, connect
from analysis.plan_file import is_safe_id, parse_plan
from analysis.schemas import METRICS, RUNS, STATUSES, TOKEN_NORMS, TOKEN_STATISTICS, canonical
from analysis.trial_files import result_value

_KEY = re.compile(r"[0-9a-f]{32}")
_NOT_FINITE = re.compile(r"(?:^|; )(?P<name>[^;]+) = -?(?:nan|inf) at step (?P<step>-?\d+)")  # in a run's tag
_PLAN = "plan.json"
_OF_MACHINES = "system/"  # how a machine was used, which trials do not publish
_NOT_TAGS = ("trial_id", "sweep", "status", "mlflow_run_id", "started")  # of RUNS: known otherwise


def collect_mlflow(tracking_uri: str, sweep: str, storage: str | None = None) -> Frames:
    """What MLflow has of `sweep`: the runs and metrics that `collect` reads from the sweep's folder.

    MLflow holds finite values of metrics only, and neither token norms nor statistics of tokens: those tables are
    empty. Of a point that was logged twice the later one counts; a point past the end of a trial, from an attempt that
    got further than the one that was accepted, cannot be told apart. `Frames.folder` is a folder that is not there.

    Args:
        tracking_uri: http://HOST:PORT, https://…, sqlite:///FILE, or another database.
        storage: where several storages have a sweep of this name, the one that is meant, as its run says.

    Raises:
        ValueError: the store does not answer, or has no such sweep, or has several.
    """
    store = connect(tracking_uri)
    parent = _parent(store, tracking_uri, sweep, storage)
    found = _newest(store.find(sweep, "sweep_key", _key(parent, tracking_uri)))
    problems: list[str] = []
    plan = _plan(store, parent, found, sweep, problems)
    trials = sorted(plan.trials, key=lambda trial: trial.trial_id)
    runs = [found.get(trial.trial_id) for trial in trials]
    rows = [_row(trial, run, plan.sweep, problems) for trial, run in zip(trials, runs, strict=True)]
    begun = {run.run_id: row["trial_id"] for run, row in zip(runs, rows, strict=True) if run and _begun(row)}
    histories = store.histories([run for run in runs if run is not None and run.run_id in begun])
    replaced = [point for run in runs if run is not None for point in _not_finite(run)]
    settings = [_settings(trial, run, problems) for trial, run in zip(trials, runs, strict=True)]
    columns = {name: pa.array([row[name] for row in rows], RUNS.field(name).type) for name in RUNS.names}
    return Frames(
        folder=Path(f"mlflow-{parent.run_id}"),
        plan=plan,
        runs=runs_table(pa.table(columns, schema=RUNS), settings),
        metrics=metrics_table(histories, begun, replaced),
        token_norms=TOKEN_NORMS.empty_table(),
        token_statistics=TOKEN_STATISTICS.empty_table(),
        mlflow=Mlflow(redact(tracking_uri), parent.experiment_id, {t: run.run_id for t, run in found.items()}),
        problems=tuple(problems),
    )


def metrics_table(
    histories: pa.Table, trials: Mapping[str, str], replaced: Iterable[tuple[str, str, int]] = ()
) -> pa.Table:
    """The table `metrics` of histories (mlflow_store.HISTORIES) of runs; `trials` has the trial of each run.

    Sorted by trial, step and name; of several points of one step the latest counts, of one time the largest. None of
    those counts whose run, name and step are `replaced`, and none says how a machine was used.
    """
    histories = histories.filter(pc.invert(pc.starts_with(histories["name"], _OF_MACHINES)))
    for point in replaced:
        of_run, of_name, at_step = (
            pc.equal(histories[column], value) for column, value in zip(("run_id", "name", "step"), point, strict=True)
        )
        histories = histories.filter(pc.invert(pc.and_(pc.and_(of_run, of_name), at_step)))
    if not histories.num_rows:
        return METRICS.empty_table()
    runs, names = (_ranked(histories[name]) for name in ("run_id", "name"))
    order_of_trials = np.argsort(np.argsort([trials[run_id] for run_id in runs[0]]))
    trial, name = order_of_trials[runs[1]], names[1]
    step, time, value = (np.asarray(histories[name]) for name in ("step", "time_ms", "value"))
    order = np.lexsort((value, time, name, step, trial))
    key = np.stack([trial[order], step[order], name[order]])
    last = np.append((key[:, 1:] != key[:, :-1]).any(axis=0), True)
    kept = order[last]
    ids = pa.array(sorted(trials[run_id] for run_id in runs[0]), pa.string())
    columns = [ids.take(trial[kept]), pa.array(step[kept]), pa.array(names[0], pa.string()).take(name[kept])]
    return pa.table([*columns, pa.array(value[kept])], schema=METRICS)


def _ranked(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int64]]]:
    """The distinct texts of a column in rising order, and for each row which of them it has."""
    texts = pa.array(sorted(pc.unique(column).to_pylist()), pa.string())
    return texts.to_pylist(), np.asarray(pc.index_in(column, texts), np.int64)


def _parent(store: RunStore, uri: str, sweep: str, storage: str | None) -> Run:
    """The sweep's own run. Raises ValueError where there is none, or no telling which."""
    found = {run.tags.get("sweep_key"): run for run in reversed(store.find(sweep, "role", "sweep"))}
    parents = [run for run in found.values() if run.tags.get("sweep") == sweep]
    if not parents:
        raise ValueError(f"MLflow at {redact(uri)} has no sweep {sweep!r}")
    listed = ", ".join(sorted(repr(run.tags.get("storage", "")) for run in parents))
    chosen = [run for run in parents if storage in (None, run.tags.get("storage"))]
    if not chosen:
        raise ValueError(f"MLflow at {redact(uri)} has no sweep {sweep!r} of storage {storage!r}; there are {listed}")
    if len(chosen) > 1:
        raise ValueError(f"MLflow at {redact(uri)} has sweeps {sweep!r} of storages {listed}: say which is meant")
    return chosen[0]


def _key(parent: Run, uri: str) -> str:
    key = parent.tags.get("sweep_key", "")
    if not _KEY.fullmatch(key):
        raise ValueError(f"MLflow at {redact(uri)}: run {parent.run_id} has no key by which its trials are found")
    return key


def _newest(runs: Sequence[Run]) -> dict[str, Run]:
    """The run of each trial: that of its newest generation, as a trial that is made anew gets a new run."""
    found: dict[str, Run] = {}
    for run in runs:  # by start
        trial_id = run.tags.get("trial_id", "")
        if run.tags.get("role") != "trial" or not is_safe_id(trial_id):
            continue
        if trial_id not in found or _generation(found[trial_id]) < _generation(run):
            found[trial_id] = run
    return found


def _generation(run: Run) -> int:
    text = run.tags.get("generation", "0")
    return int(text) if text.isdecimal() else 0


def _plan(store: RunStore, parent: Run, runs: Mapping[str, Run], sweep: str, problems: list[str]) -> SweepPlan:
    """The plan that the sweep's run has as an artifact; where it cannot be had, what the trials' runs say of it."""
    try:
        return parse_plan(store.artifact(parent, _PLAN), _PLAN)
    except ValueError as error:
        problems.append(
            f"{_PLAN} cannot be had from MLflow, so that the question, the baseline, the primary metrics and trials "
            f"that have not begun are not known: {short(error)}"
        )
    trials = []
    for trial_id, run in sorted(runs.items()):
        try:
            cell, seed = dict(json.loads(run.tags["cell"])), int(run.tags["seed"])
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"trial {trial_id}: its run {run.run_id} does not say its cell and seed: {short(error)}")
            continue
        trials.append(PlannedTrial(trial_id, run.name or trial_id, cell, seed))
    names = sorted({axis for trial in trials for axis in trial.cell})
    values = {axis: {canonical(trial.cell.get(axis)): trial.cell.get(axis) for trial in trials} for axis in names}
    axes = {axis: tuple(sorted(found.values(), key=cells.order)) for axis, found in values.items()}
    return SweepPlan(sweep, "", axes, None, (), tuple(trials))


def _not_finite(run: Run) -> list[tuple[str, str, int]]:
    """Run, name and step of values that are not finite, which MLflow was not sent: what it has there is older."""
    if run.tags.get("attempts") in (None, "1"):
        return []
    found = _NOT_FINITE.finditer(run.tags.get("nonfinite_metrics", ""))
    return [(run.run_id, one["name"], int(one["step"])) for one in found]


def _begun(row: Mapping[str, Any]) -> bool:
    """Whether a trial is over, as only then its metrics are accepted."""
    return bool(row["status"] != "missing")


def _row(trial: PlannedTrial, run: Run | None, sweep: str, problems: list[str]) -> dict[str, Any]:
    """The row of `runs`; of status "missing" with nulls where MLflow knows of no end of the trial."""
    row: dict[str, Any] = dict.fromkeys(RUNS.names)
    row |= {"trial_id": trial.trial_id, "sweep": sweep, "status": "missing"}
    if run is None:
        return row
    row["mlflow_run_id"] = run.run_id
    if run.tags.get("status") not in STATUSES:  # it runs, or was interrupted
        return row
    row["status"] = run.tags["status"]
    row["started"] = datetime.fromtimestamp(run.start_ms // 1000, tz=UTC) if run.start_ms else None
    for field in RUNS:
        if field.name in run.tags and field.name not in _NOT_TAGS:
            try:
                row[field.name] = result_value(field, _value(field, run.tags[field.name]))
            except (TypeError, ValueError, OverflowError, pa.ArrowException) as error:
                problems.append(f"trial {trial.trial_id}: tag {field.name} is unreadable: {short(error)}")
    return row


def _value(field: pa.Field, tag: str) -> Any:
    """A tag as result.json has it. Raises ValueError."""
    return tag if pa.types.is_string(field.type) and field.name != "versions" else json.loads(tag)


def _settings(trial: PlannedTrial, run: Run | None, problems: list[str]) -> dict[str, Any]:
    """The settings of a trial from its run's params; what the plan knows of them where it has none.

    Params are text, JSON but for strings: `1` may be a number or a string. The plan knows which for the axes.
    """
    known = {**trial.cell, "seed": trial.seed}
    if run is None or not run.params or run.tags.get("status") not in STATUSES:
        return known
    cut = {name.strip() for name in run.tags.get("cut_params", "").split(",")} - {""}
    for name in sorted(cut):
        problems.append(f"trial {trial.trial_id}: setting {name} is too long for MLflow and is not known in full")
    settings: dict[str, Any] = {}
    for name, text in run.params.items():
        settings[name] = None if name in cut else _decoded(text)
        if name in known and isinstance(known[name], str) and known[name] == text:
            settings[name] = known[name]
    return settings


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
