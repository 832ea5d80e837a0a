"""Rules that call a patch token an outlier by its norm, and the layer where outliers set in (paper.md §5).

No rule is right for every model: rule 3 follows the bulk, the fixed 150 is the paper's for DINOv2-g, Otsu's threshold
exists only where the norms have two clear modes. All are reported together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from trainers.tokens.histogram import BINS_PER_DECADE, Counts, Floats, bin_edges, count

FIXED_THRESHOLD = 150.0  # hand-picked for DINOv2-g in the paper, which adds that it "can vary across models"
ONSET_FRACTION = 0.005
ONSET_POINTS = 3

_DEVIATIONS = 5.0
_NORMAL_CONSISTENCY = 1.4826  # makes the MAD of a normal distribution its standard deviation
_LEAST_RATIO = 1.5
_ASHMAN = 2.0
_VALLEY = 0.5
_MODE_RATIO = 2.0
_SMOOTHING = 0.1  # standard deviation of the kernel in log r: an eighth of the least distance between two modes


def rule3_threshold(median: Floats | float, mad: Floats | float) -> Floats:
    """Norms above max(m + 5 · 1.4826 · MAD, 1.5 m) are outliers, m the median and MAD around it (paper.md §5, 3)."""
    spread = np.asarray(median) + _DEVIATIONS * _NORMAL_CONSISTENCY * np.asarray(mad)
    return np.asarray(np.maximum(spread, _LEAST_RATIO * np.asarray(median)))


def threshold(norms: NDArray[np.floating], rule: str, fixed: float | None) -> float:
    """The norm above which a token is an outlier among `norms`, all taken together; infinite where there is none.

    Args:
        norms: of any shape; NaN is left out.
        rule: "mad" for rule 3, "otsu" for the gated Otsu threshold, which may say no, "fixed" for `fixed`.
        fixed: used by that rule alone.
    """
    values = norms[~np.isnan(norms)].astype(np.float64)
    if rule == "fixed":
        assert fixed is not None, "the configuration is not resolved"
        return fixed
    if not values.size:
        return float("inf")
    if rule == "otsu":
        found = otsu_threshold(count(values[None])[0])
        return float("inf") if found is None else found
    median = float(np.median(values))
    return float(rule3_threshold(median, float(np.median(np.abs(values - median)))))


def rule3_fraction(norms_GN: NDArray[np.floating]) -> Floats:
    """The fraction of each row of norms [G, N] that rule 3 flags, [G]."""
    values = norms_GN.astype(np.float64)
    with np.errstate(invalid="ignore"):
        median = np.median(values, axis=1)
        mad = np.median(np.abs(values - median[:, None]), axis=1)
    return np.asarray((values > rule3_threshold(median, mad)[:, None]).mean(axis=1))


def otsu_threshold(counts: Counts) -> float | None:
    """Otsu's threshold on log r from one row of counts [NUM_BINS + 2], or None where its gate says no.

    The gate (paper.md §5, 4), without which half of an unimodal bulk would be flagged: Ashman's D of the two classes
    > 2; the density's valley < half the smaller mode; the upper mode at more than twice the norm of the lower. Modes
    and valley are read from the density of log r smoothed by a Gaussian of standard deviation 0.1. Norms outside the
    grid are left aside. Between two modes that nothing lies between, the threshold is the gap's (geometric) middle.
    """
    occupied = np.flatnonzero(counts[1:-1])
    if len(occupied) < 2:
        return None
    first, last = occupied[0], occupied[-1] + 1
    weights = counts[1:-1][first:last].astype(np.float64)
    log_edges = np.log(bin_edges())[first : last + 1]
    centres = (log_edges[:-1] + log_edges[1:]) / 2
    split, ashman = _otsu_split(weights, centres)
    if not ashman > _ASHMAN or not _two_modes(weights, centres, split):
        return None
    after = split + int(np.flatnonzero(weights[split:])[0])
    return float(np.exp((log_edges[split] + log_edges[after]) / 2))


def _otsu_split(weights: Floats, centres: Floats) -> tuple[int, float]:
    """How many bins belong to the lower class where the variance between classes is largest, and Ashman's D there."""
    counted = np.cumsum(weights)
    total, lower = counted[-1], counted[:-1]
    centres = centres - centres.mean()  # keeps digits in the variances below
    sums, squares = np.cumsum(weights * centres), np.cumsum(weights * centres**2)
    lower_mean, upper_mean = sums[:-1] / lower, (sums[-1] - sums[:-1]) / (total - lower)
    best = int(np.argmax(lower * (total - lower) * (upper_mean - lower_mean) ** 2))
    lower_variance = squares[best] / lower[best] - lower_mean[best] ** 2
    upper_variance = (squares[-1] - squares[best]) / (total - lower[best]) - upper_mean[best] ** 2
    least = (np.log(10) / BINS_PER_DECADE) ** 2 / 12  # variance inside one bin, so that D is finite
    spread = np.sqrt(max(lower_variance, least) + max(upper_variance, least))
    return best + 1, float(np.sqrt(2) * (upper_mean[best] - lower_mean[best]) / spread)


def _two_modes(weights: Floats, centres: Floats, split: int) -> bool:
    """Whether the density has a mode on each side of the split, far apart, with a valley between them."""
    classes = np.stack([weights, weights])
    classes[0, split:] = classes[1, :split] = 0
    # Smoothed one by one: the flank of a large lower mode would else pass for the upper one.
    smooth = gaussian_filter1d(classes, _SMOOTHING * BINS_PER_DECADE / np.log(10), axis=1, mode="constant")
    lower, upper = (int(mode) for mode in smooth.argmax(axis=1))
    density = smooth.sum(axis=0)
    valley = density[lower : upper + 1].min()
    apart = float(np.exp(centres[upper] - centres[lower]))
    return bool(valley < _VALLEY * min(density[lower], density[upper]) and apart > _MODE_RATIO)


def onset(fractions: Sequence[float | None]) -> int | None:
    """The first point whose outlier fraction, and those of the two after it, exceed 0.5 %; None where there is none.

    `fractions` are rule 3's of consecutive points (layers 0 … L; training steps serve as well). Near the end of the
    axis as many points as remain must exceed it, so that an onset in the last layer is seen. A missing fraction
    (None) does not exceed anything.
    """
    above = [fraction is not None and fraction > ONSET_FRACTION for fraction in fractions]
    return next((i for i in range(len(above)) if all(above[i : i + ONSET_POINTS])), None)
