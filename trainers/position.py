"""Resamples a learned position embedding to another grid of patches, as the official DINO and DINOv2 code does."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def interpolate_position(pos_embed: Tensor, height: int, width: int, *, antialias: bool, offset: float) -> Tensor:
    """`pos_embed` [1, 1 + g², D] for a grid of height × width patches, as [1, 1 + height · width, D].

    Bicubic; the first row belongs to the class token and stays. An unchanged grid returns `pos_embed` itself. An offset
    of 0 asks for the new size. Any other passes the scale factors (height + offset) / g and (width + offset) / g,
    which then set where the embedding is sampled, and not only how often.
    Source: facebookresearch/dinov2:dinov2/models/vision_transformer.py, `interpolate_pos_encoding`.

    Args:
        pos_embed: learned on a square grid of side g.
        height: of the new grid, in patches.
        width: of the new grid, in patches.
        antialias: of `torch.nn.functional.interpolate`.
        offset: from 0 to below 1; 0.1 where the official code has none configured.

    Raises:
        ValueError: `pos_embed` does not belong to a square grid.
    """
    _, length, dim = pos_embed.shape
    side = math.isqrt(length - 1)
    if side * side != length - 1:
        raise ValueError(f"the position embedding has {length - 1} rows for patches; allowed: a square number")
    if (height, width) == (side, side):
        return pos_embed
    grid = pos_embed[:, 1:].float().reshape(1, side, side, dim).permute(0, 3, 1, 2)
    if offset:
        scale = ((height + offset) / side, (width + offset) / side)
        grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        grid = functional.interpolate(grid, size=(height, width), mode="bicubic", antialias=antialias)
    assert grid.shape[-2:] == (height, width), "scale factors give another size"
    patches = grid.permute(0, 2, 3, 1).reshape(1, height * width, dim).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], patches], dim=1)
