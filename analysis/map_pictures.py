"""What of the arrays of trials the pictures over images show: norm maps, positions, attention, similar neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.arrays import Arrays, Read, Records, integers
from analysis.cells import Cell, cells, varying
from analysis.collect import Frames
from analysis.figures import maps, neighbors
from analysis.figures.maps import AttentionMaps, NormMap, PositionMap
from analysis.figures.neighbors import Similarities
from analysis.figures.style import Drawn
from analysis.layout import Layout, arrange
from analysis.norm_pictures import named_after

ANTIALIAS = "model.pos_antialias"


class _OverImages(Protocol):
    @property
    def images(self) -> NDArray[Any]: ...


Entry = TypeVar("Entry", bound=_OverImages)


def draw(frames: Frames, layout: Layout, problems: list[str]) -> Iterator[Drawn]:
    """Pictures of all series from norm_map.npz, location.npz, neighbors.npz and attention.npz, where trials have them.

    Arrays that trials need not have (measurements can be left out) are not missed; unreadable ones are said.
    """
    records = Records(frames, problems)
    norm_maps = False
    for suffix, label, members in layout.first_series():
        for drawn in _of_series(records, layout, members, problems):
            norm_maps |= drawn.name == "norm_map"
            yield named_after(drawn, suffix, label)
    yield from _with_and_without_antialias(records, frames, layout)
    if not norm_maps:
        problems.append("norm maps are not drawn: no finished trial has a norm map")


def _of_series(records: Records, layout: Layout, members: Sequence[Cell], problems: list[str]) -> Iterator[Drawn]:
    found = _first_of_each(records, layout, members, "norm_map", ("images", "norms", "layer"), _norm_map, problems)
    if found:
        yield maps.norm_map(found)
    yield from _positions(records, layout, members, problems)
    alike = [one for cell in members if (one := _similarities(records, layout.label(cell), cell, problems))]
    if any(one.outlier.any() for one in alike):
        yield neighbors.neighbor_similarity(alike)
    keys = ("images", "maps", "average", "averaged_images", "tokens", "head_reduction")
    seen = _first_of_each(records, layout, members, "attention", keys, _attention, problems)
    if any("cls" in entry.tokens for entry in seen):
        yield maps.class_attention(seen)
    if any(set(entry.tokens) - {"cls"} for entry in seen):
        yield maps.register_attention(seen)
        yield maps.average_attention(seen)


def _positions(records: Records, layout: Layout, members: Sequence[Cell], problems: list[str]) -> Iterator[Drawn]:
    """Where the outliers of cells are; nothing where they have none."""
    places = [found for cell in members if (found := _position(records, layout.label(cell), cell, problems))]
    if any(place.counts.any() for place, _ in places):
        of_layers = sorted({layer for _, layer in places})
        where = f"layer {of_layers[0]}" if len(of_layers) == 1 else "its layer"
        yield maps.position_map([place for place, _ in places], where)


def _with_and_without_antialias(records: Records, frames: Frames, layout: Layout) -> Iterator[Drawn]:
    """Positions with and without antialiased position embeddings side by side, where that is another axis.

    What could not be read has been said by the pictures of series.
    """
    if layout.axis == ANTIALIAS or ANTIALIAS not in varying(frames.plan.axes, cells(frames.plan)):
        return
    beside = arrange(frames, ANTIALIAS)
    for suffix, label, members in beside.first_series():
        for drawn in _positions(records, beside, members, []):
            one = replace(drawn, name="position_map_antialias", title="Positions of outliers and antialiasing")
            yield named_after(one, suffix, label)


def _first_of_each(
    records: Records,
    layout: Layout,
    members: Sequence[Cell],
    name: str,
    keys: Sequence[str],
    reader: Callable[[str], Read[Entry]],
    problems: list[str],
) -> list[Entry]:
    """One entry a cell, of its first trial that has the file; those of other images than the first are said."""
    found: list[Entry] = []
    for cell in members:
        for trial_id, entry in records.of_cell(cell, name, keys, reader(layout.label(cell))):
            if found and not np.array_equal(found[0].images, entry.images):
                words = "norm map is" if name == "norm_map" else f"{name} maps are"
                problems.append(f"trial {trial_id}: its {words} of other images and {words.split()[-1]} not shown")
                continue
            found.append(entry)
            break
    return found


def _norm_map(label: str) -> Read[NormMap]:
    def read(arrays: Arrays) -> NormMap:
        images, norms = arrays["images"], arrays["norms"]
        if images.ndim != 4 or norms.ndim != 3 or not 0 < len(images) == len(norms):
            raise ValueError(f"images have shape {images.shape}, norms {norms.shape}")
        return NormMap(label, images, norms.astype(np.float64), int(arrays["layer"]))

    return read


def _attention(label: str) -> Read[AttentionMaps]:
    def read(arrays: Arrays) -> AttentionMaps:
        images, each, average = arrays["images"], arrays["maps"], arrays["average"]
        tokens = tuple(str(token) for token in arrays["tokens"])
        if images.ndim != 4 or each.ndim != 4 or not 0 < len(images) == len(each):
            raise ValueError(f"images have shape {images.shape}, maps {each.shape}")
        if average.shape != each.shape[1:] or len(tokens) != len(average):
            raise ValueError(f"maps have shape {each.shape}, their average {average.shape}, for {len(tokens)} tokens")
        reduction, averaged = str(arrays["head_reduction"]), int(arrays["averaged_images"])
        return AttentionMaps(label, images, each, average, averaged, tokens, reduction)

    return read


def _position(records: Records, label: str, cell: Cell, problems: list[str]) -> tuple[PositionMap, int] | None:
    """The outliers of all seeds of a cell on one grid, and their layer."""

    def read(arrays: Arrays) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        counts, images = integers(arrays["counts"], 2), integers(arrays["images"], 2)
        if counts.shape != images.shape or (counts > images).any():
            raise ValueError(f"counts have shape {counts.shape}, images {images.shape}, or there are more outliers")
        return counts, images, int(arrays["layer"])

    found = list(records.of_cell(cell, "location", ("counts", "images", "layer"), read))
    if not found:
        return None
    counts, images, layer = found[0][1]
    for trial_id, (more, of_images, _) in found[1:]:
        if more.shape != counts.shape:
            problems.append(f"trial {trial_id}: its outliers are on another grid and are not in the map of its cell")
            continue
        counts, images = counts + more, images + of_images
    return PositionMap(label, counts, images), layer


def _similarities(records: Records, label: str, cell: Cell, problems: list[str]) -> Similarities | None:
    """The similarities of all seeds of a cell in the same bins."""

    def read(arrays: Arrays) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        outlier, normal = integers(arrays["mean_outlier"], 1), integers(arrays["mean_normal"], 1)
        if not len(outlier) == len(normal) == len(arrays["edges"]) - 1 or not (np.diff(arrays["edges"]) > 0).all():
            raise ValueError(f"there are {len(arrays['edges'])} edges for {len(outlier)} and {len(normal)} counts")
        return arrays["edges"], outlier, normal

    found = list(records.of_cell(cell, "neighbors", ("edges", "mean_outlier", "mean_normal"), read))
    if not found:
        return None
    edges, outlier, normal = found[0][1]
    for trial_id, (other_edges, more_outlier, more_normal) in found[1:]:
        if not np.array_equal(edges, other_edges):
            problems.append(f"trial {trial_id}: its similarities are in other bins and are not in those of its cell")
            continue
        outlier, normal = outlier + more_outlier, normal + more_normal
    return Similarities(label, edges, outlier, normal)
