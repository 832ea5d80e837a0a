"""What of token_norms the pictures of norms show: cells with all their seeds together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from analysis import thresholds
from analysis.cells import Cell
from analysis.collect import Frames
from analysis.figures import bands, distributions
from analysis.figures.bands import Band
from analysis.figures.distributions import Norms
from analysis.figures.style import Drawn
from analysis.figures.thresholds import Shares, above_every_threshold
from analysis.histograms import Floats, pooled
from analysis.labels import REGISTERS
from analysis.layout import SIZE, Layout, arrange
from analysis.norms import PATCH, EvaluatedNorms, TokenNorms, patches
from analysis.results import Results
from analysis.scores import Scores
from analysis.threshold_bands import CellBands

_ONSET = "tokens/onset_step"
_PAPER = {REGISTERS: " (as the paper's Fig. 7)", SIZE: " (as the paper's Fig. 4c)"}

Rows = Sequence[Mapping[str, Any]]


def draw(results: Results, layout: Layout, problems: list[str]) -> Iterator[Drawn]:
    """Pictures of norms of all series; of what no finished trial has there is none, and it is said once."""
    frames, scores = results.frames, results.scores
    norms = EvaluatedNorms(frames)
    ends = norms.last_layer()
    shown = [trial.trial_id for _, _, members in layout.first_series() for cell in members for trial in cell.trials]
    layers, steps = norms.layers(shown), norms.steps(shown)
    ratios = thresholds.frozen(frames).thresholds
    if not layers:
        problems.append("norms along layers are not drawn: no finished trial has token norms of the probe images")
    for suffix, label, members in layout.first_series():
        named = [(layout.label(cell), cell) for cell in members]
        at_end = [(name, cell, found) for name, cell in named if (found := _pooled(name, cell, ends, ratios))]
        kinds = {name: _kinds(cell, ends) for name, cell, _ in at_end}
        along = [band for name, cell in named if (band := _along_layers(name, _of(cell, layers)))]
        during = [band for name, cell in named if (band := _along_steps(name, cell, _of(cell, steps), scores))]
        if at_end:
            yield named_after(distributions.norm_histogram([found for _, _, found in at_end]), suffix, label)
        if along:
            yield named_after(bands.norms_by_layer(along), suffix, label)
        if during:
            yield named_after(bands.norms_by_step(during), suffix, label)
        if any(len(of_cell) > 1 for of_cell in kinds.values()):
            yield named_after(distributions.norms_by_kind(kinds), suffix, label)
    yield from _side_by_side(frames, layout, ends, ratios)
    if (every := _every_threshold(layout, patches(ends), results.bands)) is not None:
        yield above_every_threshold(every, thresholds.RATIOS, _frozen_of(layout, ratios))


def named_after(drawn: Drawn, suffix: str, series: str) -> Drawn:
    """The picture of one series among several."""
    title = f"{drawn.title}: {series}" if series else drawn.title
    return replace(drawn, name=drawn.name + suffix, title=title, series=series if suffix else "")


def _of(cell: Cell, by_trial: Mapping[str, Rows]) -> list[Rows]:
    return [by_trial[trial.trial_id] for trial in cell.trials if trial.trial_id in by_trial]


def _pooled(
    label: str, cell: Cell, ends: Mapping[str, Mapping[str, TokenNorms]], ratios: Mapping[str, float | None]
) -> Norms | None:
    """The patches of all seeds of a cell with the thresholds of every rule; Otsu's where each seed has one."""
    found = [kinds[PATCH] for trial in cell.trials if PATCH in (kinds := ends.get(trial.trial_id, {}))]
    if not found:
        return None
    together = pooled([end.histogram for end in found])
    distribution = together.distribution()
    otsu = [end.otsu for end in found if end.otsu is not None]
    rules = {"rule 3": distribution.rule3_threshold(), "fixed 150": 150.0}
    if len(otsu) == len(found):
        rules["Otsu"] = float(np.mean(otsu))
    if (ratio := ratios.get(cell.key)) is not None:
        rules["frozen from the baseline"] = ratio * distribution.median()
    return Norms(label, together, [end.histogram.maximum for end in found], rules)


def _kinds(cell: Cell, ends: Mapping[str, Mapping[str, TokenNorms]]) -> list[Norms]:
    """Class token, registers by their number, and patches, of all seeds of a cell."""
    found: dict[str, list[TokenNorms]] = {}
    for trial in cell.trials:
        for token, end in ends.get(trial.trial_id, {}).items():
            found.setdefault(token, []).append(end)
    numbers = sorted(int(token.removeprefix("register_")) for token in found if token.startswith("register_"))
    names = [("cls", "class"), *((f"register_{number}", str(number)) for number in numbers), (PATCH, PATCH)]
    return [Norms(label, pooled([end.histogram for end in found[name]])) for name, label in names if name in found]


