"""What of plan, scores and records the pictures of cost show: means over the finished seeds of each cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis import flops
from analysis.cells import Cell
from analysis.directions import direction
from analysis.figures.cost import CostPanel, CostPoint, Price, cost_against_quality, price_of_registers
from analysis.figures.style import Drawn
from analysis.frames import PlannedTrial, SweepPlan
from analysis.labels import REGISTERS
from analysis.layout import Layout
from analysis.results import Results
from analysis.score_pictures import file_name

_COUNTS = (0, 1, 2, 4, 8, 16)  # of the paper's Fig. 12
_MOST_METRICS = 4
_FLOPS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1.0, "FLOP"))
_HOURS = ((1.0, "hours"), (1 / 60, "minutes"), (1 / 3600, "seconds"))

Run = Mapping[str, Any]


@dataclass(frozen=True)
class _Cost:
    """One kind of cost of a trial, None where it is not known; `units` are sizes and names, the largest first."""

    label: str
    of: Callable[[PlannedTrial, Run], float | None]
    units: Sequence[tuple[float, str]]


def draw(results: Results, layout: Layout, problems: list[str]) -> Iterator[Drawn]:
    """Each primary metric of which more or less is better against its costs, and the price of registers.

    Cells without a finished trial whose score and cost are known are left out. Hours are drawn only where all trials
    ran on GPUs or none did, since hours of both cannot be compared.
    """
    runs = {run["trial_id"]: run for run in results.frames.runs.to_pylist()}
    costs = [_Cost("training per trial", lambda trial, run: trial.training_flops, _FLOPS), *_hours(runs, problems)]
    chosen = [name for name in results.frames.plan.primary if name in results.scores and direction(name) is not None]
    for metric in chosen[:_MOST_METRICS]:
        panels = [panel for cost in costs if (panel := _panel(results, layout, runs, metric, cost)) is not None]
        if panels:
            yield cost_against_quality(f"cost_{file_name(metric)}", metric, panels, layout.x_label)
    if prices := _prices(results.frames.plan, layout, runs):
        yield price_of_registers(prices)


def _hours(runs: Mapping[str, Run], problems: list[str]) -> list[_Cost]:
    """GPU hours where trials ran on GPUs, CPU core hours where none did; nothing where there are both, or no record."""
    kinds = {run["gpu_seconds"] > 0 for run in runs.values() if run["gpu_seconds"] is not None}
    if len(kinds) > 1:
        problems.append("scores against hours are not drawn: some trials ran on GPUs and some did not")
    if len(kinds) != 1:
        return []
    if kinds == {True}:
        return [_Cost("GPU {} per trial", lambda trial, run: _in_hours(run["gpu_seconds"], 1), _HOURS)]
    return [_Cost("CPU core {} per trial", lambda trial, run: _in_hours(run["seconds"], run["threads"]), _HOURS)]


def _in_hours(seconds: float | None, devices: int | None) -> float | None:
    return None if seconds is None or devices is None else seconds * devices / 3600


def _panel(results: Results, layout: Layout, runs: Mapping[str, Run], metric: str, cost: _Cost) -> CostPanel | None:
    points = [
        point
        for series, members in layout.series.items()
        for cell in members
        if (point := _point(results, runs, metric, cost, cell, (series, layout.short(cell)))) is not None
    ]
    if not points:
        return None
    size, unit = _unit(max(point.cost[2] for point in points), cost.units)
    label = cost.label.format(unit) if "{}" in cost.label else f"{cost.label}, {unit}"
    return CostPanel(label, pareto([_scaled(point, size) for point in points], direction(metric) or 1))


def _point(
    results: Results, runs: Mapping[str, Run], metric: str, cost: _Cost, cell: Cell, names: tuple[str, str]
) -> CostPoint | None:
    """Mean score and cost over the trials of a cell that have both; None where none has."""
    scores = results.scores[metric]
    found = [
        (price, score.value)
        for trial in cell.trials
        if (score := scores.get(trial.trial_id)) is not None
        and math.isfinite(score.value)
        and (price := cost.of(trial, runs[trial.trial_id])) is not None
    ]
    if not found:
        return None
    paid, values = zip(*found, strict=True)
    return CostPoint(*names, _range(paid), _range(values), best=False)


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """Lowest, mean and highest."""
    return min(values), math.fsum(values) / len(values), max(values)


def _unit(highest: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which the highest cost is at least one."""
    return next((one for one in units if highest >= one[0]), units[-1])


