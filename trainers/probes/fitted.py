"""The probes that a trial names, fitted once on training images and scored on any backbone and split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers import catalog, probes
from trainers.augment import evaluation_view
from trainers.config import EvaluationConfig, ModelConfig
from trainers.data import DataSet
from trainers.dotted import Loaded, load
from trainers.probes import Predictor
from trainers.probes.features import Features, extract, training_subset
from trainers.streams import Streams

PREFIXES = {"validation": "val", "test": "test"}  # of metrics, by split


class Scores(NamedTuple):
    """Of one split: `val/…` or `test/…` accuracies, and which images are right, bool [n], under the same names."""

    metrics: dict[str, float]
    correct: dict[str, Tensor]


class Probes:
    """The probes of `evaluation.probes` on one data set, always on the same images."""

    def __init__(
        self, settings: EvaluationConfig, data: DataSet, model: ModelConfig, streams: Streams, device: torch.device
    ) -> None:
        self._settings, self._data, self._streams, self._device = settings, data, streams, device
        assert isinstance(model.image_size, int), "the configuration is not resolved"
        self._view: Callable[[Tensor], Tensor] = functools.partial(
            evaluation_view, image_size=model.image_size, normalization=model.normalization
        )

    def fit(self, backbone: nn.Module) -> FittedProbes:
        """Probes that have learned from features of training images; without probes no image is looked at."""
        if not self._settings.probes:
            return FittedProbes(self, [])
        subset = training_subset(len(self._data.train), self._settings.train_images)
        train, classes = self.features(backbone, "train", subset), len(self._data.class_names)
        fitted = [
            cast(Predictor, fit(train, getattr(self._settings, name, None), self._streams, classes))
            for name, fit in self._fits()
        ]
        return FittedProbes(self, fitted)

    def features(self, backbone: nn.Module, split: str, indices: NDArray[np.int64] | None = None) -> Features:
        """Features of a split's images, or of those at `indices`."""
        part = getattr(self._data, split)
        classes = np.asarray(part.targets["classes"])
        return extract(backbone, part.images, classes, self._view, device=self._device, indices=indices)

    def _fits(self) -> Iterator[tuple[str, Loaded]]:
        for name in self._settings.probes:
            yield name, load(catalog.PROBES[name].build if name in catalog.PROBES else name)


@dataclass(frozen=True)
class FittedProbes:
    """Probes that have learned, which can be asked about other backbones than they have learned from."""

    probes: Probes
    fitted: list[Predictor]

    def score(self, backbone: nn.Module, split: str) -> Scores:
        """Accuracies on `split`, "validation" or "test", whose features are those of `backbone`."""
        if not self.fitted:
            return Scores({}, {})
        features = self.probes.features(backbone, split)
        predicted: dict[str, Tensor] = {}
        for probe in self.fitted:
            predicted |= probe.predict(features)
        prefix = PREFIXES[split]
        metrics = {f"{prefix}/{name}": value for name, value in probes.top1(predicted, features.classes)}
        right = probes.correct(predicted, features.classes)
        return Scores(metrics, {f"{prefix}/{name}": values for name, values in right.items()})
