"""Images of different sizes in one tensor: what a batch is where images keep their own size.

Shapes: B images, H_i × W_i px of image i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers.device import moved


class Ragged:
    """B images, uint8 [H_i, W_i, 3], one after another in one tensor, so that they move to a device in one copy.

    Attributes:
        pixels: uint8 [Σ H_i · W_i, 3].
        sizes: int64 [B, 2] on the CPU: height and width in px.
    """

    def __init__(self, pixels: Tensor, sizes: Tensor) -> None:
        self.pixels, self.sizes = pixels, sizes

    @classmethod
    def of(cls, images: Sequence[NDArray[np.uint8]]) -> Ragged:
        """Of arrays uint8 [H_i, W_i, 3], on the CPU."""
        sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64).reshape(-1, 2)
        flat = [torch.from_numpy(np.require(image, requirements=["C", "W"])).view(-1, 3) for image in images]
        return cls(torch.cat(flat) if flat else torch.empty(0, 3, dtype=torch.uint8), sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, rows: slice) -> Ragged:
        """Images next to each other, without a copy.

        Raises:
            ValueError: the slice has another step than 1.
        """
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice of images has the step {step}; allowed: 1")
        counts = self.sizes.prod(dim=1)
        first, last = int(counts[:start].sum()), int(counts[: max(start, stop)].sum())
        return Ragged(self.pixels[first:last], self.sizes[rows])

    def __iter__(self) -> Iterator[Tensor]:
        """Each image, uint8 [H_i, W_i, 3], without a copy."""
        sizes = self.sizes.tolist()
        parts = torch.split(self.pixels, [height * width for height, width in sizes])
        for part, (height, width) in zip(parts, sizes, strict=True):
            yield part.view(height, width, 3)

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def to(self, device: torch.device) -> Ragged:
        """The same on a device, without waiting for it; sizes stay on the CPU."""
        return Ragged(moved(self.pixels, device), self.sizes)

    def padded(self, most_pixels: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in groups of alike sizes, each padded with 0 to its largest: rows int64 [n] and [n, H, W, 3].

        A group holds at most `most_pixels` with its padding, or one image. Rows are on the CPU.
        """
        images = list(self)
        for rows in self._groups(most_pixels):
            height, width = (int(side) for side in self.sizes[rows].amax(dim=0))
            group = torch.zeros(len(rows), height, width, 3, dtype=torch.uint8, device=self.device)
            for place, row in zip(group, rows.tolist(), strict=True):
                image = images[row]
                place[: image.shape[0], : image.shape[1]] = image
            yield rows, group

    def _groups(self, most_pixels: int) -> Iterator[Tensor]:
        """Landscapes apart from portraits, each by their longer side: so little is padded."""
        portrait = self.sizes[:, 0] > self.sizes[:, 1]
        by_size = (self.sizes.amax(dim=1) + portrait * (self.sizes.max() + 1)).argsort(stable=True)
        group: list[int] = []
        largest = torch.zeros(2, dtype=torch.int64)
        for row in by_size.tolist():
            grown = torch.maximum(largest, self.sizes[row])
            if group and int(grown.prod()) * (len(group) + 1) > most_pixels:
                yield torch.tensor(group)
                group, grown = [], self.sizes[row]
            group.append(row)
            largest = grown
        if group:
            yield torch.tensor(group)


Images = Tensor | Ragged  # uint8: [B, H, W, 3], or of different sizes


def sizes_of(images: Images) -> Tensor:
    """Height and width in px of every image, int64 [B, 2] on the CPU."""
    if isinstance(images, Ragged):
        return images.sizes
    return torch.tensor(images.shape[1:3]).expand(len(images), 2)
