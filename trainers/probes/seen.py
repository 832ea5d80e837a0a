"""A split of a data set as a frozen backbone sees it: what several probes read of it is computed once.

Shapes: n images, B of them, N patches, D width, S side of an image in px as the backbone takes it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from trainers import vit
from trainers.augment import evaluation_view
from trainers.config import ModelConfig
from trainers.data import DataSet, Split
from trainers.probes.features import extract


@dataclass(frozen=True)
class SeenSplit:
    """Some images of one split, and the backbone that looks at them, always in eval mode and without gradients.

    Attributes:
        backbone: a Backbone.
        model: its settings.
        data: the data set.
        split: "train", "validation" or "test".
        indices: int64 [n], which images of the split.
        device: where the backbone is.
        reads: what `features` are; see trainers.probes.features.READS.
        norm_layer: whose patches' norms `features["norms"]` are, 0 … L or negative from the last.
        scratch: folder for features that are too large for memory; None for the system's own.
    """

    backbone: nn.Module
    model: ModelConfig
    data: DataSet
    split: str
    indices: NDArray[np.int64]
    device: torch.device
    reads: frozenset[str] = frozenset()
    norm_layer: int = -1
    scratch: Path | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def part(self) -> Split:
        """The whole split."""
        return cast(Split, getattr(self.data, self.split))

    @property
    def image_size(self) -> int:
        """S."""
        return self.model.side

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        return self.model.grid

    @functools.cached_property
    def features(self) -> Mapping[str, Tensor]:
        """What `reads` names, each [n, …] float32; on the device, or on the CPU where it is large.

        Raises:
            FloatingPointError: tokens are NaN or infinite.
        """
        model = cast(vit.Backbone, self.backbone)
        return extract(
            model, self.views(), len(self), self.reads, self.norm_layer, device=self.device, scratch=self.scratch
        )

    @functools.cached_property
    def classes(self) -> Tensor:
        """int64 [n] on the device."""
        return torch.from_numpy(np.asarray(self.part.targets["classes"][self.indices], np.int64)).to(self.device)

    def views(self, chunk: int = 256) -> Iterator[Tensor]:
        """All images in their order, at most `chunk` at a time: float32 [B, 3, S, S], normalised, on the device."""
        for start in range(0, len(self), chunk):
            yield self.view(np.arange(start, min(start + chunk, len(self))))

    def view(self, positions: NDArray[np.int64]) -> Tensor:
        """The images at some positions of 0 … n − 1, as `views` gives them."""
        pixels = torch.from_numpy(np.asarray(self.part.images[self.indices[positions]])).to(self.device)
        return evaluation_view(pixels, self.image_size, self.model.normalization)

    def dense(self, name: str, positions: NDArray[np.int64]) -> Tensor:
        """A target that has a value for every pixel, at the size of the images: [B, S, S] on the device.

        Each pixel takes the value of the nearest one of the target.
        """
        values = torch.from_numpy(np.asarray(self.part.targets[name][self.indices[positions]])).to(self.device)
        if values.shape[1:] == (self.image_size, self.image_size):
            return values
        resized = functional.interpolate(values[:, None].float(), size=self.image_size, mode="nearest-exact")
        return resized[:, 0].to(values.dtype)

    def sibling(self, split: str) -> SeenSplit:
        """All images of another split of the same data set, seen alike; its features are its own."""
        count = len(getattr(self.data, split))
        return replace(self, split=split, indices=np.arange(count))
