"""Augmentation in batches on the device with parameters drawn per image: DeiT-III's 3-Augment, and the plain view.

Source: facebookresearch/deit:augment.py, `new_data_aug_generator`: simple random crop (or random resized crop),
horizontal flip, one of grayscale, solarize and Gaussian blur, colour jitter, normalisation, in this order.
Shapes: B images, H height, W width, C = 3 channels, S side of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from torch import Generator, Tensor

from trainers import catalog, color
from trainers.device import moved
from trainers.method_settings import DeiT3Config
from trainers.ragged import Images, Ragged, sizes_of

IMAGENET_MEAN, IMAGENET_STD = catalog.NORMALIZATIONS["imagenet"]

CROP_PADDING = 4  # px, reflected, on every side before a simple random crop
RESIZED_SCALE = (0.08, 1.0)  # area of a resized crop as a fraction of the image
RESIZED_RATIO = (3 / 4, 4 / 3)  # its width / height
RESIZED_ATTEMPTS = 10  # then the largest centred box of an allowed ratio, as torchvision and timm do
BLUR_SIGMA = (0.1, 2.0)  # px

GRAYSCALE, SOLARIZE, BLUR = range(3)  # values of Draws.choice

_PADDED_PIXELS = 2**25  # of images of different sizes that a GPU works on at once; 400 MB in float32
_CACHE_VALUES = 2**18  # float32 values (1 MiB) that a CPU works on at once, so that they stay in its cache


class Draws(NamedTuple):
    """Parameters of each image's augmentation, on the CPU."""

    box: Tensor  # int64 [B, 4]: top, left, height, width of the crop in px, for a simple crop in the image whose
    # shorter side was resized to S and that was padded
    flip: Tensor  # bool [B]
    choice: Tensor  # int64 [B]: GRAYSCALE, SOLARIZE or BLUR
    sigma: Tensor  # float32 [B], of the blur, px
    factors: Tensor  # float32 [B, 3]: brightness, contrast, saturation
    order: Tensor  # int64 [B, 3]: in which order these come


def three_augment(images: Images, image_size: int, settings: DeiT3Config, generator: Generator) -> Tensor:
    """Augmented and normalised images, float32 [B, 3, S, S], of uint8 [B, H, W, 3] on the same device.

    Args:
        images: square images, of any size, or images of different sizes.
        image_size: S in px.
        settings: which crop, flips, 3-Augment and how much colour jitter.
        generator: of the CPU; how much is drawn does not depend on the device.

    Raises:
        ValueError: the images are not uint8 [B, H, H, 3], or the image size is too small to be padded or blurred.
    """
    draws = draw(len(images), sizes_of(images), image_size, settings, generator)
    return apply(images, draws, image_size, settings)


def draw(
    batch: int,
    source_size: int | Tensor,
    image_size: int,
    settings: DeiT3Config,
    generator: Generator,
    own: slice = slice(None),
) -> Draws:
    """Independent parameters of those of `batch` images that are `own`.

    All of them are drawn whether `settings` uses them or not, the box of the crop last: trials that differ in one of
    these settings share the draws of the others.

    Args:
        batch: for how many images is drawn.
        source_size: side of square images in px, or int64 [B, 2]: height and width of each of the own ones.
        image_size: S in px.
        settings: which crop, flips and how much colour jitter.
        generator: of the CPU.
        own: B rows of the batch.
    """
    uniform = torch.rand(batch, 6, generator=generator)
    order = torch.rand(batch, 3, generator=generator).argsort(dim=1)
    low, high = BLUR_SIGMA
    box = _draw_boxes(batch, source_size, image_size, settings.crop, generator, own)
    uniform, order = uniform[own], order[own]
    return Draws(
        flip=uniform[:, 0] < (0.5 if settings.flip else 0.0),
        choice=(uniform[:, 1] * 3).long(),
        sigma=low + (high - low) * uniform[:, 2],
        factors=1.0 + settings.color_jitter * (2.0 * uniform[:, 3:] - 1.0),
        order=order,
        box=box,
    )


