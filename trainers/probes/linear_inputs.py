"""What the heads of the linear probe read of features: class tokens of the last blocks, and the last one's mean patch.

Source: facebookresearch/dinov2:dinov2/eval/linear.py, create_linear_input. All heads read columns of one wide input:
class tokens of the last blocks, the last block last, then the mean patch.
Shapes: n images, B batch, W columns of the wide input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.probes.classification import Features

_SMALL = 2**28  # bytes of wide inputs that are laid out once for all images, so that a batch is one gather

ReadWide = Callable[[Tensor, int], Tensor]  # positions and the most blocks that a head reads → float32 [B, W]


@dataclass(frozen=True)
class Input:
    """What the heads of one family and number of blocks read: some columns of the wide input."""

    family: str
    blocks: int
    columns: slice

    @property
    def purpose(self) -> str:
        """Of the stream that draws the weights."""
        return f"probe/{self.family}" + ("" if self.blocks == 1 else f"/{self.blocks}")


def inputs_of(features: Features, blocks: Sequence[int]) -> list[Input]:
    """What the heads read, by family and number of blocks; without class token there is only the mean patch.

    A backbone of fewer blocks than asked for gives all that it has.
    """
    patch = features.mean_patch.shape[1]
    if features.cls is None:
        return [Input("linear_mean_patch", 1, slice(0, patch))]
    width = features.cls.shape[1]
    there = 1 if features.cls_blocks is None else features.cls_blocks.shape[1]
    counts = list(dict.fromkeys(min(count, there) for count in blocks))
    end = max(counts) * width
    ends = {"linear": end, "linear_mean_patch": end + patch}
    return [Input(family, count, slice(end - count * width, last)) for family, last in ends.items() for count in counts]


def wide(features: Features, blocks: int) -> Tensor:
    """Class tokens of the last so many blocks and the last one's mean patch, [B, W], where the classes are."""
    parts = [features.mean_patch]
    if features.cls is not None:
        parts = [features.cls if blocks == 1 else features.cls_blocks[:, -blocks:].flatten(1), *parts]  # type: ignore[index]
    return torch.cat([part.to(features.classes.device) for part in parts], dim=1)


def rows_of(features: Features) -> ReadWide:
    """Wide inputs of images by their positions."""
    whole: dict[int, Tensor] = {}

    def rows(positions: Tensor, blocks: int) -> Tensor:
        if not whole:
            one = wide(features.at(positions[:1]), blocks)
            if one.nbytes * len(features) > _SMALL:
                return wide(features.at(positions), blocks)
            whole[blocks] = wide(features, blocks)
        return whole[blocks][positions]

    return rows
