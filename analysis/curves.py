"""Learning curves as data for the report: all metrics with several steps, thinned to keep the page small; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.cells import Cell
from analysis.collect import Frames
from analysis.discovery import is_curve
from analysis.labels import axis_labels, cell_name, metric_label, unit

LOSS = "train/loss"
MOST_NUMBERS = 40_000  # values of all curves together: about 300 kB
_MOST_POINTS = 60  # of a curve
_LEAST_POINTS = 12
_MOST_METRICS = 40
_FIRST = ("train", "val", "tokens")

Points = tuple[NDArray[np.int64], NDArray[np.float64]]  # steps, rising, and values
ByCell = dict[int, tuple[Points, dict[int, Points]]]  # number of a cell to its mean and its trials by seed


@dataclass(frozen=True)
class Curves:
    """What the page draws, ready for JSON, and what was left out so that it stays small, in words.

    `data` has `cells` (labels), `steps` (lists of steps that curves share) and `metrics`, each with `name, label,
    symbol, decimals, curves`; a curve is [cell, seed, which steps, values], and a null seed is the mean over the
    cell's finished trials.
    """

    data: Mapping[str, Any]
    left_out: tuple[str, ...]


def curves(frames: Frames, everything: Sequence[Cell], varying: Sequence[str], most: int = MOST_NUMBERS) -> Curves:
    """The curves of all metrics that any trial has at two steps or more, the loss and primary metrics first.

    Trials that are not finished have curves of their own, but are in no mean. Where there are more than `most` values,
    single seeds are left out, then points, then the last metrics.
    """
    by_metric = _by_metric(frames)
    wanted = sorted(by_metric, key=lambda name: _rank(name, frames.plan.primary))
    left_out = [] if len(wanted) <= _MOST_METRICS else [f"{len(wanted) - _MOST_METRICS} metrics"]
    finished = {row["trial_id"] for row in frames.runs.select(["trial_id", "status"]).to_pylist() if _done(row)}
    found = {name: _of_cells(everything, by_metric[name], finished) for name in wanted[:_MOST_METRICS]}
    seeds = _size(found, _MOST_POINTS, seeds=True) <= most
    points = _MOST_POINTS
    while points > _LEAST_POINTS and _size(found, points, seeds) > most:
        points = max(_LEAST_POINTS, points // 2)
    kept: dict[str, ByCell] = {}
    for name, by_cell in found.items():
        if _size(kept | {name: by_cell}, points, seeds) <= most:
            kept[name] = by_cell
    left_out += [] if seeds or not found else ["curves of single seeds"]
    left_out += [] if len(kept) == len(found) else [f"{len(found) - len(kept)} metrics with many curves"]
    names = axis_labels(everything[0].values) if everything else {}
    grids: dict[tuple[int, ...], int] = {}
    metrics = [_metric(name, by_cell, points, seeds, grids) for name, by_cell in kept.items()]
    labels = [cell_name(cell.values, varying, names) for cell in everything]
    data = {"cells": labels, "steps": [list(steps) for steps in grids], "metrics": metrics}
    return Curves(data, tuple(left_out))


def _done(row: Mapping[str, Any]) -> bool:
    return bool(row["status"] == "finished")


def _by_metric(frames: Frames) -> dict[str, dict[str, Points]]:
    """Finite values of every metric and trial, in the order of steps; metrics with one step alone are left out."""
    table = frames.metrics.filter(pc.is_finite(frames.metrics["value"])).combine_chunks()
    names, name_codes = _coded(table["name"])
    trials, trial_codes = _coded(table["trial_id"])
    curve = name_codes * max(1, len(trials)) + trial_codes
    steps, values = table["step"].to_numpy(), table["value"].to_numpy()
    order = np.lexsort((steps, curve))
    starts = np.flatnonzero(np.diff(curve[order], prepend=-1))
    found: dict[str, dict[str, Points]] = {}
    for rows in np.split(order, starts[1:]) if len(starts) else ():
        name = names[name_codes[rows[0]]]
        if not is_curve(name):
            found.setdefault(name, {})[trials[trial_codes[rows[0]]]] = (steps[rows], values[rows])
    return {name: by for name, by in found.items() if max(len(at) for at, _ in by.values()) > 1}


def _coded(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct texts of a column, and where each row's stands among them."""
    coded = pa.concat_arrays(column.chunks or [pa.array([], pa.string())]).dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)


def _rank(name: str, primary: Sequence[str]) -> tuple[int, int, str]:
    """The loss first, then what is primary or its twin on validation images, then by kind and name."""
    twins = {*primary, *(f"val/{metric.removeprefix('test/')}" for metric in primary if metric.startswith("test/"))}
    kind = name.split("/")[0]
    place = 0 if name == LOSS else 1 if name in twins else 2
    return place, _FIRST.index(kind) if kind in _FIRST else len(_FIRST), name


def _of_cells(everything: Sequence[Cell], by_trial: Mapping[str, Points], finished: set[str]) -> ByCell:
    found: ByCell = {}
    for number, cell in enumerate(everything):
        own = {trial.seed: by_trial[trial.trial_id] for trial in cell.trials if trial.trial_id in by_trial}
        if own:
            whole = [by_trial[t.trial_id] for t in cell.trials if t.trial_id in by_trial and t.trial_id in finished]
            found[number] = (_mean(whole), dict(sorted(own.items())))
    return found


def _mean(curves_: Sequence[Points]) -> Points:
    """The mean at all steps that every curve has."""
    if not curves_:
        return np.empty(0, np.int64), np.empty(0)
    steps = reduce(np.intersect1d, [at for at, _ in curves_])
    return steps, np.mean([values[np.searchsorted(at, steps)] for at, values in curves_], axis=0)


def _size(found: Mapping[str, ByCell], points: int, seeds: bool) -> int:
    """How many values the curves have together."""
    return sum(
        min(points, len(curve[0]))
        for by_cell in found.values()
        for mean, own in by_cell.values()
        for curve in (mean, *(own.values() if seeds else ()))
    )


def _metric(name: str, by_cell: ByCell, points: int, seeds: bool, grids: dict[tuple[int, ...], int]) -> dict[str, Any]:
    """One metric; new steps are added to `grids`."""
    kind = unit(name)
    drawn = []
    for cell, (mean, own) in by_cell.items():
        for seed, curve in [(None, mean), *(own.items() if seeds else ())]:
            if len(curve[0]):
                steps, values = thinned(curve, points)
                shown = [float(f"{value * kind.scale:.5g}") for value in values.tolist()]
                drawn.append([cell, seed, grids.setdefault(tuple(steps.tolist()), len(grids)), shown])
    return {
        "name": name,
        "label": metric_label(name),
        "symbol": kind.symbol,
        "decimals": kind.decimals,
        "curves": drawn,
    }


def thinned(curve: Points, most: int) -> Points:
    """At most `most` points of a curve, evenly by their place, the first and the last among them."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    kept = np.linspace(0, len(steps) - 1, most).round().astype(np.int64)
    return steps[kept], values[kept]
