"""Which cells of two sweeps are the same: equal values of all axes, or of a setting where one has no such axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from analysis.cells import Cell
from analysis.results import Results
from analysis.schemas import RUNS, canonical

_UNKNOWN = object()


@dataclass(frozen=True)
class Matched:
    """The cells of two sweeps, A and B.

    Attributes:
        axes: by which cells are matched, in the order of A, then of B.
        both: pairs of cells with equal values of `axes`, and these values.
        only_a: cells of A that B lacks.
        constant_a: axes that only A has, with the one value that it has there; what B has is a matter of settings.
    """

    axes: tuple[str, ...]
    both: tuple[tuple[dict[str, Any], Cell, Cell], ...]
    only_a: tuple[Cell, ...]
    only_b: tuple[Cell, ...]
    constant_a: Mapping[str, Any]
    constant_b: Mapping[str, Any]


class Trials:
    """What is recorded of a sweep's trials, for look-up by cell.

    Attributes:
        settings: names of the resolved settings that trials have.
    """

    def __init__(self, results: Results) -> None:
        runs = results.frames.runs
        self.results = results
        self.name = results.frames.plan.sweep
        self.settings = tuple(name for name in runs.column_names if name not in RUNS.names)
        self._rows: dict[str, dict[str, Any]] = {row["trial_id"]: row for row in runs.to_pylist()}

    def row(self, trial_id: str) -> Mapping[str, Any]:
        """A trial's row of `runs`."""
        return self._rows[trial_id]

    def recorded(self, cell: Cell) -> list[Mapping[str, Any]]:
        """The rows of `runs` of a cell's trials that are over."""
        rows = [self._rows[trial.trial_id] for trial in cell.trials]
        return [row for row in rows if row["status"] != "missing"]

    def values(self, cell: Cell, name: str) -> set[str]:
        """The values of a column in a cell's trials that are over, as `comparable`."""
        return {comparable(row[name]) for row in self.recorded(cell)}


def match(a: Trials, b: Trials) -> Matched:
    """Cells of `a` and `b` by the axes of both, and by those of one in which its cells differ.

    For an axis that the other sweep lacks, its trials' resolved setting stands, if it is one value in the cell.

    Raises:
        ValueError: an axis in which the cells of one sweep differ is no setting of the other's trials, or no cell is in
            both sweeps.
    """
    axes_a, axes_b = list(a.results.frames.plan.axes), list(b.results.frames.plan.axes)
    both = [axis for axis in axes_a if axis in axes_b]
    more_a = [axis for axis in axes_a if axis not in both and axis in a.results.varying]
    more_b = [axis for axis in axes_b if axis not in both and axis in b.results.varying]
    axes = [*both, *more_a, *more_b]
    keys_a, keys_b = _by_key(a, axes, b), _by_key(b, axes, a)
    shared = [key for key in keys_a if key in keys_b]
    if not shared:
        raise ValueError(_nothing_shared(a, b, axes))
    return Matched(
        axes=tuple(axes),
        both=tuple((_values(keys_a[key][0], keys_b[key][0], more_b), keys_a[key][1], keys_b[key][1]) for key in shared),
        only_a=tuple(cell for key, (_, cell) in keys_a.items() if key not in keys_b),
        only_b=tuple(cell for key, (_, cell) in keys_b.items() if key not in keys_a),
        constant_a=_constant(a, axes),
        constant_b=_constant(b, axes),
    )


def comparable(value: Any) -> str:
    """A setting's value as text, the same for what a plan, a configuration and a table make of it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else canonical(value)


def _by_key(trials: Trials, axes: list[str], other: Trials) -> dict[str, tuple[dict[str, Any], Cell]]:
    """Cells by the text of their values of `axes`, and these values; those of which one is unknown are left out."""
    own = set(trials.results.frames.plan.axes)
    missing = [axis for axis in axes if axis not in own]
    if lacking := sorted(set(missing) - set(trials.settings)):
        raise ValueError(
            f"{trials.name} and {other.name} cannot be compared: cells of {other.name} differ in {', '.join(lacking)}, "
            f"which is neither an axis of {trials.name} nor known of its trials"
        )
    found = {}
    for cell in trials.results.cells:
        values = {axis: cell.values[axis] if axis in own else _only(trials.values(cell, axis)) for axis in axes}
        if _UNKNOWN not in values.values():
            found[canonical([comparable(value) for value in values.values()])] = (values, cell)
    return found


def _values(a: Mapping[str, Any], b: Mapping[str, Any], of_b: Iterable[str]) -> dict[str, Any]:
    """Equal values, those `of_b` as the axis has them there: from the other's settings they are text."""
    return {**a, **{axis: b[axis] for axis in of_b}}


def _only(values: set[str]) -> Any:
    return next(iter(values)) if len(values) == 1 else _UNKNOWN


def _constant(trials: Trials, axes: Iterable[str]) -> dict[str, Any]:
    results = trials.results
    first = results.cells[0].values if results.cells else {}
    return {axis: first[axis] for axis in results.frames.plan.axes if axis not in axes and axis in first}


def _nothing_shared(a: Trials, b: Trials, axes: Iterable[str]) -> str:
    """Why no cell is in both: the axes that have no value in common, or else that no combination is."""
    said = []
    for axis in axes:
        one, other = (
            {comparable(cell.values[axis]) for cell in trials.results.cells if axis in cell.values} for trials in (a, b)
        )
        if one and other and not one & other:
            said.append(f"{axis} is {', '.join(sorted(one))} in {a.name}, {', '.join(sorted(other))} in {b.name}")
    why = "; ".join(said) or "no combination of axis values is in both"
    return f"{a.name} and {b.name} cannot be compared, as they have no cell in common: {why}"
