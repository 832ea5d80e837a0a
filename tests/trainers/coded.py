"""A backbone whose tokens a test plants image by image, and subjects with training and test images of their own."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.trainers.planted import subject
from trainers.augment import IMAGENET_MEAN, IMAGENET_STD
from trainers.data import Split
from trainers.measurement import Subject
from trainers.vit import Tokens

NORMAL, OUTLIER = 10.0, 300.0  # norms before the final norm, on either side of the fixed 150


class Coded(nn.Module):
    """A backbone that looks up what it knows of an image by the number in its first pixel (see `images`).

    Args:
        patches_nND: what `tokens` says of the patches, after the final norm.
        outlier_nN: which patches have the norm of an outlier in the residual stream.
        cls_nD: class tokens, or none.
        registers_nRD: registers, or none.
    """

    def __init__(
        self, patches_nND: Tensor, outlier_nN: Tensor, cls_nD: Tensor | None = None, registers_nRD: Tensor | None = None
    ) -> None:
        super().__init__()
        self._patches, self._outlier, self._cls = patches_nND.float(), outlier_nN, cls_nD
        self._registers = patches_nND[:, :0].float() if registers_nRD is None else registers_nRD
        self.embed_dim, self.num_registers = patches_nND.shape[2], self._registers.shape[1]

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        assert normed
        numbers = _numbers(images)
        cls_BD = None if self._cls is None else self._cls[numbers]
        return Tokens(cls_BD, self._registers[numbers], self._patches[numbers])

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        numbers = _numbers(images)
        norm_nN = torch.where(self._outlier, OUTLIER, NORMAL)
        direction = torch.eye(self.embed_dim)[0]
        cls_BD = None if self._cls is None else direction.expand(len(images), -1)
        registers_BRD = direction.expand(len(images), self.num_registers, -1)
        for patches_nN in (torch.full_like(norm_nN, NORMAL), norm_nN):
            yield Tokens(cls_BD, registers_BRD, patches_nN[numbers][..., None] * direction)

    def attention(self, images: Tensor, layer: int) -> Tensor:
        raise NotImplementedError

    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


def images(count: int, side: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Noise, uint8 [count, side, side, 3], with the image's number in red and green of the first pixel."""
    drawn = random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    drawn[:, 0, 0, 0], drawn[:, 0, 0, 1] = np.divmod(np.arange(count), 256)
    return drawn


def _numbers(views: Tensor) -> Tensor:
    high, low = ((views[:, i, 0, 0] * IMAGENET_STD[i] + IMAGENET_MEAN[i]) * 255 for i in (0, 1))
    return high.round().long() * 256 + low.round().long()


def coded_subject(
    backbone: nn.Module,
    pixels: NDArray[np.uint8],
    classes: NDArray[np.int64],
    num_test: int,
    content: NDArray[np.float32] | None = None,
    **settings: Any,
) -> Subject:
    """The last `num_test` images are the test set, the others training and validation; outliers by the norm 150."""
    side = pixels.shape[1]
    defaults = {"model__image_size": side, "data__decode_size": max(side, 16), "tokens__outlier_rule": "fixed"}
    given = subject(backbone, pixels[:8], **{**defaults, **settings})
    targets = {"classes": classes} | ({} if content is None else {"content": content})
    train, test = (
        Split(pixels[part], {name: values[part] for name, values in targets.items()})
        for part in (slice(None, -num_test), slice(-num_test, None))
    )
    names = tuple(str(name) for name in range(int(classes.max()) + 1))
    return replace(given, data=replace(given.data, class_names=names, train=train, validation=train, test=test))
