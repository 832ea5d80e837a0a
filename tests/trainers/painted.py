"""Images whose red channel says what each pixel is, and backbones that read it patch by patch, for dense probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tests.trainers.planted import WIDTH, Planted, levels
from trainers.config import resolve
from trainers.data import DataSet, Split, Whole
from trainers.probes import Context
from trainers.probes.seen import SeenSplit
from trainers.streams import Streams

STEP = 30  # levels from one number to the next; numbers are 0 … 7
NAMES = tuple(f"class {number}" for number in range(WIDTH))


def painted(numbers: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Images [n, H, W, 3] of numbers [n, H, W]."""
    return np.repeat((numbers * STEP).astype(np.uint8)[..., None], 3, axis=-1)


def reader(patch_size: int, scale: float = 3.0) -> Planted:
    """A backbone whose patches are one-hot for their mean number, of norm `scale`."""

    def plant(images: Tensor) -> Tensor:
        mean = F.avg_pool2d(levels(images)[:, None], patch_size)[:, 0] / STEP
        codes = F.one_hot(mean.round().long().clamp(0, WIDTH - 1), WIDTH).flatten(1, 2).float()
        return torch.stack([codes, codes * scale])

    return Planted(plant)


def blocks(count: int, cells: int, cell: int, random: np.random.Generator, most: int = WIDTH) -> NDArray[np.int64]:
    """Numbers below `most` that are constant on cells, [count, cells · cell, cells · cell]."""
    drawn = random.integers(0, most, (count, cells, cells))
    return drawn.repeat(cell, axis=1).repeat(cell, axis=2)


def seen(
    backbone: torch.nn.Module,
    pixels: NDArray[np.uint8],
    reads: frozenset[str],
    patch_size: int,
    wholes: list[Whole] | None = None,
    side: int | None = None,
    **targets: Any,
) -> SeenSplit:
    """Images as a backbone sees them; with `wholes` the data set has images of other sizes besides."""
    image_size = side or pixels.shape[1]
    model = resolve({"model.size": "nano", "model.patch_size": patch_size, "model.image_size": image_size}).model
    open_whole: Callable[[str], Whole] | None = None if wholes is None else lambda path: wholes[int(path)]
    paths = None if wholes is None else [str(number) for number in range(len(wholes))]
    split = Split(pixels, targets, paths, open_whole)
    data = DataSet("painted", ("one",), tuple(targets), split, split, split, "0" * 16, (), NAMES, max_depth=8.0)
    return SeenSplit(backbone, model, data, "train", np.arange(len(pixels)), torch.device("cpu"), reads)


def context(seed: int = 0) -> Context:
    """Of a trial that knows its seed alone."""
    return Context(Streams(seed), None, "deit3")
