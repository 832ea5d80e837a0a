"""How the cells of a sweep are arranged in pictures: along an x axis, and in series of everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.cells import Cell, cells, order, varying
from analysis.collect import Frames
from analysis.labels import REGISTERS, axis_labels, cell_text, value_text
from analysis.schemas import canonical

SIZE = "model.size"
MOST_SERIES = 4  # pictures with a panel for each cell are drawn for each series
_SIZES = ("nano", "tiny", "small", "base", "large", "huge", "giant")  # small ones first, as an axis shows them


@dataclass(frozen=True)
class Layout:
    """Cells arranged along the x axis (`axis` is None where the sweep has none) and in series of everything else."""

    axis: str | None
    x_label: str
    xs: tuple[Any, ...]
    series: Mapping[str, tuple[Cell, ...]]  # label to cells, along x

    def label(self, cell: Cell) -> str:
        """What tells a cell apart from others of its series."""
        if self.axis is None:
            return "all"
        value = cell.values[self.axis]
        if self.axis == REGISTERS:
            return f"{value} register{'' if value == 1 else 's'}"
        return cell_text(cell.values, [self.axis], axis_labels(cell.values))

    def short(self, cell: Cell) -> str:
        """The cell's place on the x axis."""
        return "all" if self.axis is None else value_text(cell.values[self.axis])

    def first_series(self) -> Iterator[tuple[str, str, tuple[Cell, ...]]]:
        """The first series: a suffix for names of files, the label, and the cells."""
        for number, (label, members) in enumerate(list(self.series.items())[:MOST_SERIES]):
            yield f"_{number + 1}" if number else "", label, members


def arrange(frames: Frames, axis: str | None = None) -> Layout:
    """Cells along `axis`; by default along the number of registers where it varies, else along the first axis."""
    everything = cells(frames.plan)
    axes = list(frames.plan.axes)
    apart = varying(axes, everything) or axes[:1]
    if axis is None:
        axis = REGISTERS if REGISTERS in apart else next(iter(apart), None)
    names = axis_labels(axes)
    others = [name for name in apart if name != axis]
    series: dict[str, list[Cell]] = {}
    for cell in _sorted(everything, axis):
        label = cell_text(cell.values, others, names) if others else ""
        series.setdefault(label, []).append(cell)
    xs = (
        {canonical(cell.values[axis]): cell.values[axis] for cell in _sorted(everything, axis)} if axis else {"": "all"}
    )
    x_label = "number of registers" if axis == REGISTERS else names.get(axis or "", "")
    return Layout(axis, x_label, tuple(xs.values()), {label: tuple(members) for label, members in series.items()})


def place(axis: str, value: Any) -> tuple[int, tuple[int, Any]]:
    """A sort key for values of `axis` as readers expect them: model sizes from the smallest, else as `order` has it."""
    return (_SIZES.index(value) if axis == SIZE and value in _SIZES else len(_SIZES), order(value))


def _sorted(everything: Sequence[Cell], axis: str | None) -> list[Cell]:
    """Cells in the order of the x axis; else as they are."""
    if axis is None:
        return list(everything)
    return sorted(everything, key=lambda cell: place(axis, cell.values[axis]))
