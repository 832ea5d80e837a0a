"""Two sweeps cell by cell: what changed, and the differences of all metrics with their intervals; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import stdtr, stdtrit

from analysis import statistics
from analysis.aggregates import by_seed
from analysis.cells import Cell
from analysis.changes import Change, changes
from analysis.corrections import benjamini_hochberg, holm
from analysis.discovery import is_curve
from analysis.matching import Matched, Trials, match
from analysis.results import Results
from analysis.schemas import setting_column

WELCH_T = "welch_t"
SAME_TRIALS = "none: same trials"

# Settings that decide what a seed draws: where one differs, equal seeds share neither weights nor data.
_DRAWN = (
    *("method", "command", "preset", "imported", "data.train", "data.name", "data.seed", "data.decode_size"),
    *("model.size", "model.patch_size", "model.image_size", "model.weights", "optim.batch_size", "optim.steps"),
)
_ROUNDING = 1e-12  # of the values: a smaller spread is none
_OF_ONE_SWEEP = (  # flags about a cell and its own baseline, which is no part of a comparison of two sweeps
    *("baseline", "no_baseline", "no_pair", "no_variance", "one_seed", "partly_paired"),
)
# What says that a trial of one sweep is that of the other, adopted, and not a trial of equal configuration run again.
_SAME = ("status", "started", "seconds", "git_commit", "device")

# After the columns of the axes.
COMPARISON = pa.schema(
    [
        ("metric", pa.string()),
        ("primary", pa.bool_()),  # in one of the sweeps
        ("n_a", pa.int64()),
        ("n_b", pa.int64()),
        ("n_same", pa.int64()),  # scores that are of the same trial in both
        ("mean_a", pa.float64()),
        ("std_a", pa.float64()),
        ("mean_b", pa.float64()),
        ("std_b", pa.float64()),
        ("n_paired", pa.int64()),
        ("delta", pa.float64()),  # B − A
        ("delta_low", pa.float64()),
        ("delta_high", pa.float64()),
        ("interval_method", pa.string()),
        ("p_value", pa.float64()),
        # Holm's over cells × primary metrics, Benjamini and Hochberg's over the rest without points of CorLoc curves.
        ("p_adjusted", pa.float64()),
        ("flags", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Comparison:
    """Sweep B against sweep A.

    Attributes:
        table: the axes of `matched`, then COMPARISON: a row for each cell in both and metric that both have.
        metrics_a: metrics that only A has.
    """

    a: str
    b: str
    matched: Matched
    changes: tuple[Change, ...]
    table: pa.Table
    metrics_a: tuple[str, ...]
    metrics_b: tuple[str, ...]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `table`."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows


def compare(a: Results, b: Results, names: tuple[str, str] | None = None) -> Comparison:
    """B − A in every cell that both have, whether their trials have finished or not.

    Differences are paired by seed where both sweeps planned the same seeds for the cell and its trials differ in no
    setting or data that decides what a seed draws; else they are Welch's for independent samples. Neither assumes equal
    variances, both are valid, and pairing is the narrower one where a seed is shared. Trials that one sweep adopted
    from the other are the same numbers: such a cell has no test.

    Args:
        names: what A and B are called; by default by their sweeps' names.

    Raises:
        ValueError: no cell is in both, or an axis of one means nothing in the other.
    """
    trials = Trials(a), Trials(b)
    matched = match(*trials)
    primary = {*a.frames.plan.primary, *b.frames.plan.primary}
    metrics_a, metrics_b = {*a.scores, *a.frames.plan.primary}, {*b.scores, *b.frames.plan.primary}
    flags = _flags(a), _flags(b)
    rows = []
    for values, one, other in matched.both:
        same = _same_trials(*trials, one, other)
        unfair = _unfair(*trials, one, other)
        for metric in sorted(metrics_a & metrics_b):
            mine, theirs = by_seed(one, a.scores.get(metric, {})), by_seed(other, b.scores.get(metric, {}))
            row = _row(metric, mine, theirs, same, unfair)
            known = flags[0].get((one.key, metric), set()) | flags[1].get((other.key, metric), set())
            row["flags"] = sorted({*row["flags"], *known})
            rows.append({**values, **row, "metric": metric, "primary": metric in primary})
    for is_primary, correct in ((True, holm), (False, benjamini_hochberg)):
        family = [r for r in rows if r["primary"] == is_primary and (is_primary or not is_curve(r["metric"]))]
        for row, adjusted in zip(family, correct([row["p_value"] for row in family]), strict=True):
            row["p_adjusted"] = adjusted
    return Comparison(
        a=names[0] if names else a.frames.plan.sweep,
        b=names[1] if names else b.frames.plan.sweep,
        matched=matched,
        changes=changes(*trials, matched),
        table=_table(matched.axes, rows),
        metrics_a=tuple(sorted(metrics_a - metrics_b)),
        metrics_b=tuple(sorted(metrics_b - metrics_a)),
    )


def welch_t(a: Sequence[float], b: Sequence[float], confidence: float = statistics.CONFIDENCE) -> statistics.Difference:
    """Mean of `b` − mean of `a`, independent samples of unequal variances, with interval and two-sided p-value.

    Degrees of freedom are Welch's (1947, Biometrika 34). As scipy.stats.ttest_ind(equal_var=False), which warns of
    samples without variance and whose import takes longer than a comparison may. Two of each are needed.
    """
    first, second = statistics.summarise(a), statistics.summarise(b)
    if first.mean is None or second.mean is None:
        return statistics.Difference(0, first.mean, None, None, None, statistics.NO_PAIR, None)
    delta = second.mean - first.mean
    if first.std is None or second.std is None:
        return statistics.Difference(0, first.mean, delta, None, None, statistics.ONE_SEED, None)
    parts = first.std**2 / first.n, second.std**2 / second.n
    error = math.sqrt(sum(parts))
    if error <= _ROUNDING * max(1e-300, float(np.abs([*a, *b]).max())):
        return statistics.Difference(0, first.mean, delta, delta, delta, WELCH_T, None, no_variance=True)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (first.n - 1) + parts[1] ** 2 / (second.n - 1))
    reach = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    p_value = 2 * float(stdtr(freedom, -abs(delta) / error))
    return statistics.Difference(0, first.mean, delta, delta - reach, delta + reach, WELCH_T, p_value)


def _row(
    metric: str, a: Mapping[int, float], b: Mapping[int, float], same: set[int], unfair: str | None
) -> dict[str, Any]:
    """The numbers of one cell and metric.

    Args:
        a, b: scores by seed.
        same: seeds whose trial is the same in both.
        unfair: the flag that says why seeds do not pair; None where they do.
    """
    first, second = (statistics.summarise([values[seed] for seed in sorted(values)]) for values in (a, b))
    shared = [seed for seed in a.keys() & b.keys() if seed in same]
    flags = set() if unfair is None else {unfair}
    if shared:
        delta = None if first.mean is None or second.mean is None else second.mean - first.mean
        found = statistics.Difference(0, first.mean, delta, None, None, SAME_TRIALS, None)
    elif unfair is None:
        found = statistics.paired_t(b, a)
    else:
        found = welch_t([a[seed] for seed in sorted(a)], [b[seed] for seed in sorted(b)])
    return {
        "n_a": first.n,
        "n_b": second.n,
        "n_same": len(shared),
        "mean_a": first.mean,
        "std_a": first.std,
        "mean_b": second.mean,
        "std_b": second.std,
        "n_paired": found.n_paired,
        "delta": found.delta,
        "delta_low": found.low,
        "delta_high": found.high,
        "interval_method": found.method,
        "p_value": found.p_value,
        "p_adjusted": None,
        "flags": flags | ({"no_variance"} if found.no_variance else set()),
    }


def _same_trials(a: Trials, b: Trials, one: Cell, other: Cell) -> set[int]:
    """The seeds whose trial one sweep adopted from the other: equal id, and the same run of it."""
    theirs = {trial.trial_id for trial in other.trials}
    return {trial.seed for trial in one.trials if trial.trial_id in theirs and _is_same(a, b, trial.trial_id)}


def _is_same(a: Trials, b: Trials, trial_id: str) -> bool:
    first, second = a.row(trial_id), b.row(trial_id)
    return first["started"] is not None and all(first[name] == second[name] for name in _SAME)


def _unfair(a: Trials, b: Trials, one: Cell, other: Cell) -> str | None:
    """Why trials of equal seed do not pair, as a flag: other seeds, or other draws by the same seed."""
    if {trial.seed for trial in one.trials} != {trial.seed for trial in other.trials}:
        return "other_seeds"
    for name in (*_DRAWN, "data_fingerprint"):
        if name == "data_fingerprint" or (name in a.settings and name in b.settings):
            unknown = {"null"} if name == "data_fingerprint" else set()
            first, second = a.values(one, name) - unknown, b.values(other, name) - unknown
            if first and second and first != second:
                return "other_draws"
    return None


def _flags(results: Results) -> dict[tuple[str, str], set[str]]:
    """The flags of a sweep's own table by cell and metric, but for those about its own baseline."""
    return {
        (cell.key, metric): {
            flag for flag in row["flags"] if flag not in _OF_ONE_SWEEP and not flag.startswith("baseline_other_")
        }
        for cell, rows in zip(results.cells, results.by_cell, strict=True)
        for metric, row in rows.items()
    }


def _table(axes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = {axis: setting_column([row[axis] for row in rows]) for axis in axes}
    for field in COMPARISON:
        columns[field.name] = pa.array([row[field.name] for row in rows], type=field.type)
    return pa.table(columns)
