"""Metrics of depth, image by image, as the toolbox has them that DINOv2's depth code derives from.

Source: zhyever/Monocular-Depth-Estimation-Toolbox:depth/core/evaluation/metrics.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

DELTA = 1.25  # delta1, delta2, delta3: within a factor of this, its square, its cube


def valid_for_metrics(depth: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Which true depths count: min_depth < depth < max_depth, so that NaN, infinity and 0 never do."""
    return (depth > min_depth) & (depth < max_depth)


def per_image(predicted: Tensor, depth: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Metrics of each image over its valid pixels, float64 [B]; NaN where an image has none.

    rmse, abs_rel (mean of |error| / depth), sq_rel (mean of error² / depth), rmse_log, log_10 (mean |log10 ratio|),
    silog (100 · standard deviation of the log ratio) and delta1, delta2, delta3 (shares within 1.25, 1.25², 1.25³).

    Args:
        predicted: positive, [B, H, W].
        depth: true depths, [B, H, W].
        valid: bool [B, H, W].
    """
    predicted = torch.where(valid, predicted.double(), 1.0)
    depth = torch.where(valid, depth.double(), 1.0)
    count = valid.flatten(1).sum(dim=1).double()

    def mean(values: Tensor) -> Tensor:  # 0 / 0 is NaN, as wanted
        return torch.where(valid, values, 0.0).flatten(1).sum(dim=1) / count

    error = predicted - depth
    log_ratio = predicted.log() - depth.log()
    ratio = torch.maximum(predicted / depth, depth / predicted)
    variance = mean(log_ratio**2) - mean(log_ratio) ** 2
    return {
        "rmse": mean(error**2).sqrt(),
        "abs_rel": mean(error.abs() / depth),
        "sq_rel": mean(error**2 / depth),
        "rmse_log": mean(log_ratio**2).sqrt(),
        "log_10": mean((predicted.log10() - depth.log10()).abs()),
        "silog": 100.0 * variance.clamp(min=0.0).sqrt(),  # rounding may leave it below 0
        **{f"delta{power}": mean((ratio < DELTA**power).double()) for power in (1, 2, 3)},
    }
