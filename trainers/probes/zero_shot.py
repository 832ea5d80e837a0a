"""Zero-shot classification: an image belongs to the class whose texts it is most similar to; nothing is learned.

Source: mlfoundations/open_clip:src/open_clip/zero_shot_classifier.py, src/open_clip_train/zero_shot.py. A class is the
mean of the unit-length features of its texts, one for each template, at length 1 again; an image is its class token in
the joint space, at length 1. Shapes: n images, D width, E width of the joint space, C classes, T templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainers.findings import Score
from trainers.probe_settings import ZeroShotConfig
from trainers.probes import Context
from trainers.probes.features import evaluating
from trainers.probes.seen import SeenSplit

TOPS = (1, 5)  # a class among so many counts; left out where there are no more classes than that

_CHUNK = 4_096  # images whose similarities are held at a time
_TEXTS = 4_096  # whose features are held at a time; never fewer than those of a class


class JointSpace(Protocol):
    """A method that compares images with texts, such as trainers.methods.openclip.OpenCLIP."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Of n texts, float32 [n, E] of length 1."""
        ...

    def image_features(self, cls_BD: Tensor) -> Tensor:
        """Of images by their class tokens, float32 [B, E] of length 1."""
        ...


class ZeroShot:
    """The probe `zero_shot`: see trainers.probes.Probe.

    Raises:
        ValueError: the method has no text tower.
    """

    reads = frozenset({"cls"})
    learns = False
    transfers = False  # every data set has classes of its own

    def __init__(self, settings: ZeroShotConfig, context: Context) -> None:
        if not all(hasattr(context.method, name) for name in ("text_features", "image_features")):
            raise ValueError(
                f"probe zero_shot needs a method that compares images with texts; method is {context.name}"
            )
        self._settings, self._method = settings, cast(nn.Module, context.method)

    def fit(self, train: SeenSplit, validation: SeenSplit) -> Classifier:
        """What the texts of the classes look like now; no image is looked at."""
        templates = self._settings.templates or train.data.templates
        method = cast(JointSpace, self._method)
        with evaluating(self._method):
            return Classifier(method, class_features(method, train.data.class_names, templates))


@dataclass(frozen=True)
class Classifier:
    """Classes in the joint space."""

    method: JointSpace
    features_CE: Tensor

    @torch.no_grad()
    def ranks(self, cls_nD: Tensor, classes_n: Tensor) -> Tensor:
        """How many classes are more similar to each image than its own, int64 [n]; of equal ones the lower is."""
        ranks = []
        numbers = torch.arange(len(self.features_CE), device=classes_n.device)
        for tokens, own in zip(torch.split(cls_nD, _CHUNK), torch.split(classes_n, _CHUNK), strict=True):
            similarity = self.method.image_features(tokens.to(classes_n.device)) @ self.features_CE.T
            mine = similarity.gather(1, own[:, None])
            before = (similarity > mine) | ((similarity == mine) & (numbers < own[:, None]))
            if not bool(similarity.isfinite().all()):
                raise FloatingPointError("similarities to texts are not finite: the weights have diverged")
            ranks.append(before.sum(dim=1))
        return torch.cat(ranks)

    def score(self, seen: SeenSplit) -> Iterator[Score]:
        """`zero_shot/top1`, and `zero_shot/top5` where there are more than five classes."""
        if "cls" not in seen.features:
            raise ValueError("probe zero_shot needs a class token, which the backbone does not have")
        ranks = self.ranks(seen.features["cls"], seen.classes).cpu()
        for most in TOPS:
            if most == 1 or len(self.features_CE) > most:
                right = (ranks < most).double()
                yield Score(f"zero_shot/top{most}", float(right.mean()), right.numpy())


@torch.no_grad()
def class_features(method: JointSpace, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Of each class the mean over its texts, float32 [C, E] of length 1."""
    together = max(1, _TEXTS // len(templates))
    means = []
    for start in range(0, len(class_names), together):
        names = class_names[start : start + together]
        texts = [template.replace("{}", name) for name in names for template in templates]
        means.append(method.text_features(texts).view(len(names), len(templates), -1).mean(dim=1))
    return functional.normalize(torch.cat(means), dim=-1)
