"""Whole images for segmentation: random training crops, and windows of test images, as DINOv2 has them for ADE20k.

Source: the configuration of dinov2's linear ADE20k evaluation (franchesoni/cheapseg:configs/dinov2/
original_dinov2_vitb14_ade20k_linear_config.py) and open-mmlab/mmsegmentation:mmseg/datasets/pipelines/transforms.py,
mmseg/models/segmentors/encoder_decoder.py. Different here: contrast and hue are changed on values that are not rounded
in between. Shapes: H × W px of an image, S side of crops and windows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from trainers.augment import standardise
from trainers.data import IGNORED, Whole

SCALES = (0.5, 2.0)  # shorter side of a training image, as a multiple of S
MOST_OF_ONE_CLASS = 0.75  # share of a crop's pixels that count; a crop with more is drawn again
DRAWS = 11  # the first, and ten more of which the last is taken as it is
BRIGHTNESS = 32.0  # most that is added, of 255
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18 / 180  # most of a turn


def pixels_of(whole: Whole) -> Tensor:
    """float32 [3, H, W], 0 … 255."""
    return torch.from_numpy(whole.pixels.copy()).permute(2, 0, 1).float()


def scaled(pixels: Tensor, shorter: int) -> Tensor:
    """An image [3, H, W] whose shorter side is `shorter`; bilinear without antialiasing, as OpenCV does it there."""
    factor = shorter / min(pixels.shape[1:])
    size = [max(1, int(length * factor + 0.5)) for length in pixels.shape[1:]]
    return F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]


def training_crop(whole: Whole, side: int, random: np.random.Generator, normalization: str) -> tuple[Tensor, Tensor]:
    """A random view: normalised float32 [3, S, S] and its classes uint8 [S, S]; what is padded is 0 and IGNORED."""
    pixels = scaled(pixels_of(whole), max(1, round(side * random.uniform(*SCALES))))
    labels = torch.from_numpy(np.array(whole.targets["segmentation"], np.uint8))
    labels = F.interpolate(labels[None, None], size=pixels.shape[1:], mode="nearest")[0, 0]
    rows, columns = _crop(labels, side, random)
    pixels, labels = pixels[:, rows, columns], labels[rows, columns]
    if random.random() < 0.5:
        pixels, labels = pixels.flip(2), labels.flip(1)
    pixels = standardise(distorted(pixels, random)[None].contiguous(), normalization=normalization)[0]
    missing = (0, side - pixels.shape[2], 0, side - pixels.shape[1])
    return F.pad(pixels, missing), F.pad(labels, missing, value=IGNORED)


def _crop(labels: Tensor, side: int, random: np.random.Generator) -> tuple[slice, slice]:
    """Rows and columns of a window in which no class takes too much, if one is found."""
    for _ in range(DRAWS):
        top, left = (int(random.integers(0, max(length - side, 0) + 1)) for length in labels.shape)
        rows, columns = slice(top, top + side), slice(left, left + side)
        counts = torch.bincount(labels[rows, columns].flatten(), minlength=256)
        counts[IGNORED] = 0
        if counts.count_nonzero() > 1 and counts.max() / counts.sum() < MOST_OF_ONE_CLASS:
            break
    return rows, columns


def distorted(pixels: Tensor, random: np.random.Generator) -> Tensor:
    """mmsegmentation's PhotoMetricDistortion of [3, H, W], 0 … 255: each change with probability one half."""
    if random.random() < 0.5:
        pixels = (pixels + random.uniform(-BRIGHTNESS, BRIGHTNESS)).clamp(0, 255)
    contrast_first = random.random() < 0.5
    if contrast_first:
        pixels = _contrast(pixels, random)
    if random.random() < 0.5:
        pixels = saturated(pixels, random.uniform(*SATURATION))
    if random.random() < 0.5:
        pixels = tv.adjust_hue(pixels / 255, random.uniform(-HUE, HUE)).clamp(0, 1) * 255
    return pixels if contrast_first else _contrast(pixels, random)


def _contrast(pixels: Tensor, random: np.random.Generator) -> Tensor:
    return (pixels * random.uniform(*CONTRAST)).clamp(0, 255) if random.random() < 0.5 else pixels


def saturated(pixels: Tensor, factor: float) -> Tensor:
    """Pixels whose saturation in HSV is multiplied, up to 1: hue and value, the largest channel, stay."""
    value, least = pixels.amax(dim=0), pixels.amin(dim=0)
    saturation = (value - least) / value.clamp(min=1e-6)
    most = torch.where(saturation > 0, (1 / saturation.clamp(min=1e-6)).clamp(max=factor), 1.0)
    return value - (value - pixels) * most


def windows(height: int, width: int, side: int, stride: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of windows that cover an image, the last of a row or column ending at its edge."""
    for y in _starts(height, side, stride):
        for x in _starts(width, side, stride):
            yield slice(y, min(y + side, height)), slice(x, min(x + side, width))


def _starts(length: int, side: int, stride: int) -> list[int]:
    count = max(length - side + stride - 1, 0) // stride + 1
    return [max(0, min(i * stride, length - side)) for i in range(count)]


def by_windows(image: Tensor, side: int, stride: int, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits [K, H, W] of a normalised image [3, H, W]: the mean over all windows that a pixel lies in.

    Args:
        logits_of: logits [1, K, h, w] of a window [1, 3, h, w].
    """
    total: Tensor | None = None
    count = image.new_zeros(image.shape[1:])
    for rows, columns in windows(image.shape[1], image.shape[2], side, stride):
        found = logits_of(image[None, :, rows, columns])[0]
        if total is None:
            total = found.new_zeros(len(found), *image.shape[1:])
        total[:, rows, columns] += found
        count[rows, columns] += 1
    assert total is not None, "an image has a window"
    return total / count
