"""Colour changes and blur of a batch of images with parameters of each image's own; nothing random happens here.

Images are float32 [B, 3, H, W] with values 0 … 255. Results agree with `torchvision.transforms.v2.functional` image
by image, except that values are not rounded to whole grey levels between two operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.device import moved

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of the factors, entries of the order

BLUR_RADIUS = 6  # px; how far PIL's GaussianBlur (three box blurs) reaches at sigma = 2, the largest in DeiT-III
SOLARIZE_MIDDLE = 127.5  # between the largest value that is kept, 127, and PIL's threshold, 128
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as in PIL


def luma(images: Tensor) -> Tensor:
    """Brightness of every pixel, [B, 1, H, W]."""
    weighted = images[:, 0:1] * _LUMA[0]
    return weighted.add_(images[:, 1:2], alpha=_LUMA[1]).add_(images[:, 2:3], alpha=_LUMA[2])


def grayscale(images: Tensor) -> Tensor:
    """Three equal channels."""
    return luma(images).expand(-1, 3, -1, -1)


def solarize(images: Tensor) -> Tensor:
    """Values from 128 on inverted, exactly for whole values; between two grey levels off by less than one."""
    return (images - SOLARIZE_MIDDLE).abs_().neg_().add_(SOLARIZE_MIDDLE)


def gaussian_blur(images: Tensor, sigma_B: Tensor, radius: int = BLUR_RADIUS) -> Tensor:
    """Separable Gaussian of 2 · radius + 1 taps (13), borders reflected, sigma in px.

    Equal to torchvision's `gaussian_blur` with as many taps. PIL, which DeiT-III and DINO call, approximates the same
    Gaussian by three box blurs, repeats border pixels instead of reflecting them, and blurs a little more at 0.2 to
    0.5 px; on sharp 24 px images the two differ by 0 to 1.7 grey levels on average.
    """
    offset = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    taps = torch.softmax(-0.5 * (offset / sigma_B[:, None]) ** 2, dim=1)
    padded = F.pad(images, (radius,) * 4, mode="reflect")
    rows_done = _convolve_rows(padded, taps, radius).transpose(2, 3).contiguous()
    return _convolve_rows(rows_done, taps, radius).transpose(2, 3)


def _convolve_rows(padded: Tensor, taps: Tensor, radius: int) -> Tensor:
    """Weighted sum of shifted rows, without the padding; faster here than grouped convolutions with few channels."""
    height = padded.shape[2] - 2 * radius
    rows = padded.unfold(2, height, 1).permute(2, 0, 1, 4, 3)  # a view: [2 · radius + 1, B, C, height, width]
    weights = taps.t()[:, :, None, None, None]
    total = rows[radius] * weights[radius]
    for tap in range(radius):
        total.addcmul_(rows[tap] + rows[2 * radius - tap], weights[tap])  # the Gaussian is symmetric
    return total


def color_jitter_(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Changes of colour of each image by its own amounts, in its own order, in place.

    Args:
        images: values 0 … 255.
        factors: [B, J] on the CPU, columns BRIGHTNESS, CONTRAST, SATURATION (1 changes nothing) and, with J = 4, HUE
            (as a fraction of the circle, 0 changes nothing).
        order: int64 [B, J] on the CPU, which of them comes first, second and so on; -1 for none.
    """
    changes = (adjust_brightness_, adjust_contrast_, adjust_saturation_, adjust_hue_)
    for chosen_B in order.unbind(1):
        for column in range(factors.shape[1]):
            on_subset_(images, chosen_B == column, changes[column], factors[:, column])
    return images


def adjust_brightness_(images: Tensor, factor_B: Tensor) -> Tensor:
    """Blend with black, in place."""
    return images.mul_(factor_B[:, None, None, None]).clamp_(0.0, 255.0)


def adjust_contrast_(images: Tensor, factor_B: Tensor) -> Tensor:
    """Blend with the mean luma of each image, in place."""
    factor = factor_B[:, None, None, None]
    mean = luma(images.mean(dim=(2, 3), keepdim=True))
    return images.mul_(factor).add_(mean.mul_(1.0 - factor)).clamp_(0.0, 255.0)


def adjust_saturation_(images: Tensor, factor_B: Tensor) -> Tensor:
    """Blend with the luma of each pixel, in place."""
    factor = factor_B[:, None, None, None]
    gray = luma(images)
    return images.mul_(factor).add_(gray.mul_(1.0 - factor)).clamp_(0.0, 255.0)


def adjust_hue_(images: Tensor, turn_B: Tensor) -> Tensor:
    """Hue moved by `turn_B` (-0.5 … 0.5, as a fraction of the circle) with HSV's value and saturation kept, in place.

    With channels as (value - min) / (max - min), the hue in sixths of the circle is 1 - red + green + blue away from
    red, towards green where that is above blue. Turned to h, a channel is clamp(d - 1, 0, 1), where d is the distance
    on the circle from h to the hue that has least of this channel: cyan 3, magenta -1, yellow 1.
    """
    red, green, blue = images.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest.sub_(smallest)
    from_red = (green + blue).sub_(red).sub_(smallest)
    from_red.div_(chroma.clamp(min=1e-6)).add_(1.0)  # without chroma any hue will do
    hue = from_red.copysign_(green - blue).add_(6.0 * turn_B[:, None, None])
    least = moved(torch.tensor((3.0, -1.0, 1.0)), images.device)[:, None, None]
    distance = torch.sub(hue[:, None], least, out=images)  # -9 … 9; folded at ±3 twice it is that on the circle
    distance.abs_().sub_(3.0).abs_().sub_(3.0).abs_()
    return distance.sub_(1.0).clamp_(0.0, 1.0).mul_(chroma[:, None]).add_(smallest[:, None])


def on_subset_(images: Tensor, chosen_B: Tensor, change: Callable[..., Tensor], *parameters_B: Tensor) -> None:
    """`change(images, *parameters)` in place on the chosen images alone; what is chosen and how lies on the CPU.

    The chosen ones are found on the CPU, so that no device is waited for.
    """
    index = chosen_B.nonzero()[:, 0]
    if len(index) == 0:
        return
    parameters = [moved(values[index], images.device) for values in parameters_B]
    if len(index) == len(images):
        images.copy_(change(images, *parameters))  # costs nothing where `change` works in place
    else:
        index = moved(index, images.device)
        images.index_copy_(0, index, change(images.index_select(0, index), *parameters))
