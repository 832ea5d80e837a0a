"""Linear segmentation: batch norm and one linear layer on the last patches after the final norm, scored by mIoU.

Source: facebookresearch/dinov2:dinov2/eval/segmentation/models/decode_heads/linear_head.py (BNHead) and the
configuration that trainers/probes/segmentation_views.py names. Logits are resized to the image, bilinear, before the
loss; ignored pixels have no loss, but count in its mean, as in mmsegmentation. Batch norm is synchronised over GPUs
there; here one rank evaluates and sees the whole batch, which is the same.
`fast` learns from squares whose features are extracted once; `whole` from random crops of whole images, with a pass of
the backbone at every step, and tests by sliding windows.
Shapes: B images, N = h × w patches, D width, K classes, S side of squares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from trainers.augment import standardise
from trainers.config import SegmentationConfig
from trainers.data import IGNORED, Whole
from trainers.findings import Score
from trainers.probes import Context, dense
from trainers.probes import segmentation_views as views
from trainers.probes.seen import SeenSplit

INIT_STD = 0.01  # of mmsegmentation's heads
WARMUP_START = 1e-6

_CHUNK_VALUES = 2**24  # logits that are held at a time in testing


class Head(nn.Module):
    """Batch norm over all patches, and a linear layer."""

    def __init__(self, width: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.weight = nn.Parameter(torch.randn(num_classes, width, generator=generator) * INIT_STD)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, patches_BND: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Logits [B, K, H, W] at `size`."""
        normed = self.norm(patches_BND.flatten(0, 1)).view_as(patches_BND)
        logits = dense.as_map(F.linear(normed, self.weight, self.bias), grid)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


class Segmentation:
    """The probe `segmentation`: see trainers.probes.Probe."""

    transfers = False

    def __init__(self, settings: SegmentationConfig, context: Context) -> None:
        self._settings, self._streams = settings, context.streams
        self.reads = frozenset[str]() if settings.whole else frozenset({"patches"})

    def fit(self, train: SeenSplit, validation: SeenSplit) -> FittedSegmentation:
        """The head that the training images give; validation does not serve.

        Raises:
            ValueError: no training pixel counts.
            FloatingPointError: the weights have diverged.
            HeadDiverged: what is learned has.
        """
        settings, seed = self._settings, self._streams.seed_for("probe/segmentation")
        dense.require(
            train, "segmentation", lambda truth: truth != IGNORED, whole=settings.whole, what="pixel of a class"
        )
        generator = torch.Generator().manual_seed(seed)

        def batches(order: Iterator[NDArray[np.int64]]) -> Iterator[_Batch]:
            return _crops(train, settings, seed, order) if settings.whole else _squares(train, order)

        def head(first: _Batch) -> Head:
            return Head(first.patches_BND.shape[2], len(train.data.segmentation_names), generator).to(train.device)

        learned = dense.fit(settings, len(train), generator, batches, head, _loss, partial(_rate, settings))
        return FittedSegmentation(learned, settings)


