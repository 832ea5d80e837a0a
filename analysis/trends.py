"""How metrics go with an ordered axis, all else equal: Page's test and a quadratic in log2(1 + value); pure.

Dense metrics have an optimum in the number of registers (paper.md §2), which no test for a trend finds: so both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis import corrections
from analysis.aggregates import by_seed, table
from analysis.cells import Cell, cells, order
from analysis.discovery import is_curve
from analysis.frames import SweepPlan
from analysis.page_trend import page_trend
from analysis.quadratic import fit
from analysis.schemas import TRENDS, canonical
from analysis.scores import Score, Scores

LEAST_LEVELS = 3

ONE_SEED = "one_seed"
NO_COMPLETE_SEED = "no_complete_seed"
INCOMPLETE_SEEDS = "incomplete_seeds"  # some seeds lack a level and are left out
MISSING_LEVEL = "missing_level"  # some levels have no score at all and are left out
TOO_FEW_LEVELS = "fewer_than_3_levels"  # that have scores
NO_VARIANCE = "no_variance"
FIRST_SEEDS = "first_seeds"  # those that were added by the variance of the first ones are left out
NOT_EXACT = "normal_approximation"
NO_LOGARITHM = "no_logarithm"  # a level of -1 or less


@dataclass(frozen=True)
class Ordered:
    """Cells that differ in one axis alone, whose values are numbers, by its rising values."""

    axis: str
    others: Mapping[str, Any]  # every axis; None of the ordered one
    levels: tuple[tuple[float, Cell], ...]


def trends(plan: SweepPlan, scores: Scores) -> pa.Table:
    """The table `trends`: the axes, then schemas.TRENDS, a row for each ordered axis, setting of the others and metric.

    Seeds are blocks: only those count that have a finite score at every level that has any. `page_p_adjusted` and
    `curvature_p_adjusted` are each Holm's correction over all rows of declared primary metrics, and Benjamini and
    Hochberg's over the others. Points of a curve of CorLoc are no metrics of their own and have no row.
    """
    metrics = [name for name in sorted(scores.keys() | set(plan.primary)) if not is_curve(name)]
    rows = []
    for one in ordered(plan):
        for metric in metrics:
            row = {**one.others, "axis": one.axis, "metric": metric, "primary": metric in plan.primary}
            rows.append(row | _row(one, scores.get(metric, {}), plan.first_seeds))
    for name in ("page_p", "curvature_p"):
        for primary, correct in ((True, corrections.holm), (False, corrections.benjamini_hochberg)):
            family = [row for row in rows if row["primary"] == primary]
            for row, adjusted in zip(family, correct([row[name] for row in family]), strict=True):
                row[f"{name}_adjusted"] = adjusted
    return table(plan.axes, rows, TRENDS)


def ordered(plan: SweepPlan) -> tuple[Ordered, ...]:
    """All rows of cells along an axis of at least three numbers, in the order of the axes and then of the others.

    A setting that has no effect in a cell is null there and fits any value: (num_registers 0, reg_init_std null) is
    the first level of (4, 0.02) and of (4, 1e-6), where there is no (0, 0.02).
    """
    everything = cells(plan)
    found = []
    for axis in plan.axes:
        kinds = {type(cell.values[axis]) for cell in everything if cell.values[axis] is not None}
        if kinds and kinds <= {int, float}:
            found += [one for one in along(axis, everything) if len(one.levels) >= LEAST_LEVELS]
    return tuple(found)


def along(axis: str, everything: Sequence[Cell]) -> list[Ordered]:
    """Cells along `axis` for every setting of the others, sorted by these; as many levels as there are."""
    by_others: dict[str, dict[float, Cell]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for cell in everything:
        others = {**cell.values, axis: None}
        settings.setdefault(canonical(others), others)
        if cell.values[axis] is not None:
            by_others.setdefault(canonical(others), {})[cell.values[axis]] = cell
    found = []
    for key in sorted(settings, key=lambda key: [order(value) for value in settings[key].values()]):
        levels = dict(by_others.get(key, {}))
        for other, cells_ in by_others.items():
            if other != key and _idle(settings[other], settings[key]):
                levels = cells_ | levels
        found.append(Ordered(axis, settings[key], tuple((level, levels[level]) for level in sorted(levels))))
    return found


def _idle(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether `one` equals `other` but for settings that have no effect in it."""
    return all(value is None or value == other[axis] for axis, value in one.items())


