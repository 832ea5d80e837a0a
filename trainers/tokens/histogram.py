"""The fixed log-spaced grid on which norms are counted, and what can be read from such counts.

The grid has NUM_BINS bins of equal width in log r from 1e-3 to 1e5 (512 per decade, 0.45 % wide each), and one bin
on either side: bin 0 counts r < 1e-3 (zeros among them), bin NUM_BINS + 1 counts r ≥ 1e5 (infinity among them).
NaN is in no bin.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

NUM_BINS = 4_096  # at 1,024 the MAD of a bulk 20 ± 1.5 errs by 4 % (paper.md §5)
LOWEST = 1e-3
HIGHEST = 1e5
BINS_PER_DECADE = NUM_BINS / 8


def bin_edges() -> Floats:
    """The NUM_BINS + 1 edges; bin i, 1 ≤ i ≤ NUM_BINS, counts edges[i - 1] ≤ r < edges[i]."""
    return _edge(np.arange(NUM_BINS + 1))


def _edge(index: Counts) -> Floats:
    """Edges by their index, 0 … NUM_BINS."""
    return np.asarray(10.0 ** (index / BINS_PER_DECADE + np.log10(LOWEST)))


def bin_index(norms: NDArray[np.floating]) -> Counts:
    """The bin, 0 … NUM_BINS + 1, of every norm; norms are ≥ 0 and not NaN."""
    with np.errstate(divide="ignore"):
        position = (np.log10(norms.astype(np.float64)) - np.log10(LOWEST)) * BINS_PER_DECADE
    return np.asarray(np.floor(np.clip(position, -1, NUM_BINS)) + 1, dtype=np.int64)


def count(norms_GN: NDArray[np.floating]) -> Counts:
    """Counts [G, NUM_BINS + 2] of every row of norms [G, N]."""
    groups, width = len(norms_GN), NUM_BINS + 2
    flat = bin_index(norms_GN) + np.arange(groups)[:, None] * width
    return np.bincount(flat.ravel(), minlength=groups * width).reshape(groups, width)


def sparse(counts: Counts) -> tuple[tuple[int, int], ...]:
    """The occupied bins of one row as (bin, count), in rising order of bins."""
    occupied = np.flatnonzero(counts)
    return tuple(zip(occupied.tolist(), counts[occupied].tolist(), strict=True))


class Distribution:
    """What one row of counts says of the norms behind it, when they are spread evenly inside each bin.

    Args:
        counts: [NUM_BINS + 2], at least one of them positive.
        maximum: the largest norm, known exactly; it closes the topmost occupied bin.
    """

    def __init__(self, counts: Counts, maximum: float) -> None:
        occupied = np.flatnonzero(counts)
        self._count = counts[occupied]
        self._low = np.where(occupied > 0, _edge(occupied - 1), 0.0)
        self._high = np.where(occupied <= NUM_BINS, _edge(occupied), np.inf)
        self._high = np.maximum(self._low, np.minimum(self._high, maximum))
        self._cumulative = np.cumsum(self._count)
        self.total = int(self._cumulative[-1])
        self._log_usable = occupied[0] > 0 and occupied[-1] <= NUM_BINS

    def quantiles(self, levels: Sequence[float]) -> Floats:
        """Quantiles by linear interpolation of order statistics, as numpy's; off by one bin's width at the most."""
        rank = np.asarray(levels) * (self.total - 1)
        below = np.floor(rank).astype(np.int64)
        low, high = self._ordered(below), self._ordered(np.minimum(below + 1, self.total - 1))
        share = rank - below
        return np.asarray(np.where(share == 0, low, low + (high - low) * share))

    def _ordered(self, rank: Counts) -> Floats:
        """Estimated order statistics; number `rank` (from 0) lies in the bin that it was counted in."""
        bin_ = np.searchsorted(self._cumulative, rank, side="right")
        inside = (rank - (self._cumulative - self._count)[bin_] + 0.5) / self._count[bin_]
        return np.asarray(self._low[bin_] + (self._high - self._low)[bin_] * inside)

    def fraction_below(self, values: NDArray[np.float64] | float) -> Floats:
        """The fraction of norms below each of `values`."""
        knots = np.stack([self._low, self._high], axis=1).ravel()
        heights = np.stack([self._cumulative - self._count, self._cumulative], axis=1).ravel() / self.total
        return np.asarray(np.interp(values, knots, heights))

    def median_absolute_deviation(self, median: float) -> float:
        """The distance from `median` within which half of the norms lie."""
        knots = np.concatenate([self._low, self._high])
        distance = np.unique(np.abs(knots[np.isfinite(knots)] - median))
        within = self.fraction_below(median + distance) - self.fraction_below(median - distance)
        return float(np.interp(0.5, within, distance))

    def kurtosis_log(self) -> float:
        """Pearson's kurtosis of log r from the bins' centres.

        NaN where a norm lies outside the grid, or where log r spreads over fewer than two bins (standard deviation).
        """
        if not self._log_usable:
            return float("nan")
        weights = self._count / self.total
        deviation = (log_centre := (np.log(self._low) + np.log(self._high)) / 2) - weights @ log_centre
        variance = float(weights @ deviation**2)
        if variance < (2 * np.log(10) / BINS_PER_DECADE) ** 2:
            return float("nan")
        return float(weights @ deviation**4) / variance**2
