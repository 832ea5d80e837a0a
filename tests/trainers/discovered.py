"""Images of bright rectangles on dark ground with their boxes, and a backbone whose features say what is bright."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.trainers.planted import levels
from trainers.config import ObjectDiscoveryConfig, resolve
from trainers.data import DataSet, Split, Whole
from trainers.probes import Context
from trainers.probes.object_discovery import ObjectDiscovery
from trainers.probes.seen import SeenSplit
from trainers.streams import Streams
from trainers.vit import Tokens

PATCH, SIDE = 8, 64
OBJECT, GROUND, MEAN = torch.eye(4)[0], torch.tensor([-0.5, 1.0, 0.0, 0.0]), torch.eye(4)[2]
STRAY = 100.0  # of class token and registers, which must not enter


class Bright(nn.Module):
    """Keys are OBJECT for bright patches, else GROUND; queries are all alike, values the keys with a shared MEAN.

    Args:
        deleted: patches whose features are NaN.
    """

    embed_dim, num_registers = 4, 2

    def __init__(self, deleted: Sequence[int] = ()) -> None:
        super().__init__()
        self._deleted = list(deleted)
        self.sizes: list[tuple[int, ...]] = []  # of the images that it has seen
        self.corners: list[float] = []  # red in the last pixel of the first image of each batch, normalised

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        count = images.shape[2] * images.shape[3] // PATCH**2
        return Tokens(
            images.new_zeros(len(images), 4),
            images.new_zeros(len(images), 2, 4),
            images.new_zeros(len(images), count, 4),
        )

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        yield from (self.tokens(images), self.tokens(images))

    def attention(self, images: Tensor, layer: int) -> Tensor:
        raise NotImplementedError

    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        assert layer == 1
        self.sizes.append(tuple(images.shape))
        self.corners.append(float(images[0, 0, -1, -1]))
        means_BN = nn.functional.avg_pool2d(levels(images)[:, None], PATCH).flatten(1)
        keys = torch.where(means_BN[..., None] > 128, OBJECT, GROUND)
        keys[:, self._deleted] = torch.nan
        stray = torch.full((len(images), 3, 4), STRAY)
        found = (torch.full_like(keys, 1.0), keys, keys + MEAN)
        # Two heads of two channels.
        query, key, value = (torch.cat([stray, of], dim=1).unflatten(2, (2, 2)).transpose(1, 2) for of in found)
        return query, key, value


def pictured(boxes: Sequence[Sequence[float]], height: int = SIDE, width: int = SIDE) -> NDArray[np.uint8]:
    """Images of 20 with 240 inside of a box each; no box where it is empty."""
    drawn = np.full((len(boxes), height, width, 3), 20, np.uint8)
    for image, (x0, y0, x1, y1) in zip(drawn, boxes, strict=True):
        image[int(y0) : int(y1), int(x0) : int(x1)] = 240
    return drawn


def rectangles(count: int, seed: int) -> list[list[float]]:
    """Boxes of whole patches, 2 to 4 patches high and wide."""
    rng = np.random.Generator(np.random.PCG64(seed))
    found = []
    for _ in range(count):
        width, height = rng.integers(2, 5, 2) * PATCH
        x, y = (int(rng.integers(0, (SIDE - length) // PATCH + 1)) * PATCH for length in (width, height))
        found.append([x, y, x + int(width), y + int(height)])
    return found


def split(boxes: Sequence[Sequence[float]], truth: Sequence[Sequence[Sequence[float]]] | None = None) -> Split:
    """Images of `boxes`; true boxes are the same, unless others are given for each image."""
    of_images = [[box] for box in boxes] if truth is None else truth
    most = max(1, *(len(of) for of in of_images))
    table = np.full((len(boxes), most, 5), np.nan, np.float32)
    for row, of in zip(table, of_images, strict=True):
        for number, box in enumerate(of):
            row[number] = (*box, 3)
    return Split(pictured(boxes), {"boxes": table})


def whole(boxes: Sequence[Sequence[float]], height: int, width: int) -> Split:
    """The same, at a size of their own; the squares are of no use."""
    pixels = pictured(boxes, height, width)

    def opened(path: str) -> Whole:
        index = int(path)
        return Whole(pixels[index], {"boxes": np.array([[*boxes[index], 3.0]], np.float32)})

    squares = Split(np.zeros((len(boxes), SIDE, SIDE, 3), np.uint8), split(boxes).targets)
    return Split(squares.images, squares.targets, tuple(str(index) for index in range(len(boxes))), opened)


def data(validation: Split, test: Split, train: Split | None = None, **facts: Any) -> DataSet:
    return DataSet("planted", ("one",), ("boxes",), train or validation, validation, test, "0" * 16, **facts)


def probe(method: str = "dinov2", **settings: Any) -> ObjectDiscovery:
    given = {"biases": (-0.5, 0.0), "pictures": 0} | settings
    return ObjectDiscovery(ObjectDiscoveryConfig(**given), Context(Streams(0), None, method))


def see(found: DataSet, which: str, asked: ObjectDiscovery, backbone: nn.Module, side: int = SIDE) -> SeenSplit:
    model = resolve({"model.size": "nano", "model.patch_size": PATCH, "model.image_size": side}).model
    indices = np.arange(len(getattr(found, which)))
    return SeenSplit(backbone, model, found, which, indices, torch.device("cpu"), asked.reads)
