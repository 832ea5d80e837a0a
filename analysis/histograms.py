"""What the sparse histograms of token_norms say: quantiles, rule 3, and the fraction above any threshold; pure.

The grid is that of trainers/tokens/histogram.py: 4,096 bins of equal width in log r from 1e-3 to 1e5 (512 a decade,
0.45 % wide each), and a bin on either side. Inside a bin norms are taken to be spread evenly, so that every threshold
and quantile is off by one bin's width at the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NUM_BINS = 4_096  # bin 0 lies below them, bin NUM_BINS + 1 above
LOWEST = 1e-3
BINS_PER_DECADE = 512

_DEVIATIONS = 5.0
_NORMAL_CONSISTENCY = 1.4826
_LEAST_RATIO = 1.5
ROUNDING = 1e-12  # of a share of norms


@dataclass(frozen=True)
class Histogram:
    """Occupied bins in rising order, [n], how many norms each has, [n], and the largest norm, which is known exactly.

    There is at least one norm.
    """

    bins: Integers
    counts: Integers
    maximum: float

    @property
    def total(self) -> int:
        """The number of norms."""
        return int(self.counts.sum())

    def distribution(self) -> Distribution:
        """The norms as a distribution; infinite ones are taken to lie at the end of the grid, 1e5."""
        low = np.where(self.bins > 0, edge(self.bins - 1), 0.0)
        high = np.where(self.bins <= NUM_BINS, edge(self.bins), np.inf)
        if self.bins[-1] > 0:  # the maximum closes the topmost bin
            high[-1] = min(high[-1], self.maximum)
        high = np.where(np.isfinite(high) & (high > low), high, np.nextafter(low, np.inf))
        upper = np.cumsum(self.counts) / self.total
        lower = np.concatenate([[0.0], upper[:-1]])
        knots, below = np.stack([low, high], axis=1).ravel(), np.stack([lower, upper], axis=1).ravel()
        keep = np.concatenate([[True], np.diff(knots) > 0])  # where a bin ends and the next begins, at the same height
        return Distribution(knots[keep], below[keep])

    def coarse(self, factor: int) -> tuple[Floats, Integers]:
        """Counts [m] of `factor` neighbouring bins each, from the first to the last occupied, and their edges [m + 1].

        What lies outside of the grid is counted in the nearest bin.
        """
        group = (np.clip(self.bins, 1, NUM_BINS) - 1) // factor
        counts = np.bincount(group - group[0], weights=self.counts).astype(np.int64)
        return edge(np.minimum((group[0] + np.arange(len(counts) + 1)) * factor, NUM_BINS)), counts


@dataclass(frozen=True)
class Distribution:
    """The share of norms below each of some knots, [K], both rising; between knots it is linear."""

    knots: Floats
    below: Floats

    def quantiles(self, levels: Sequence[float]) -> Floats:
        """The norms below which `levels` of all lie; between two norms that nothing lies between, their middle."""
        low = np.searchsorted(self.below, np.asarray(levels) - ROUNDING, side="left")
        high = np.searchsorted(self.below, np.asarray(levels) + ROUNDING, side="right")
        return np.array(
            [
                (self.knots[first] + self.knots[last - 1]) / 2  # a stretch without norms at just this level
                if last > first
                else np.interp(level, self.below[first - 1 : first + 1], self.knots[first - 1 : first + 1])
                for level, first, last in zip(levels, low, high, strict=True)
            ]
        )

    def median(self) -> float:
        """The norm below which half of all lie."""
        return float(self.quantiles([0.5])[0])

    def median_absolute_deviation(self) -> float:
        """The distance from the median within which half of the norms lie."""
        median = self.median()
        distances = np.unique(np.abs(np.append(self.knots, median) - median))
        within = self.fraction_below(median + distances) - self.fraction_below(median - distances)
        return Distribution(distances, np.maximum.accumulate(within)).median()

    def rule3_threshold(self) -> float:
        """max(m + 5 · 1.4826 · MAD, 1.5 m), m the median: above it a norm is an outlier (paper.md §5, 3)."""
        median = self.median()
        spread = median + _DEVIATIONS * _NORMAL_CONSISTENCY * self.median_absolute_deviation()
        return max(spread, _LEAST_RATIO * median)

    def fraction_below(self, norms: Floats | float) -> Floats:
        """The share of norms below each of `norms`."""
        return np.asarray(np.interp(norms, self.knots, self.below))

    def fraction_above(self, norms: Floats | float) -> Floats:
        """The share of norms above each of `norms`."""
        return 1 - self.fraction_below(norms)

    def over_median(self) -> Distribution:
        """The norms over their own median."""
        return Distribution(self.knots / self.median(), self.below)


def edge(index: Integers) -> Floats:
    """Edges of the grid by their index, 0 … NUM_BINS; bin i counts edge(i - 1) ≤ r < edge(i)."""
    return np.asarray(10.0 ** (index / BINS_PER_DECADE + np.log10(LOWEST)))


def read(histograms: pa.ChunkedArray | pa.Array, maxima: Sequence[float | None]) -> list[Histogram | None]:
    """Rows of the columns `histogram` and `max` of token_norms; None where a row has counted nothing."""
    column = histograms.combine_chunks() if isinstance(histograms, pa.ChunkedArray) else histograms
    column = pa.concat_arrays([column])
    lengths = np.asarray(column.value_lengths().fill_null(0))
    entries = column.flatten()
    bins, counts = (np.asarray(entries.field(name), np.int64) for name in ("bin", "count"))
    ends = np.cumsum(lengths)
    return [
        None
        if maximum is None or not counts[end - n : end].any()
        else _sorted(bins[end - n : end], counts[end - n : end], maximum)
        for n, end, maximum in zip(lengths, ends, maxima, strict=True)
    ]


def _sorted(bins: Integers, counts: Integers, maximum: float) -> Histogram:
    occupied, place = np.unique(bins[counts > 0], return_inverse=True)
    return Histogram(occupied, np.bincount(place, weights=counts[counts > 0]).astype(np.int64), maximum)


def pooled(histograms: Sequence[Histogram]) -> Histogram:
    """All norms of several histograms together; there is at least one histogram."""
    bins = np.concatenate([one.bins for one in histograms])
    counts = np.concatenate([one.counts for one in histograms])
    return _sorted(bins, counts, max(one.maximum for one in histograms))


def mixture(distributions: Sequence[Distribution], weights: Sequence[float]) -> Distribution:
    """Several distributions together, each in proportion to its weight; there is at least one."""
    knots = np.unique(np.concatenate([one.knots for one in distributions]))
    shares = np.asarray(weights, np.float64) / sum(weights)
    return Distribution(knots, shares @ np.stack([one.fraction_below(knots) for one in distributions]))
