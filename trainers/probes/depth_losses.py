"""Losses of depth in the logarithm: the scale-invariant loss and the gradient loss of DINOv2's depth heads.

Both compare log(depth + 0.001) at valid pixels alone. Shapes: B images of H × W px.
Source: facebookresearch/dinov2:dinov2/eval/depth/models/losses/{sigloss,gradientloss}.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-3  # m, added before the logarithm
MEAN_WEIGHT = 0.15
STRIDES = (1, 2, 4, 6)

_TINY = 1e-12  # of a variance, below which the root's slope is left out: it would be infinite


def valid_for_loss(depth: Tensor, max_depth: float) -> Tensor:
    """Where a true depth is known and can be learned: 0 < depth ≤ max_depth; NaN and infinity are not known."""
    return (depth > 0) & (depth <= max_depth)


def sig_loss(predicted: Tensor, depth: Tensor, valid: Tensor, *, warm_up: bool = False) -> Tensor:
    """√(var(g) + 0.15 · mean(g)²) of g = log predicted − log depth over all valid pixels; the variance is unbiased.

    Args:
        predicted: float32 of any shape, positive.
        depth: true depths.
        valid: bool, which pixels count; where none does, the loss has no slope.
        warm_up: √(0.15 · mean(g)²) instead, which fits the mean of all depths alone.
    """
    g = _log_difference(predicted, depth, valid)
    count = valid.sum()
    mean = g.sum() / count.clamp(min=1)
    if warm_up:
        return math.sqrt(MEAN_WEIGHT) * mean.abs()
    variance = torch.where(valid, g - mean, 0.0).square().sum() / (count - 1).clamp(min=1)
    return (variance + MEAN_WEIGHT * mean**2).clamp(min=_TINY).sqrt()


def gradient_loss(predicted: Tensor, depth: Tensor, valid: Tensor, axes: tuple[int, int] = (-2, -1)) -> Tensor:
    """How much the error of log depth differs between pixels two apart, over four strides.

    For each stride of 1, 2, 4, 6 in both axes: |g[j] − g[j + 2]| along either axis where both are valid, summed and
    divided by how many pixels are valid.

    Args:
        predicted, depth, valid: as in `sig_loss`.
        axes: rows and columns, which is what the loss means. The official code slices axes (0, 1) of [B, 1, H, W]:
            images and channels. Of no more than two images, as each GPU has there, this is always 0.
    """
    g = _log_difference(predicted, depth, valid)
    total = predicted.sum() * 0.0
    for stride in STRIDES:
        at = [slice(None)] * g.ndim
        for axis in axes:
            at[axis] = slice(None, None, stride)
        part, mask = g[tuple(at)], valid[tuple(at)]
        apart = sum(_two_apart(part, mask, axis) for axis in axes)
        total = total + apart / mask.sum().clamp(min=1)
    return total


def _log_difference(predicted: Tensor, depth: Tensor, valid: Tensor) -> Tensor:
    """log predicted − log depth, 0 where it is not valid."""
    known = torch.where(valid, depth, 1.0)
    return torch.where(valid, torch.log(predicted + EPS) - torch.log(known + EPS), 0.0)


def _two_apart(g: Tensor, valid: Tensor, axis: int) -> Tensor:
    length = max(0, g.shape[axis] - 2)
    near, far = slice(0, length), slice(2, 2 + length)
    both = _along(valid, axis, near) & _along(valid, axis, far)
    return ((_along(g, axis, near) - _along(g, axis, far)).abs() * both).sum()


def _along(values: Tensor, axis: int, part: slice) -> Tensor:
    at = [slice(None)] * values.ndim
    at[axis] = part
    return values[tuple(at)]
