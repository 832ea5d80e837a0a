"""Which images each step sees, and getting them to the device ahead of time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from trainers.data import Split
from trainers.methods import Batch
from trainers.streams import Streams

TARGETS = ("classes", "segmentation", "depth")  # those that are arrays with one entry an image


class Order:
    """The order of the training images: every epoch another permutation, drawn from the stream of that epoch.

    It is a function of (seed, step) alone, so that resuming needs no state and batches may straddle epochs.
    """

    def __init__(self, num_images: int, batch_size: int, streams: Streams) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self._streams = streams
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Indices int64 [batch_size] of the images of optimiser step `step`."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.num_images
        self._epochs = {epoch: self._permutation(epoch) for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)}
        offsets = positions % self.num_images
        return np.concatenate([self._epochs[int(e)][offsets[epochs == e]] for e in np.unique(epochs)])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch in self._epochs:
            return self._epochs[epoch]
        generator = np.random.default_rng(self._streams.seed_for(f"data_order/{epoch}"))
        return generator.permutation(self.num_images)


def fetch(split: Split, indices: NDArray[np.int64], device: torch.device, needs: Collection[str] = TARGETS) -> Batch:
    """The images of `indices` and those of their targets that are needed, on the device."""
    names = [name for name in TARGETS if name in needs and name in split.targets]
    on_device = {name: _move(np.asarray(split.targets[name])[indices], device) for name in names}
    return Batch(_move(split.images[indices], device), on_device)


def batches(
    split: Split, order: Order, start: int, steps: int, device: torch.device, needs: Collection[str] = TARGETS
) -> Iterator[Batch]:
    """The batches of steps `start` … `steps` − 1; a thread reads the next one while the current one is used."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as pool:
        upcoming = pool.submit(fetch, split, order(start), device, needs) if start < steps else None
        for step in range(start, steps):
            assert upcoming is not None
            batch = upcoming.result()
            if step + 1 < steps:
                upcoming = pool.submit(fetch, split, order(step + 1), device, needs)
            yield batch


def split_batch(batch: Batch, size: int) -> Iterator[Batch]:
    """A batch in micro-batches of `size` images."""
    for first in range(0, len(batch.images), size):
        part = slice(first, first + size)
        targets: Mapping[str, torch.Tensor] = {name: values[part] for name, values in batch.targets.items()}
        yield Batch(batch.images[part], targets)


def _move(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
