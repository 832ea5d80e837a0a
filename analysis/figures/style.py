"""What all pictures share: colours, letters, panels, logarithmic axes, and how they become PNG and SVG.

Colours are Okabe and Ito's, told apart with every kind of colour vision; series differ in marker too, for print. Places
are worked out in inches rather than by a layout engine, which would take half of the time of drawing.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]
MISSING = "#c9c9c9"  # of what was not measured; no colour of a scale comes near it
MOST_PANELS = 8

LETTER = 0.074  # width in inches of an average letter of 9 points
SMALL = 0.066  # of 8 points
_LONGEST = 42  # letters of a label in a legend
_LINE = 0.165  # height in inches of a line of 9 points
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "register-ablations",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in an axis value is a dollar
}


@dataclass(frozen=True)
class Drawn:
    """A figure ready to be published.

    Attributes:
        name: stem of its files.
        title: its heading.
        caption: what it shows, and of which trials.
        alternative: a text for those who cannot see it.
        group: under which heading of the report it stands.
        series: the series of cells that it shows; "" for the first one and for pictures of all.
    """

    name: str
    title: str
    caption: str
    alternative: str
    png: bytes
    svg: bytes
    group: str = "Scores and training"
    series: str = ""


@contextmanager
def styled() -> Iterator[None]:
    """Figures that are made and rendered inside look alike."""
    with matplotlib.rc_context(_STYLE):
        yield


def render(figure: Figure) -> tuple[bytes, bytes]:
    """PNG and SVG of a figure, without dates, versions or random ids."""
    png, svg = io.BytesIO(), io.BytesIO()
    # Level 3 takes two thirds of the time of the default and a tenth more bytes.
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None}, pil_kwargs={"compress_level": 3})
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def panels(
    titles: Sequence[str],
    x_label: str | Sequence[str],
    y_label: str,
    *,
    size: tuple[float, float] = (2.35, 1.6),
    legend: Sequence[str] = (),
    shared_x: bool = True,
    shared_y: bool = True,
    most_columns: int = 3,
    left: float = 0.78,
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, at most `most_columns` in a row.

    Args:
        titles: of the panels; long ones are broken into lines, no title is "".
        x_label, y_label: of all panels; each panel has its own x label where these are several.
        size: of a panel's inner area in inches; a panel alone is larger.
        legend: labels of the legend, for which room is left above all panels.
        shared_x, shared_y: whether all panels share this axis; then only those at the edge have numbers.
        left: inches left of all panels.
    """
    if len(titles) == 1:
        size = (max(size[0], 3.9), max(size[1], 2.3))
    columns = len(titles) if len(titles) <= most_columns else 2 if len(titles) == 4 else most_columns
    rows = math.ceil(len(titles) / columns)
    wrapped = [wrap(title, size[0]) for title in titles]
    over = _LINE * max(text.count("\n") + bool(text) for text in wrapped) + 0.09  # each row's titles
    right, bottom = 0.14, 0.48
    own = [] if isinstance(x_label, str) else [wrap(text, size[0], most_lines=1) for text in x_label]
    beside, above = 0.26 if shared_y else 0.56, 0.48 if own else 0.1 if shared_x else 0.26
    width = left + columns * size[0] + (columns - 1) * beside + right
    top = _LINE * math.ceil(len(legend) / _legend_columns(legend, width)) + 0.1 if legend else 0.0
    height = bottom + rows * (size[1] + over) + (rows - 1) * above + top
    figure = Figure(figsize=(width, height))
    axes: list[Axes] = []
    for index, text in enumerate(wrapped):
        row, column = divmod(index, columns)
        x = left + column * (size[0] + beside)
        y = bottom + (rows - 1 - row) * (size[1] + over + above)
        first = axes[0] if axes else None
        place = (x / width, y / height, size[0] / width, size[1] / height)
        one = figure.add_axes(place, sharex=first if shared_x else None, sharey=first if shared_y else None)
        fix(one, text)
        low, first_in_row = not shared_x or index + columns >= len(titles), not shared_y or column == 0
        one.tick_params(bottom=low, labelbottom=low, left=first_in_row, labelleft=first_in_row)
        axes.append(one)
        if own:
            _below(figure, own[index], x + size[0] / 2, y - bottom)
    if isinstance(x_label, str):
        _below(figure, x_label, (left + width - right) / 2, 0.0)
    label = wrap(y_label, height - top - 0.1)
    figure.text(0.06 / width, (bottom + height - top) / 2 / height, label, ha="left", va="center", rotation=90)
    return figure, axes


