"""Reads the published files of a sweep into frames; what is missing or broken becomes nulls and a said problem."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis.schemas import METRICS, RUNS, STATUSES, TOKEN_NORMS, TOKEN_STATISTICS, canonical, setting_column

OUTLIER_LIMIT = 0.005  # of patches: a fraction whose upper bound is below counts as no outliers
IMPORTED = "imported"  # a setting of results of other tools: that they are

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class _File:
    """A table that a trial publishes: its columns, those by which it is sorted, whether every finished trial has it."""

    name: str
    schema: pa.Schema
    keys: tuple[str, ...]
    expected: bool = True


_FILES = (
    _File("metrics", METRICS, ("step", "name")),
    _File("token_norms", TOKEN_NORMS, ("step", "layer", "token", "source", "weights")),
    _File(  # trials of older versions have none
        "token_statistics", TOKEN_STATISTICS, ("step", "weights", "name", "layer", "head", "token"), expected=False
    ),
)


@dataclass(frozen=True)
class PlannedTrial:
    """One trial of the current plan: where it stands among the axes, and its seed."""

    trial_id: str
    name: str
    cell: Mapping[str, Any]
    seed: int
    training_flops: float | None = None  # of the whole trial, as planned; None where nothing is known


@dataclass(frozen=True)
class SweepPlan:
    """The current plan of a sweep; `baseline` is None where the sweep file declares none."""

    sweep: str
    question: str
    axes: Mapping[str, tuple[Any, ...]]
    baseline: Mapping[str, Any] | None
    primary: tuple[str, ...]
    trials: tuple[PlannedTrial, ...]
    first_seeds: tuple[int, ...] | None = None  # where cells got more seeds by the variance of these
    scheduler: str | None = None  # that stopped trials early
    match: str | None = None  # "steps" or "flops": what the sweep declares equal between compared cells
    score: Mapping[str, Any] | None = (
        None  # the declared rule by which a trial's scoring step is chosen; None: its last
    )
    outlier_limit: float = OUTLIER_LIMIT


@dataclass(frozen=True)
class Mlflow:
    """Where the runs of a sweep are tracked; the address carries no password."""

    tracking_uri: str
    experiment_id: str
    runs: Mapping[str, str]  # trial_id to run id


@dataclass(frozen=True)
class Frames:
    """What a sweep has published; its tables have the schemas of their names (RUNS with settings), and are sorted."""

    folder: Path
    plan: SweepPlan
    runs: pa.Table
    metrics: pa.Table
    token_norms: pa.Table
    token_statistics: pa.Table
    mlflow: Mlflow | None
    problems: tuple[str, ...]


def collect(folder: Path) -> Frames:
    """Reads `folder`, the published folder of one sweep. Trials that are not in the current plan are left out.

    Raises:
        ValueError: there is no readable plan, so it cannot be said what the sweep is.
    """
    plan = read_plan(folder)
    problems: list[str] = []
    mlflow = _read_mlflow(folder / "mlflow.json", problems)
    rows: list[dict[str, Any]] = []
    settings: list[dict[str, Any]] = []
    tables: dict[str, list[pa.Table]] = {file.name: [file.schema.empty_table()] for file in _FILES}
    for trial in sorted(plan.trials, key=lambda trial: trial.trial_id):
        place = folder / "trials" / trial.trial_id
        row = _read_result(place / "result.json", trial.trial_id, problems)
        row |= {"sweep": plan.sweep, "mlflow_run_id": mlflow.runs.get(trial.trial_id) if mlflow else None}
        rows.append(row)
        settings.append(_read_settings(place / "config.json", trial, row["status"], problems))
        if row["status"] == "missing":
            continue  # nothing of it has been accepted yet
        ours = settings[-1].get("command") is None and not settings[-1].get(IMPORTED)
        for file in _FILES:
            expected = file.expected and row["status"] == "finished" and (ours or file.name == "metrics")
            tables[file.name] += _read_table(place, file, trial.trial_id, expected, problems)
    return Frames(
        folder=folder,
        plan=plan,
        runs=_runs_table(rows, settings),
        **{name: pa.concat_tables(parts).combine_chunks() for name, parts in tables.items()},
        mlflow=mlflow,
        problems=tuple(problems),
    )


def read_plan(folder: Path) -> SweepPlan:
    """The current plan in `folder`/plan.json.

    Raises:
        ValueError: the file is missing, is not such a plan, or names a trial that would leave the folder.
    """
    path = folder / "plan.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a sweep's folder: it has no plan.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        trials = tuple(
            PlannedTrial(
                trial_id=str(t["trial_id"]),
                name=str(t.get("name") or t["trial_id"]),
                cell=dict(t["cell"]),
                seed=int(t["seed"]),
                training_flops=None if t.get("training_flops") is None else float(t["training_flops"]),
            )
            for t in raw["trials"]
        )
        plan = SweepPlan(
            sweep=str(raw["sweep"]),
            question=str(raw.get("question") or ""),
            axes={str(axis): tuple(values) for axis, values in raw["axes"].items()},
            baseline=None if raw.get("baseline") is None else dict(raw["baseline"]),
            primary=tuple(str(name) for name in raw.get("primary") or ()),
            trials=trials,
            first_seeds=_first_seeds(raw),
            scheduler=None if raw.get("scheduler") is None else str(raw["scheduler"]["name"]),
            match=None if raw.get("match") is None else str(raw["match"]),
            score=None if raw.get("score") is None else dict(raw["score"]),
            outlier_limit=float(raw.get("outlier_limit") or OUTLIER_LIMIT),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a readable plan: {_short(error)}") from error
    for trial in plan.trials:
        if not _SAFE_ID.fullmatch(trial.trial_id):
            raise ValueError(f"{path}: {trial.trial_id!r} is not a trial's id")
    return plan


def _first_seeds(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The seeds that every cell has, where a plan says that some got more by the variance of those."""
    return None if raw.get("more_seeds") is None else tuple(int(seed) for seed in raw["seeds"])


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises OSError or ValueError."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _read_mlflow(path: Path, problems: list[str]) -> Mlflow | None:
    if not path.exists():
        return None
    try:
        raw = _read_json(path)
        runs = {str(trial): str(run) for trial, run in dict(raw.get("runs") or {}).items()}
        return Mlflow(_without_user(str(raw.get("tracking_uri", ""))), str(raw.get("experiment_id", "")), runs)
    except (OSError, ValueError, TypeError) as error:
        problems.append(f"mlflow.json is unreadable: {_short(error)}")
        return None


