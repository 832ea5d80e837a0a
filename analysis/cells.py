"""Cells of an ablation: which trials replicate each other, and which cell a cell is compared with; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from analysis.collect import PlannedTrial, SweepPlan
from analysis.schemas import canonical


@dataclass(frozen=True)
class Cell:
    """One combination of axis values (null where a setting has no effect) and its trials, sorted by seed."""

    values: Mapping[str, Any]
    trials: tuple[PlannedTrial, ...]

    @cached_property
    def key(self) -> str:
        """Text that only equal combinations share."""
        return canonical(dict(self.values))


def order(value: Any) -> tuple[int, Any]:
    """A sort key for any axis value: null, then numbers, then texts, then compound values."""
    if value is None:
        return (0, 0)
    if isinstance(value, bool | int | float):
        return (1, value)
    return (2, value) if isinstance(value, str) else (3, canonical(value))


def cells(plan: SweepPlan) -> tuple[Cell, ...]:
    """The cells of `plan`, sorted by their values in the order of the axes, however the plan lists them."""
    groups: dict[str, list[PlannedTrial]] = {}
    for trial in plan.trials:
        groups.setdefault(canonical({axis: trial.cell.get(axis) for axis in plan.axes}), []).append(trial)
    built = [
        Cell(
            values={axis: trials[0].cell.get(axis) for axis in plan.axes},
            trials=tuple(sorted(trials, key=lambda trial: (trial.seed, trial.trial_id))),
        )
        for trials in groups.values()
    ]
    return tuple(sorted(built, key=lambda cell: [order(value) for value in cell.values.values()]))


def compared_with(everything: Sequence[Cell], baseline: Mapping[str, Any] | None) -> dict[str, Cell | None]:
    """The cell that each cell is compared with, by key: one that has the baseline's values and equals it in everything
    else; None where there is none.

    A setting that has no effect in one of the two is null there and does not tell them apart: with axes
    num_registers × reg_init_std, the cell (0, null) is the baseline of (4, 0.02) and of (4, 1e-6). Where several
    cells fit equally, none is chosen.
    """
    if baseline is None:
        return {cell.key: None for cell in everything}
    candidates = [cell for cell in everything if is_baseline(cell, baseline)]
    same: dict[Any, list[Cell]] = {}  # an index: of thousands of cells, not each can be compared with each
    for candidate in candidates:
        same.setdefault(_hashable(candidate.values), []).append(candidate)
    found: dict[str, Cell | None] = {}
    for cell in everything:
        wanted = {**cell.values, **baseline}
        fits = same.get(_hashable(wanted)) or [other for other in candidates if _fits(other.values, wanted, baseline)]
        found[cell.key] = fits[0] if len(fits) == 1 else None
    return found


def is_baseline(cell: Cell, baseline: Mapping[str, Any] | None) -> bool:
    """Whether `cell` is one that others are compared with."""
    return baseline is not None and all(cell.values.get(axis) == value for axis, value in baseline.items())


def varying(axes: Iterable[str], everything: Sequence[Cell]) -> list[str]:
    """The axes in which the cells differ; an axis with one value tells nothing apart."""
    return [axis for axis in axes if len({canonical(cell.values[axis]) for cell in everything}) > 1]


def _hashable(value: Any) -> Any:
    """What is equal, and of equal hash, for equal values of settings."""
    if isinstance(value, Mapping):
        return frozenset((name, _hashable(one)) for name, one in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _fits(values: Mapping[str, Any], wanted: Mapping[str, Any], fixed: Mapping[str, Any]) -> bool:
    for axis, value in wanted.items():
        idle = axis not in fixed and (value is None or values.get(axis) is None)
        if values.get(axis) != value and not idle:
            return False
    return True
