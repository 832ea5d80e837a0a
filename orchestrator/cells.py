"""The cells of a sweep: combinations of axis values, with `when` applied and `exclude` left out; pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.sweep import When
from trainers import presets
from trainers.config import TrialConfig, flatten

Values = Mapping[str, Any]  # of the axes
Condition = Mapping[str, tuple[Any, ...]]  # every named setting has one of the values


@dataclass(frozen=True)
class Cell:
    """One combination of axis values, and all settings that hold in it by dotted name."""

    values: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """What decides the cells of a sweep; all values as a TrialConfig would hold them."""

    trial: Mapping[str, Any]
    axes: Mapping[str, tuple[Any, ...]]
    when: Sequence[When]
    exclude: Sequence[Condition]

    def size(self) -> int:
        """The number of combinations, the excluded ones included."""
        return math.prod(len(values) for values in self.axes.values())

    def cells(self) -> Iterator[Cell]:
        """All cells in the order of the file: the last axis varies fastest.

        A condition on a setting that is no axis sees the base, its preset and the defaults, never what another
        entry of `when` sets, so that conditions do not depend on the order of entries.
        """
        defaults = flatten(TrialConfig().model_dump())
        for combination in itertools.product(*self.axes.values()):
            values = dict(zip(self.axes, combination, strict=True))
            if any(_holds(condition, values) for condition in self.exclude):
                continue
            base = {**self.trial, **values}
            settings = dict(self.trial)
            if self.when:
                seen = {**defaults, **_recipe(base), **base}
                for entry in self.when:
                    if _holds(entry.condition, seen):
                        settings.update(entry.settings)
            yield Cell(values, {**settings, **values})


def _holds(condition: Condition, settings: Mapping[str, Any]) -> bool:
    return all(name in settings and settings[name] in allowed for name, allowed in condition.items())


def _recipe(settings: Mapping[str, Any]) -> Mapping[str, object]:
    """The preset's settings; none where there is no such preset, which resolving the cell will report."""
    try:
        return presets.recipe(settings)[1]
    except ValueError:
        return {}


def baseline_of(cell: Values, everything: Sequence[Values], baseline: Values) -> Values | None:
    """The cell that has the baseline's values and equals `cell` in all else; None where it is not exactly one.

    As the analysis has it: a setting without effect in one of the two is null there and does not tell them apart,
    unless another cell fits exactly.
    """
    wanted = {**cell, **baseline}
    fits = [other for other in everything if _fits(other, wanted, baseline)]
    exact = [other for other in fits if other == wanted]
    chosen = exact or fits
    return chosen[0] if len(chosen) == 1 else None


def _fits(values: Values, wanted: Values, fixed: Values) -> bool:
    for axis, value in wanted.items():
        idle = axis not in fixed and (value is None or values.get(axis) is None)
        if values.get(axis) != value and not idle:
            return False
    return True
