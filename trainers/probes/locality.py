"""What patch tokens know of their own place: linear probes for position and pixels (paper, Fig. 5b and Table 5).

Both learn from the patch tokens of training images, normal and outlier ones alike, and are scored on test images for
either kind. Patches of padding are left out. What the paper does not publish is decided here: the position probe is a
softmax over grid cells, solved to its optimum, with the penalty chosen on a tenth of the images; the pixel probe is
least squares, solved exactly; pixels are those of the view that the model saw, in [0, 1], and the error of a patch is
the Euclidean length of the difference over its p · p · 3 values. (The paper's 18.38 at p = 14 would be 0.76 a value,
which no fit errs by in [0, 1]: its pixels have another scale.)
Shapes: B images, N patches of p · p px, n patches of all images, D width, P = p · p · 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers import catalog
from trainers.measurement import Finding, Metric, Subject
from trainers.probes import logistic_regression, patches
from trainers.probes.features import training_subset
from trainers.probes.logistic_regression import Classifier
from trainers.probes.patches import Seen
from trainers.token_settings import LocalityConfig

CS = (1e-2, 1.0, 1e2)  # from a probe that hardly learns to one that hardly is penalised
TOLERANCE = 1e-3  # of the objective; accuracies differ in the fourth digit from those at 1e-6
HELD_OUT = 0.1  # of the training images

RIDGE = 1e-12  # relative to the features' mean square: no more than keeps the equations solvable


def measure(subject: Subject, settings: LocalityConfig) -> Iterator[Finding]:
    """`locality/position/GROUP/top1` and `…/distance` (in cells), `locality/pixels/GROUP/l2`, by group of test patches.

    Groups are normal, outlier and all patches; what has no patches is absent. `locality/outlier_fraction` says how many
    of the scored patches are outliers.

    Raises:
        ValueError: there are fewer than two training images, or the patch tokens do not lie on the image's grid.
    """
    position, pixels = _learn(subject, settings)
    scores = _score(subject, settings, position, pixels)
    groups = {"normal": scores.content & ~scores.outlier, "outlier": scores.outlier, "all": scores.content}
    for group, chosen in groups.items():
        if not chosen.any():
            continue
        if position is not None:
            yield Metric(f"locality/position/{group}/top1", float((scores.distance[chosen] == 0).mean()))
            yield Metric(f"locality/position/{group}/distance", float(scores.distance[chosen].mean()))
        yield Metric(f"locality/pixels/{group}/l2", float(scores.error[chosen].mean()))
    if scores.content.any():
        yield Metric("locality/outlier_fraction", float(scores.outlier[scores.content].mean()))


class LeastSquares:
    """Linear regression with an intercept from sums over samples, which are added in any portions.

    Args:
        width: D of the inputs.
        targets: P of the outputs.
        device: of both.
    """

    def __init__(self, width: int, targets: int, device: torch.device) -> None:
        self._moments_DD = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self._products_DP = torch.zeros(width + 1, targets, dtype=torch.float64, device=device)

    def add(self, inputs_nD: Tensor, targets_nP: Tensor) -> None:
        """Add n samples."""
        inputs = torch.cat([inputs_nD.double(), inputs_nD.new_ones(len(inputs_nD), 1).double()], dim=1)
        self._moments_DD.addmm_(inputs.T, inputs)
        self._products_DP.addmm_(inputs.T, targets_nP.double())

    def solve(self) -> LinearMap:
        """The map of least squared error over all samples that were added."""
        count = self._moments_DD[-1, -1]
        mean_D, mean_P = self._moments_DD[-1, :-1] / count, self._products_DP[-1] / count
        covariance_DD = self._moments_DD[:-1, :-1] / count - mean_D.outer(mean_D)
        shared_DP = self._products_DP[:-1] / count - mean_D.outer(mean_P)
        mean_square = self._moments_DD.diagonal()[:-1].mean() / count
        covariance_DD.diagonal().add_((RIDGE * mean_square).clamp(min=torch.finfo(torch.float64).tiny))
        weight_DP = torch.linalg.solve(covariance_DD, shared_DP)
        return LinearMap(weight_DP, mean_P - mean_D @ weight_DP)


class LinearMap(NamedTuple):
    """From inputs to outputs, float64."""

    weight_DP: Tensor
    bias_P: Tensor

    def __call__(self, inputs_nD: Tensor) -> Tensor:
        return torch.addmm(self.bias_P, inputs_nD.double(), self.weight_DP)


class _Scores(NamedTuple):
    """Of every patch of the test images, [n, N]."""

    distance: NDArray[np.float64]  # between the predicted and the true cell
    error: NDArray[np.float64]
    outlier: NDArray[np.bool_]
    content: NDArray[np.bool_]


def pixels_of(views: Tensor, patch_size: int, grid: tuple[int, int], normalization: str = "imagenet") -> Tensor:
    """Values of every patch in [0, 1], [B, N, P], of normalised views [B, 3, S, S]."""
    rows, columns = grid
    mean, std = (views.new_tensor(values)[:, None, None] for values in catalog.NORMALIZATIONS[normalization])
    values = (views[:, :, : rows * patch_size, : columns * patch_size] * std + mean).clamp_(0.0, 1.0)
    split = values.reshape(len(views), 3, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(len(views), rows * columns, -1)


def _learn(subject: Subject, settings: LocalityConfig) -> tuple[Classifier | None, LinearMap]:
    """The probes for position and pixels; there is none for position where patches of one cell alone are seen."""
    images = training_subset(len(subject.data.train), settings.train_images)
    if len(images) < 2:
        raise ValueError("locality needs at least two training images; there is one")
    random = subject.numpy("locality")
    held_out_images = random.permutation(len(images)) < max(1, round(HELD_OUT * len(images)))
    cells = subject.grid[0] * subject.grid[1]
    share = settings.train_tokens / (len(images) * cells)
    pixels: LeastSquares | None = None
    tokens, places, held_out, first = [], [], [], 0
    for seen in patches.read(subject, "train", images):
        _check(subject, seen)
        values_BNP = pixels_of(seen.views, subject.model.patch_size, subject.grid, subject.model.normalization)
        flat_nD = seen.tokens.patches_BND.flatten(0, 1)
        pixels = pixels or LeastSquares(flat_nD.shape[1], values_BNP.shape[2], subject.device)
        content = torch.from_numpy(np.flatnonzero(seen.content_BN)).to(subject.device)
        pixels.add(flat_nD[content], values_BNP.flatten(0, 1)[content])
        kept = np.flatnonzero(seen.content_BN & (random.random(seen.content_BN.shape) < share))
        tokens.append(flat_nD[torch.from_numpy(kept).to(subject.device)])
        places.append(kept % cells)
        held_out.append(held_out_images[first + kept // cells])
        first += len(seen.indices)
    assert pixels is not None
    position = _learn_position(torch.cat(tokens), np.concatenate(places), np.concatenate(held_out))
    return position, pixels.solve()


def _check(subject: Subject, seen: Seen) -> None:
    rows, columns = subject.grid
    found = seen.tokens.patches_BND.shape[1]
    if found != rows * columns:
        raise ValueError(
            f"the backbone gives {found} patch tokens where {subject.image_size} px hold {rows} × {columns} patches of "
            f"{subject.model.patch_size} px; leave locality out of tokens.measurements"
        )


def _learn_position(tokens_nD: Tensor, places_n: NDArray[np.int64], held_out_n: NDArray[np.bool_]) -> Classifier | None:
    if not logistic_regression.can_choose(places_n, held_out_n):
        return None
    places, held_out = (torch.from_numpy(values).to(tokens_nD.device) for values in (places_n, held_out_n))
    return logistic_regression.fit_best(tokens_nD, places, CS, held_out, tolerance=TOLERANCE)


def _score(subject: Subject, settings: LocalityConfig, position: Classifier | None, pixels: LinearMap) -> _Scores:
    images = training_subset(len(subject.data.test), settings.test_images)
    rows, columns = subject.grid
    place_N = torch.arange(rows * columns, device=subject.device)
    distances, errors, outliers, content = [], [], [], []
    for seen in patches.read(subject, "test", images):
        flat_nD = seen.tokens.patches_BND.flatten(0, 1)
        values_BNP = pixels_of(seen.views, subject.model.patch_size, subject.grid, subject.model.normalization)
        values_nP = values_BNP.flatten(0, 1)
        errors.append(torch.linalg.vector_norm(pixels(flat_nD) - values_nP, dim=1).view(-1, rows * columns))
        found_BN = place_N if position is None else position.predict(flat_nD).view(-1, rows * columns)
        down, across = found_BN // columns - place_N // columns, found_BN % columns - place_N % columns
        distances.append(torch.hypot(down.double(), across.double()).expand_as(errors[-1]))
        outliers.append(seen.outlier_BN)
        content.append(seen.content_BN)
    distance, error, outlier = (torch.cat(parts).cpu().numpy() for parts in (distances, errors, outliers))
    return _Scores(distance, error, outlier, np.concatenate(content))
