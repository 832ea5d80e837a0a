"""The pictures of a report, one function each: they take frames or rows and return a drawn figure, or None.

Colours are Okabe and Ito's, told apart with every kind of colour vision; series differ in marker too, for print.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from analysis.labels import Unit, metric_label, unit, value_text

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
_MOST_PANELS = 8


@dataclass(frozen=True)
class Drawn:
    """A figure ready to be published: the file's stem, a heading, a caption and a text for those who cannot see it."""

    name: str
    title: str
    caption: str
    alternative: str
    png: bytes
    svg: bytes


@dataclass(frozen=True)
class Point:
    """One seed's score of a metric at one place of the x axis, in one series."""

    series: str
    x: Any
    seed: int
    value: float


@dataclass(frozen=True)
class LayerBand:
    """Norms of patch tokens by layer of one cell, quantiles averaged over its seeds; each list has shape [L + 1]."""

    label: str
    layers: Sequence[int]
    quantiles: Mapping[str, Sequence[float]]  # "median", "p90", "p99", "max"
    cls: Sequence[float] | None  # median norm of the class token
    registers: Sequence[float] | None  # median norm, averaged over registers


@dataclass(frozen=True)
class NormMap:
    """Last-layer patch norms of one trial on probe images: images uint8 [k, H, W, 3], norms float [k, rows, cols]."""

    label: str
    images: np.ndarray[Any, Any]
    norms: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Curve:
    """A metric of one trial along its training: `label` says which cell of its panel it belongs to."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]


def against_axis(name: str, metric: str, points: Sequence[Point], xs: Sequence[Any], x_label: str) -> Drawn:
    """A metric against an axis: the seeds as small points joined where they are paired, their mean as a line.

    Axis values stand at equal distances, as register counts double. Used for the outlier fraction and for top-1.
    """
    kind = unit(metric)
    series = list(dict.fromkeys(point.series for point in points))
    with _style():
        figure = Figure(figsize=(5.4, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for index, label in enumerate(series[: len(COLOURS)]):
            _draw_series(axes, [p for p in points if p.series == label], xs, kind, index, len(series))
        axes.set_xticks(range(len(xs)), [value_text(x) for x in xs])
        axes.set_xlim(-0.4, len(xs) - 0.6)
        axes.set_xlabel(x_label)
        axes.set_ylabel(metric_label(metric) + (f", {kind.symbol}" if kind.symbol else ""))
        if min(point.value for point in points) >= 0 and metric.rsplit("/", 1)[-1].startswith("outlier"):
            axes.set_ylim(bottom=0)
        if len(series) > 1:
            axes.legend(loc="best", fontsize=8)
        png, svg = _render(figure)
    caption = "Small points are seeds, joined by seed; large points are means."
    if len(series) > len(COLOURS):
        caption += f" The first {len(COLOURS)} of {len(series)} series are drawn."
    return Drawn(
        name,
        f"{_capital(metric_label(metric))} against {x_label}",
        caption,
        _in_words(points, series, xs, kind),
        png,
        svg,
    )


def training_curves(panels: Mapping[str, Sequence[Curve]]) -> Drawn:
    """The training loss against steps, one panel a series, since losses of different methods have their own scales."""
    shown = dict(list(panels.items())[:_MOST_PANELS])
    columns = min(len(shown), 3) if len(shown) != 4 else 2
    rows = math.ceil(len(shown) / columns)
    labels = list(dict.fromkeys(curve.label for curves in shown.values() for curve in curves))[: len(COLOURS)]
    with _style():
        figure = Figure(figsize=(max(2.7 * columns + 0.6, 4.6), 2.1 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, curves) in zip(grid, shown.items(), strict=False):
            axes.set_title(title, fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            for curve in (c for c in curves if c.label in labels):
                colour = COLOURS[labels.index(curve.label)]
                axes.plot(curve.steps, curve.values, color=colour, linewidth=0.9, alpha=0.8, label=curve.label or None)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        figure.supxlabel("step", fontsize=9)
        figure.supylabel("training loss", fontsize=9)
        handles, names = _legend_of(list(grid[: len(shown)]))
        if len(names) > 1:
            figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 2 * columns), fontsize=8)
        png, svg = _render(figure)
    caption = "Mean loss since the point before, one line a trial. Losses of different methods cannot be compared."
    if len(panels) > len(shown):
        caption += f" The first {len(shown)} of {len(panels)} panels are drawn."
    ends = [f"{t or 'all'}: from {_mean_end(c, 0):.4g} to {_mean_end(c, -1):.4g}" for t, c in shown.items()]
    return Drawn(
        "train_loss",
        "Training loss",
        caption,
        f"Mean training loss over trials, first and last point. {'; '.join(ends)}.",
        png,
        svg,
    )


def _mean_end(curves: Sequence[Curve], end: int) -> float:
    return sum(curve.values[end] for curve in curves) / len(curves)


def norms_by_layer(bands: Sequence[LayerBand]) -> Drawn:
    """Distribution of patch norms by layer, one panel a cell, on one logarithmic scale (the paper's Fig. 4a)."""
    shown = bands[:_MOST_PANELS]
    columns = min(len(shown), 3) if len(shown) != 4 else 2
    rows = math.ceil(len(shown) / columns)
    with _style():
        figure = Figure(figsize=(2.6 * columns + 0.6, 2.1 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, band in zip(grid, shown, strict=False):
            _draw_band(axes, band)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("layer (0 is what enters the first block)", fontsize=9)
        figure.supylabel("L2 norm of a token", fontsize=9)
        handles, labels = _legend_of(list(grid[: len(shown)]))
        figure.legend(handles, labels, loc="outside upper center", ncols=2 * columns, fontsize=8)
        png, svg = _render(figure)
    caption = (
        "Norms of patch tokens on the probe images at the last step, by layer and before the final norm. Quantiles are "
        "averaged over seeds, the maximum is the highest of all seeds. The scale is logarithmic and shared."
    )
    if len(bands) > len(shown):
        caption += f" The first {len(shown)} of {len(bands)} cells are drawn."
    lasts = [f"{b.label}: median {b.quantiles['median'][-1]:.4g}, maximum {b.quantiles['max'][-1]:.4g}" for b in shown]
    words = "Patch norms at the last layer. " + "; ".join(lasts) + "."
    return Drawn("norms_by_layer", "Norm distribution along layers", caption, words, png, svg)


def norm_map(maps: Sequence[NormMap], layer: int, most_images: int = 3) -> Drawn:
    """Norm of every patch over probe images: the image, then one heat map a cell, on one scale (the paper's Fig. 3)."""
    shown = maps[:_MOST_PANELS]
    images = shown[0].images[:most_images]
    low = min(float(m.norms[: len(images)].min()) for m in shown)
    high = max(float(m.norms[: len(images)].max()) for m in shown)
    with _style():
        size = (1.25 * (len(shown) + 1) + 0.8, 1.3 * len(images) + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(images), len(shown) + 1, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
        for row, image in enumerate(images):
            grid[row][0].imshow(image, interpolation="nearest")
            for column, entry in enumerate(shown, start=1):
                picture = grid[row][column].imshow(entry.norms[row], cmap="viridis", vmin=low, vmax=high)
        for axes, title in zip(grid[0], ["image", *(entry.label for entry in shown)], strict=True):
            axes.set_title(title, fontsize=8)
        for axes in grid.ravel():
            axes.set_axis_off()
        figure.colorbar(picture, ax=grid, label=f"L2 norm, layer {layer}", fraction=0.05, pad=0.02)
        png, svg = _render(figure)
    caption = (
        f"L2 norm of each patch token at the output of layer {layer} (before the final norm) over probe images, one "
        "trial (the lowest finished seed) for each cell. All maps share one scale."
    )
    if len(maps) > len(shown):
        caption += f" The first {len(shown)} of {len(maps)} cells are drawn."
    peaks = "; ".join(f"{entry.label}: highest norm {float(entry.norms[: len(images)].max()):.4g}" for entry in shown)
    return Drawn("norm_map", "Norm map over images", caption, f"Heat maps of patch norms. {peaks}.", png, svg)


def _draw_series(axes: Axes, points: Sequence[Point], xs: Sequence[Any], kind: Unit, index: int, count: int) -> None:
    """One series: seeds thin and pale, the mean thick; several series stand a little apart."""
    colour, marker = COLOURS[index], MARKERS[index]
    shift = 0.0 if count == 1 else 0.24 * (index / (min(count, len(COLOURS)) - 1) - 0.5)
    place = {repr(x): position + shift for position, x in enumerate(xs)}
    for seed in sorted({point.seed for point in points}):
        own = sorted((place[repr(p.x)], p.value * kind.scale) for p in points if p.seed == seed)
        axes.plot(
            *zip(*own, strict=True), color=colour, linewidth=0.7, alpha=0.45, marker=marker, markersize=3, clip_on=False
        )
    means = []
    for x in xs:
        values = [point.value for point in points if repr(point.x) == repr(x)]
        if values:
            means.append((place[repr(x)], kind.scale * sum(values) / len(values)))
    label = points[0].series or "mean"
    places, heights = zip(*means, strict=True)
    axes.plot(
        places,
        heights,
        label=label,
        zorder=3,
        clip_on=False,  # a mean of 0 lies on the axis
        color=colour,
        linewidth=1.8,
        marker=marker,
        markersize=7,
        markeredgecolor="white",
    )


def _draw_band(axes: Axes, band: LayerBand) -> None:
    quantiles, layers = band.quantiles, band.layers
    blue = COLOURS[0]
    axes.fill_between(layers, quantiles["median"], quantiles["p90"], color=blue, alpha=0.45, lw=0, label="50–90 %")
    axes.fill_between(layers, quantiles["p90"], quantiles["p99"], color=blue, alpha=0.2, lw=0, label="90–99 %")
    axes.plot(layers, quantiles["median"], color=blue, linewidth=1.6, label="median patch")
    axes.plot(layers, quantiles["max"], color=COLOURS[1], linewidth=1.3, linestyle="--", label="maximum patch")
    if band.cls is not None:
        axes.plot(layers, band.cls, color="#000000", linewidth=1, linestyle=":", label="class token")
    if band.registers is not None:
        axes.plot(layers, band.registers, color=COLOURS[2], linewidth=1.2, linestyle="-.", label="registers")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda norm, _: f"{norm:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(band.label, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend_of(grid: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels of all panels, each label once."""
    found: dict[str, Any] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _in_words(points: Sequence[Point], series: Sequence[str], xs: Sequence[Any], kind: Unit) -> str:
    sentences = []
    for label in series[: len(COLOURS)]:
        parts = []
        for x in xs:
            values = [p.value for p in points if p.series == label and repr(p.x) == repr(x)]
            if values:
                parts.append(
                    f"{value_text(x)}: {kind.text(sum(values) / len(values))}{kind.symbol and ' ' + kind.symbol}"
                )
        sentences.append((f"{label}: " if label else "Means. ") + "; ".join(parts))
    return ". ".join(sentences) + "."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE):
        yield


def _render(figure: Figure) -> tuple[bytes, bytes]:
    """PNG and SVG of a figure, without dates, versions or random ids."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    figure.set_layout_engine("none")  # as it was just laid out; laying it out again is half of the time
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()
