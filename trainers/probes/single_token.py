"""What one token knows of the whole image: logistic regression on a single token of each image (paper, Table 1 and 4).

The protocol is that of dinov2:dinov2/eval/log_regression.py on the test set: C from 1e-6 to 1e5 is chosen on a tenth of
the training images, the optimum for it is found on all of them. Features are tokens after the final norm, as they come.
Which patch stands for an image is drawn; images without an outlier have no part in the outlier's row, and how many have
one is recorded as coverage.
Shapes: B images, N patches, R registers, D width, n images of a split, K draws.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers.measurement import Finding, Metric, Subject
from trainers.probes import logistic_regression, patches
from trainers.probes.features import training_subset
from trainers.token_settings import SingleTokenConfig

HELD_OUT = 10  # one in so many training images chooses C
LOWEST, HIGHEST = -6.0, 5.0  # exponents of C


class Row(NamedTuple):
    """One token for each image of a split, where it has one; on the CPU, since there may be millions."""

    tokens_nD: Tensor
    has_n: NDArray[np.bool_]


class SplitTokens(NamedTuple):
    """Tokens of a split's images: of kinds of which there is one, and K draws of a normal and an outlier patch."""

    single: dict[str, Row]  # "cls", "register_0" …
    normal: list[Row]
    outlier: list[Row]
    classes_n: NDArray[np.int64]

    @property
    def normal_where_outlier(self) -> list[Row]:
        """The same draws of a normal patch, of images that have an outlier as well."""
        pairs = zip(self.normal, self.outlier, strict=True)
        return [Row(normal.tokens_nD, normal.has_n & outlier.has_n) for normal, outlier in pairs]


def measure(subject: Subject, settings: SingleTokenConfig) -> Iterator[Finding]:
    """`single_token/KIND/top1` on test images; of patches the mean over draws, and `…/top1_std` (n - 1) of several.

    KIND is cls, register_0 …, normal, outlier, and normal_where_outlier, a normal patch of the images that have an
    outlier. `single_token/outlier/coverage_train` and `…/coverage_test` are the shares of images that have one. A kind
    is absent that too few images have to choose C and learn two classes, or none of the test images.
    """
    train = _read(subject, "train", settings.train_images, settings.draws)
    test = _read(subject, "test", settings.test_images, settings.draws)
    cs = (10.0 ** np.linspace(LOWEST, HIGHEST, settings.num_c)).tolist()
    for kind, row in train.single.items():
        top1 = _top1(subject, row, train.classes_n, test.single[kind], test.classes_n, cs)
        if top1 is not None:
            yield Metric(f"single_token/{kind}/top1", top1)
    for kind in ("normal", "outlier", "normal_where_outlier"):
        rows: list[tuple[Row, Row]] = list(zip(getattr(train, kind), getattr(test, kind), strict=True))
        if kind == "outlier":
            yield Metric("single_token/outlier/coverage_train", float(rows[0][0].has_n.mean()))
            yield Metric("single_token/outlier/coverage_test", float(rows[0][1].has_n.mean()))
        drawn = [_top1(subject, row, train.classes_n, other, test.classes_n, cs) for row, other in rows]
        found = [value for value in drawn if value is not None]
        if found:
            yield Metric(f"single_token/{kind}/top1", statistics.fmean(found))
        if len(found) > 1:
            yield Metric(f"single_token/{kind}/top1_std", statistics.stdev(found))


def _read(subject: Subject, split: str, most: int, draws: int) -> SplitTokens:
    part = getattr(subject.data, split)
    images = training_subset(len(part), most)
    random = subject.numpy(f"single_token/{split}")
    single: dict[str, list[Tensor]] = {}
    normal, outlier = _Drawn(draws), _Drawn(draws)
    for seen in patches.read(subject, split, images):
        for kind, tokens_BD in _kinds(seen.tokens.cls_BD, seen.tokens.registers_BRD).items():
            single.setdefault(kind, []).append(tokens_BD.cpu())
        content_BN = torch.from_numpy(seen.content_BN).to(subject.device)
        keys_BKN = random.random((len(seen.indices), draws, content_BN.shape[1]), np.float32)
        keys = torch.from_numpy(keys_BKN).to(subject.device)
        normal.add(seen.tokens.patches_BND, content_BN & ~seen.outlier_BN, keys)
        outlier.add(seen.tokens.patches_BND, seen.outlier_BN, keys)
    everywhere = np.ones(len(images), bool)
    rows = {kind: Row(torch.cat(parts), everywhere) for kind, parts in single.items()}
    return SplitTokens(rows, normal.rows(), outlier.rows(), np.asarray(part.targets["classes"][images], np.int64))


def _kinds(cls_BD: Tensor | None, registers_BRD: Tensor) -> Mapping[str, Tensor]:
    registers = {f"register_{i}": registers_BRD[:, i] for i in range(registers_BRD.shape[1])}
    return registers if cls_BD is None else {"cls": cls_BD, **registers}


class _Drawn:
    """Draws of one patch per image among those that a mask allows."""

    def __init__(self, draws: int) -> None:
        self._draws = draws
        self._tokens: list[Tensor] = []
        self._has: list[Tensor] = []

    def add(self, patches_BND: Tensor, allowed_BN: Tensor, keys_BKN: Tensor) -> None:
        """Of each image the allowed patch of the largest key, which is uniform in [0, 1), once for every draw."""
        index_BK = keys_BKN.masked_fill(~allowed_BN[:, None], -1.0).argmax(dim=2)
        index_BKD = index_BK[..., None].expand(-1, -1, patches_BND.shape[2])
        self._tokens.append(patches_BND.gather(1, index_BKD).cpu())
        self._has.append(allowed_BN.any(dim=1).cpu())

    def rows(self) -> list[Row]:
        """One row for each draw."""
        has_n = torch.cat(self._has).numpy()
        return [Row(torch.cat([part[:, draw] for part in self._tokens]), has_n) for draw in range(self._draws)]


def _top1(
    subject: Subject,
    train: Row,
    train_classes: NDArray[np.int64],
    test: Row,
    test_classes: NDArray[np.int64],
    cs: list[float],
) -> float | None:
    """Accuracy on the test images that have the token; None where it cannot be learned or there are none."""
    labels = train_classes[train.has_n]
    order = subject.numpy("single_token/held_out").permutation(len(labels))
    held_out = order < len(labels) // HELD_OUT
    if not (logistic_regression.can_choose(labels, held_out) and test.has_n.any()):
        return None
    model = logistic_regression.fit_best(
        _some(train, subject),
        torch.from_numpy(labels).to(subject.device),
        cs,
        torch.from_numpy(held_out).to(subject.device),
    )
    predicted = model.predict(_some(test, subject)).cpu().numpy()
    return float((predicted == test_classes[test.has_n]).mean())


def _some(row: Row, subject: Subject) -> Tensor:
    """The tokens of the images that have one, on the device."""
    return row.tokens_nD[torch.from_numpy(np.flatnonzero(row.has_n))].to(subject.device)
