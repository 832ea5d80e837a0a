"""What probes of classes share: the features that they read, and accuracies from predicted classes.

Shapes: n images, D width, K blocks, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from trainers.findings import Score
from trainers.probes.seen import SeenSplit


@dataclass(frozen=True)
class Features:
    """What probes of classes read of n images, all on one device; tokens are final-norm'ed, registers never enter."""

    cls: Tensor | None  # float32 [n, D], None for a backbone without class token
    mean_patch: Tensor  # float32 [n, D], mean over the patch tokens
    classes: Tensor  # int64 [n]
    cls_blocks: Tensor | None = None  # float32 [n, K, D], class tokens of the last blocks, where they are read

    def __len__(self) -> int:
        return len(self.classes)

    def at(self, indices: Tensor) -> Features:
        """The features of some of the images."""
        cls, blocks = (None if part is None else part[indices] for part in (self.cls, self.cls_blocks))
        return Features(cls, self.mean_patch[indices], self.classes[indices], blocks)


def features(seen: SeenSplit) -> Features:
    """Of all images of a split."""
    read = seen.features
    return Features(read.get("cls"), read["mean_patch"], seen.classes, read.get("cls_blocks"))


def accuracies(predicted: Mapping[str, Tensor], classes: Tensor) -> Iterator[Score]:
    """The fraction of images that are classified correctly, and whether each is, for predictions int64 [n] by name.

    Raises:
        ValueError: there are no images.
    """
    if not len(classes):
        raise ValueError("there are no images to evaluate on")
    for name, prediction in predicted.items():
        right = (prediction == classes).cpu()
        yield Score(name, int(right.sum()) / len(right), right.double().numpy())