def _without_user(uri: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _read_result(path: Path, trial_id: str, problems: list[str]) -> dict[str, Any]:
    """The row of `runs` for one trial; of status "missing" with nulls where there is no readable result."""
    row: dict[str, Any] = dict.fromkeys(RUNS.names) | {"trial_id": trial_id, "status": "missing"}
    if not path.exists():
        return row
    try:
        raw = _read_json(path)
        if raw.get("status") not in STATUSES:
            raise ValueError(f"its status is {raw.get('status')!r}; allowed: {', '.join(STATUSES)}")
    except (OSError, ValueError) as error:
        problems.append(f"trial {trial_id}: result.json is unreadable: {_short(error)}")
        return row | {"error": f"result.json is unreadable: {_short(error)}"}
    row["status"] = raw["status"]
    for field in RUNS:
        if field.name not in raw or field.name in ("trial_id", "status"):
            continue
        try:
            row[field.name] = _result_value(field, raw[field.name])
        except (TypeError, ValueError) as error:
            problems.append(f"trial {trial_id}: {field.name} in result.json is unreadable: {_short(error)}")
    return row


def _result_value(field: pa.Field, value: Any) -> Any:
    """`value` of a result as its column wants it. Raises TypeError or ValueError."""
    if value is None:
        return None
    if field.name == "started":
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    if field.name == "versions":
        return canonical(dict(value))
    if field.name == "error":
        return f"{value['type']}: {value['message']}" if isinstance(value, dict) else str(value)
    return pa.scalar(value, type=field.type).as_py()


def _read_settings(path: Path, trial: PlannedTrial, status: str, problems: list[str]) -> dict[str, Any]:
    """Flat settings of a trial; where the file is missing or broken, what the plan knows of them."""
    known = dict(trial.cell) | {"seed": trial.seed}
    if not path.exists():
        if status != "missing":
            problems.append(f"trial {trial.trial_id}: config.json is missing")
        return known
    try:
        return flatten(_read_json(path))
    except (OSError, ValueError) as error:
        problems.append(f"trial {trial.trial_id}: config.json is unreadable: {_short(error)}")
        return known


def _read_table(place: Path, file: _File, trial_id: str, expected: bool, problems: list[str]) -> list[pa.Table]:
    """The table of a trial with its id, in the file's schema, sorted; or nothing, and a problem that says why."""
    path = place / f"{file.name}.parquet"
    if not path.exists():
        if expected:
            problems.append(f"trial {trial_id}: it has finished, but {path.name} is missing")
        return []
    try:
        table = pq.ParquetFile(path).read()
        columns = []
        for field in file.schema:
            if field.name == "trial_id":
                columns.append(pa.repeat(pa.scalar(trial_id, pa.string()), table.num_rows))
            elif field.name in table.column_names:
                columns.append(table[field.name].cast(field.type))
            elif field.name in file.keys:
                raise ValueError(f"it has no column {field.name}")
            else:
                columns.append(pa.nulls(table.num_rows, field.type))
        return [_sorted(pa.table(columns, schema=file.schema), file.keys)]
    except (OSError, pa.ArrowException, ValueError) as error:
        problems.append(f"trial {trial_id}: {path.name} is unreadable: {_short(error)}")
        return []


def _sorted(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    if _is_sorted(table, keys):  # as published, which is cheaper to see than to sort again
        return table
    order = [(key, "ascending", "at_start") for key in keys]
    return table.take(pc.sort_indices(table, sort_keys=order))


def _is_sorted(table: pa.Table, keys: Sequence[str]) -> bool:
    """Whether each row's keys are not below the row's before it; null stands first."""
    rising = pa.scalar(True)  # of equal keys
    for key in reversed(keys):
        column = table[key].combine_chunks()
        if column.null_count:
            column = column.fill_null("" if pa.types.is_string(column.type) else -1)
        before, after = column[:-1], column[1:]
        rising = pc.or_(pc.less(before, after), pc.and_(pc.equal(before, after), rising))
    return bool(pc.all(rising, skip_nulls=False).as_py())


def _runs_table(rows: Sequence[Mapping[str, Any]], settings: Sequence[Mapping[str, Any]]) -> pa.Table:
    """One row a trial: the fixed columns, then every setting under its dotted name, typed from its values."""
    columns = {field.name: pa.array([row[field.name] for row in rows], type=field.type) for field in RUNS}
    for name in sorted({name for values in settings for name in values}):
        if name not in columns:
            columns[name] = setting_column([values.get(name) for values in settings])
    return pa.table(columns)


def _short(error: BaseException) -> str:
    """The first line of an error's message, or its type where there is none."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
