"""A sheet of small pictures under one scale of colours; those of a row are one image, which is quick to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.figures.style import MISSING, SMALL, fix, render, styled, wrap

Tile = NDArray[np.uint8]  # RGB, [rows, columns, 3]

_GAP = 0.05  # inches between tiles
_LINE = 0.15  # inches of a line of 8 points
_WIDEST = 9.0  # inches of all tiles together
_LEAST_SIDE = 48  # pixels of a tile, so that a gap is a few of them
_MOST_SIDE = 224


@dataclass(frozen=True)
class Scale:
    """What colours mean: from `low` to `high` in `label`; `low` and `high` differ."""

    low: float
    high: float
    label: str
    colours: str = "viridis"

    def paint(self, values: NDArray[Any]) -> Tile:
        """Values [rows, columns] as colours; NaN is grey."""
        shares = (np.asarray(values, np.float64) - self.low) / (self.high - self.low)
        map_ = matplotlib.colormaps[self.colours].with_extremes(bad=MISSING)
        return np.asarray(map_(np.ma.masked_invalid(shares), bytes=True)[..., :3])


def scale_of(arrays: Sequence[NDArray[Any]], label: str, low: float | None = None, colours: str = "viridis") -> Scale:
    """The scale that holds all finite values of `arrays`, from `low` where it is given."""
    finite = np.concatenate([array[np.isfinite(array)].ravel() for array in arrays] or [np.zeros(0)])
    least = float(finite.min(initial=math.inf)) if low is None else low
    highest = float(finite.max(initial=-math.inf))
    if not highest > least:
        least = least if math.isfinite(least) else 0.0
        highest = least + 1.0
    return Scale(least, highest, label, colours)


def draw(
    tiles: Sequence[Sequence[Tile | None]],
    scale: Scale,
    titles: Mapping[tuple[int, int], str],
    rows: Sequence[str] = (),
    tile: float = 1.15,
) -> tuple[bytes, bytes]:
    """PNG and SVG of rows of tiles, all of them as large; None leaves a place free.

    Args:
        titles: texts over tiles, by row and column.
        rows: a text left of each row.
        tile: inches of a tile's side at the most; less where a row has many.
    """
    columns = max(len(row) for row in tiles)
    side = min(tile, _WIDEST / columns - _GAP)
    wrapped = {place: wrap(text, side + _GAP, SMALL) for place, text in titles.items()}
    over = [
        _LINE * max([0, *(t.count("\n") + 1 for (r, _), t in wrapped.items() if r == row)]) for row in range(len(tiles))
    ]
    names = [wrap(name, 0.95, SMALL) for name in rows]
    left = 0.1 + (1.0 if any(names) else 0.0)
    tall = min(len(tiles) * (side + _GAP) - _GAP, 2.6)
    label = wrap(scale.label, tall + 0.15, SMALL)
    width = left + columns * (side + _GAP) + 0.6 + _LINE * (1 + label.count("\n"))
    height = 0.06 + sum(over) + len(tiles) * (side + _GAP) + 0.06
    pixels = _pixels([one for row in tiles for one in row if one is not None])
    with styled():
        figure = Figure(figsize=(width, height))
        y = height - 0.06
        for number, row in enumerate(tiles):
            y -= over[number]
            for column in range(columns):
                if (text := wrapped.get((number, column))) is not None:
                    x = left + column * (side + _GAP) + side / 2
                    figure.text(x / width, (y + 0.03) / height, text, ha="center", va="bottom", fontsize=8)
            if number < len(names):
                figure.text(
                    (left - 0.06) / width, (y - side / 2) / height, names[number], ha="right", va="center", fontsize=8
                )
            _place(figure, row, (left, y - side, columns * (side + _GAP) - _GAP, side), pixels, side)
            y -= side + _GAP
        x = left + columns * (side + _GAP) + 0.06
        _bar(figure, scale, label, (x / width, (height - over[0] - 0.06 - tall) / height, 0.1 / width, tall / height))
        return render(figure)


def _place(
    figure: Figure, row: Sequence[Tile | None], place: tuple[float, float, float, float], pixels: int, side: float
) -> None:
    """One row of tiles as one image; `place` is left, bottom, width and height in inches."""
    left, bottom, width, height = place
    gap = max(1, round(_GAP / side * pixels))
    columns = round((width + _GAP) / (side + _GAP))
    sheet = np.full((pixels, columns * (pixels + gap) - gap, 3), 255, np.uint8)
    for column, one in enumerate(row):
        if one is not None:
            start = column * (pixels + gap)
            sheet[:, start : start + pixels] = _resized(one, pixels)
    figure_width, figure_height = figure.get_size_inches()
    axes = figure.add_axes(
        (left / figure_width, bottom / figure_height, width / figure_width, height / figure_height), frameon=False
    )
    axes.set_axis_off()
    fix(axes)
    axes.imshow(sheet, interpolation="nearest", aspect="auto")


def _bar(figure: Figure, scale: Scale, label: str, place: tuple[float, float, float, float]) -> None:
    axes = figure.add_axes(place)
    ramp = np.linspace(scale.low, scale.high, 128)[:, None]
    extent = (0.0, 1.0, scale.low, scale.high)
    axes.imshow(scale.paint(ramp), extent=extent, origin="lower", aspect="auto", interpolation="nearest")
    fix(axes)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_major_locator(MaxNLocator(5 if place[3] * figure.get_size_inches()[1] > 1.3 else 3))
    axes.tick_params(labelsize=8, length=2)
    at = 1 - 0.05 / float(figure.get_size_inches()[0])
    figure.text(at, place[1] + place[3] / 2, label, ha="right", va="center", rotation=90, fontsize=8)


def _pixels(tiles: Sequence[Tile]) -> int:
    """Pixels of a tile's side in which every tile's cells are whole, where that is possible."""
    least = min(math.lcm(*(side for one in tiles for side in one.shape[:2])), _MOST_SIDE)
    return least * -(-_LEAST_SIDE // least)


def _resized(one: Tile, pixels: int) -> Tile:
    rows, columns = (np.arange(pixels) * size // pixels for size in one.shape[:2])
    return np.asarray(one[rows][:, columns])
