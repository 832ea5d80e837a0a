"""Pictures of the three stages of object discovery, for queries, keys and values side by side (the paper's Fig. 13).

Shapes: N patches on a grid of h × w, D width, H × W px of an image as the backbone takes it, without its padding.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from trainers.probes.lost import Found
from trainers.tokens.attention import colors

STAGES = ("1 / (1 + degree)", "similar to seed", "seed expansion")
PREDICTED, TRUTH = "#D55E00", "#56B4E9"  # boxes, in colours that are told apart with every kind of colour vision

# In px.
_CELL = 112  # longer side of a map, rounded so that patches are whole
_GAP = 6
_LINE = 14  # height of a line of text
_WIDTH = 480  # at least, so that titles fit


@dataclass(frozen=True)
class Stages:
    """What LOST makes of one kind of features of one image: maps [h, w], the seed's place, and the box in px."""

    score: NDArray[np.float32]
    similarity: NDArray[np.float32]  # products of the seed with all patches, bias included
    expansion: NDArray[np.float32]
    seed: tuple[int, int]  # row and column
    box: tuple[float, float, float, float] | None  # None where nothing was found


@dataclass(frozen=True)
class Example:
    """One image uint8 [H, W, 3], its true boxes [K, 4] in px, and the stages for each kind of features."""

    pixels: NDArray[np.uint8]
    truth: NDArray[np.floating]
    stages: Mapping[str, Stages]


def stages(features_ND: Tensor, found: Found, bias: float, grid: tuple[int, int], box: NDArray[np.floating]) -> Stages:
    """The stages of a single image, for which `found` was found under `bias`; `box` is [4] in px."""
    seed = int(found.seed_B[0])
    similarity_N = features_ND @ features_ND[seed] + bias
    score, similarity, expansion = (
        values.float().cpu().numpy().reshape(grid)
        for values in (1 / (1 + found.degree_BN[0]), similarity_N, found.map_BN[0])
    )
    x0, y0, x1, y1 = (float(value) for value in box)
    place = divmod(seed, grid[1])
    return Stages(score, similarity, expansion, place, (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None)


def draw(title: str, examples: Sequence[Example]) -> bytes:
    """PNG with a row for each image: the image with its boxes, then the stages for each kind of features.

    Colours go from 0 to the largest value of each map; of products those that are not positive are grey. The seed has
    a white frame.
    """
    kinds = list(examples[0].stages)
    sizes = [_cell(next(iter(example.stages.values())).score.shape) for example in examples]
    width = max(size[1] for size in sizes)
    columns = 1 + len(STAGES) * len(kinds)
    tops = np.cumsum([2 * _GAP + 4 * _LINE, *(height + _GAP for height, _ in sizes)]).tolist()
    sheet = Image.new("RGB", (max(_WIDTH, _GAP + columns * (width + _GAP)), tops[-1]), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, fill="black")
    pen.text((_GAP, _GAP + _LINE), "found", fill=PREDICTED)
    pen.text((_GAP + 48, _GAP + _LINE), "true", fill=TRUTH)
    headings = [("", "image"), *((kind, stage) for kind in kinds for stage in STAGES)]
    for column, (kind, stage) in enumerate(headings):
        left = _GAP + column * (width + _GAP)
        pen.text((left, _GAP + 2 * _LINE), kind, fill="black")
        pen.text((left, _GAP + 3 * _LINE), stage, fill="black")
    for top, size, example in zip(tops, sizes, examples, strict=False):
        for column, cell in enumerate(_row(example, size)):
            sheet.paste(cell, (_GAP + column * (width + _GAP), top))
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    return png.getvalue()


def _cell(grid: tuple[int, ...]) -> tuple[int, int]:
    """Height and width in px at which a map is drawn, so that all patches are equal squares."""
    scale = max(1, round(_CELL / max(grid)))
    return grid[0] * scale, grid[1] * scale


def _row(example: Example, size: tuple[int, int]) -> list[Image.Image]:
    """The image and its maps, each [height, width] px."""
    height, width = size
    image = Image.fromarray(example.pixels).resize((width, height), Image.Resampling.BICUBIC)
    scale = (width / example.pixels.shape[1], height / example.pixels.shape[0])
    for box in example.truth:
        _frame(image, box, scale, TRUTH)
    cells = [image]
    for of_kind in example.stages.values():
        grid = of_kind.score.shape
        for values in (of_kind.score, of_kind.similarity, of_kind.expansion):
            shown = colors(np.where(values > 0, values, np.nan).astype(np.float32))
            cell = Image.fromarray(shown).resize((width, height), Image.Resampling.NEAREST)
            row, column = of_kind.seed
            patch = (width / grid[1], height / grid[0])
            _frame(cell, (column, row, column + 1, row + 1), patch, "white")
            cells.append(cell)
        if of_kind.box is not None:
            _frame(cells[-1], of_kind.box, scale, PREDICTED)
            for box in example.truth:
                _frame(cells[-1], box, scale, TRUTH)
    return cells


def _frame(
    cell: Image.Image, box: Sequence[float] | NDArray[np.floating], scale: tuple[float, float], color: str
) -> None:
    """Draws the edges of a box, given in units of which `scale` px are one across and down."""
    x0, y0, x1, y1 = (round(float(value) * scale[number % 2]) for number, value in enumerate(box))
    right, bottom = min(x1, cell.width) - 1, min(y1, cell.height) - 1
    if x0 <= right and y0 <= bottom:
        ImageDraw.Draw(cell).rectangle((x0, y0, right, bottom), outline=color, width=2)
