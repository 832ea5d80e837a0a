"""What probes that predict every pixel share: patch tokens as maps, padding to whole patches, training of their heads.

Shapes: B images, N = h × w patches, D width, H × W px of an image.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers.data import Whole
from trainers.probes import HeadDiverged
from trainers.probes.features import evaluating, taps
from trainers.probes.seen import SeenSplit

Job = TypeVar("Job")
Made = TypeVar("Made")
Batch = TypeVar("Batch")
Head = TypeVar("Head", bound=nn.Module)

_AHEAD = 2  # batches that are made while one is learned from


def center_padded(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, H, W] with zeros around them up to whole patches, the odd pixel at the right and the bottom.

    Source: facebookresearch/dinov2:dinov2/hub/utils.py, CenterPadding.
    """
    padding: list[int] = []
    for size in reversed(images.shape[2:]):
        missing = -size % patch_size
        padding += [missing // 2, missing - missing // 2]
    return F.pad(images, padding)


def as_map(tokens_BND: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens on their grid, [B, D, h, w]."""
    return tokens_BND.transpose(1, 2).reshape(len(tokens_BND), tokens_BND.shape[2], *grid)


def filled(tokens_BND: Tensor) -> Tensor:
    """Tokens with NaN of deleted patches replaced by the mean over the image's other patches.

    Raises:
        FloatingPointError: an image has none left, or values are infinite: the weights have diverged.
    """
    gone_BN1 = tokens_BND.isnan().any(dim=2, keepdim=True)
    if bool(gone_BN1.any()):
        kept_BND = tokens_BND.masked_fill(gone_BN1, 0.0)
        count_B11 = (~gone_BN1).sum(dim=1, keepdim=True)
        tokens_BND = torch.where(gone_BN1, kept_BND.sum(dim=1, keepdim=True) / count_B11, tokens_BND)
    if not bool(tokens_BND.isfinite().all()):
        raise FloatingPointError("features are not finite: the weights have diverged")
    return tokens_BND


def batches(num_images: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Positions of each step's images: shuffled passes over all of them, one after another."""
    wanted = steps * batch_size
    passes = [torch.randperm(num_images, generator=generator) for _ in range(math.ceil(wanted / num_images))]
    yield from torch.cat(passes)[:wanted].view(steps, batch_size).numpy()


def poly(step: int, steps: int) -> float:
    """Factor of the learning rate that falls linearly to 0, mmcv's poly policy of power 1."""
    return 1.0 - step / steps


def cosine(step: int, steps: int) -> float:
    """Factor of the learning rate that falls to 0 along a cosine, mmcv's CosineAnnealing."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def warmed_up(factor: float, step: int, warmup_steps: int, start: float) -> float:
    """`factor` times a linear rise from `start` to 1 over the first steps, as mmcv's linear warm-up multiplies it."""
    return factor if step >= warmup_steps else factor * (start + (1.0 - start) * step / warmup_steps)


class Recipe(Protocol):
    """How a head is trained: settings of SegmentationConfig and DepthConfig."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...


def fit(
    settings: Recipe,
    num_images: int,
    generator: torch.Generator,
    batches_of: Callable[[Iterator[NDArray[np.int64]]], Iterator[Batch]],
    head_of: Callable[[Batch], Head],
    loss_of: Callable[[Head, Batch, int], Tensor],
    rates: Callable[[int], float],
    clip_grad: float | None = None,
) -> Head:
    """A head that has learned from batches of images; see `train`.

    Args:
        settings: how many steps, of how many images.
        num_images: that there are.
        generator: draws the order of the images.
        batches_of: gives what is learned from in each step from the positions of its images.
        head_of: makes the head, from the first batch.
        loss_of: of a head and a batch at a step.
        rates: the learning rate of a step.
        clip_grad: largest norm of the gradients of all parameters together.

    Raises:
        HeadDiverged: a loss is NaN or infinite.
    """
    found = batches_of(batches(num_images, settings.batch_size, settings.steps, generator))
    first = next(found)
    head = head_of(first)
    losses = (partial(loss_of, head, batch, step) for step, batch in enumerate(chain([first], found)))
    train(head, losses, rates, settings.weight_decay, clip_grad)
    return head


def require(seen: SeenSplit, target: str, counts: Callable[[Tensor], Tensor], *, whole: bool, what: str) -> None:
    """Look until a pixel is found that can be learned from, which is in the first image as a rule.

    Args:
        seen: training images.
        target: "segmentation" or "depth".
        counts: which values of it count.
        whole: whether whole images are learned from.
        what: such a pixel has, for the message.

    Raises:
        ValueError: there is none.
    """
    for position in range(len(seen)):
        if whole:
            values = torch.from_numpy(np.array(seen.part.whole(int(seen.indices[position])).targets[target]))
        else:
            values = seen.dense(target, np.array([position]))
        if bool(counts(values).any()):
            return
    raise ValueError(f"{seen.data.name} has no {what} in {seen.split} to learn from")


@torch.enable_grad()
def train(
    head: nn.Module,
    losses: Iterable[Callable[[], Tensor]],
    rates: Callable[[int], float],
    weight_decay: float,
    clip_grad: float | None = None,
) -> None:
    """AdamW over the steps whose losses are given, each called once the head has learned from those before.

    Args:
        head: in training mode; it is left in eval mode.
        losses: of each step.
        rates: the learning rate of a step.
        weight_decay: of all parameters.
        clip_grad: largest norm of the gradients of all parameters together.

    Raises:
        HeadDiverged: a loss is NaN or infinite.
    """
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=weight_decay)
    bad = torch.zeros((), dtype=torch.bool, device=next(head.parameters()).device)
    for step, loss_of in enumerate(losses):
        optimizer.param_groups[0]["lr"] = rates(step)
        loss = loss_of()
        bad |= ~loss.detach().isfinite()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(head.parameters(), clip_grad)
        optimizer.step()
    if bool(bad):  # asked once, since asking stops a GPU
        raise HeadDiverged("its loss is not finite; a lower learning_rate may help")
    head.eval()


def read(seen: SeenSplit, images: Tensor, reads: Collection[str]) -> tuple[Mapping[str, Tensor], tuple[int, int]]:
    """What `reads` names of normalised images [B, 3, H, W] of any size, and the grid of their patches.

    Images are padded to whole patches. Afterwards, as in the official code, maps on the grid are resized to the
    images without padding, as if they covered no more.
    """
    patch_size = seen.model.patch_size
    padded = center_padded(images, patch_size)
    with torch.no_grad(), evaluating(seen.backbone):
        found = taps(seen.backbone, padded, reads)
    return found, (padded.shape[2] // patch_size, padded.shape[3] // patch_size)


def crops(
    seen: SeenSplit,
    order: Iterable[NDArray[np.int64]],
    batch_size: int,
    seed: int,
    crop: Callable[[Whole, np.random.Generator], tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random views of whole images and their targets, stacked, on the device; one batch for each of `order`.

    Made by as many threads as this process may have cores.

    Args:
        seen: the images.
        order: positions of each batch's images.
        batch_size: the most of them.
        seed: with the number of a view it is the seed of its draws, so that threads do not matter.
        crop: gives a view and its target from an image and a generator.
    """

    def make(job: tuple[int, int]) -> tuple[Tensor, Tensor]:
        number, position = job
        return crop(seen.part.whole(int(seen.indices[position])), np.random.default_rng([seed, number]))

    jobs = (
        [(step * batch_size + i, int(position)) for i, position in enumerate(positions)]
        for step, positions in enumerate(order)
    )
    for made in ahead(jobs, make, len(os.sched_getaffinity(0))):
        images, targets = (torch.stack(parts).to(seen.device) for parts in zip(*made, strict=True))
        yield images, targets


def ahead(batches: Iterable[Sequence[Job]], make: Callable[[Job], Made], workers: int) -> Iterator[list[Made]]:
    """What `make` gives of all jobs, batch after batch, by threads that begin before a batch is asked for.

    The result does not depend on `workers` if `make` depends on its job alone.
    """
    waiting: deque[list[Future[Made]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            waiting.append([pool.submit(make, job) for job in batch])
            if len(waiting) > _AHEAD:
                yield [made.result() for made in waiting.popleft()]
        while waiting:
            yield [made.result() for made in waiting.popleft()]
