"""Pictures over the image: patch norms, where outliers are, and attention of class token and registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.figures import sheet
from analysis.figures.sheet import Scale, Tile, scale_of
from analysis.figures.style import MOST_PANELS, Drawn, shown

PLACES = "Where outliers are"
ATTENTION = "Attention"
_MOST_IMAGES = 3
_MOST_REGISTERS = 8
_MOST_ROWS = 5  # cells of the picture of registers

Array = NDArray[Any]


@dataclass(frozen=True)
class NormMap:
    """Last-layer patch norms of one trial on probe images: images uint8 [k, H, W, 3], norms float [k, rows, cols].

    A norm is NaN where a patch consists of padding.
    """

    label: str
    images: Array
    norms: Array
    layer: int


@dataclass(frozen=True)
class PositionMap:
    """How often the patch of each place on the grid is an outlier, over all seeds of one cell; both [rows, columns]."""

    label: str
    counts: Array  # outliers
    images: Array  # images in which the place is more than padding


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of tokens to patches in the last block of one trial, over heads reduced as `reduction` says.

    Attributes:
        label: the cell.
        images: uint8 [k, H, W, 3].
        maps: [k, tokens, rows, columns]; NaN where a patch consists of padding.
        average: over `averaged` images, [tokens, rows, columns].
        tokens: "cls", "register_0" … in their order.
    """

    label: str
    images: Array
    maps: Array
    average: Array
    averaged: int
    tokens: tuple[str, ...]
    reduction: str


def norm_map(maps: Sequence[NormMap]) -> Drawn:
    """Norm of every patch over probe images: the image, then one heat map a cell, on one scale (the paper's Fig. 3)."""
    drawn = maps[:MOST_PANELS]
    images = drawn[0].images[:_MOST_IMAGES]
    norms = [entry.norms[: len(images)] for entry in drawn]
    layer = drawn[0].layer
    scale = scale_of(norms, f"L2 norm, layer {layer}")
    tiles: list[list[Tile | None]] = [
        [_photograph(image), *(scale.paint(each[row]) for each in norms)] for row, image in enumerate(images)
    ]
    titles = {(0, column): title for column, title in enumerate(["image", *(entry.label for entry in drawn)])}
    caption = (
        f"L2 norm of each patch token at the output of layer {layer} (before the final norm) over probe images, one "
        f"trial (the lowest finished seed) for each cell. All maps share one scale.{_missing(norms)}"
    )
    peaks = "; ".join(
        f"{entry.label}: highest norm {_highest(each):.4g}" for entry, each in zip(drawn, norms, strict=True)
    )
    words = f"Heat maps of patch norms. {peaks}."
    png_svg = sheet.draw(tiles, scale, titles)
    return Drawn("norm_map", "Norm map over images", caption + shown(maps, "cells"), words, *png_svg, PLACES)


def position_map(maps: Sequence[PositionMap], layer: str) -> Drawn:
    """How often each place of the grid holds an outlier, one map a cell on one scale (the paper's Fig. 10)."""
    drawn = maps[:MOST_PANELS]
    rates = [100 * np.where(m.images > 0, m.counts / np.maximum(m.images, 1), np.nan) for m in drawn]
    scale = scale_of(rates, "images with an outlier here, %", low=0.0)
    columns = min(len(drawn), 4)
    tiles: list[list[Tile | None]] = [
        [scale.paint(rate) for rate in rates[start : start + columns]] for start in range(0, len(rates), columns)
    ]
    titles = {divmod(number, columns): entry.label for number, entry in enumerate(drawn)}
    caption = (
        f"Share of probe images in which the patch at each place of the grid is an outlier in {layer}, by the trial's "
        f"own rule; all finished seeds of a cell together.{_missing(rates)}"
    )
    words = "; ".join(
        f"{entry.label}: at most {_highest(rate):.3g} %, {_mean(rate):.3g} % on average"
        for entry, rate in zip(drawn, rates, strict=True)
    )
    png_svg = sheet.draw(tiles, scale, titles, tile=1.6)
    title = "Positions of outliers"
    return Drawn("position_map", title, caption + shown(maps, "cells"), f"{title}. {words}.", *png_svg, PLACES)


def class_attention(maps: Sequence[AttentionMaps]) -> Drawn:
    """Attention of the class token over probe images, one column a cell (the paper's Fig. 1)."""
    drawn = [entry for entry in maps if "cls" in entry.tokens][:MOST_PANELS]
    images = drawn[0].images[:_MOST_IMAGES]
    of_class = [entry.maps[: len(images), entry.tokens.index("cls")] for entry in drawn]
    tiles: list[list[Tile | None]] = [
        [_photograph(image), *(_relative(each[row]) for each in of_class)] for row, image in enumerate(images)
    ]
    titles = {(0, column): title for column, title in enumerate(["image", *(entry.label for entry in drawn)])}
    caption = (
        f"Attention of the class token to patches in the last block, {drawn[0].reduction} over heads, on probe images; "
        f"one trial (the lowest finished seed) for each cell. Each map goes from 0 to its own largest value."
        f"{_missing(of_class)}"
    )
    words = "; ".join(f"{e.label}: largest value {_highest(m):.3g}" for e, m in zip(drawn, of_class, strict=True))
    png_svg = sheet.draw(tiles, _SHARE, titles)
    title = "Attention of the class token"
    return Drawn("attention", title, caption + shown(maps, "cells"), f"{title}. {words}.", *png_svg, ATTENTION)