def _draw_boxes(
    batch: int, source_size: int | Tensor, image_size: int, crop: str, generator: Generator, own: slice
) -> Tensor:
    if crop == "resized":
        return draw_resized_boxes(batch, source_size, generator, own=own)
    size_B2 = _sizes(source_size, len(range(batch)[own]))
    if crop == "none":
        side_B = size_B2.amin(dim=1)
        return _centred(size_B2, torch.stack([side_B, side_B], dim=1))
    corner_B2 = torch.randint(0, 2 * CROP_PADDING + 1, (batch, 2), generator=generator)[own]
    spare_B2 = shorter_side_resized(size_B2, image_size) - image_size  # px beyond S, on the longer side
    if spare_B2.any():
        uniform_B2 = torch.rand(batch, 2, generator=_apart(generator), dtype=torch.float64)[own]
        along_B2 = (uniform_B2 * (spare_B2 + 2 * CROP_PADDING + 1)).long()
        corner_B2 = torch.where(spare_B2 > 0, along_B2, corner_B2)
    return torch.cat([corner_B2, torch.full_like(corner_B2, image_size)], dim=1)


def _apart(generator: Generator) -> Generator:
    """Another generator that depends on where this one stands, and leaves it there.

    So a batch moves the generator on alike whether all of its images, or a rank's share of them, are square or not.
    """
    state = generator.get_state()
    seed = torch.randint(2**62, (1,), generator=generator).item()
    generator.set_state(state)
    return Generator().manual_seed(int(seed))


def _sizes(source_size: int | Tensor, count: int) -> Tensor:
    """Heights and widths, int64 [count, 2]."""
    if isinstance(source_size, int):
        return torch.tensor([source_size, source_size]).expand(count, 2)
    return source_size


def _centred(size_B2: Tensor, box_B2: Tensor) -> Tensor:
    return torch.cat([torch.div(size_B2 - box_B2, 2, rounding_mode="floor"), box_B2], dim=1)


def shorter_side_resized(size_B2: Tensor, image_size: int) -> Tensor:
    """Heights and widths, int64 [B, 2], once the shorter side is S, as torchvision's Resize rounds them."""
    return torch.div(size_B2 * image_size, size_B2.amin(dim=1, keepdim=True), rounding_mode="floor")


def draw_resized_boxes(
    batch: int,
    source_size: int | Tensor,
    generator: Generator,
    scale: tuple[float, float] = RESIZED_SCALE,
    own: slice = slice(None),
) -> Tensor:
    """Boxes [B, 4] (top, left, height, width) as torchvision's RandomResizedCrop draws them.

    `scale` is the smallest and largest area as a fraction of the image; the others are as in `draw`.
    """
    shape = (batch, RESIZED_ATTEMPTS)
    area = torch.rand(shape, generator=generator, dtype=torch.float64)
    ratio = torch.rand(shape, generator=generator, dtype=torch.float64)
    corner = torch.rand(batch, 2, generator=generator, dtype=torch.float64)
    return resized_boxes(area[own], ratio[own], corner[own], source_size, scale)


def resized_boxes(
    area: Tensor, ratio: Tensor, corner: Tensor, source_size: int | Tensor, scale: tuple[float, float]
) -> Tensor:
    """Boxes int64 [n, 4] (top, left, height, width) of n images from numbers that are uniform in [0, 1).

    Args:
        area, ratio: float64 [n, attempts]; the first attempt that fits is taken. Where none does, the box is centred,
            and the whole image or as much of it as RESIZED_RATIO allows.
        corner: float64 [n, 2].
        source_size: side of square images in px, or int64 [n, 2]: height and width of each.
        scale: smallest and largest area as a fraction of the image.
    """
    low, high = scale
    whole_n2 = _sizes(source_size, len(area))
    area = whole_n2.prod(dim=1)[:, None] * (low + (high - low) * area)
    log_low, log_high = math.log(RESIZED_RATIO[0]), math.log(RESIZED_RATIO[1])
    ratio = torch.exp(log_low + (log_high - log_low) * ratio)

    size = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=2).round().long().clamp_(min=1)
    fits = (size <= whole_n2[:, None]).all(dim=2)
    first = fits.int().argmax(dim=1)
    size = size[torch.arange(len(size)), first]
    drawn = torch.cat([(corner * (whole_n2 - size + 1)).long(), size], dim=1)
    return torch.where(fits.any(dim=1)[:, None], drawn, _centred(whole_n2, _allowed(whole_n2)))


