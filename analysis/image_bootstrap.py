"""Intervals over test images by a paired bootstrap, where there is one run and never will be another; pure.

Seeds are one source of error and the images of the test set another. Released weights exist once, so that nothing can
be said of further runs; what can be bounded is how far the difference between two given models would change with other
images of the same kind. Images are many, so a percentile bootstrap covers (simulated: docs/measurements.md), unlike
over a few seeds. It resamples images, with both models' results of an image together, and nothing else: an interval
over images is no interval over seeds, and is named and flagged as what it is.

Only metrics that are means over images can be resampled: accuracies, CorLoc, an image's depth error. mIoU over the
whole test set is no mean of its images' mIoU. So per-image results count only where their mean is the reported score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.statistics import Difference

Floats = NDArray[np.float64]

METHOD = "paired bootstrap over images"
FLAG = "over_images"  # the interval says nothing of further runs
CONFIDENCE = 0.95
RESAMPLES = 2_000
_SEED = 20_240_502
_CHUNK = 2_000_000  # drawn images at once, which bounds memory
_FEW = 64  # distinct values, as of accuracies: counts of them are drawn instead of images, which is faster
_TOLERANCE = 1e-9  # of a mean, beside rounding in its sum


@dataclass(frozen=True)
class PerImage:
    """A metric of each test image: `index` rising and unique, [n], its `values`, [n], NaN where an image has none."""

    index: NDArray[np.int64]
    values: Floats
    data: str | None  # fingerprint of the data: only the same images can be paired

    def is_mean(self, score: float) -> bool:
        """Whether `score` is the mean of the images that have a value."""
        finite = self.values[np.isfinite(self.values)]
        return bool(len(finite)) and abs(float(finite.mean()) - score) <= _TOLERANCE * max(1.0, abs(score))


@dataclass(frozen=True)
class Interval:
    """A mean over `n` images with its 95 % bounds over images."""

    n: int
    mean: float
    low: float
    high: float


def generator() -> np.random.Generator:
    """What tables draw with, made anew for each interval, so that none depends on which others there are."""
    return np.random.default_rng(_SEED)


def paired(
    cell: PerImage | None,
    baseline: PerImage | None,
    cell_score: float,
    baseline_score: float,
    random: np.random.Generator,
) -> Difference | None:
    """One run against one run of the baseline, as a Difference with one pair, no p-value, and bounds over images.

    A p-value beside those over seeds would be one of another hypothesis. None where the two cannot be paired: no
    per-image results, other data or images, or scores that are no means over images.
    """
    if cell is None or baseline is None or not (cell.is_mean(cell_score) and baseline.is_mean(baseline_score)):
        return None
    found = difference([cell], [baseline], random)
    if found is None:
        return None
    return Difference(1, baseline_score, cell_score - baseline_score, found.low, found.high, METHOD, None)


def difference(cell: Sequence[PerImage], baseline: Sequence[PerImage], random: np.random.Generator) -> Interval | None:
    """The mean difference over images between two groups of given runs, each image's values averaged over runs.

    With several seeds it is the second level beside the interval over seeds: these runs, other images. None where the
    runs have not all seen the same images, or some image has a value in one run and none in another.
    """
    both = [*cell, *baseline]
    if not cell or not baseline or any(not _same_images(both[0], other) for other in both[1:]):
        return None
    own, theirs = (np.mean([one.values for one in group], axis=0) for group in (cell, baseline))
    return interval((own - theirs)[np.isfinite(both[0].values)], random)


def interval(values: Floats, random: np.random.Generator, confidence: float = CONFIDENCE) -> Interval | None:
    """The mean of `values`, [n], finite, with the percentile interval of RESAMPLES resamples; None of fewer than two.

    The draws depend on the generator and the values, and not on their order.
    """
    if len(values) < 2:
        return None
    ordered = np.sort(values)
    tail = (1 - confidence) / 2
    low, high = np.quantile(_resampled_means(ordered, random), (tail, 1 - tail))
    return Interval(len(ordered), float(ordered.mean()), float(low), float(high))


def _resampled_means(values: Floats, random: np.random.Generator) -> Floats:
    """Means of RESAMPLES samples with replacement, of as many images as there are, [RESAMPLES]."""
    n = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW:  # how often each value is drawn is multinomial, which is the same sample
        return np.asarray(random.multinomial(n, counts / n, size=RESAMPLES) @ distinct / n)
    step = max(1, _CHUNK // n)
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([values[random.integers(0, n, (size, n), np.int32)].mean(axis=1) for size in sizes])


def _same_images(one: PerImage, other: PerImage) -> bool:
    return (
        one.data == other.data
        and np.array_equal(one.index, other.index)
        and np.array_equal(np.isfinite(one.values), np.isfinite(other.values))
    )
