"""Weighted k-nearest-neighbour classification on frozen features: the official DINO and DINOv2 protocol.

Source: facebookresearch/dinov2:dinov2/eval/knn.py. The feature is the class token, or the mean patch of a backbone that
has no class token. Shapes: n images, D width, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from trainers.config import KnnConfig
from trainers.findings import Score
from trainers.probes import Context, classification
from trainers.probes.classification import Features
from trainers.probes.seen import SeenSplit

_MAIN_K = 20  # "20 is usually working the best" (official help text): its metric has the short name
_QUERIES, _KNOWN = 512, 16_384  # how many evaluated and training images are compared at a time
_VOTES = 2**23  # votes that are held at a time, 64 MiB: of images, classes and all k

log = logging.getLogger(__name__)


class Neighbors(NamedTuple):
    """Of n images, on one device."""

    similarity: Tensor  # float32 [n, k], cosine
    indices: Tensor  # int64 [n, k]


class Knn:
    """The probe `knn`: see trainers.probes.Probe. A k larger than the training set is absent."""

    reads = frozenset({"cls", "mean_patch"})
    transfers = False

    def __init__(self, settings: KnnConfig, context: Context) -> None:
        self._settings = settings

    def fit(self, train: SeenSplit, validation: SeenSplit) -> KnnProbe:
        """Nothing is learnt or drawn; which k are more than there are images is said."""
        if missing := [k for k in self._settings.k if k > len(train)]:
            log.warning("k-NN has %d training images and leaves out k = %s", len(train), ", ".join(map(str, missing)))
        return fit(classification.features(train), self._settings, len(train.data.class_names))


@dataclass(frozen=True)
class KnnProbe:
    """The training images' features, where they lie, and the k that they allow."""

    features: Tensor  # float32 [n, D] of any length, perhaps memory-mapped while the device is a GPU
    classes: Tensor  # int64 [n] on the device
    ks: tuple[int, ...]
    temperature: float
    num_classes: int

    @torch.no_grad()
    def predict(self, evaluated: Features) -> dict[str, Tensor]:
        """Classes, int64 [n], as `knn/top1` for k = 20, else `knn/k10/top1`; of equal votes the lowest class."""
        if not self.ks:
            return {}
        near = self._neighbors(_feature(evaluated))
        together = max(1, min(_QUERIES, _VOTES // (self.num_classes * len(self.ks))))
        predicted: dict[int, list[Tensor]] = {k: [] for k in self.ks}
        for part in zip(*(torch.split(found, together) for found in near), strict=True):
            for k, votes_nC in self._votes(*part).items():
                predicted[k].append(votes_nC.argmax(dim=1))
        return {_name(k): torch.cat(parts) for k, parts in predicted.items()}

    def score(self, seen: SeenSplit) -> Iterator[Score]:
        """Top-1 accuracies under the names that `predict` gives."""
        evaluated = classification.features(seen)
        yield from classification.accuracies(self.predict(evaluated), evaluated.classes)

    def _neighbors(self, queries: Tensor) -> Neighbors:
        return neighbors(queries, self.features, max(self.ks), self.classes.device)

    def _votes(self, similarity: Tensor, index: Tensor) -> dict[int, Tensor]:
        return votes(similarity, self.classes[index], self.ks, self.temperature, self.num_classes)


@torch.no_grad()
def fit(train: Features, settings: KnnConfig, num_classes: int) -> KnnProbe:
    """Nothing is learnt or drawn."""
    ks = tuple(k for k in settings.k if k <= len(train))
    return KnnProbe(_feature(train), train.classes, ks, settings.temperature, num_classes)


@torch.no_grad()
def neighbors(queries: Tensor, known: Tensor, k: int, device: torch.device) -> Neighbors:
    """The k known features of highest cosine similarity, highest first; of equal ones those of lower index.

    Memory is bounded by the features of a chunk and k neighbours of each query: the known ones are read once, chunk by
    chunk, and may be memory-mapped. Chunks change nothing but the last bit of a similarity, where a matrix product
    rounds otherwise for another shape.

    Args:
        queries: float32 [n, D] of any length, on any device.
        known: float32 [m, D], m ≥ k; likewise.
        k: how many neighbours.
        device: where to compute; results are there.
    """
    parts = torch.split(queries, _QUERIES)
    nothing = Neighbors(torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device))
    best = [Neighbors(*(values.expand(len(part), 0) for values in nothing)) for part in parts]
    for start in range(0, len(known), _KNOWN):
        rows_mD = functional.normalize(known[start : start + _KNOWN].to(device), dim=1)
        for number, part in enumerate(parts):
            found = _highest(functional.normalize(part.to(device), dim=1) @ rows_mD.T, k)
            found = found._replace(indices=found.indices + start)
            best[number] = _sorted(
                Neighbors(*(torch.cat(both, dim=1) for both in zip(best[number], found, strict=True))), k
            )
    return Neighbors(*(torch.cat(values) for values in zip(*best, strict=True)))


def _highest(similarity_nm: Tensor, k: int) -> Neighbors:
    """The k highest of each row, or all, in the order of `neighbors`; topk leaves open which of equal ones it takes."""
    k = min(k, similarity_nm.shape[1])
    values, index = similarity_nm.topk(k, dim=1)
    lowest = values[:, -1:]
    tied = ((similarity_nm >= lowest).sum(dim=1) > k).nonzero()[:, 0]  # rows that leave out some of those equal to it
    if len(tied):
        chosen = values[tied] == lowest[tied]
        equal = similarity_nm[tied] == lowest[tied]
        first = equal & (equal.cumsum(dim=1) <= chosen.sum(dim=1, keepdim=True))
        index[tied] = index[tied].masked_scatter(chosen, first.nonzero()[:, 1])
    order = index.argsort(dim=1)
    return _sorted(Neighbors(values.gather(1, order), index.gather(1, order)), k)


def _sorted(found: Neighbors, k: int) -> Neighbors:
    """The k highest, highest first; equal ones stay in their order."""
    values, order = found.similarity.sort(dim=1, descending=True, stable=True)
    return Neighbors(values[:, :k], found.indices.gather(1, order[:, :k]))


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


def _feature(features: Features) -> Tensor:
    return features.mean_patch if features.cls is None else features.cls


def _name(k: int) -> str:
    return "knn/top1" if k == _MAIN_K else f"knn/k{k}/top1"
