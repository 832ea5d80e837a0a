"""Dunnett's distribution of the largest of several t statistics against one baseline, by quadrature; pure.

Quadrature rather than the random sampling of scipy.stats.dunnett: the same input gives the same digits.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, stdtr

_NODES = 64  # of the noise, twice as many of the scale: 9 digits
_WIDEST = 8.0  # standard deviations of the baseline's noise that are integrated over


def probability(t: float, comparisons: int, freedom: int) -> float:
    """P(|T_i| ≤ `t` for all i): T a multivariate t with correlations 1/2 and `freedom` degrees (Dunnett 1955, §3).

    ∫ over the scale s (s² is chi-square over its degrees) and the baseline's noise z, given which the comparisons are
    independent. Correlations are 1/2 where baseline and cells have equally many seeds.
    """
    nodes, weights = _gauss_legendre()
    z = _WIDEST * (nodes + 1) / 2  # the integrand is even
    density_z = _WIDEST * weights * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    s, density_s = _scale(freedom)
    reach = math.sqrt(2) * t * s[:, None]
    inside = ndtr(z[None, :] + reach) - ndtr(z[None, :] - reach)
    return float(density_s @ (inside**comparisons) @ density_z)


@cache  # of a pure function: every metric of a sweep asks for the same few
def critical(comparisons: int, freedom: int, confidence: float) -> float:
    """c with `probability(c, comparisons, freedom)` = `confidence`; of one comparison it is Student's quantile."""
    high = 2.0
    while probability(high, comparisons, freedom) < confidence:
        high *= 2
    return float(brentq(lambda c: probability(c, comparisons, freedom) - confidence, 0.0, high, xtol=1e-9))


def p_value(t: float, comparisons: int, freedom: int) -> float:
    """P(max |T_i| ≥ |`t`|), between the p-value of a single comparison and Bonferroni's bound."""
    single = 2 * float(stdtr(freedom, -abs(t)))
    if comparisons == 1:
        return single
    found = 1 - probability(abs(t), comparisons, freedom)
    return min(1.0, max(single, min(found, comparisons * single)))


@cache
def _gauss_legendre() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return nodes, weights


@cache
def _scale(freedom: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes of the scale s, even on a logarithmic axis where it has any density, and weights of that density.

    The trapezoidal rule converges geometrically there; with few degrees, small s decide how large t can get.
    """
    low = -max(32 / freedom, 9 / math.sqrt(2 * freedom))
    high = math.log(1 + 12 / math.sqrt(freedom)) if freedom > 4 else math.log(8.0)
    v, step = np.linspace(low, high, 2 * _NODES, retstep=True)
    half = freedom / 2
    log_density = math.log(2) + half * math.log(half) - math.lgamma(half) + freedom * v - half * np.exp(2 * v)
    return np.exp(v), float(step) * np.exp(log_density)
