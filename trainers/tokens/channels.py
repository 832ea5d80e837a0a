"""Statistics over channels of the residual stream: massive activations, kurtosis, max-median ratio (paper.md §5, 7).

Shapes: B images, N patches, T = class token + R + N tokens, D width, K kinds of token (class, each register, patches).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers import vit
from trainers.device import moved
from trainers.measurement import DETAIL_CHUNK, Finding, Metric, Statistic, Subject
from trainers.tokens.norms import token_kinds

# Sun et al. 2024, "Massive Activations in Large Language Models" (arXiv 2402.17762): above 100, and at least about
# 1,000 times the median of the hidden state, which is that of one input.
MASSIVE = 100.0
MASSIVE_RATIO = 1_000.0
TOP = 3  # largest activations that are kept


class Channels:
    """Statistics of one layer, added batch by batch on the device.

    All are means over images or over tokens, so that they do not depend on how images fall into batches but for the
    rounding of sums in float64. A median of an even number of values is the lower of the two in the middle, as in the
    code of the sources.

    Args:
        kinds: of token, in their order along T; the last is that of all patches.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = tuple(kinds)
        self._squares: list[Tensor] = []  # of each batch [D], summed over its tokens
        self._images: list[Tensor] = []  # of each batch [B, numbers of an image]
        self._ratios: list[Tensor] = []  # of each batch their sum, and of how many tokens

    @property
    def names(self) -> list[tuple[str, str | None]]:
        """What `values` holds: name, and kind of token or None where it is of all tokens.

        kurtosis         mean(s⁴) / mean(s²)² over channels, s the root mean square of a channel over tokens, not
                         centred: 1 where all are equal, D where one channel holds everything (He et al. 2024,
                         arXiv 2405.19279, equation 1; their code reports this minus 1, of centred tokens)
        max_over_median  mean over tokens of max|x| / median|x| (the same, equation 2); infinite where a median is 0
        massive          activations above 100 and at least 1,000 times the image's median, per image
        median           of an image's |x|, mean over images, as locuslab/massive-activations:main_vit.py
        top1 … top3      the largest |x| of an image, mean over images (the same)
        """
        of_all = ("kurtosis", "max_over_median", "massive", "median", *(f"top{rank + 1}" for rank in range(TOP)))
        kinds = [(name, kind) for name in ("massive", "top1") for kind in self._kinds]
        return [*((name, None) for name in of_all), *kinds]

    def update(self, x_BTD: Tensor, padded_BN: NDArray[np.bool_] | None = None) -> None:
        """Add the tokens of some images, but for patches that are padding and tokens that are NaN, which were deleted.

        bf16 and fp16 are exact in float32.
        """
        known_BTD = x_BTD.detach().float().abs()
        left_out_BT1 = known_BTD.amax(dim=2, keepdim=True).isnan()
        if padded_BN is not None and padded_BN.any():
            left_out_BT1 = left_out_BT1 | self._mask(padded_BN, x_BTD.device)
        size_BTD = known_BTD.masked_fill(left_out_BT1, 0.0)  # neither large nor counted
        known_BTD.masked_fill_(left_out_BT1, torch.nan)
        median_B = known_BTD.flatten(1).nanmedian(dim=1).values
        bound_B11 = (MASSIVE_RATIO * median_B)[:, None, None]
        massive_BT = ((size_BTD > MASSIVE) & (size_BTD >= bound_B11)).sum(dim=2)
        largest_BT = size_BTD.amax(dim=2)
        ratio_BT = largest_BT.double() / known_BTD.nanmedian(dim=2).values.double()
        has_ratio_BT = largest_BT != 0  # not of a token of zeros, nor of one that is left out
        self._ratios.append(torch.stack([torch.where(has_ratio_BT, ratio_BT, 0.0).sum(), has_ratio_BT.sum()]))
        self._squares.append(torch.linalg.vector_norm(size_BTD, dim=(0, 1), dtype=torch.float64).square())
        of_all = [massive_BT.sum(dim=1), median_B, *size_BTD.flatten(1).topk(TOP, dim=1).values.unbind(dim=1)]
        single = len(self._kinds) - 1
        of_kinds = [*massive_BT[:, :single].unbind(dim=1), massive_BT[:, single:].sum(dim=1)]
        of_kinds += [*largest_BT[:, :single].unbind(dim=1), largest_BT[:, single:].amax(dim=1)]
        self._images.append(torch.stack([value_B.double() for value_B in (*of_all, *of_kinds)], dim=1))

    def _mask(self, padded_BN: NDArray[np.bool_], device: torch.device) -> Tensor:
        """Which tokens are left out, [B, T, 1]."""
        others = np.zeros((len(padded_BN), len(self._kinds) - 1), np.bool_)
        return moved(torch.from_numpy(np.concatenate([others, padded_BN], axis=1)), device)[..., None]

    def values(self) -> Tensor:
        """The statistics that `names` names, float64 on the device; NaN where one is undefined."""
        square_D = torch.stack(self._squares).sum(dim=0)  # over how many tokens makes no difference
        kurtosis = square_D.square().mean() / square_D.mean().square()
        ratio, counted = torch.stack(self._ratios).sum(dim=0)
        return torch.cat([torch.stack([kurtosis, ratio / counted]), torch.cat(self._images).mean(dim=0)])


def measure(subject: Subject, settings: None) -> Iterator[Finding]:
    """`channels/…` of every layer over the detail images; of the last layer as metrics. Absent where not finite."""
    backbone = cast(vit.Backbone, subject.backbone)
    pixels = subject.probe_images(subject.tokens.detail_images)
    padded_BN = subject.padding(subject.data.validation, np.arange(len(pixels)))
    layers: list[Channels] = []
    seen = 0
    for images in subject.batches(pixels, DETAIL_CHUNK):
        padded = None if padded_BN is None else padded_BN[seen : seen + len(images)]
        seen += len(images)
        for layer, tokens in enumerate(backbone.residuals(images)):
            if layer == len(layers):
                layers.append(Channels(token_kinds(subject.num_registers, tokens.cls_BD is not None)))
            layers[layer].update(vit.together(tokens), padded)
    for layer, values in enumerate(torch.stack([channels.values() for channels in layers]).tolist()):
        found = {place: value for place, value in zip(layers[layer].names, values, strict=True) if math.isfinite(value)}
        yield from (Statistic(f"channels/{name}", value, layer, None, kind) for (name, kind), value in found.items())
    for name in ("kurtosis", "max_over_median", "massive"):
        if (name, None) in found:
            yield Metric(f"channels/last/{name}", found[name, None])
