"""Statistics over channels of the residual stream: massive activations, kurtosis, max-median ratio (paper.md §5, 7).

Shapes: B images, T tokens, D width, n = B · T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from trainers import vit
from trainers.measurement import Finding, Metric, Statistic, Subject

# Sun et al. 2024, "Massive Activations in Large Language Models": above 100 and about 1,000 times the median.
MASSIVE = 100.0
MASSIVE_RATIO = 1_000.0
TOP = 3  # largest activations that are kept


class Channels:
    """Sums over the tokens of one layer, batch by batch; exact but for `median`, which averages over batches."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self._squares_D = torch.zeros(width, dtype=torch.float64, device=device)
        self._top = torch.zeros(TOP, dtype=torch.float64, device=device)
        self._massive = torch.zeros((), dtype=torch.int64, device=device)
        self._ratios = torch.zeros((), dtype=torch.float64, device=device)
        self._medians = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens = self._images = 0

    def update(self, x_BTD: Tensor) -> None:
        """Add the tokens of one batch. A batch's median |x| is over all of its tokens and channels."""
        size_nD = x_BTD.detach().flatten(0, -2).double().abs()
        count = len(size_nD)
        median = size_nD.median()
        self._squares_D += size_nD.square().sum(dim=0)
        self._top = torch.cat([self._top, size_nD.flatten().topk(min(TOP, size_nD.numel())).values]).topk(TOP).values
        self._massive += ((size_nD > MASSIVE) & (size_nD >= MASSIVE_RATIO * median)).sum()
        self._ratios += (size_nD.amax(dim=1) / size_nD.median(dim=1).values).sum()
        self._medians += median * count
        self._tokens += count
        self._images += len(x_BTD)

    def result(self) -> dict[str, float]:
        """Statistics by name; ratios to a median of 0 are infinite.

        top1 … top3      the largest |x|
        median           of |x|
        massive          activations above 100 and above 1,000 medians, per image
        kurtosis         mean(s⁴) / mean(s²)² over channels, s the root mean square of a channel: 1 where all are equal,
                         D where one channel holds everything (He et al. 2024, arXiv 2405.19279)
        max_over_median  mean over tokens of max|x| / median|x| (the same)
        """
        square = self._squares_D / self._tokens
        top = {f"top{rank}": value for rank, value in enumerate(self._top.tolist(), start=1)}
        return top | {
            "median": float(self._medians) / self._tokens,
            "massive": float(self._massive) / self._images,
            "kurtosis": float(square.square().mean() / square.mean().square()),
            "max_over_median": float(self._ratios) / self._tokens,
        }


def measure(subject: Subject, settings: None) -> Iterator[Finding]:
    """`channels/…` of every layer over the detail images; of the last layer as metrics."""
    backbone = cast(vit.Backbone, subject.backbone)
    layers: list[Channels] = []
    for images in subject.batches(subject.probe_images(subject.tokens.detail_images)):
        for layer, tokens in enumerate(backbone.residuals(images)):
            if layer == len(layers):
                layers.append(Channels(backbone.embed_dim, subject.device))
            layers[layer].update(vit.together(tokens))
    for layer, channels in enumerate(layers):
        found = channels.result()
        yield from (Statistic(f"channels/{name}", value, layer) for name, value in found.items())
    for name in ("kurtosis", "max_over_median", "massive"):
        yield Metric(f"channels/last/{name}", found[name])
