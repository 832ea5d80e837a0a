"""Downstream metrics on the frozen backbone; every probe file yields (name, value) from per-image predictions.

A probe file has `fit(train, settings, streams, num_classes)`, whose result predicts the classes of any `Features`
under the names of its metrics, and `probe(train, evaluated, settings, streams, num_classes)`, which yields accuracies.
Shapes: n images, D width, C classes, K heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from trainers.probes.features import Features


class Predictor(Protocol):
    """A fitted probe."""

    def predict(self, evaluated: Features) -> dict[str, Tensor]:
        """Predicted classes, int64 [n], under the name of each metric."""
        ...


def correct(predicted: Mapping[str, Tensor], classes: Tensor) -> dict[str, Tensor]:
    """Which images are classified correctly, bool [n] on the CPU, under the name of each metric."""
    return {name: (prediction == classes).cpu() for name, prediction in predicted.items()}


def top1(predicted: Mapping[str, Tensor], classes: Tensor) -> Iterator[tuple[str, float]]:
    """(name, fraction of images that are classified correctly) of each metric.

    Raises:
        ValueError: there are no images.
    """
    if not len(classes):
        raise ValueError("there are no images to evaluate on")
    for name, right in correct(predicted, classes).items():
        yield name, int(right.sum()) / len(right)
