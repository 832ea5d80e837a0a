"""A quadratic along an axis with a block for each seed: slope, curvature and where the extremum lies; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
_ROUNDING = 1e-12  # deviations below this share of the values are none


@dataclass(frozen=True)
class Coefficient:
    """A least-squares coefficient with its t interval and two-sided p-value, None where residuals have no variance."""

    value: float
    low: float | None
    high: float | None
    p_value: float | None


@dataclass(frozen=True)
class Quadratic:
    """value = seed + slope · (x - middle) + curvature · (x - middle)².

    `optimum` is the x of the extremum where it lies between the outermost x and the curvature's interval excludes 0;
    its interval is Fieller's, cut off at the outermost x. `freedom` are the residuals' degrees.
    """

    slope: Coefficient
    curvature: Coefficient
    freedom: int
    optimum: tuple[float, float, float] | None  # low, estimate, high


def fit(values_SK: Floats, x_K: Floats, confidence: float = CONFIDENCE) -> Quadratic:
    """Ordinary least squares of `values_SK` (S seeds, K levels, complete) on `x_K`, a constant for each seed.

    The residuals have S · K - S - 2 degrees of freedom: scatter of the runs and what no quadratic describes. The
    middle is that of the outermost x, so that the slope is the mean slope between them.

    Raises:
        ValueError: fewer than 2 seeds or 3 distinct x.
    """
    seeds, levels = values_SK.shape
    found = tuple(x_K.tolist())
    if seeds < 2 or len(set(found)) < 3:
        raise ValueError(f"a quadratic needs 2 seeds and 3 levels; given: {seeds} and {len(set(found))}")
    low, high = min(found), max(found)
    terms_2K, inverse = _design(found)
    inverse = inverse / seeds
    within_SK = values_SK - values_SK.mean(axis=1, keepdims=True)
    slope, curvature = (inverse @ (terms_2K @ within_SK.sum(axis=0))).tolist()
    residuals = within_SK - slope * terms_2K[0] - curvature * terms_2K[1]
    freedom = seeds * levels - seeds - 2
    variance = float((residuals**2).sum()) / freedom
    if math.sqrt(variance) <= _ROUNDING * max(1e-300, float(np.abs(values_SK).max())):
        nothing = (None, None, None)
        return Quadratic(Coefficient(slope, *nothing), Coefficient(curvature, *nothing), freedom, None)
    covariance = variance * inverse
    critical = float(stdtrit(freedom, (1 + confidence) / 2))
    both = (slope, curvature)
    coefficients = [_coefficient(b, math.sqrt(covariance[i, i]), critical, freedom) for i, b in enumerate(both)]
    optimum = _optimum(both, covariance, critical, (high - low) / 2)
    middle = (low + high) / 2
    at = None if optimum is None else (middle + optimum[0], middle + optimum[1], middle + optimum[2])
    return Quadratic(coefficients[0], coefficients[1], freedom, at)


@lru_cache(maxsize=256)
def _design(x_K: tuple[float, ...]) -> tuple[Floats, Floats]:
    """The linear and the square term, [2, K], both of mean 0, and the inverse of their products, [2, 2]."""
    away = np.array(x_K) - (min(x_K) + max(x_K)) / 2
    terms_2K = np.stack([away, away**2])
    terms_2K -= terms_2K.mean(axis=1, keepdims=True)
    return terms_2K, np.asarray(np.linalg.inv(terms_2K @ terms_2K.T), np.float64)


def _coefficient(value: float, error: float, critical: float, freedom: int) -> Coefficient:
    p_value = 2 * float(stdtr(freedom, -abs(value) / error))
    return Coefficient(value, value - critical * error, value + critical * error, p_value)


def _optimum(
    both: tuple[float, float], covariance: Floats, critical: float, reach: float
) -> tuple[float, float, float] | None:
    """Where slope + 2 · curvature · d = 0, and between which d that cannot be excluded (Fieller 1954)."""
    slope, curvature = both
    square = curvature**2 - critical**2 * covariance[1, 1]
    if square <= 0 or not abs(slope) < 2 * abs(curvature) * reach:
        return None
    half = slope * curvature - critical**2 * covariance[0, 1]
    constant = slope**2 - critical**2 * covariance[0, 0]
    root = math.sqrt(max(0.0, half**2 - square * constant))
    ends = [max(-reach, min(reach, (-half + sign * root) / (2 * square))) for sign in (-1, 1)]
    return ends[0], -slope / (2 * curvature), ends[1]
