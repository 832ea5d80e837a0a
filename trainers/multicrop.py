"""Multi-crop augmentation of DINO and DINOv2, in batches on the device with parameters of every crop's own.

Source: facebookresearch/dino:main_dino.py and facebookresearch/dinov2:dinov2/data/augmentations.py,
`DataAugmentationDINO`. Each crop: random resized crop, horizontal flip, colour jitter, grayscale, Gaussian blur,
solarize (of the second global crop alone), normalisation, in this order.
Shapes: B images, V crops of one size of each, n = V · B crops in crop-major order (crop 0 of all images, then crop 1),
S side of a crop.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from trainers import augment, color
from trainers.method_settings import CropsConfig
from trainers.methods import Batch, Views
from trainers.ragged import Images, sizes_of
from trainers.streams import Streams

NUM_GLOBAL = 2
JITTER_PROBABILITY = 0.8


class Blur(NamedTuple):
    """Probability of Gaussian blur of the first, second and local crops, and how far its taps reach, px."""

    first: float
    second: float
    local: float
    radius: int


DINO_BLUR = Blur(1.0, 0.1, 0.5, radius=color.BLUR_RADIUS)  # the Gaussian that PIL's box blurs approximate
# What dinov2/data/transforms.py does: its GaussianBlur(p) hands 1 - p to torchvision's RandomApply, which takes the
# probability of applying, not of leaving as is. So the first global crop is never blurred and the second mostly is.
DINOV2_BLUR = Blur(0.0, 0.9, 0.5, radius=4)  # kernel_size=9

_ATTEMPTS = augment.RESIZED_ATTEMPTS
_NUMBERS = 2 * _ATTEMPTS + 16  # uniform numbers that a crop takes


class Draws(NamedTuple):
    """Parameters of n crops' augmentation, on the CPU."""

    box: Tensor  # int64 [n, 4]: top, left, height, width in px
    flip: Tensor  # bool [n]
    factors: Tensor  # float32 [n, 4]: brightness, contrast, saturation, hue
    order: Tensor  # int64 [n, 4]: in which order these come; -1 where colours are left as they are
    grayscale: Tensor  # bool [n]
    blur: Tensor  # bool [n]
    sigma: Tensor  # float32 [n], of the blur, px
    solarize: Tensor  # bool [n]


def multicrop_views(
    batch: Batch, image_size: int, crops: CropsConfig, streams: Streams, blur: Blur = DINO_BLUR
) -> Views:
    """`global` float32 [2 · B, 3, S, S] and, with local crops, `local` [num_local · B, 3, s, s], normalised.

    Every crop draws from a stream of its own, so that the number of local crops changes no other crop.

    Args:
        batch: images, uint8; parameters are drawn for all ranks' and its own rows of them used.
        image_size: S in px; s is `crops.local_size`.
        crops: areas, colours and number of crops.
        streams: of the trial.
        blur: how the recipe blurs; `crops.blur` switches it off.

    Raises:
        ValueError: the images are not uint8 [B, H, H, 3], or crops are too small to be blurred.
    """
    assert isinstance(crops.local_size, int), "the configuration is not resolved"
    radius = blur.radius if crops.blur else 0
    augment.check(batch.images, image_size, radius)
    views = {"global": _crops(batch, "global", NUM_GLOBAL, image_size, crops, streams, blur)}
    if crops.num_local:
        augment.check(batch.images, crops.local_size, radius, "crops.local_size")
        views["local"] = _crops(batch, "local", crops.num_local, crops.local_size, crops, streams, blur)
    return views


def _crops(batch: Batch, name: str, count: int, size: int, crops: CropsConfig, streams: Streams, blur: Blur) -> Tensor:
    return apply(batch.images, draw(batch, name, count, crops, streams, blur), size, blur.radius)


