"""Frames to the ablation table: one row for each cell and metric; pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from analysis import flags, statistics
from analysis.cells import Cell, baseline_of, cells, is_baseline
from analysis.collect import Frames, SweepPlan
from analysis.schemas import ABLATION, STATUSES, setting_column
from analysis.scores import Score, Scores, last_scores


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
    states = flags.states_of(frames)
    baselines = {cell.key: baseline_of(cell, everything, frames.plan.baseline) for cell in everything}
    cell_flags = {
        cell.key: flags.of_cell(cell, baselines[cell.key], states)
        | flags.adaptive(cell, frames.plan.first_seeds)
        | flags.censored(cell, frames.plan.scheduler, states)
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
            own = flags.of_row(cell, row, differences[cell.key], by_trial) | flags.chosen(cell, metric, states)
            row["flags"] = sorted(cell_flags[cell.key] | own)
            rows[cell.key, metric] = row
    ordered = [rows[cell.key, metric] for cell in everything for metric in metrics]
    tested = [row for row in ordered if row["primary"]]
    for row, adjusted in zip(tested, statistics.holm([row["p_value"] for row in tested]), strict=True):
        row["p_adjusted"] = adjusted
    return _table(list(frames.plan.axes), ordered)


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
            reason = flags.IS_BASELINE if is_baseline(cell, declared) else flags.NO_BASELINE
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


def _table(axes: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = {axis: setting_column([row[axis] for row in rows]) for axis in axes}
    for field in ABLATION:
        columns[field.name] = pa.array([row[field.name] for row in rows], type=field.type)
    return pa.table(columns)
