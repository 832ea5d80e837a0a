"""Where outliers are: image by image, on the grid of patches, and layer by layer (paper, Fig. 10; paper.md §5, 6).

Shapes: B images, N patches on a grid of h × w cells, L blocks (layers 0 … L).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainers.measurement import Arrays, Finding, Metric, PerImage, Statistic, Subject

# Of what `summary` gives, what is a metric of the trial.
METRICS = ("images_with_outliers", "outliers_per_image", "border_over_centre", "row_cv", "column_cv", "threshold")


class Location(NamedTuple):
    """Where the outliers of one layer are; the map P(outlier | cell) is `counts / images`."""

    per_image: NDArray[np.int64]  # [B]
    counts: NDArray[np.int64]  # [h, w], outliers in each cell
    images: NDArray[np.int64]  # [h, w], images in which the cell is more than padding
    threshold: float


def locate(norms: NDArray[np.floating], grid: tuple[int, int], threshold: float) -> Location:
    """Norms [B, N] above a threshold, by image and by cell; NaN is no patch.

    Raises:
        ValueError: the patches do not fill the grid.
    """
    norms_Bhw = on_grid(norms, grid)
    outliers = norms_Bhw > threshold
    return Location(outliers.sum(axis=(1, 2)), outliers.sum(axis=0), (~np.isnan(norms_Bhw)).sum(axis=0), threshold)


def on_grid(patches_BN: NDArray[Any], grid: tuple[int, int]) -> NDArray[Any]:
    """Numbers of patches by row and column, [B, h, w].

    Raises:
        ValueError: the patches do not fill the grid.
    """
    if patches_BN.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"the backbone gives {patches_BN.shape[1]} patches an image, not the {grid[0]} × {grid[1]} of its image "
            "and patch size; set model.image_size and model.patch_size as the backbone has them"
        )
    return patches_BN.reshape(len(patches_BN), *grid)


def summary(location: Location) -> dict[str, float]:
    """Numbers of a location by name; what is undefined is left out, all of it where there is no patch.

    images_with_outliers  share of images that have one or more
    outliers_per_image    mean over images
    border_rate           share of outliers among the patches of the outermost ring of cells
    centre_rate           the same of all other cells
    border_over_centre    border_rate / centre_rate; undefined where no outlier is in the centre
    row_cv, column_cv     standard deviation over rows (columns) of their share of outliers, divided by the mean over
                          them: 0 where all are alike. By chance alone k outliers give about √((h - 1) / k). Undefined
                          without outliers
    threshold             left out where it is infinite, because the rule finds no outliers
    """
    if not location.images.any():
        return {}
    is_border = np.ones(location.counts.shape, bool)
    is_border[1:-1, 1:-1] = False
    border, centre = _rate(location, is_border), _rate(location, ~is_border)
    numbers = {
        "images_with_outliers": (location.per_image > 0).mean(),
        "outliers_per_image": location.per_image.mean(),
        "border_rate": border,
        "centre_rate": centre,
        "border_over_centre": border / centre if centre > 0 else math.nan,
        "row_cv": variation(location, axis=1),
        "column_cv": variation(location, axis=0),
        "threshold": location.threshold,
    }
    return {name: float(number) for name, number in numbers.items() if math.isfinite(number)}


def _rate(location: Location, cells: NDArray[np.bool_]) -> float:
    """The share of outliers among the patches of some cells; NaN where there is none."""
    patches = location.images[cells].sum()
    return float(location.counts[cells].sum() / patches) if patches else math.nan


def variation(location: Location, axis: int) -> float:
    """Coefficient of variation of the shares of outliers of rows (axis 1) or columns (axis 0); NaN if undefined.

    Rows that are padding in all images are left out. The deviation is the population's, so that the gradient through
    the bicubic resampling of Fig. 11 has 0.934 without antialiasing and 0.080 with it.
    """
    counts, patches = location.counts.sum(axis=axis), location.images.sum(axis=axis)
    shares = counts[patches > 0] / patches[patches > 0]
    return float(shares.std() / shares.mean()) if len(shares) > 1 and shares.mean() > 0 else math.nan


def measure(subject: Subject, settings: None) -> Iterator[Finding]:
    """`location/…` of every layer with that layer's own threshold, and metrics of `tokens.outlier_layer`.

    The probe images decide; patches that are padding alone count nowhere, and `tokens/padding_fraction` says how many
    of all patches these are.
    """
    location = locate(subject.patch_norms(subject.tokens.outlier_layer), subject.grid, subject.threshold)
    yield from (
        Metric(f"tokens/location/{name}", value) for name, value in summary(location).items() if name in METRICS
    )
    by_layer = [_at(subject, layer) for layer in range(len(subject.norms[0]))]
    for layer, other in enumerate(by_layer):
        yield from (
            Statistic(f"location/{name}", value, layer, token="patch") for name, value in summary(other).items()
        )
    padded_BN = subject.padding(subject.data.validation, np.arange(len(location.per_image)))
    if padded_BN is not None:
        yield Metric("tokens/padding_fraction", float(padded_BN.mean()))
    yield PerImage("tokens/location/outliers", location.per_image.astype(np.float64))
    yield Arrays("location", _arrays(location, range(len(by_layer))[subject.tokens.outlier_layer], by_layer))


def _at(subject: Subject, layer: int) -> Location:
    norms_BN = subject.patch_norms(layer)
    return locate(norms_BN, subject.grid, subject.threshold_of(norms_BN))


def _arrays(location: Location, layer: int, by_layer: Sequence[Location]) -> dict[str, NDArray[Any]]:
    """Of one layer `counts` and `images` [h, w], `threshold` and `layer`; of all of them `layer_counts` [L + 1, h, w]
    and `layer_thresholds` [L + 1]. A threshold is infinite where the rule finds no outliers."""
    return {
        "counts": location.counts,
        "images": location.images,
        "threshold": np.array(location.threshold),
        "layer": np.array(layer),
        "layer_counts": np.stack([other.counts for other in by_layer]),
        "layer_thresholds": np.array([other.threshold for other in by_layer]),
    }
