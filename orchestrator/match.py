"""Equal training of compared cells: what a sweep that asks for equal steps or equal FLOPs finds, or makes; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.cells import Cell, Values, baseline_of
from orchestrator.estimate import step_flops
from trainers.config import TrialConfig, flatten

STEPS = "optim.steps"


def effective(cell: Cell, config: TrialConfig) -> dict[str, Any]:
    """The cell's axis values, null where the resolved configuration has no such setting."""
    held = flatten(config.model_dump())
    return {name: None if held.get(name) is None else value for name, value in cell.values.items()}


def pairs(
    cells: Sequence[Cell], configs: Sequence[TrialConfig], baseline: Mapping[str, Any]
) -> Iterator[tuple[int, int]]:
    """Positions of each cell and of its baseline cell, those of baselines themselves and without one left out."""
    values: list[Values] = [effective(cell, config) for cell, config in zip(cells, configs, strict=True)]
    distinct = list({repr(value): value for value in values}.values())  # cells that are one trial
    bases = [value for value in distinct if all(value[name] == wanted for name, wanted in baseline.items())]
    for position, value in enumerate(values):
        found = baseline_of(value, bases, baseline)
        if found is not None and found != value:
            yield position, values.index(found)


def with_equal_flops(cells: Sequence[Cell], configs: Sequence[TrialConfig], baseline: Mapping[str, Any]) -> list[Cell]:
    """The cells with as many optimiser steps each as cost the training FLOPs of its baseline cell, rounded to a whole
    number, one at least. Baseline cells, and cells without one, stay as they are.

    Everything that a recipe derives from the length follows when the settings are resolved again.

    Args:
        configs: the resolved configuration of each cell.
    """
    matched = list(cells)
    for position, base in pairs(cells, configs, baseline):
        flops = step_flops(configs[base]) * configs[base].optim.steps
        steps = max(1, round(flops / step_flops(configs[position])))
        matched[position] = Cell(cells[position].values, {**cells[position].settings, STEPS: steps})
    return matched


def training_flops(config: TrialConfig) -> float | None:
    """FLOPs of all training steps of a trial by formula; None for a program, of which nothing is known."""
    return None if config.command is not None else step_flops(config) * config.optim.steps
