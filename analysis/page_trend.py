"""Page's test for a trend over ordered levels, exact also where values tie; pure.

scipy.stats.page_trend_test is exact only without ties, and fractions of outliers tie at 0. Here each seed's midranks
are permuted as they are, so that the p-value is exact given the ties; without ties both are equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Floats = NDArray[np.float64]

MOST_EXACT = 12  # levels: the subsets of more are too many to go through


@dataclass(frozen=True)
class Trend:
    """Page's L with its two-sided p-value; `direction` is "rises" or "falls", or None where L is as by chance.

    All but `exact` are None where no seed tells any two levels apart.
    """

    l: float | None  # noqa: E741 # Page's own name
    p_value: float | None
    direction: str | None
    exact: bool


def page_trend(values_SK: Floats) -> Trend:
    """Whether values rise or fall along levels, by their ranks within each seed (Page 1963, JASA 58).

    L = Σ over levels of (position × sum of ranks). Under the null hypothesis that levels do not differ, all orders of
    a seed's values are equally likely; the distribution of L is the convolution of the seeds' distributions. It is
    symmetric, so that twice the smaller tail is the two-sided p-value; it cannot be below 2 / (K!)^S.

    Args:
        values_SK: finite; S seeds, K ≥ 3 levels in rising order.

    Raises:
        ValueError: fewer than 3 levels or no seed.
    """
    seeds, levels = values_SK.shape
    if seeds < 1 or levels < 3:
        raise ValueError(f"Page's test needs 1 seed and 3 levels; given: {seeds} and {levels}")
    ranks = doubled_ranks(values_SK)
    position = np.arange(1, levels + 1)
    doubled_l = int((ranks @ position).sum())
    middle = seeds * levels * (levels + 1) ** 2 / 2  # of 2 L
    exact = levels <= MOST_EXACT
    if (ranks == ranks[:, :1]).all():
        return Trend(None, None, None, exact)
    if exact:
        probabilities = _null(tuple(sorted(tuple(sorted(row)) for row in ranks.tolist())))
        tail = min(probabilities[: doubled_l + 1].sum(), probabilities[doubled_l:].sum())
    else:
        spread = position.var() * levels * ranks.var(axis=1) * levels / (levels - 1)
        tail = ndtr(-abs(doubled_l - middle) / math.sqrt(float(spread.sum())))
    direction = None if doubled_l == middle else "rises" if doubled_l > middle else "falls"
    return Trend(doubled_l / 2, min(1.0, 2 * float(tail)), direction, exact)


def doubled_ranks(values_SK: Floats) -> NDArray[np.int64]:
    """Twice the rank of each value within its row; values that tie share the middle of their ranks."""
    others, own = values_SK[:, None, :], values_SK[:, :, None]
    return np.asarray(2 * (others < own).sum(axis=2) + (others == own).sum(axis=2) + 1, np.int64)


@lru_cache(maxsize=1024)
def _null(rows: tuple[tuple[int, ...], ...]) -> Floats:
    """P(2 L = index) where each of `rows` has the given doubled ranks in any order, equally likely."""
    found: Floats = np.ones(1)
    for row in rows:
        found = np.convolve(found, _null_of_one(row))
    return found


@lru_cache(maxsize=1024)
def _null_of_one(ranks: tuple[int, ...]) -> Floats:
    """P(Σ position × rank = index) of one row, over the sets of ranks that its first positions can have."""
    levels = len(ranks)
    longest = int(np.dot(np.arange(1, levels + 1), np.sort(ranks)))
    start: Floats = np.eye(1, longest + 1)[0]
    by_set = {0: start}
    for position in range(1, levels + 1):
        grown: dict[int, Floats] = {}
        for used, probabilities in by_set.items():
            for index, rank in enumerate(ranks):
                if not used >> index & 1:
                    moved = grown.setdefault(used | 1 << index, np.zeros(longest + 1))
                    step = position * rank
                    moved[step:] += probabilities[: longest + 1 - step] / (levels + 1 - position)
        by_set = grown
    return by_set[(1 << levels) - 1]
