"""Which images each step sees, which of them are this rank's, and getting them to the device ahead of time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainers import distributed
from trainers.data import Split
from trainers.data.streamed import Ahead, LazyTarget, Streamed
from trainers.device import moved
from trainers.methods import Batch, Upcoming
from trainers.ragged import Images, Ragged
from trainers.streams import Streams

TARGETS = ("classes", "segmentation", "depth")  # those that are arrays with one entry an image
CAPTIONS = "captions"

Prepare = Callable[[Upcoming], Mapping[str, torch.Tensor]]


class Order:
    """The order of the training images: every epoch another permutation, drawn from the stream of that epoch.

    It is a function of (seed, step) alone, so that resuming needs no state and batches may straddle epochs. With
    repeated augmentation (Berman et al. 2019; facebookresearch/deit:samplers.py) each image comes `repeats` times in
    a row, and an epoch shows only the first part of its permutation.
    """

    def __init__(self, num_images: int, batch_size: int, streams: Streams, repeats: int = 1) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.repeats = repeats
        self._streams = streams
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Indices int64 [batch_size] of the images of optimiser step `step`."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.num_images
        self._epochs = {epoch: self._permutation(epoch) for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)}
        offsets = positions % self.num_images // self.repeats
        return np.concatenate([self._epochs[int(e)][offsets[epochs == e]] for e in np.unique(epochs)])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch in self._epochs:
            return self._epochs[epoch]
        generator = np.random.default_rng(self._streams.seed_for(f"data_order/{epoch}"))
        return generator.permutation(self.num_images)


@dataclass(frozen=True)
class Shares:
    """How a batch of all ranks is divided: into micro-batches, and each of these evenly among the ranks.

    Raises:
        ValueError: a micro-batch cannot be shared evenly.
    """

    batch_size: int
    micro_batch_size: int

    def __post_init__(self) -> None:
        ranks = distributed.world_size()
        if self.micro_batch_size % ranks:
            raise ValueError(
                f"optim.micro_batch_size {self.micro_batch_size} cannot be shared evenly by {ranks} ranks; "
                f"allowed: multiples of {ranks}"
            )

    @property
    def own(self) -> int:
        """Images of a micro-batch that this rank holds."""
        return self.micro_batch_size // distributed.world_size()

    def positions(self) -> NDArray[np.int64]:
        """Where this rank's images stand in the batch, micro-batch after micro-batch."""
        parts = np.arange(self.batch_size).reshape(-1, self.micro_batch_size)
        return parts[:, distributed.own_rows(self.micro_batch_size)].reshape(-1)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """The micro-batches of this rank's images of a batch."""
        for start in range(0, len(batch.images), self.own):
            part = slice(start, start + self.own)
            yield Batch(
                batch.images[part],
                {name: values[part] for name, values in batch.targets.items()},
                {name: values[part] for name, values in batch.prepared.items()},
                first=distributed.rank() * self.own,
                total=self.micro_batch_size,
            )


@dataclass(frozen=True)
class Reader:
    """Reads this rank's images of a step, those targets of theirs that are needed, and what a method prepares.

    Images that are streamed are decoded several steps ahead, up to step `steps`; targets that only their squares have
    are left out.
    """

    split: Split
    order: Order
    shares: Shares
    needs: Collection[str]
    prepare: Prepare
    device: torch.device
    steps: int | None = None

    def __call__(self, step: int) -> Batch:
        indices, images = self._images(step)
        targets = {name: self.split.targets.get(name) for name in TARGETS if name in self.needs}
        upcoming = Upcoming(step, self.order.batch_size, self.shares.positions(), self._captions(indices))
        return Batch(
            images,
            {
                name: moved(torch.from_numpy(np.asarray(values)[indices]), self.device)
                for name, values in targets.items()
                if values is not None and not isinstance(values, LazyTarget)
            },
            self.prepare(upcoming),
        )

    def close(self) -> None:
        """Ends decoding ahead."""
        if self._ahead is not None:
            self._ahead.close()

    def _images(self, step: int) -> tuple[NDArray[np.int64], Images]:
        """The images and their indices, which are others where some of those in the order cannot be read."""
        if self._ahead is None:
            indices = self._indices(step)
            images = torch.from_numpy(np.ascontiguousarray(self.split.images[indices]))
            return indices, moved(images, self.device)
        indices, originals = self._ahead(step)
        return indices, Ragged.of(originals).to(self.device)

    def _indices(self, step: int) -> NDArray[np.int64]:
        return self.order(step)[self.shares.positions()]

    @functools.cached_property
    def _ahead(self) -> Ahead | None:
        images = self.split.images
        return Ahead(images, self._indices, self.steps) if isinstance(images, Streamed) else None

    def _captions(self, indices: NDArray[np.int64]) -> list[str] | None:
        if CAPTIONS not in self.needs or CAPTIONS not in self.split.targets:
            return None
        texts = self.split.targets[CAPTIONS]
        return [texts[int(index)] for index in indices]


def batches(read: Callable[[int], Batch], start: int, steps: int) -> Iterator[Batch]:
    """The batches of steps `start` … `steps` − 1; a thread reads the next one while the current one is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        try:
            upcoming = pool.submit(read, start) if start < steps else None
            for step in range(start, steps):
                assert upcoming is not None
                batch = upcoming.result()
                if step + 1 < steps:
                    upcoming = pool.submit(read, step + 1)
                yield batch
        finally:
            if isinstance(read, Reader):
                read.close()