def _below(figure: Figure, label: str, x: float, y: float) -> None:
    """A label of x axes centred at `x`, over `y`, both in inches."""
    width, height = figure.get_size_inches()
    figure.text(x / width, (y + 0.07) / height, label, ha="center", va="bottom")


def fix(axes: Axes, title: str = "") -> None:
    """Give axes their title at a fixed place; matplotlib would look for it, and for axis labels, in every drawing."""
    axes.set_title(title, fontsize=9, pad=4, y=1.0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_label_coords(0.5, 0.5)


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend above all panels, each label once, where `panels` has left room for it."""
    found: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        width = float(figure.get_size_inches()[0])
        figure.legend(
            list(found.values()),
            [brief(label, min(_LONGEST, int(width / SMALL) - 10)) for label in found],
            loc="upper center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=_legend_columns(list(found), width),
            fontsize=8,
            borderpad=0.2,
            columnspacing=1.4,
            handletextpad=0.5,
            labelspacing=0.3,
        )


def _legend_columns(labels: Sequence[str], inches: float) -> int:
    """How many columns of a legend fit side by side."""
    widest = 0.6 + SMALL * min(_LONGEST, max(map(len, labels)))
    return max(1, min(len(labels), int((inches + 0.2) / widest)))


def brief(text: str, letters: int) -> str:
    """`text` with its middle left out where it is longer than `letters`, as names of one kind differ at their ends."""
    end = max(1, (letters - 1) * 2 // 3)
    return text if len(text) <= letters else f"{text[: max(0, letters - 1 - end)]}…{text[-end:]}"


def name_places(axes: Axes, names: Sequence[str], inches: float) -> None:
    """Names at 0, 1, 2 … of the x axis, which have `inches` together."""
    room = max(3, int(inches / len(names) / LETTER))
    axes.xaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.xaxis.set_major_formatter(FixedFormatter([brief(name, room) for name in names]))


def wrap(text: str, inches: float, letter: float = LETTER, most_lines: int = 3) -> str:
    """`text` in lines no longer than `inches`, at most three; what is longer ends in an ellipsis."""
    width = max(6, int(inches / letter))
    return "\n".join(textwrap.wrap(text, width, max_lines=most_lines, placeholder=" …")) or text


def steps_axis(axes: Axes) -> None:
    """Few and whole numbers on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def log_x(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis from `low` to `high`, both positive, with ticks at 1, 2 and 5 or at powers of ten."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    _log_ticks(axes.xaxis, low, high)


def log_y(axes: Axes, low: float, high: float) -> None:
    """The same of a y axis."""
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    _log_ticks(axes.yaxis, low, high)


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    spread = math.log10(high / low)
    dense = (1, 1.5, 2, 3, 4, 5, 7)
    steps: tuple[float, ...] = dense if spread < 0.7 else (1, 2, 5) if spread < 2 else (1, 3) if spread < 3 else (1,)
    every = 1 if spread < 5 else 2
    ticks = [step * 10.0**decade for decade in decades if not decade % every for step in steps]
    ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
    if len(ticks) < 2:
        ticks = [low, high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FixedFormatter([_tick(tick) for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def _tick(value: float) -> str:
    return f"{value:.0f}" if 1000 <= value < 1e5 else f"{value:.3g}".replace("e-0", "e−").replace("e+0", "e")


def shown(things: Sequence[Any] | Mapping[str, Any], noun: str, most: int = MOST_PANELS) -> str:
    """A sentence that says what was left out because there is too much of it, or nothing."""
    return f" The first {most} of {len(things)} {noun} are drawn." if len(things) > most else ""


def sentence(text: str) -> str:
    """`text` with a capital letter."""
    return text[:1].upper() + text[1:]
