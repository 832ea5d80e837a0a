"""Stochastic depth: which images skip a residual branch, drawn outside of the blocks, and the sum that skips them.

Draws are made on the CPU for the images of all ranks, each rank uses those of its own, and they depend on neither
registers nor resolution. The rate is the same in all blocks, as in the official DeiT-III and DINOv2 (timm's would rise
with depth).
Shapes: L blocks, 2 branches of each (attention, MLP), B images of a group on this rank, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainers import distributed
from trainers.attention import Layout, pack, unpack


class Subset(NamedTuple):
    """What a block computes: rows int64 [2, k] of each group, per branch, and the factor of what the branches give."""

    rows: tuple[Tensor, ...]
    scale: float


Drop = Tensor | Subset | None  # of one block; a tensor holds a factor of each branch and image, or branch and token
Branch = Callable[[Tensor, Layout], Tensor]


def draw_factors(rate: float, depth: int, images: int, crops: int, generator: torch.Generator) -> Tensor:
    """Factors of every branch and image, [L, 2, B]: 0 where it is dropped, else 1 / (1 - rate)."""
    kept = torch.rand((depth, 2, images * distributed.world_size()), generator=generator) >= rate
    return _own_images(kept / (1 - rate), crops)


def draw_subsets(
    rate: float, group: int, depth: int, images: int, crops: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Rows int64 [L, 2, k] that are kept, rising, and the factor group / kept of what they give.

    Of every `group` consecutive images of a crop exactly max(int(group · (1 - rate)), 1) are kept.
    Source: facebookresearch/dinov2:dinov2/layers/block.py, `drop_add_residual_stochastic_depth`, which draws one
    subset of all images of a rank and resolution.

    Raises:
        ValueError: `group` does not divide this rank's images of a crop.
    """
    own = images // crops
    if own % group:
        raise ValueError(
            f"model.drop_path_group is {group}, which does not divide the {own} images of a crop on a rank"
        )
    kept = max(int(group * (1 - rate)), 1)
    scores = torch.rand((depth, 2, images * distributed.world_size()), generator=generator)
    order = _own_images(scores, crops).view(depth, 2, -1, group).argsort(dim=-1)
    chosen = order[..., :kept].sort(dim=-1).values + torch.arange(0, images, group)[:, None]
    return chosen.flatten(-2), group / kept


def _own_images(drawn: Tensor, crops: int) -> Tensor:
    """This rank's draws [..., B] of those of all ranks; a rank holds an equal share of each crop."""
    by_rank = drawn.view(*drawn.shape[:-1], crops, distributed.world_size(), -1)
    return by_rank[..., distributed.rank(), :].flatten(-2)


def factors_of_tokens(factors: Sequence[Tensor], shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Factors [L, 2, B] of each group as `add_branch` multiplies by them, [L, 2, B, 1, 1] or [L, 2, n, 1]."""
    if len(factors) == 1:
        return factors[0][..., None, None]
    repeated = [of_images.repeat_interleave(length, -1) for of_images, (_, length) in zip(factors, shapes, strict=True)]
    return torch.cat(repeated, dim=-1)[..., None]


def add_branch(streams: list[Tensor], branch: Branch, layout: Layout, drop: Drop, index: int) -> list[Tensor]:
    """The residual stream plus what `branch` (0 attention, 1 MLP) gives for it, after stochastic depth.

    Args:
        streams: one packed tensor of all groups; with a Subset x_BTD of each group, so that rows of images are chosen
            and added to without copying the others.
        branch: from a packed tensor and its layout to a tensor of that shape.
        layout: of all groups.
        drop: what is dropped in this block.
        index: of the branch.
    """
    if isinstance(drop, Subset):
        return _add_to_subset(streams, branch, layout, [rows[index] for rows in drop.rows], drop.scale)
    (x,) = streams
    added = branch(x, layout)
    return [x + (added if drop is None else drop[index].to(x.dtype) * added)]


def _add_to_subset(
    groups: list[Tensor], branch: Branch, layout: Layout, rows: list[Tensor], scale: float
) -> list[Tensor]:
    shapes = tuple((len(kept), x_BTD.shape[1]) for kept, x_BTD in zip(rows, groups, strict=True))
    chosen = [
        x_BTD.flatten(1).index_select(0, kept).view(-1, *x_BTD.shape[1:])
        for x_BTD, kept in zip(groups, rows, strict=True)
    ]
    added = unpack(branch(pack(chosen), Layout(shapes, layout.masks)), shapes)
    # Whole images as rows: adding token by token is ten times slower on a CPU.
    return [
        torch.index_add(x_BTD.flatten(1), 0, kept, new.flatten(1).to(x_BTD.dtype), alpha=scale).view_as(x_BTD)
        for x_BTD, kept, new in zip(groups, rows, added, strict=True)
    ]