def draw(batch: Batch, name: str, count: int, crops: CropsConfig, streams: Streams, blur: Blur = DINO_BLUR) -> Draws:
    """Independent parameters of `count` crops of every image, from the streams `augment.NAME0`, `augment.NAME1`, …

    As many numbers are drawn whatever the settings, and the rows of `batch.own` used: trials that differ in a setting
    share the draws of the others, and so do different numbers of ranks.
    """
    shape = (batch.drawn, _NUMBERS)
    generators = [streams.torch(f"augment.{name}{crop}") for crop in range(count)]
    uniform = torch.stack([torch.rand(shape, generator=g, dtype=torch.float64)[batch.own] for g in generators])
    area, ratio, other = torch.split(uniform.flatten(0, 1), [_ATTEMPTS, _ATTEMPTS, 16], dim=1)
    is_global = name == "global"
    scale = crops.global_scale if is_global else crops.local_scale
    blurred = [blur.first, blur.second] if is_global else [blur.local] * count
    solarized = [0.0, crops.solarize] if is_global else [0.0] * count
    jitter = crops.color_jitter
    amounts = torch.tensor([jitter, jitter, jitter / 2, jitter / 4], dtype=torch.float64)
    unchanged = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    jittered = other[:, 3] < (JITTER_PROBABILITY if jitter else 0.0)
    low, high = augment.BLUR_SIGMA
    return Draws(
        box=augment.resized_boxes(area, ratio, other[:, :2], sizes_of(batch.images).repeat(count, 1), scale),
        flip=other[:, 2] < (0.5 if crops.flip else 0.0),
        factors=(unchanged + amounts * (2.0 * other[:, 4:8] - 1.0)).float(),
        order=torch.where(jittered[:, None], other[:, 8:12].argsort(dim=1), -1),
        grayscale=other[:, 12] < crops.grayscale,
        blur=other[:, 13] < _per_crop(blurred if crops.blur else [0.0] * count, len(batch.images)),
        sigma=(low + (high - low) * other[:, 14]).float(),
        solarize=other[:, 15] < _per_crop(solarized, len(batch.images)),
    )


def _per_crop(probabilities: list[float], batch: int) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).repeat_interleave(batch)


def apply(images: Images, draws: Draws, crop_size: int, blur_radius: int) -> Tensor:
    """The crops, float32 [n, 3, S, S], of uint8 [B, H, W, 3]; each is changed only by what it drew."""
    if images.device.type != "cpu":
        pixels = augment.resized_crop_by_matrices(images, draws.box, draws.flip, crop_size)
        return augment.standardise(_recoloured_(pixels, draws, blur_radius))
    result = torch.empty(len(draws.box), 3, crop_size, crop_size)
    sources = list(images)
    for rows in _pieces(draws.order, augment.images_at_once(crop_size)):
        own = Draws(*(values[rows] for values in draws))
        pixels = augment.cropped([sources[row % len(sources)] for row in rows.tolist()], own.box, own.flip, crop_size)
        result.index_copy_(0, rows, augment.standardise(_recoloured_(pixels, own, blur_radius)))
    return result


def _pieces(order: Tensor, at_once: int) -> list[Tensor]:
    """Rows of crops whose colours change in the same order, so that each change takes a whole piece, in place."""
    code = ((order + 1) * 5 ** torch.arange(order.shape[1])).sum(dim=1)
    rows = code.argsort(stable=True)
    lengths = torch.unique_consecutive(code[rows], return_counts=True)[1].tolist()
    return [piece for run in torch.split(rows, lengths) for piece in torch.split(run, at_once)]


def _recoloured_(pixels: Tensor, draws: Draws, blur_radius: int) -> Tensor:
    """Colours and blur of float32 [n, 3, S, S] with values 0 … 255, in place."""
    color.color_jitter_(pixels, draws.factors, draws.order)
    color.on_subset_(pixels, draws.grayscale, color.grayscale)
    color.on_subset_(pixels, draws.blur, partial(color.gaussian_blur, radius=blur_radius), draws.sigma)
    color.on_subset_(pixels, draws.solarize, color.solarize)
    return pixels
