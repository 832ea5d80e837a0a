"""Interquartile means over the seeds of a cell, beside the mean where single runs go astray; pure.

Agarwal et al. (2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice") take the interquartile
mean over tasks × runs of normalised scores. Here it is taken over the seeds of one metric alone: top-1, mIoU and RMSE
share no scale, so that a mean over them would weigh each by the normalisation that somebody chose, and what registers
cost in one would hide what they bring in another. With fewer than four seeds nothing is trimmed, and there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from analysis.cells import Cell, cells, compared_with, is_baseline
from analysis.frames import SweepPlan
from analysis.schemas import AGGREGATES, setting_column
from analysis.scores import Score, Scores

LEAST = 4  # values: a quarter of fewer is none
TOO_FEW = "fewer_than_4_seeds"


def aggregates(plan: SweepPlan, scores: Scores) -> pa.Table:
    """The table `aggregates`: the axes, then schemas.AGGREGATES, sorted by axes and metric; a row a cell and metric.

    `iqm_delta` is the interquartile mean of the differences to the baseline over the seeds that both have.
    """
    everything = cells(plan)
    baselines = compared_with(everything, plan.baseline)
    metrics = sorted(scores.keys() | set(plan.primary))
    values = {metric: {cell.key: by_seed(cell, scores.get(metric, {})) for cell in everything} for metric in metrics}
    rows = []
    for cell in everything:
        baseline = None if is_baseline(cell, plan.baseline) else baselines[cell.key]
        for metric in metrics:
            own = values[metric][cell.key]
            theirs = {} if baseline is None else values[metric][baseline.key]
            rows.append({**cell.values, **_row(metric, own, theirs)})
    return table(plan.axes, rows, AGGREGATES)


def interquartile_mean(values: Sequence[float]) -> float | None:
    """The mean of `values`, [n], without the lowest and highest ⌊n / 4⌋; None of fewer than four.

    As scipy.stats.trim_mean(values, 0.25), whose import takes longer than a whole analysis may.
    """
    if len(values) < LEAST:
        return None
    cut = len(values) // 4
    return float(np.sort(np.asarray(values, np.float64))[cut : len(values) - cut].mean())


def by_seed(cell: Cell, by_trial: Mapping[str, Score]) -> dict[int, float]:
    """The finite scores of a cell's trials by seed, in rising order of seeds."""
    found = {t.seed: by_trial[t.trial_id].value for t in cell.trials if t.trial_id in by_trial}
    return {seed: found[seed] for seed in sorted(found) if np.isfinite(found[seed])}


def table(axes: Sequence[str] | Mapping[str, Any], rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table: the columns of the axes, typed from their values, then those of `schema`."""
    columns = {axis: setting_column([row[axis] for row in rows]) for axis in axes}
    columns |= {field.name: pa.array([row[field.name] for row in rows], type=field.type) for field in schema}
    return pa.table(columns)


def _row(metric: str, own: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any]:
    differences = [own[seed] - theirs[seed] for seed in sorted(own.keys() & theirs.keys())]
    return {
        "metric": metric,
        "n": len(own),
        "iqm": interquartile_mean(list(own.values())),
        "n_paired": len(differences),
        "iqm_delta": interquartile_mean(differences),
        "flags": [TOO_FEW] if 0 < len(own) < LEAST else [],
    }
