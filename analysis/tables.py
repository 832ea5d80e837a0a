"""Frames to the ablation table: one row for each cell and metric; pure."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from analysis import discovery, statistics, thresholds
from analysis.cells import Cell, baseline_of, cells, is_baseline
from analysis.collect import IMPORTED, Frames, SweepPlan
from analysis.schemas import ABLATION, STATUSES, setting_column

NO_BASELINE = "none: no baseline"
IS_BASELINE = "none: baseline"

# Provenance that all finished trials of a cell, and of its baseline, should share: column of `runs`, name in flags.
_PROVENANCE = {
    "device": "device",
    "threads": "threads",
    "git_commit": "git_commit",
    "versions": "versions",
    "data_fingerprint": "data",
}
_WEIGHTS = "model.weights"  # a setting: the weights that are measured where none are trained
_SELECT_ON = "evaluation.linear.select_on"
_TRIAL = re.compile(r"[0-9a-f]{16}([@:].*)?")  # of these, those of a trial: ID[@STEP][:raw, ema or teacher]


@dataclass(frozen=True)
class Score:
    """What a finished trial reached: its value at its last step with that metric.

    NaN where it is not finite, or where a derived metric cannot be: then `missing` is the flag that says why.
    """

    step: int
    value: float
    missing: str | None = None


Scores = Mapping[str, Mapping[str, Score]]  # metric to trial_id to score


def last_scores(frames: Frames) -> Scores:
    """The scores of all finished trials, of every metric and of those that are derived from others here.

    A value that is null or not finite is kept as NaN.
    """
    statuses = frames.runs["status"].to_pylist()
    finished = {
        t for t, status in zip(frames.runs["trial_id"].to_pylist(), statuses, strict=True) if status == "finished"
    }
    # The table is sorted by trial and step, so the last row of a group is that of its last step.
    last = frames.metrics.group_by(["trial_id", "name"], use_threads=False).aggregate(
        [("step", "last"), ("value", "last")]
    )
    found: dict[str, dict[str, Score]] = {}
    columns = (last[name].to_pylist() for name in ("trial_id", "name", "step_last", "value_last"))
    for trial_id, name, step, value in zip(*columns, strict=True):
        if trial_id in finished:
            finite = value is not None and math.isfinite(value)
            found.setdefault(name, {})[trial_id] = Score(step, value if finite else math.nan)
    if fractions := thresholds.frozen(frames).fractions:
        found[thresholds.METRIC] = {
            trial_id: Score(step, math.nan, thresholds.FLAG) if fraction is None else Score(step, fraction)
            for trial_id, (step, fraction) in fractions.items()
        }
    return found | discovery.common(frames, found)


def ablation(frames: Frames, interval: str = statistics.PAIRED_T, scores: Scores | None = None) -> pa.Table:
    """The table `ablation`: the axes, then schemas.ABLATION, sorted by axes and metric.

    Every cell has a row for every metric that any trial has or that is declared primary. Only finished trials
    count in `n` and `mean`; a finished trial without a finite value of the metric counts in `n_missing`, so that
    n and the five other counts sum to the planned trials of the cell. `baseline_mean` and `delta` are over the
    seeds that cell and baseline share. `p_adjusted` is Holm's correction over one family, all cells × all declared
    primary metrics of the sweep; it is null for other metrics, which are exploratory.

    Args:
        interval: statistics.PAIRED_T, or statistics.POOLED_DUNNETT, which falls back to PAIRED_T where it cannot be.
        scores: `last_scores(frames)` where the caller has them already.
    """
    everything = cells(frames.plan)
    scores = last_scores(frames) if scores is None else scores
    metrics = sorted(scores.keys() | set(frames.plan.primary))
    states = _states(frames)
    baselines = {cell.key: baseline_of(cell, everything, frames.plan.baseline) for cell in everything}
    cell_flags = {
        cell.key: _cell_flags(cell, baselines[cell.key], states)
        | _adaptive(cell, frames.plan.first_seeds)
        | _censored(cell, frames.plan.scheduler, states)
        for cell in everything
    }
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for metric in metrics:
        by_trial = scores.get(metric, {})
        values = {cell.key: _by_seed(cell, by_trial) for cell in everything}
        differences = _differences(everything, baselines, values, frames.plan, interval)
        for cell in everything:
            row = _row(cell, metric, values[cell.key], differences[cell.key], states)
            row["primary"] = metric in frames.plan.primary
            own = _row_flags(cell, row, differences[cell.key], by_trial) | _chosen(cell, metric, states)
            row["flags"] = sorted(cell_flags[cell.key] | own)
            rows[cell.key, metric] = row
    ordered = [rows[cell.key, metric] for cell in everything for metric in metrics]
    tested = [row for row in ordered if row["primary"]]
    for row, adjusted in zip(tested, statistics.holm([row["p_value"] for row in tested]), strict=True):
        row["p_adjusted"] = adjusted
    return _table(list(frames.plan.axes), ordered)


def _states(frames: Frames) -> dict[str, dict[str, Any]]:
    """Status, provenance and, where there are any, the settings that flags are about, of every trial by trial_id."""
    settings = [name for name in (_WEIGHTS, _SELECT_ON, IMPORTED) if name in frames.runs.column_names]
    columns = frames.runs.select(["trial_id", "status", *_PROVENANCE, *settings])
    return {row["trial_id"]: row for row in columns.to_pylist()}


def _by_seed(cell: Cell, by_trial: Mapping[str, Score]) -> dict[int, float]:
    found = {trial.seed: by_trial[trial.trial_id].value for trial in cell.trials if trial.trial_id in by_trial}
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def _differences(
    everything: Sequence[Cell],
    baselines: Mapping[str, Cell | None],
    values: Mapping[str, Mapping[int, float]],
    plan: SweepPlan,
    interval: str,
) -> dict[str, statistics.Difference]:
    """The difference of every cell to its baseline cell, by cell key; nulls with a reason where there is none.

    Where cells got more seeds by the variance of the first ones, the interval is Stein's whatever `interval` says.
    """
    declared, first = plan.baseline, plan.first_seeds
    found: dict[str, statistics.Difference] = {}
    groups: dict[str, dict[str, Mapping[int, float]]] = {}
    for cell in everything:
        baseline = baselines[cell.key]
        if baseline is None or is_baseline(cell, declared):
            reason = IS_BASELINE if is_baseline(cell, declared) else NO_BASELINE
            found[cell.key] = statistics.Difference(0, None, None, None, None, reason, None)
        else:
            both = values[cell.key], values[baseline.key]
            found[cell.key] = statistics.paired_t(*both) if first is None else statistics.stein_t(*both, first)
            groups.setdefault(baseline.key, {baseline.key: values[baseline.key]})[cell.key] = values[cell.key]
    if interval == statistics.POOLED_DUNNETT and first is None:
        for baseline_key, group in groups.items():
            whole = {key: by_seed for key, by_seed in group.items() if by_seed.keys() == values[baseline_key].keys()}
            try:
                found |= statistics.pooled_dunnett(whole, baseline_key)
            except ValueError:  # nothing to pool: the paired differences stand
                continue
    return found


def _row(
    cell: Cell,
    metric: str,
    by_seed: Mapping[int, float],
    difference: statistics.Difference,
    states: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    counts = Counter(states[trial.trial_id]["status"] for trial in cell.trials)
    summary = statistics.summarise([by_seed[seed] for seed in sorted(by_seed)])
    return {
        **cell.values,
        "metric": metric,
        "n": summary.n,
        "n_missing": counts["missing"] + counts["finished"] - summary.n,
        **{f"n_{status}": counts[status] for status in STATUSES if status not in ("finished", "missing")},
        "mean": summary.mean,
        "std": summary.std,
        "n_paired": difference.n_paired,
        "baseline_mean": difference.baseline_mean,
        "delta": difference.delta,
        "delta_low": difference.low,
        "delta_high": difference.high,
        "interval_method": difference.method,
        "p_value": difference.p_value,
        "p_adjusted": None,
    }


def _row_flags(
    cell: Cell, row: Mapping[str, Any], difference: statistics.Difference, by_trial: Mapping[str, Score]
) -> set[str]:
    scores = [by_trial[trial.trial_id] for trial in cell.trials if trial.trial_id in by_trial]
    reasons = [score.missing for score in scores if score.missing is not None]
    flags = {f"{status}" for status in STATUSES[1:] if row[f"n_{status}"]} | set(reasons)
    if row["n_missing"] == len(reasons):
        flags.discard("missing")
    conditions = {
        "baseline": row["interval_method"] == IS_BASELINE,
        "mixed_steps": len({score.step for score in scores}) > 1,
        "no_baseline": row["interval_method"] == NO_BASELINE,
        "no_pair": difference.method == statistics.NO_PAIR and not reasons,
        "no_variance": difference.no_variance,
        "not_finite": any(math.isnan(score.value) and score.missing is None for score in scores),
        "one_seed": row["n"] == 1 or difference.n_paired == 1,
        "partly_paired": 0 < difference.n_paired < row["n"],
    }
    return flags | {flag for flag, holds in conditions.items() if holds}


def _chosen(cell: Cell, metric: str, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """`chosen_on_val`: linear heads were chosen by their scores on validation images, which are then optimistic."""
    linear = metric.startswith(("val/linear", "test/linear"))
    return (
        {"chosen_on_val"} if linear and any(states[t.trial_id].get(_SELECT_ON) == "val" for t in cell.trials) else set()
    )


def _cell_flags(cell: Cell, baseline: Cell | None, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Flags of all rows of a cell.

    `mixed_X`: its finished trials differ in X; `baseline_other_X`: they differ in it from the baseline's;
    `observational`: its weights were not trained here, but named, and by no trial's id; `imported`: results of some of
    its trials come from other tools.
    """
    weights = {states[trial.trial_id].get(_WEIGHTS) for trial in cell.trials}
    named = any(name is not None and not _TRIAL.fullmatch(name) for name in weights)
    flags: set[str] = {"observational"} if named else set()
    flags |= {"imported"} if any(states[trial.trial_id].get(IMPORTED) for trial in cell.trials) else set()
    for column, name in _PROVENANCE.items():
        own = _finished(cell, column, states)
        if len(own) > 1:
            flags.add(f"mixed_{name}")
        elif baseline is not None and len(_finished(baseline, column, states) | own) > 1 and own:
            other_data = name == "data" and any(axis.startswith("data.") for axis in _changed(cell, baseline))
            flags |= set() if other_data else {f"baseline_other_{name}"}
    return flags


def _adaptive(cell: Cell, first_seeds: Sequence[int] | None) -> set[str]:
    """`adaptive`: the cell got more seeds than the first ones, whose variance decided how many."""
    return {"adaptive"} if first_seeds is not None and any(t.seed not in first_seeds for t in cell.trials) else set()


def _censored(cell: Cell, scheduler: str | None, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """`censored`: a scheduler stopped some of the cell's trials by their scores, so those that finished are no sample
    of all.
    """
    pruned = any(states[trial.trial_id]["status"] == "pruned" for trial in cell.trials)
    return {"censored"} if scheduler is not None and pruned else set()


def _finished(cell: Cell, column: str, states: Mapping[str, Mapping[str, Any]]) -> set[Any]:
    rows = (states[trial.trial_id] for trial in cell.trials)
    return {row[column] for row in rows if row["status"] == "finished"}


def _changed(cell: Cell, other: Cell) -> list[str]:
    return [axis for axis, value in cell.values.items() if other.values[axis] != value]


def _table(axes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = {axis: setting_column([row[axis] for row in rows]) for axis in axes}
    for field in ABLATION:
        columns[field.name] = pa.array([row[field.name] for row in rows], type=field.type)
    return pa.table(columns)
