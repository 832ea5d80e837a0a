"""One bias of object discovery for all trials that are compared: the one of the best mean CorLoc; pure.

Each trial chooses its own bias, so a difference between trials with and without registers may come from the bias. Here
all trials of a comparison, of every number of registers and every seed, share the bias whose CorLoc is best on average
(paper.md §1, Table 3). It is computed from the curves that trials publish: no trial depends on another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from analysis.cells import Cell, cells, compared_with
from analysis.collect import Frames
from analysis.labels import REGISTERS
from analysis.schemas import canonical

if TYPE_CHECKING:
    from analysis.scores import Score, Scores

PROBE = "object_discovery"
COMMON = "common_bias"
_CURVE = re.compile(rf"(?P<family>.*\b{PROBE}/(?:[^/]+/)?)bias_(?P<bias>[^/]+)/corloc")

_REGISTER_AXES = (REGISTERS, "model.reg_init_std")
_WEIGHTS = "model.weights"  # of trials that train nothing: no setting that could tell comparisons apart
# Trials that differ in one of these have curves that cannot be averaged.
_SETTINGS = (
    *("method", "model.size", "model.patch_size"),
    *(f"evaluation.{PROBE}.{name}" for name in ("features", "normalize", "whole", "data", "protocol_splits")),
)
_PROTOCOL = f"evaluation.{PROBE}.protocol_splits"


@dataclass(frozen=True)
class Comparison:
    """Cells that share a bias; None where their trials have no bias in common, or no curve."""

    cells: tuple[Cell, ...]
    bias: float | None


def is_curve(metric: str) -> bool:
    """Whether a metric is one point of a curve of CorLoc over biases, of which there are many."""
    return _CURVE.fullmatch(metric) is not None


def families(scores: Scores) -> dict[str, dict[float, Mapping[str, Score]]]:
    """The curves: `test/object_discovery/` and the like, to biases in rising order, to scores by trial."""
    found: dict[str, dict[float, Mapping[str, Score]]] = {}
    for metric, by_trial in scores.items():
        point = _CURVE.fullmatch(metric)
        if point is not None and metric.startswith(("val/", "test/")):
            found.setdefault(point["family"], {})[float(point["bias"])] = by_trial
    return {family: dict(sorted(found[family].items())) for family in sorted(found)}


def comparisons(frames: Frames, scores: Scores) -> tuple[Comparison, ...]:
    """All cells, in comparisons: those of one baseline and of equal settings of model and probe.

    Without a baseline they are those that differ in registers alone.
    """
    curves = families(scores)
    runs = {run["trial_id"]: run for run in frames.runs.to_pylist()}
    everything = cells(frames.plan)
    baselines = compared_with(everything, frames.plan.baseline)
    grouped: dict[str, list[Cell]] = {}
    for cell in everything:
        baseline = baselines[cell.key]
        alike = baseline.key if baseline is not None else _without_registers(cell)
        grouped.setdefault(canonical([alike, _settings(cell, runs)]), []).append(cell)
    return tuple(Comparison(tuple(members), _best(members, curves, runs)) for members in grouped.values())


def common(frames: Frames, scores: Scores) -> dict[str, dict[str, Score]]:
    """Metrics at the common bias, by name and trial: `…/common_bias/corloc` of every curve, and `…/common_bias`."""
    curves = families(scores)
    found: dict[str, dict[str, Score]] = {}
    for comparison in comparisons(frames, scores):
        if comparison.bias is None:
            continue
        trials = [trial.trial_id for cell in comparison.cells for trial in cell.trials]
        for family, curve in curves.items():
            at_bias = curve.get(comparison.bias, {})
            for trial in trials:
                if trial in at_bias:
                    found.setdefault(f"{family}{COMMON}/corloc", {})[trial] = at_bias[trial]
                    value = replace(at_bias[trial], value=comparison.bias)
                    found.setdefault(f"{family}{COMMON}", {})[trial] = value
    return found


def _without_registers(cell: Cell) -> str:
    return canonical({axis: v for axis, v in cell.values.items() if axis not in (*_REGISTER_AXES, _WEIGHTS)})


def _settings(cell: Cell, runs: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What the first trial of a cell that has begun says."""
    begun = [runs[trial.trial_id] for trial in cell.trials if runs[trial.trial_id]["status"] != "missing"]
    return [begun[0].get(name) if begun else cell.values.get(name) for name in _SETTINGS]


def _best(
    members: Sequence[Cell],
    curves: Mapping[str, Mapping[float, Mapping[str, Score]]],
    runs: Mapping[str, Mapping[str, Any]],
) -> float | None:
    """The bias of the best mean CorLoc over trials, of several the one nearest to 0.

    On the first data set's validation images, as each trial chooses its own; on its test set where the trials chose
    theirs there (`protocol_splits`).
    """
    trials = [trial.trial_id for cell in members for trial in cell.trials]
    split = "test" if any(runs[trial].get(_PROTOCOL) for trial in trials) else "val"
    curve = curves.get(f"{split}/{PROBE}/", {})
    with_curve = [trial for trial in trials if any(trial in by_trial for by_trial in curve.values())]
    means: list[tuple[float, float]] = []
    for bias, by_trial in curve.items():
        values = [by_trial[trial].value for trial in with_curve if trial in by_trial]
        if values and len(values) == len(with_curve) and all(map(math.isfinite, values)):
            means.append((round(math.fsum(values) / len(values), 12), bias))
    return min(means, key=lambda pair: (-pair[0], abs(pair[1]), pair[1]))[1] if means else None