def _along_layers(label: str, trials: Sequence[Rows]) -> Band | None:
    """One cell's norms by layer from the last rows of its trials; None where none has patch norms."""
    rows = [row for of_trial in trials for row in of_trial]
    places = sorted({row["layer"] for row in rows if row["token"] == PATCH})
    cls = [row for row in rows if row["token"] == "cls"]
    registers = [row for row in rows if row["token"].startswith("register_")]
    if not places:
        return None
    return Band(
        label=label,
        places=places,
        quantiles=_quantiles([row for row in rows if row["token"] == PATCH], "layer", places),
        cls=_reduced(cls, "layer", "median", places, np.mean) if cls else None,
        registers=_reduced(registers, "layer", "median", places, np.mean) if registers else None,
    )


def _along_steps(label: str, cell: Cell, trials: Sequence[Rows], scores: Scores) -> Band | None:
    """One cell's norms along training; None where there are not two evaluations."""
    rows = [row for of_trial in trials for row in of_trial]
    places = sorted({row["step"] for row in rows})
    if len(places) < 2:
        return None
    by_trial = scores.get(_ONSET, {})
    onsets = sorted(by_trial[trial.trial_id].value for trial in cell.trials if trial.trial_id in by_trial)
    return Band(label, places, _quantiles(rows, "step", places), onsets=[step for step in onsets if np.isfinite(step)])


def _quantiles(rows: Rows, key: str, places: Sequence[int]) -> dict[str, list[float]]:
    means = {name: _reduced(rows, key, name, places, np.mean) for name in ("median", "p90", "p99")}
    return {**means, "max": _reduced(rows, key, "max", places, np.max)}


def _reduced(rows: Rows, key: str, name: str, places: Sequence[int], reduce: Any) -> list[float]:
    """`reduce` of a column over all rows of each place; NaN, which leaves a gap, where a place has none."""
    values: dict[int, list[float]] = {place: [] for place in places}
    for row in rows:
        if row[name] is not None:
            values.setdefault(row[key], []).append(row[name])
    return [float(reduce(values[place])) if values[place] else float("nan") for place in places]


def _side_by_side(
    frames: Frames,
    layout: Layout,
    ends: Mapping[str, Mapping[str, TokenNorms]],
    ratios: Mapping[str, float | None],
) -> Iterator[Drawn]:
    """Distributions along the x axis, and along model sizes where these are another axis."""
    layouts = {"norms_by_cell": layout}
    if layout.axis not in (None, SIZE) and SIZE in frames.plan.axes and len(frames.plan.axes[SIZE]) > 1:
        layouts["norms_by_size"] = arrange(frames, SIZE)
    for name, arranged in layouts.items():
        groups = {
            label: [found for cell in members if (found := _pooled(arranged.short(cell), cell, ends, ratios))]
            for label, members in arranged.series.items()
        }
        groups = {label: members for label, members in groups.items() if members}
        if arranged.axis is not None and sum(map(len, groups.values())) > 1:
            yield distributions.norms_by_cell(name, groups, arranged.x_label, _PAPER.get(arranged.axis, ""))


def _every_threshold(
    layout: Layout, ends: Mapping[str, TokenNorms], bands: Mapping[str, CellBands]
) -> dict[str, list[Shares]] | None:
    found: dict[str, list[Shares]] = {}
    for label, members in layout.series.items():
        for cell in members:
            own = [ends[trial.trial_id] for trial in cell.trials if trial.trial_id in ends]
            if own:
                fractions = [thresholds.curve(end) for end in own]
                most = max(end.histogram.total for end in own)
                shares = Shares(layout.label(cell), fractions, most, *_bounds(bands.get(cell.key)))
                found.setdefault(label, []).append(shares)
    return found or None


def _bounds(bands: CellBands | None) -> tuple[tuple[Floats, Floats] | None, tuple[tuple[float, float], ...]]:
    """The band of a cell's fraction, and the stretches of τ/median over which its difference keeps its sign."""
    if bands is None:
        return None, ()
    whole = bands.fraction
    band = None if whole is None or whole.low is None or whole.high is None else (whole.low, whole.high)
    return band, tuple((stretch.first, stretch.last) for stretch in bands.holds())


def _frozen_of(layout: Layout, ratios: Mapping[str, float | None]) -> dict[str, float | None]:
    """The frozen threshold of each series where all of its cells share one."""
    found: dict[str, float | None] = {}
    for label, members in layout.series.items():
        of_cells = {ratios.get(cell.key) for cell in members}
        found[label] = of_cells.pop() if len(of_cells) == 1 else None
    return found
