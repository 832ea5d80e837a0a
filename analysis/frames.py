"""What the analysis knows of a sweep, as typed values: its plan, where it is tracked, and the tables of its trials."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from analysis.schemas import RUNS, setting_column

OUTLIER_LIMIT = 0.005  # of patches: a fraction whose upper bound is below counts as no outliers
IMPORTED = "imported"  # a setting of results of other tools: that they are


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
    model_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # name to width and depth


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


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings, as JSON gives them, as one mapping of dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def runs_table(rows: pa.Table, settings: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`rows` of RUNS, one a trial, beside every setting under its dotted name, typed from its values."""
    columns = {name: rows[name].combine_chunks() for name in RUNS.names}
    for name in sorted({name for values in settings for name in values}):
        if name not in columns:
            columns[name] = setting_column([values.get(name) for values in settings])
    return pa.table(columns)


def short(error: BaseException) -> str:
    """The first line of an error's message, or its type where there is none."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def redact(text: str) -> str:
    """`text` without users and passwords in front of hosts, and without values of query parameters."""
    text = re.sub(r"(?<=://)[^/\s'\"]*@", "", text)
    return re.sub(r"([?&][^=&\s'\"]*=)[^&\s'\"]+", r"\1***", text)
