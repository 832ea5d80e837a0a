"""Features of images as DINOv2's linear evaluation crops them: at random for training, the centre for evaluation.

Source: facebookresearch/dinov2:dinov2/data/transforms.py. Training: a random resized crop of 8 to 100 % of the image,
bicubic, flipped in one of two; of images at their own size where these are streamed (`data.decode_size: original`), as
there, else of the decoded squares. Evaluation: resized to 256 and cut to 224, so S out of 8/7 · S of the squares; those
that were decoded smaller are taken whole.
Shapes: n images, B of them, H side of the decoded images, S side as the backbone takes them, in px.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from trainers.augment import draw_resized_boxes, evaluation_view, resized_crop, standardise
from trainers.data.streamed import Streamed
from trainers.probes.features import evaluating, extract, taps
from trainers.probes.seen import SeenSplit
from trainers.ragged import Images, Ragged, sizes_of

CHUNK = 256  # images that pass through the backbone at a time


@dataclass(frozen=True)
class RandomCrops:
    """Images of a split, cropped anew whenever they are looked at.

    Attributes:
        seen: the split.
        reads: which features; see trainers.probes.features.READS.
        generator: of crops and flips, on the CPU; how much is drawn does not depend on the device.
    """

    seen: SeenSplit
    reads: Collection[str]
    generator: Generator

    @torch.no_grad()
    def features(self, positions: Tensor) -> dict[str, Tensor]:
        """Of one crop of each of the images at `positions`, [B, …] by name, on the device.

        Raises:
            FloatingPointError: features are NaN or infinite, because the weights are.
        """
        parts = []
        with evaluating(self.seen.backbone):
            for some in torch.split(positions, CHUNK):
                parts.append(taps(self.seen.backbone, self._view(some), self.reads))
        rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if not all(bool(values.isfinite().all()) for values in rows.values()):
            raise FloatingPointError("features are not finite: the weights have diverged")
        return rows

    def _view(self, positions: Tensor) -> Tensor:
        images = _originals(self.seen, positions)
        boxes_B4 = draw_resized_boxes(len(images), sizes_of(images), self.generator)
        flip_B = torch.rand(len(images), generator=self.generator) < 0.5
        crops = resized_crop(images, boxes_B4, flip_B, self.seen.image_size)
        return standardise(crops, normalization=self.seen.model.normalization)


def centre_features(seen: SeenSplit, reads: Collection[str], positions: Tensor | None = None) -> dict[str, Tensor]:
    """Features of the centres of images, of all of them by default; see trainers.probes.features.extract."""
    wanted = torch.arange(len(seen)) if positions is None else positions
    return extract(seen.backbone, _centres(seen, wanted), len(wanted), reads, device=seen.device, scratch=seen.scratch)


def _centres(seen: SeenSplit, positions: Tensor) -> Iterator[Tensor]:
    for some in torch.split(positions, CHUNK):
        yield centre_view(_pixels(seen, some), seen.image_size, seen.model.normalization)


def centre_view(pixels: Tensor, image_size: int, normalization: str = "imagenet") -> Tensor:
    """The middle S of 8/7 · S px, or all of smaller images: uint8 [B, H, H, 3] as normalised float32 [B, 3, S, S]."""
    whole = round(image_size * 8 / 7)
    if pixels.shape[1] < whole:
        return evaluation_view(pixels, image_size, normalization)
    first = round((whole - image_size) / 2)
    inside = slice(first, first + image_size)
    return evaluation_view(pixels, whole, normalization)[:, :, inside, inside]


def _originals(seen: SeenSplit, positions: Tensor) -> Images:
    """The images at their own size where they are streamed, else their squares, on the device."""
    images = seen.part.images
    if not isinstance(images, Streamed):
        return _pixels(seen, positions)
    with ThreadPoolExecutor(images.workers) as pool:
        decoded = pool.map(images.original, seen.indices[positions.cpu().numpy()].tolist())
        return Ragged.of([pixels for _, pixels in decoded]).to(seen.device)


def _pixels(seen: SeenSplit, positions: Tensor) -> Tensor:
    """uint8 [B, H, H, 3] on the device."""
    indices = seen.indices[positions.cpu().numpy()]
    return torch.from_numpy(np.asarray(seen.part.images[indices])).to(seen.device)