def _scaled(point: CostPoint, size: float) -> CostPoint:
    low, mean, high = point.cost
    return replace(point, cost=(low / size, mean / size, high / size))


def pareto(points: Sequence[CostPoint], better: int) -> list[CostPoint]:
    """`points` with `best` where no other is at least as good for at most the cost, and better in one of both.

    Args:
        better: directions.HIGHER or directions.LOWER, which way scores are better.
    """
    places = [(point.cost[1], better * point.score[1]) for point in points]
    ordered = sorted(range(len(points)), key=lambda i: (places[i][0], -places[i][1]))
    marked = list(points)
    highest = -math.inf
    before = None  # the last that was marked: what equals it in both is as good
    for i in ordered:
        if places[i][1] > highest or places[i] == before:
            marked[i] = replace(points[i], best=True)
            highest, before = places[i][1], places[i]
    return marked


def _prices(plan: SweepPlan, layout: Layout, runs: Mapping[str, Run]) -> list[Price]:
    """The price of registers of each kind of model in the sweep: by formula, and as the trials of series are planned.

    Nothing where the sweep has neither shapes of models nor cells with and without registers.
    """
    if layout.axis != REGISTERS:
        return []
    compared = [x for x in layout.xs if isinstance(x, int)]
    counts = sorted({0, *compared, *(count for count in _COUNTS if count <= max(compared, default=0))})
    found: list[Price] = []
    for series, members in layout.series.items():
        of_series = [runs[trial.trial_id] for cell in members for trial in cell.trials]
        run = next((one for one in of_series if one.get("model.size") is not None), {})
        shape = _shape(plan, run)
        own = counts if shape else []
        parameters = [flops.parameters_increase(shape, count) for count in own] if shape else []
        forward = [flops.flops_increase(shape, count) for count in own] if shape else []
        model = f"{run['model.size']}, {run['model.image_size']} px" if shape else "all"
        found.append(Price(series or model, own, parameters, forward, _planned(members, runs)))
    return _merged([price for price in found if price.forward or price.planned])


def _shape(plan: SweepPlan, run: Run) -> flops.Shape | None:
    """The shape of a trial's model; None where it is not recorded, or the model is not of one of our sizes."""
    known = plan.model_sizes.get(run.get("model.size") or "")
    patch, image = run.get("model.patch_size"), run.get("model.image_size")
    if known is None or not isinstance(patch, int) or not isinstance(image, int) or run.get("model.factory"):
        return None
    return flops.Shape(*known, patch, image)


def _planned(members: Sequence[Cell], runs: Mapping[str, Run]) -> dict[int, float]:
    """By which share training on one image is dearer than in the cell without registers, by number of registers."""
    each: dict[int, float] = {}
    for cell in members:
        count = cell.values[REGISTERS]
        for trial in cell.trials:
            run = runs[trial.trial_id]
            images = (run.get("optim.steps") or 0) * (run.get("optim.batch_size") or 0)
            if trial.training_flops and images and isinstance(count, int):
                each.setdefault(count, trial.training_flops / images)
    return {count: price / each[0] - 1 for count, price in sorted(each.items())} if 0 in each and len(each) > 1 else {}


def _merged(prices: Sequence[Price]) -> list[Price]:
    """Series of equal prices as one: what tells them apart costs nothing."""
    groups: dict[tuple[Any, ...], list[Price]] = {}
    for price in prices:
        key = (*price.counts, *price.parameters, *price.forward, *price.planned.items())
        groups.setdefault(key, []).append(price)
    return [
        replace(own[0], label=own[0].label + (f" and {len(own) - 1} more" if len(own) > 1 else ""))
        for own in groups.values()
    ]
