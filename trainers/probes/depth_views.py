"""Whole images for depth: random training crops, and which pixels of test images count, as DINOv2 has them for NYU.

Source: dinov2's NYU configuration (its DPT variant; the linear one differs in the head alone) and
zhyever/Monocular-Depth-Estimation-Toolbox:depth/datasets/pipelines/transforms.py, depth/datasets/nyu.py.
Shapes: H × W px of an image; px of NYU are those of 480 × 640, and other sizes are cut in proportion.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from trainers.augment import standardise
from trainers.data import Whole

NYU_SIZE = (480, 640)
TRAINING_CUT = (slice(45, 472), slice(43, 608))  # without the white margin
EIGEN_CUT = (slice(45, 471), slice(41, 601))  # that test pixels come from
DEGREES = 2.5
GAMMA, BRIGHTNESS, COLOR = (0.9, 1.1), (0.75, 1.25), (0.9, 1.1)


def cut(height: int, width: int, of_nyu: tuple[slice, slice]) -> tuple[slice, slice]:
    """Rows and columns of an image of H × W px that `of_nyu` is of one of NYU."""
    rows, columns = (
        slice(part.start * length // full, part.stop * length // full)
        for part, length, full in zip(of_nyu, (height, width), NYU_SIZE, strict=True)
    )
    return rows, columns


def inputs(whole: Whole) -> tuple[Tensor, Tensor]:
    """Pixels float32 [3, H, W], 0 … 255, and depths float32 [H, W]."""
    pixels = torch.from_numpy(whole.pixels.copy()).permute(2, 0, 1).float()
    return pixels, torch.from_numpy(np.array(whole.targets["depth"], np.float32))


def training_crop(
    whole: Whole, size: tuple[int, int], nyu: bool, random: np.random.Generator, normalization: str
) -> tuple[Tensor, Tensor]:
    """A random view: normalised float32 [3, *size] and its depths float32 [*size]; what is padded is 0.

    Cut, turned by up to 2.5° and mirrored with probability one half each, cropped, its colours changed.
    """
    pixels, depth = inputs(whole)
    if nyu:
        rows, columns = cut(depth.shape[0], depth.shape[1], TRAINING_CUT)
        pixels, depth = pixels[:, rows, columns], depth[rows, columns]
    if random.random() < 0.5:
        degrees = random.uniform(-DEGREES, DEGREES)
        pixels = tv.rotate(pixels, degrees, InterpolationMode.BILINEAR)
        depth = tv.rotate(depth[None], degrees, InterpolationMode.NEAREST)[0]
    if random.random() < 0.5:
        pixels, depth = pixels.flip(2), depth.flip(1)
    top, left = (
        int(random.integers(0, max(length - most, 0) + 1)) for length, most in zip(depth.shape, size, strict=True)
    )
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    pixels, depth = colored(pixels[:, rows, columns], random), depth[rows, columns]
    pixels = standardise(pixels[None].contiguous(), normalization=normalization)[0]
    missing = (0, size[1] - depth.shape[1], 0, size[0] - depth.shape[0])
    return F.pad(pixels, missing), F.pad(depth, missing)


def colored(pixels: Tensor, random: np.random.Generator) -> Tensor:
    """The toolbox's ColorAug of [3, H, W], with probability one half; it takes powers of 0 … 255, not of 0 … 1."""
    if random.random() >= 0.5:
        return pixels
    powered = pixels ** random.uniform(*GAMMA)
    factors = random.uniform(*BRIGHTNESS) * random.uniform(*COLOR, size=3)
    return (powered * torch.from_numpy(factors).float()[:, None, None]).clamp(0, 255)
