"""Columns and types of the published tables, and how a column is typed from a setting's values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

# What may stand in `runs.status`; a planned trial without an accepted result is "missing".
STATUSES = ("finished", "diverged", "pruned", "stopped", "failed", "missing")
LOST = ("missing", "failed", "diverged", "pruned", "stopped")  # why a planned trial has no score, as tables say it

RUNS = pa.schema(
    [
        ("trial_id", pa.string()),
        ("sweep", pa.string()),
        ("status", pa.string()),
        ("attempts", pa.int64()),
        ("mlflow_run_id", pa.string()),
        ("started", pa.timestamp("us", tz="UTC")),
        ("seconds", pa.float64()),
        ("gpu_seconds", pa.float64()),
        ("images_per_second", pa.float64()),
        ("steps", pa.int64()),
        ("device", pa.string()),
        ("threads", pa.int64()),
        ("git_commit", pa.string()),
        ("versions", pa.string()),  # JSON object, package to version, keys sorted
        ("data_fingerprint", pa.string()),
        ("error", pa.string()),  # "Type: message"; the traceback stays in result.json
    ]
)

METRICS = pa.schema([("trial_id", pa.string()), ("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])

_NORM_NUMBERS = (
    *("mean", "median", "p90", "p98", "p99", "p999", "max", "max_over_median", "kurtosis", "kurtosis_log"),
    *("outlier_fraction", "outlier_fraction_150", "otsu_threshold"),
)
TOKEN_NORMS = pa.schema(
    [
        ("trial_id", pa.string()),
        ("step", pa.int64()),
        ("layer", pa.int64()),
        ("token", pa.string()),
        ("source", pa.string()),
        ("weights", pa.string()),
        ("count", pa.int64()),
        *((name, pa.float64()) for name in _NORM_NUMBERS),
        ("histogram", pa.list_(pa.struct([("bin", pa.int32()), ("count", pa.int64())]))),
    ]
)

TOKEN_STATISTICS = pa.schema(
    [
        ("trial_id", pa.string()),
        ("step", pa.int64()),
        ("weights", pa.string()),
        ("name", pa.string()),
        ("layer", pa.int64()),
        ("head", pa.int64()),
        ("token", pa.string()),
        ("value", pa.float64()),
    ]
)

# After the columns of the axes.
ABLATION = pa.schema(
    [
        ("metric", pa.string()),
        ("primary", pa.bool_()),
        ("n", pa.int64()),
        ("n_missing", pa.int64()),
        ("n_failed", pa.int64()),
        ("n_diverged", pa.int64()),
        ("n_pruned", pa.int64()),
        ("n_stopped", pa.int64()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("n_paired", pa.int64()),
        ("baseline_mean", pa.float64()),
        ("delta", pa.float64()),
        ("delta_low", pa.float64()),
        ("delta_high", pa.float64()),
        ("interval_method", pa.string()),  # a name in statistics.py, or "none: …"
        ("p_value", pa.float64()),  # of this comparison alone
        ("p_adjusted", pa.float64()),  # primary: over the family of all such; else Benjamini–Hochberg, exploratory
        ("flags", pa.list_(pa.string())),
    ]
)

# After the columns of the axes: how a metric goes with an ordered axis (null in its own column), all else equal.
TRENDS = pa.schema(
    [
        ("axis", pa.string()),
        ("metric", pa.string()),
        ("primary", pa.bool_()),
        ("n_levels", pa.int64()),  # of the axis, that have scores
        ("n_seeds", pa.int64()),  # that have a score at every level
        ("page_l", pa.float64()),
        ("direction", pa.string()),  # "rises", "falls", or null
        ("page_p", pa.float64()),  # two-sided
        ("page_p_adjusted", pa.float64()),
        ("slope", pa.float64()),  # of the quadratic, in units of the metric a doubling of 1 + value, at its middle
        ("slope_low", pa.float64()),
        ("slope_high", pa.float64()),
        ("slope_p", pa.float64()),
        ("curvature", pa.float64()),  # factor of the square
        ("curvature_low", pa.float64()),
        ("curvature_high", pa.float64()),
        ("curvature_p", pa.float64()),
        ("curvature_p_adjusted", pa.float64()),
        ("optimum", pa.float64()),  # axis value of the extremum, null where none lies between the levels
        ("optimum_low", pa.float64()),
        ("optimum_high", pa.float64()),
        ("extremum", pa.string()),  # "highest" or "lowest" at the optimum
        ("flags", pa.list_(pa.string())),
    ]
)

# After the columns of the axes: whether a cell has no outliers, as an equivalence statement.
ELIMINATION = pa.schema(
    [
        ("metric", pa.string()),
        ("n", pa.int64()),
        ("mean", pa.float64()),
        ("upper_seeds", pa.float64()),  # one-sided 95 % bounds, over further seeds and over further images
        ("upper_images", pa.float64()),
        ("n_images", pa.int64()),
        ("upper", pa.float64()),  # the larger of the two
        ("limit", pa.float64()),
        ("below", pa.bool_()),
        ("smallest", pa.bool_()),  # the smallest count of registers that is below with all larger ones
        ("runs_above", pa.int64()),  # runs whose own fraction is not below the limit
        ("runs_above_upper", pa.float64()),  # one-sided 95 % bound of their share among further runs
        ("method", pa.string()),
        ("flags", pa.list_(pa.string())),
    ]
)

# After the columns of the axes: the fraction of patches above τ/median for every τ, bands simultaneous over all τ.
THRESHOLDS = pa.schema(
    [
        ("ratio", pa.float64()),
        ("n", pa.int64()),
        ("fraction", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n_paired", pa.int64()),
        ("delta", pa.float64()),
        ("delta_low", pa.float64()),
        ("delta_high", pa.float64()),
    ]
)

# After the columns of the axes: interquartile means over seeds.
AGGREGATES = pa.schema(
    [
        ("metric", pa.string()),
        ("n", pa.int64()),
        ("iqm", pa.float64()),
        ("n_paired", pa.int64()),
        ("iqm_delta", pa.float64()),  # of the differences to the baseline
        ("flags", pa.list_(pa.string())),
    ]
)

_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def setting_type(values: Iterable[object]) -> pa.DataType:
    """The column type that holds all `values` of a setting: bool, int64, float64 or string.

    Nulls fit every type; integers beside floats become floats; anything mixed or compound becomes JSON text.
    """
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64()
    if kinds and kinds <= {int, float}:
        return pa.float64()
    return pa.string()


def setting_column(values: Sequence[object]) -> pa.Array:
    """A setting's values as an array of `setting_type(values)`; shape [len(values)]."""
    kind = setting_type(values)
    if kind != pa.string():
        return pa.array(values, type=kind)
    texts = all(value is None or isinstance(value, str) for value in values)
    return pa.array([value if texts or value is None else canonical(value) for value in values], type=kind)


def canonical(value: Any) -> str:
    """JSON of `value` with sorted keys and no spaces: equal values have equal text."""
    return _JSON.encode(value)
