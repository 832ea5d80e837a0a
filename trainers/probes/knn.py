"""Weighted k-nearest-neighbour classification on frozen features: the official DINO and DINOv2 protocol.

Source: facebookresearch/dinov2:dinov2/eval/knn.py. The feature is the class token, or the mean patch of a backbone that
has no class token. Shapes: n images, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainers.config import KnnConfig
from trainers.findings import Score
from trainers.probes import Context, classification
from trainers.probes.classification import Features
from trainers.probes.seen import SeenSplit

_MAIN_K = 20  # "20 is usually working the best" (official help text): its metric has the short name
_CHUNK = 512  # images whose similarities to all training images are held at a time


class Knn:
    """The probe `knn`: see trainers.probes.Probe. A k larger than the training set is absent."""

    reads = frozenset({"cls", "mean_patch"})
    transfers = False

    def __init__(self, settings: KnnConfig, context: Context) -> None:
        self._settings = settings

    def fit(self, train: SeenSplit, validation: SeenSplit) -> KnnProbe:
        """Nothing is learnt or drawn."""
        return fit(classification.features(train), self._settings, len(train.data.class_names))


@dataclass(frozen=True)
class KnnProbe:
    """The training images' unit-length features, and the k that they allow."""

    features: Tensor  # float32 [n, D]
    classes: Tensor  # int64 [n]
    ks: tuple[int, ...]
    temperature: float
    num_classes: int

    @torch.no_grad()
    def predict(self, evaluated: Features) -> dict[str, Tensor]:
        """Classes, int64 [n], as `knn/top1` for k = 20, else `knn/k10/top1`; of equal votes the lowest class."""
        if not self.ks:
            return {}
        chunks = [self._votes(part) for part in torch.split(_unit(evaluated), _CHUNK)]
        return {_name(k): torch.cat([votes[k].argmax(dim=1) for votes in chunks]) for k in self.ks}

    def score(self, seen: SeenSplit) -> Iterator[Score]:
        """Top-1 accuracies under the names that `predict` gives."""
        evaluated = classification.features(seen)
        yield from classification.accuracies(self.predict(evaluated), evaluated.classes)

    def _votes(self, queries: Tensor) -> dict[int, Tensor]:
        similarity, index = (queries @ self.features.T).topk(max(self.ks), dim=1)
        return votes(similarity, self.classes[index], self.ks, self.temperature, self.num_classes)


@torch.no_grad()
def fit(train: Features, settings: KnnConfig, num_classes: int) -> KnnProbe:
    """Nothing is learnt or drawn: the training features, normalised."""
    ks = tuple(k for k in settings.k if k <= len(train))
    return KnnProbe(_unit(train), train.classes, ks, settings.temperature, num_classes)


def votes(
    similarity: Tensor, classes: Tensor, ks: Sequence[int], temperature: float, num_classes: int
) -> dict[int, Tensor]:
    """Votes [n, C] of the first k neighbours: each weighs exp(similarity / temperature).

    The weights of the largest k sum to 1, as in the official code, so those of smaller k do not.

    Args:
        similarity: cosine similarities, highest first, [n, largest k].
        classes: those neighbours' classes, int64 [n, largest k].
        ks: how many neighbours vote.
        temperature: 0.07 in DINO and DINOv2.
        num_classes: C.
    """
    weights = torch.softmax(similarity.double() / temperature, dim=1)
    empty = weights.new_zeros(len(weights), num_classes)
    return {k: empty.scatter_add(1, classes[:, :k], weights[:, :k]) for k in ks}


def _unit(features: Features) -> Tensor:
    return functional.normalize(features.mean_patch if features.cls is None else features.cls, dim=1)


def _name(k: int) -> str:
    return "knn/top1" if k == _MAIN_K else f"knn/k{k}/top1"