def _row(one: Ordered, by_trial: Mapping[str, Score], first_seeds: Sequence[int] | None) -> dict[str, Any]:
    levels, seeds, values_SK, flags = complete(one, by_trial, first_seeds)
    row: dict[str, Any] = dict.fromkeys(TRENDS.names[3:]) | {"n_levels": len(levels), "n_seeds": len(seeds)}
    if len(levels) < LEAST_LEVELS:
        flags.add(TOO_FEW_LEVELS)
    elif len(seeds) < 2:
        flags.add(ONE_SEED if seeds else NO_COMPLETE_SEED)
    else:
        row |= _page(values_SK, flags) | _quadratic(values_SK, np.array(levels, np.float64), flags)
    return row | {"flags": sorted(flags)}


def complete(
    one: Ordered, by_trial: Mapping[str, Score], first_seeds: Sequence[int] | None
) -> tuple[list[float], list[int], NDArray[np.float64], set[str]]:
    """Levels [K] with scores, seeds [S] with one at each of them, the scores [S, K], and flags of what was left out."""
    flags: set[str] = set()
    values = [(level, by_seed(cell, by_trial)) for level, cell in one.levels]
    planned = {trial.seed for _, cell in one.levels for trial in cell.trials}
    if first_seeds is not None and not planned <= set(first_seeds):
        flags.add(FIRST_SEEDS)
        values = [(level, {s: v for s, v in own.items() if s in first_seeds}) for level, own in values]
    present = [(level, own) for level, own in values if own]
    everywhere = set.intersection(*(set(own) for _, own in present)) if present else set()
    anywhere = {seed for _, own in present for seed in own}
    flags |= {MISSING_LEVEL} if len(present) < len(values) else set()
    flags |= {INCOMPLETE_SEEDS} if everywhere < anywhere else set()
    seeds = sorted(everywhere)
    scores = np.array([[own[seed] for _, own in present] for seed in seeds], np.float64)
    return [level for level, _ in present], seeds, scores.reshape(len(seeds), len(present)), flags


def _page(values_SK: NDArray[np.float64], flags: set[str]) -> dict[str, Any]:
    found = page_trend(values_SK)
    flags |= {NO_VARIANCE} if found.p_value is None else set()
    flags |= set() if found.exact else {NOT_EXACT}
    return {"page_l": found.l, "page_p": found.p_value, "direction": found.direction}


def _quadratic(values_SK: NDArray[np.float64], levels: NDArray[np.float64], flags: set[str]) -> dict[str, Any]:
    if levels[0] <= -1:
        flags.add(NO_LOGARITHM)
        return {}
    found = fit(values_SK, np.log2(1 + levels))
    row: dict[str, Any] = {}
    for name, coefficient in (("slope", found.slope), ("curvature", found.curvature)):
        row |= {name: coefficient.value, f"{name}_low": coefficient.low, f"{name}_high": coefficient.high}
        row[f"{name}_p"] = coefficient.p_value
    if found.slope.p_value is None:
        flags.add(NO_VARIANCE)
    if found.optimum is not None:
        low, middle, high = (math.exp2(x) - 1 for x in found.optimum)
        extremum = "highest" if found.curvature.value < 0 else "lowest"
        row |= {"optimum_low": low, "optimum": middle, "optimum_high": high, "extremum": extremum}
    return row
