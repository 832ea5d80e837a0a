"""Block masks of patches, as iBOT and DINOv2 draw them: how many patches of each crop, and which.

Source: facebookresearch/dinov2:dinov2/data/masking.py (blocks), dinov2/data/collate.py (how many).
Shapes: C crops, N = side² patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray

MIN_PATCHES = 4  # the smallest area that is aimed at, unless fewer are left to mask
ASPECT = (0.3, 1 / 0.3)  # height / width of a block, uniform on a logarithmic scale
_LOG_ASPECT = (math.log(ASPECT[0]), math.log(ASPECT[1]))
ATTEMPTS = 10  # at placing a block; then the mask stays as it is, so that one in ten falls short


def requested_counts(
    crops: int, patches: int, probability: float, ratio: tuple[float, float], generator: np.random.Generator
) -> NDArray[np.int64]:
    """How many patches each crop should lose, int64 [C], in random order.

    Exactly int(C · probability) crops are masked. Their shares are stratified: the range `ratio` is cut into as many
    equal slices, and one share is drawn in each. Single precision, as in the official code, so that equal shares are
    cut to equal counts.
    """
    masked = int(crops * probability)
    edges = torch.linspace(*ratio, masked + 1)
    places = torch.from_numpy(generator.random(masked, dtype=np.float32))
    counts = np.zeros(crops, dtype=np.int64)
    counts[:masked] = (patches * (edges[:-1] + (edges[1:] - edges[:-1]) * places)).long().numpy()
    return generator.permutation(counts)


class BlockMasks:
    """Draws masks of a square grid of patches as unions of rectangles.

    A mask is an integer whose bit N is patch N in raster order, so that placing a block costs a few operations on
    integers. Half of the patches at the most are in one block; the side is halved and rounded down, as officially.

    Args:
        side: patches along each side of a crop.
        most: patches of the largest block; None for what the official training takes.
    """

    def __init__(self, side: int, most: int | None = None) -> None:
        self.side = side
        self.most = (side // 2) * side if most is None else most
        row = [(1 << width) - 1 for width in range(side)]
        self._corner = [  # [height][width]: the block in the upper left corner
            [sum(bits << (line * side) for line in range(height)) for bits in row] for height in range(side)
        ]

    def __call__(self, counts: NDArray[np.int64], seeds: Iterable[int]) -> NDArray[np.bool_]:
        """Masks bool [C, N] of at most `counts` [C] patches, each crop's from its own seed."""
        patches = self.side**2
        size = -(-patches // 8)
        wanted = zip(counts.tolist(), seeds, strict=True)
        drawn = [self.draw(count, Random(int(seed))) if count else 0 for count, seed in wanted]
        packed = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in drawn), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(len(drawn), size), axis=1, count=patches, bitorder="little")
        return bits.view(np.bool_)

    def draw(self, count: int, random: Random) -> int:
        """One mask of at most `count` patches."""
        mask, left = 0, count
        while left > 0:
            enlarged = self._with_block(mask, min(left, self.most), random.random)
            if enlarged == mask:
                break
            mask = enlarged
            left = count - mask.bit_count()
        return mask

    def _with_block(self, mask: int, most: int, uniform: Callable[[], float]) -> int:
        """`mask` and a block that adds 1 to `most` patches to it, or `mask` where every attempt failed."""
        side, (low, high) = self.side, _LOG_ASPECT
        for _ in range(ATTEMPTS):
            area = MIN_PATCHES + (most - MIN_PATCHES) * uniform()
            aspect = math.exp(low + (high - low) * uniform())
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < side and width < side:
                top, left = int(uniform() * (side - height + 1)), int(uniform() * (side - width + 1))
                enlarged = mask | self._corner[height][width] << (top * side + left)
                if 0 < (enlarged ^ mask).bit_count() <= most:
                    return enlarged
        return mask