@dataclass(frozen=True)
class FittedSegmentation:
    """A trained head."""

    head: Head
    settings: SegmentationConfig

    @torch.no_grad()
    def score(self, seen: SeenSplit) -> Iterator[Score]:
        """`segmentation/miou`, `…/accuracy` (of pixels) and `…/mean_accuracy` (over classes); all over the split.

        Classes that occur neither in the truth nor in the prediction are left out of the mean, as mmsegmentation's
        nan-mean does; of `mean_accuracy` those that do not occur in the truth. mIoU and accuracy of each image are
        over the classes that occur in it, in the truth or in its prediction; NaN where no pixel counts, and
        `…/images_without_classes` says of how many: where that is all, it stands alone.
        """
        num_classes = len(seen.data.segmentation_names)
        found = (self._whole if self.settings.whole else self._squares)(seen)
        total = np.zeros((num_classes, num_classes), np.int64)
        mious: list[float] = []
        accuracies: list[float] = []
        for predicted, truth in found:
            of_image = confusion(predicted, truth, num_classes).cpu().numpy()
            total += of_image
            mious.append(mean_iou(of_image))
            accuracies.append(accuracy(of_image))
        if total.any():
            yield Score("segmentation/miou", mean_iou(total), np.array(mious))
            yield Score("segmentation/accuracy", accuracy(total), np.array(accuracies))
            yield Score("segmentation/mean_accuracy", mean_accuracy(total))
        yield Score("segmentation/images_without_classes", float(np.isnan(mious).sum()))

    def _squares(self, seen: SeenSplit) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted and true classes of each image, [S, S]."""
        side = seen.image_size
        chunk = max(1, _CHUNK_VALUES // (len(self.head.bias) * side * side))
        for positions in np.split(np.arange(len(seen)), range(chunk, len(seen), chunk)):
            patches_BND = _patches(seen, positions)
            predicted = self.head(patches_BND, seen.grid, (side, side)).argmax(dim=1)
            yield from zip(predicted, seen.dense("segmentation", positions), strict=True)

    def _whole(self, seen: SeenSplit) -> Iterator[tuple[Tensor, Tensor]]:
        """Predicted and true classes of each image at its own size, [H, W]."""
        side, stride = _side(seen, self.settings), _stride(seen, self.settings)

        def logits_of(window: Tensor) -> Tensor:
            patches_BND, grid = _read(seen, window)
            logits: Tensor = self.head(patches_BND, grid, (window.shape[2], window.shape[3]))
            return logits

        for index in seen.indices:
            whole = seen.part.whole(int(index))
            image = views.scaled(views.pixels_of(whole), side)[None]
            image = standardise(image, normalization=seen.model.normalization)[0].to(seen.device)
            logits = views.by_windows(image, side, stride, logits_of)
            truth = torch.from_numpy(np.array(whole.targets["segmentation"])).to(seen.device)
            resized = F.interpolate(logits[None], size=truth.shape, mode="bilinear", align_corners=False)
            yield resized[0].argmax(dim=0), truth


def confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """How many pixels of a true class (row) are taken for a class (column), int64 [K, K], without those IGNORED."""
    return multiclass_confusion_matrix(
        predicted.long(), truth.long(), num_classes, ignore_index=IGNORED, validate_args=False
    )


def mean_iou(confusion_KK: NDArray[np.int64]) -> float:
    """Mean intersection over union of the classes that occur in the truth or in the prediction; NaN of none."""
    right = np.diagonal(confusion_KK)
    union = confusion_KK.sum(axis=0) + confusion_KK.sum(axis=1) - right
    return _mean(right, union)


def mean_accuracy(confusion_KK: NDArray[np.int64]) -> float:
    """Mean share of right pixels of the classes that occur in the truth; NaN of none."""
    return _mean(np.diagonal(confusion_KK), confusion_KK.sum(axis=1))


def accuracy(confusion_KK: NDArray[np.int64]) -> float:
    """Share of right pixels; NaN of none."""
    return _mean(np.diagonal(confusion_KK).sum(keepdims=True), confusion_KK.sum(keepdims=True).ravel())


def _mean(parts: NDArray[np.int64], wholes: NDArray[np.int64]) -> float:
    present = wholes > 0
    return float((parts[present] / wholes[present]).mean()) if present.any() else float("nan")


@dataclass(frozen=True)
class _Batch:
    patches_BND: Tensor
    grid: tuple[int, int]
    truth: Tensor  # [B, H, W]


def _loss(head: Head, batch: _Batch, _step: int) -> Tensor:
    truth = batch.truth.long()
    logits = head(batch.patches_BND, batch.grid, (truth.shape[1], truth.shape[2]))
    return F.cross_entropy(logits, truth, ignore_index=IGNORED, reduction="sum") / truth.numel()


def _rate(settings: SegmentationConfig, step: int) -> float:
    decayed = dense.poly(step, settings.steps)
    return settings.learning_rate * dense.warmed_up(decayed, step, settings.warmup_steps, WARMUP_START)


def _patches(seen: SeenSplit, positions: NDArray[np.int64]) -> Tensor:
    patches = seen.features["patches"]
    return patches[torch.from_numpy(positions).to(patches.device)].to(seen.device)


def _squares(seen: SeenSplit, order: Iterator[NDArray[np.int64]]) -> Iterator[_Batch]:
    for positions in order:
        yield _Batch(_patches(seen, positions), seen.grid, seen.dense("segmentation", positions))


def _crops(
    seen: SeenSplit, settings: SegmentationConfig, seed: int, order: Iterator[NDArray[np.int64]]
) -> Iterator[_Batch]:
    side = _side(seen, settings)

    def crop(whole: Whole, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        return views.training_crop(whole, side, random, seen.model.normalization)

    for images, truths in dense.crops(seen, order, settings.batch_size, seed, crop):
        patches_BND, grid = _read(seen, images)
        yield _Batch(patches_BND, grid, truths)


def _read(seen: SeenSplit, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    found, grid = dense.read(seen, images, {"patches"})
    return dense.filled(found["patches"]), grid


def _side(seen: SeenSplit, settings: SegmentationConfig) -> int:
    return settings.side or seen.image_size


def _stride(seen: SeenSplit, settings: SegmentationConfig) -> int:
    """Of windows; two thirds of their side, as 341 is of 512, where it is not set."""
    return settings.stride or max(1, _side(seen, settings) * 2 // 3)
