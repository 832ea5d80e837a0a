"""Frames to the ablation table: one row for each cell and metric; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from analysis import corrections, flags, image_bootstrap, statistics
from analysis.aggregates import by_seed, table
from analysis.cells import Cell, cells, compared_with, is_baseline
from analysis.collect import Frames, SweepPlan
from analysis.discovery import is_curve
from analysis.image_bootstrap import PerImage
from analysis.schemas import ABLATION, STATUSES
from analysis.scores import Scores, last_scores

OfImages = Callable[[str, str], PerImage | None]  # (trial_id, metric) to its results image by image


def ablation(frames: Frames, scores: Scores | None = None, of_images: OfImages | None = None) -> pa.Table:
    """The table `ablation`: the axes, then schemas.ABLATION, sorted by axes and metric.

    Every cell has a row for every metric that any trial has or that is declared primary. Only finished trials
    count in `n` and `mean`; a finished trial without a finite value of the metric counts in `n_missing`, so that
    n and the five other counts sum to the planned trials of the cell. `baseline_mean` and `delta` are over the
    seeds that cell and baseline share. `interval_method` says which of `statistics.compare`'s intervals `delta_low`
    and `delta_high` are, chosen for each metric and each baseline cell. `p_adjusted` of declared primary metrics is
    corrected over one family, all cells × all primary metrics (`corrections.family`); of all other metrics, which are
    exploratory, it is Benjamini and Hochberg's over all of them and says nothing that may be claimed. Points of a
    curve are no metrics of their own and have none: they are many and alike, so that one curve that differs everywhere
    would raise the limit for all other metrics. Weights that were released exist once, so that their intervals are over
    test images, where those are known, and flagged: they say nothing of further runs and have no p-value.

    Args:
        scores: `last_scores(frames)` where the caller has them already.
        of_images: results of single images.
    """
    everything = cells(frames.plan)
    scores = last_scores(frames) if scores is None else scores
    metrics = sorted(scores.keys() | set(frames.plan.primary))
    states = flags.states_of(frames)
    baselines = compared_with(everything, frames.plan.baseline)
    cell_flags = {cell.key: flags.of_cell(cell, baselines[cell.key], frames.plan, states) for cell in everything}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    found: dict[str, dict[str, statistics.Difference]] = {}
    for metric in metrics:
        by_trial = scores.get(metric, {})
        values = {cell.key: by_seed(cell, by_trial) for cell in everything}
        found[metric] = _differences(everything, baselines, values, frames.plan)
        if of_images is not None:
            released = [cell for cell in everything if "observational" in cell_flags[cell.key]]
            found[metric] |= _over_images(released, baselines, metric, values, of_images)
        for cell in everything:
            row = _row(cell, metric, values[cell.key], found[metric][cell.key], states)
            row["primary"] = metric in frames.plan.primary
            own = flags.of_row(cell, row, found[metric][cell.key], by_trial, states) | flags.chosen(
                cell, metric, states
            )
            row["flags"] = sorted(cell_flags[cell.key] | own)
            rows[cell.key, metric] = row
    adjusted = _adjusted(found, baselines, frames.plan)
    for (key, metric), row in rows.items():
        row["p_adjusted"] = adjusted.get((metric, key))
    return table(frames.plan.axes, [rows[cell.key, metric] for cell in everything for metric in metrics], ABLATION)


def _differences(
    everything: Sequence[Cell],
    baselines: Mapping[str, Cell | None],
    values: Mapping[str, Mapping[int, float]],
    plan: SweepPlan,
) -> dict[str, statistics.Difference]:
    """The difference of every cell to its baseline cell, by cell key; nulls with a reason where there is none.

    Where cells got more seeds by the variance of the first ones, the interval is Stein's of each cell alone, since the
    sweep file asked for its width.
    """
    found: dict[str, statistics.Difference] = {}
    groups: dict[str, dict[str, Mapping[int, float]]] = {}
    for cell in everything:
        baseline = baselines[cell.key]
        if baseline is None or is_baseline(cell, plan.baseline):
            reason = flags.IS_BASELINE if is_baseline(cell, plan.baseline) else flags.NO_BASELINE
            found[cell.key] = statistics.Difference(0, None, None, None, None, reason, None)
        elif plan.first_seeds is not None:
            found[cell.key] = statistics.stein_t(values[cell.key], values[baseline.key], plan.first_seeds)
        else:
            groups.setdefault(baseline.key, {baseline.key: values[baseline.key]})[cell.key] = values[cell.key]
    for baseline_key, group in groups.items():
        found |= statistics.compare(group, baseline_key)
    return found


def _over_images(
    released: Sequence[Cell],
    baselines: Mapping[str, Cell | None],
    metric: str,
    values: Mapping[str, Mapping[int, float]],
    of_images: OfImages,
) -> dict[str, statistics.Difference]:
    """Differences of cells with one run to baselines with one run, bounded over images; others are left out."""
    found: dict[str, statistics.Difference] = {}
    for cell in released:
        baseline = baselines[cell.key]
        if baseline is None or baseline.key == cell.key or len(cell.trials) != 1 or len(baseline.trials) != 1:
            continue
        own, theirs = values[cell.key].get(cell.trials[0].seed), values[baseline.key].get(baseline.trials[0].seed)
        if own is None or theirs is None:
            continue
        mine, other = (of_images(one.trials[0].trial_id, metric) for one in (cell, baseline))
        if (difference := image_bootstrap.paired(mine, other, own, theirs, image_bootstrap.generator())) is not None:
            found[cell.key] = difference
    return found


def _adjusted(
    found: Mapping[str, Mapping[str, statistics.Difference]], baselines: Mapping[str, Cell | None], plan: SweepPlan
) -> dict[tuple[str, str], float | None]:
    """Corrected p-values by metric and cell key; what has none is left out."""
    blocks: dict[tuple[str, str], list[str]] = {}
    exploratory: list[tuple[str, str]] = []
    for metric, differences in found.items():
        for key, difference in differences.items():
            baseline = baselines[key]
            if difference.p_value is None or baseline is None:
                continue
            if metric in plan.primary:
                blocks.setdefault((metric, baseline.key), []).append(key)
            elif not is_curve(metric):
                exploratory.append((metric, key))
    corrected = corrections.family([[found[metric][key] for key in keys] for (metric, _), keys in blocks.items()])
    adjusted = {
        (metric, key): p
        for ((metric, _), keys), block in zip(blocks.items(), corrected, strict=True)
        for key, p in zip(keys, block, strict=True)
    }
    raw = [found[metric][key].p_value for metric, key in exploratory]
    return adjusted | dict(zip(exploratory, corrections.benjamini_hochberg(raw), strict=True))


def _row(
    cell: Cell,
    metric: str,
    own: Mapping[int, float],
    difference: statistics.Difference,
    states: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    counts = Counter(states[trial.trial_id]["status"] for trial in cell.trials)
    summary = statistics.summarise([own[seed] for seed in sorted(own)])
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