def _allowed(size_n2: Tensor) -> Tensor:
    """The largest height and width of an allowed ratio within images, int64 [n, 2]."""
    height, width = size_n2.unbind(1)
    lowest, highest = RESIZED_RATIO
    tallest = (width / lowest).round().long().clamp_(min=1)
    widest = (height * highest).round().long().clamp_(min=1)
    return torch.stack([torch.minimum(height, tallest), torch.minimum(width, widest)], dim=1)


def apply(images: Images, draws: Draws, image_size: int, settings: DeiT3Config) -> Tensor:
    """What `three_augment` returns, given the parameters; each image is changed only by what it drew."""
    check(images, image_size)
    batch = len(images)
    part = images_at_once(image_size) if images.device.type == "cpu" else batch
    result = torch.empty(batch, 3, image_size, image_size, device=images.device)
    for start in range(0, batch, part):
        piece = slice(start, start + part)
        pixels = _changed(images[piece], Draws(*(values[piece] for values in draws)), image_size, settings)
        standardise(pixels, out=result[piece])
    return result


def images_at_once(image_size: int) -> int:
    """How many images of side S a CPU changes at a time, so that they stay in its cache."""
    return max(1, _CACHE_VALUES // (3 * image_size**2))


def check(images: Images, size: int, blur_radius: int = color.BLUR_RADIUS, setting: str = "image_size") -> None:
    """Raise a ValueError unless the images are uint8 [B, H, H, 3] and `size`, which `setting` says, can be blurred.

    Images of different sizes may be any rectangles.
    """
    if isinstance(images, Ragged):
        pass
    elif images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; allowed: torch.uint8 [B, H, H, 3]")
    if size <= blur_radius:
        raise ValueError(f"{setting} is {size} px; augmentation needs at least {blur_radius + 1} px")


def _changed(images: Images, draws: Draws, image_size: int, settings: DeiT3Config) -> Tensor:
    """All but the normalisation: values 0 … 255."""
    if settings.crop == "resized" or (isinstance(images, Ragged) and settings.crop == "none"):
        pixels = resized_crop(images, draws.box, draws.flip, image_size)
    elif isinstance(images, Ragged):
        pixels = _simple_crop_of_rectangles(images, draws.box[:, :2], draws.flip, image_size)
    else:
        pixels = simple_crop(_resize(images, image_size), draws.box[:, :2], draws.flip, image_size, settings.crop)
    if settings.three_augment:
        color.on_subset_(pixels, draws.choice == GRAYSCALE, color.grayscale)
        color.on_subset_(pixels, draws.choice == SOLARIZE, color.solarize)
        color.on_subset_(pixels, draws.choice == BLUR, color.gaussian_blur, draws.sigma)
    if settings.color_jitter:
        color.color_jitter_(pixels, draws.factors, draws.order)
    return pixels


def simple_crop(images: Tensor, corner_B2: Tensor, flip_B: Tensor, image_size: int, crop: str = "simple") -> Tensor:
    """Windows of side S of uint8 [B, S, S, 3] padded by 4 reflected px, flipped where told; float32 [B, 3, S, S].

    Pixels are gathered at whole offsets, so no value changes. With `crop` "none" nothing is padded.
    """
    padding = CROP_PADDING if crop == "simple" else 0
    steps = torch.arange(image_size) - padding
    rows, columns = corner_B2[:, :1] + steps, corner_B2[:, 1:] + steps
    columns = torch.where(flip_B[:, None], columns.flip(1), columns)
    rows, columns = _reflect(rows, image_size), _reflect(columns, image_size)
    rows = rows + image_size * torch.arange(len(images))[:, None]
    index = (image_size * moved(rows, images.device)[:, :, None] + moved(columns, images.device)[:, None, :]).view(-1)
    return _planes(images.reshape(-1, 3).index_select(0, index).view(-1, image_size, image_size, 3))


def _simple_crop_of_rectangles(images: Ragged, corner_B2: Tensor, flip_B: Tensor, image_size: int) -> Tensor:
    """`simple_crop` of images whose shorter sides are resized to S first."""
    sizes_B2 = shorter_side_resized(images.sizes, image_size)
    places_B2S = _window(sizes_B2, corner_B2, flip_B, image_size)
    if images.device.type != "cpu":
        return _simple_crop_by_matrices(images, places_B2S, sizes_B2)
    windows = []
    for image, size, (rows, columns) in zip(images, sizes_B2.tolist(), places_B2S, strict=True):
        planes = image.permute(2, 0, 1)[None]
        if tuple(size) != tuple(image.shape[:2]):
            planes = F.interpolate(planes, size, mode="bicubic", antialias=True)
        windows.append(planes[:, :, rows[:, None], columns])
    return torch.cat(windows).float()


def _window(sizes_B2: Tensor, corner_B2: Tensor, flip_B: Tensor, image_size: int) -> Tensor:
    """Rows and columns of images of these sizes that stand in the windows, int64 [B, 2, S]."""
    places_B2S = corner_B2[:, :, None] + torch.arange(image_size) - CROP_PADDING
    places_B2S[:, 1] = torch.where(flip_B[:, None], places_B2S[:, 1].flip(1), places_B2S[:, 1])
    return _reflect(places_B2S, sizes_B2[:, :, None])


def _simple_crop_by_matrices(images: Ragged, places_B2S: Tensor, sizes_B2: Tensor) -> Tensor:
    """Rows and columns `places` of images resized to `sizes`, on any device, group by group."""
    size = places_B2S.shape[2]
    pixels = torch.empty(len(images), 3, size, size, device=images.device)
    for rows, group in images.padded(_PADDED_PIXELS):
        middles, whole = moved(places_B2S[rows] + 0.5, images.device), moved(images.sizes[rows], images.device)
        scale, start = whole / moved(sizes_B2[rows], images.device), torch.zeros_like(whole)
        vertical, horizontal = (
            _weights(start[:, d], whole[:, d], middles[:, d], scale[:, d], group.shape[1 + d]) for d in (0, 1)
        )
        pixels[moved(rows, images.device)] = _products(group, vertical, horizontal)
    return pixels


def _reflect(position: Tensor, size: int | Tensor) -> Tensor:
    """Positions before 0 or past the end mirrored at the border pixel, which is not repeated."""
    return (size - 1) - ((size - 1) - position.abs()).abs()


def resized_crop(images: Images, box_B4: Tensor, flip_B: Tensor, image_size: int) -> Tensor:
    """Boxes of uint8 [B, H, W, 3] resized to S by antialiased bicubic interpolation, float32 [B, 3, S, S].

    On a CPU image by image with PyTorch's integer kernels, elsewhere as two batched matrix products; they differ
    by a few grey levels at most, as the former, like PIL, rounds and clips between its two passes.
    """
    if images.device.type != "cpu":
        return resized_crop_by_matrices(images, box_B4, flip_B, image_size)
    return cropped(images, box_B4, flip_B, image_size)


def cropped(images: Iterable[Tensor], box_B4: Tensor, flip_B: Tensor, image_size: int) -> Tensor:
    """`resized_crop` of uint8 [H, W, 3] one by one."""
    crops = [  # as torchvision's `resized_crop`, which takes longer than these kernels to get to them for small images
        F.interpolate(
            image.permute(2, 0, 1)[None, :, top : top + height, left : left + width],
            image_size,
            mode="bicubic",
            antialias=True,
        )
        for image, (top, left, height, width) in zip(images, box_B4.tolist(), strict=True)
    ]
    pixels = torch.cat(crops).float()
    flipped = flip_B.nonzero()[:, 0]
    return pixels.index_copy_(0, flipped, pixels[flipped].flip(3))


def resized_crop_by_matrices(images: Images, box_nB4: Tensor, flip_nB: Tensor, image_size: int) -> Tensor:
    """`resized_crop` on any device, without a loop over images; several crops of each where there are more boxes.

    Boxes and crops are then crop-major: the first ones of all images, then their second ones.
    """
    if isinstance(images, Ragged):
        return _rectangles_by_matrices(images, box_nB4, flip_nB, image_size)
    crops = zip(torch.split(box_nB4, len(images)), torch.split(flip_nB, len(images)), strict=True)
    return torch.cat([_by_matrices(images, box, flip, image_size) for box, flip in crops])


def _rectangles_by_matrices(images: Ragged, box_nB4: Tensor, flip_nB: Tensor, image_size: int) -> Tensor:
    pixels = torch.empty(len(box_nB4), 3, image_size, image_size, device=images.device)
    for own, group in images.padded(_PADDED_PIXELS):
        for first in range(0, len(box_nB4), len(images)):
            rows = first + own
            crops = _by_matrices(group, box_nB4[rows], flip_nB[rows], image_size)
            pixels[moved(rows, images.device)] = crops
    return pixels


def _by_matrices(images: Tensor, box_B4: Tensor, flip_B: Tensor, image_size: int) -> Tensor:
    top, left, height, width = moved(box_B4, images.device).unbind(1)
    vertical_BSH = _bicubic(top, height, images.shape[1], image_size)
    horizontal_BSW = _bicubic(left, width, images.shape[2], image_size)
    horizontal_BSW = torch.where(moved(flip_B, images.device)[:, None, None], horizontal_BSW.flip(1), horizontal_BSW)
    return _products(images, vertical_BSH, horizontal_BSW)


def _products(images: Tensor, vertical_BSH: Tensor, horizontal_BSW: Tensor) -> Tensor:
    rows = torch.matmul(vertical_BSH[:, None], _planes(images))
    return torch.matmul(rows, horizontal_BSW[:, None].transpose(2, 3)).clamp_(0.0, 255.0).round_()


def _bicubic(start_B: Tensor, length_B: Tensor, source_size: int, size: int) -> Tensor:
    """Weights [B, size, source_size] of PIL's antialiased bicubic filter (a = -0.5) over [start, start + length)."""
    middles_BS = (torch.arange(size, device=start_B.device) + 0.5).expand(len(start_B), size)
    return _weights(start_B, length_B, middles_BS, length_B / size, source_size)


def _weights(start_B: Tensor, length_B: Tensor, middles_BS: Tensor, scale_B: Tensor, source_size: int) -> Tensor:
    """Weights [B, S, source_size] of that filter for pixels at `middles`, each `scale` px of the source wide."""
    source = torch.arange(source_size, device=start_B.device)
    scale = scale_B[:, None, None]
    centre = start_B[:, None, None] + middles_BS[:, :, None] * scale
    x = ((source + 0.5 - centre) / scale.clamp(min=1.0)).abs()
    near = (1.5 * x - 2.5) * x**2 + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
    inside = (source >= start_B[:, None, None]) & (source < (start_B + length_B)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] as float32 [B, 3, H, W] with ImageNet's mean and standard deviation."""
    return standardise(_planes(images))


def evaluation_view(images: Tensor, image_size: int, normalization: str = "imagenet") -> Tensor:
    """uint8 [B, H, H, 3] resized to S where sizes differ (antialiased bicubic), normalised: float32 [B, 3, S, S]."""
    return standardise(_planes(_resize(images, image_size)), normalization=normalization)


def _resize(images: Tensor, image_size: int) -> Tensor:
    if images.shape[1:3] == (image_size, image_size):
        return images
    size = [image_size, image_size]
    planes: Tensor = tv.resize(images.permute(0, 3, 1, 2), size, tv.InterpolationMode.BICUBIC, antialias=True)
    return planes.permute(0, 2, 3, 1)


def _planes(images: Tensor) -> Tensor:
    """[B, H, W, 3] as a new float32 [B, 3, H, W]."""
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def standardise(pixels: Tensor, out: Tensor | None = None, normalization: str = "imagenet") -> Tensor:
    """(x / 255 - mean) / std of float32 [B, 3, H, W], with mean and deviation of `catalog.NORMALIZATIONS`."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in catalog.NORMALIZATIONS[normalization])
    return torch.mul(pixels, moved(1.0 / (255.0 * std), pixels.device), out=out).sub_(moved(mean / std, pixels.device))