def register_attention(maps: Sequence[AttentionMaps]) -> Drawn:
    """Attention of class token and registers over the same image, one row a cell (the paper's Fig. 9)."""
    drawn = _with_registers(maps)
    image = _photograph(drawn[0].images[0])
    columns = _columns(drawn)
    rows = [_tokens(entry.maps[0], entry.tokens, columns) for entry in drawn]
    tiles = [[None if number else image, *row] for number, row in enumerate(rows)]
    caption = (
        f"Attention of class token and registers to the patches of one probe image in the last block, "
        f"{drawn[0].reduction} over heads; one trial (the lowest finished seed) for each cell. Each map goes from 0 to "
        f"its own largest value.{_missing([entry.maps[0] for entry in drawn])}"
    )
    words = f"Attention maps of {', '.join(entry.label for entry in drawn)} over one image"
    titles = {(0, column): _token(name) for column, name in enumerate(["image", *columns])}
    png_svg = sheet.draw(tiles, _SHARE, titles, [entry.label for entry in drawn], tile=0.9)
    return Drawn(
        "attention_registers",
        "Attention of registers",
        caption + _left_out(maps, drawn),
        f"{words}, {len(columns)} tokens at the most.",
        *png_svg,
        ATTENTION,
    )


def average_attention(maps: Sequence[AttentionMaps]) -> Drawn:
    """Attention of class token and registers averaged over images, one row a cell (the paper's Fig. 16)."""
    drawn = _with_registers(maps)
    columns = _columns(drawn)
    tiles = [_tokens(entry.average, entry.tokens, columns) for entry in drawn]
    caption = (
        f"Attention of class token and registers to patches in the last block, {drawn[0].reduction} over heads and "
        f"averaged over {drawn[0].averaged} probe images; one trial (the lowest finished seed) for each cell. Each map "
        f"goes from 0 to its own largest value.{_missing([entry.average for entry in drawn])}"
    )
    titles = {(0, column): _token(name) for column, name in enumerate(columns)}
    png_svg = sheet.draw(tiles, _SHARE, titles, [entry.label for entry in drawn], tile=0.9)
    return Drawn(
        "attention_average",
        "Average attention of registers",
        caption + _left_out(maps, drawn),
        f"Average attention maps of {', '.join(entry.label for entry in drawn)}.",
        *png_svg,
        ATTENTION,
    )


_SHARE = Scale(0.0, 1.0, "attention / largest of the map")


def _relative(values: Array) -> Tile:
    highest = _highest(values)
    return _SHARE.paint(values / highest if highest > 0 else values)


def _tokens(maps: Array, tokens: Sequence[str], columns: Sequence[str]) -> list[Tile | None]:
    """The maps [tokens, rows, columns] of the tokens that `columns` names; None where a cell lacks one."""
    return [_relative(maps[tokens.index(name)]) if name in tokens else None for name in columns]


def _with_registers(maps: Sequence[AttentionMaps]) -> list[AttentionMaps]:
    """Cells that have registers, those with the most of them where there are too many."""
    those = [number for number, entry in enumerate(maps) if _registers(entry)]
    most = sorted(those, key=lambda number: -len(_registers(maps[number])))[:_MOST_ROWS]
    return [maps[number] for number in sorted(most)]


def _registers(entry: AttentionMaps) -> list[str]:
    return [name for name in entry.tokens if name != "cls"]


def _columns(maps: Sequence[AttentionMaps]) -> list[str]:
    """The tokens to be shown: class token and registers, of many the first four and others at equal distances."""
    registers = max((_registers(entry) for entry in maps), key=len)
    half = _MOST_REGISTERS // 2
    if len(registers) > _MOST_REGISTERS:
        later = np.linspace(half - 1, len(registers) - 1, half + 1).round().astype(int)[1:]
        registers = registers[:half] + [registers[index] for index in later]
    return [*(["cls"] if any("cls" in entry.tokens for entry in maps) else []), *registers]


def _token(name: str) -> str:
    return "class" if name == "cls" else name.replace("_", " ")


def _left_out(maps: Sequence[AttentionMaps], drawn: Sequence[AttentionMaps]) -> str:
    many = any(len(_registers(entry)) > _MOST_REGISTERS for entry in drawn)
    rest = sum(bool(_registers(entry)) for entry in maps) - len(drawn)
    return (f" At most {_MOST_REGISTERS} registers are drawn." if many else "") + (
        f" The {len(drawn)} cells with the most registers are drawn." if rest else ""
    )


def _photograph(image: Array) -> Tile:
    return np.asarray(image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1), np.uint8)


def _missing(arrays: Sequence[Array]) -> str:
    return " Grey patches consist of padding." if any(not np.isfinite(array).all() for array in arrays) else ""


def _highest(values: Array) -> float:
    return float(np.max(values[np.isfinite(values)], initial=0.0))


def _mean(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else 0.0
