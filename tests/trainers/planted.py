"""Backbones whose residual norms a test plants, and subjects that measurements can look at."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers.augment import IMAGENET_MEAN, IMAGENET_STD
from trainers.config import resolve
from trainers.data import DataSet, Split
from trainers.measurement import Finding, Metric, Statistic, Subject
from trainers.probes import Context
from trainers.probes.fitted import Probes
from trainers.streams import Streams
from trainers.vit import Tokens

WIDTH = 8
BULK, HIGH = 10.0, 100.0  # norms of normal patches and of outliers

Plant = Callable[[Tensor], Tensor]  # from images to patches, [L + 1, B, N, D]


class Planted(nn.Module):
    """A backbone whose patches at every layer are what `plant` says; no class token, no registers."""

    embed_dim = WIDTH
    num_registers = 0

    def __init__(self, plant: Plant) -> None:
        super().__init__()
        self._plant = plant

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        for patches_BND in self._plant(images):
            yield Tokens(None, patches_BND.new_zeros(len(images), 0, WIDTH), patches_BND)

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        *_, last = self.residuals(images)
        return last

    def attention(self, images: Tensor, layer: int) -> Tensor:
        raise NotImplementedError

    def qkv(self, images: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


def levels(images: Tensor) -> Tensor:
    """Grey levels 0 … 255 of normalised images' first channel, [B, height, width]."""
    return (images[:, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255


def with_norms(norms_LBN: Tensor) -> Tensor:
    """Patches of these norms, [L + 1, B, N, D]."""
    return norms_LBN[..., None] * torch.eye(WIDTH)[0]


def by_number(norms_LBN: NDArray[Any]) -> Planted:
    """Norms by the number of the image, which is its grey level (see `numbered`)."""
    table = torch.from_numpy(np.asarray(norms_LBN, np.float32))
    return Planted(lambda images: with_norms(table[:, levels(images)[:, 0, 0].round().long()]))


def numbered(count: int, side: int) -> NDArray[np.uint8]:
    """Uniform images whose grey level is their number, [count, side, side, 3]."""
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(levels, (count, side, side, 3)).copy()


def subject(
    backbone: nn.Module,
    pixels: NDArray[np.uint8],
    *,
    content: NDArray[np.float32] | None = None,
    step: int = 0,
    **settings: Any,
) -> Subject:
    """`backbone` and the images that it is asked about; `settings` with `__` for a dot; patches of 8 px by default."""
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    defaults = {"model.size": "nano", "model.patch_size": 8, "model.image_size": 32, "data.decode_size": 32}
    config = resolve({**defaults, "tokens.probe_images": len(pixels), **dotted})
    targets = {"classes": np.zeros(len(pixels), np.int64)} | ({} if content is None else {"content": content})
    split = Split(pixels, targets)
    data = DataSet("planted", ("one",), ("classes",), split, split, split, "0" * 16)
    device, streams = torch.device("cpu"), Streams(0)
    assert isinstance(config.model.image_size, int)
    probes = Probes(config.evaluation, data, config.model, Context(streams, None, "deit3"), device)
    return Subject(backbone, config.model, config.tokens, data, device, streams, step, probes)


def metrics(findings: list[Finding]) -> dict[str, float]:
    """The metrics among findings, by name."""
    return {finding.name: finding.value for finding in findings if isinstance(finding, Metric)}


def statistics(findings: list[Finding]) -> dict[tuple[str, int | None], float]:
    """The statistics among findings, by name and layer."""
    return {(finding.name, finding.layer): finding.value for finding in findings if isinstance(finding, Statistic)}
