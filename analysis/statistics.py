"""Means, paired differences with their intervals, and corrections for many comparisons; pure.

Seeds are few, so nothing here is a bootstrap: simulated, a percentile bootstrap's nominal 95 % interval covers
63–68 % of the time with 3 seeds and 84 % with 5, where Student's t covers 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, stdtr, stdtrit

Name = TypeVar("Name", bound=Hashable)

CONFIDENCE = 0.95
PAIRED_T = "paired_t"
POOLED_DUNNETT = "pooled_dunnett"
STEIN = "stein two-stage t"
ONE_SEED = "none: one seed"
NO_PAIR = "none: no pair"
NO_FIRST_VARIANCE = "none: the first seeds show no variance"

# Differences whose spread is below this share of the values are equal but for rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Summary:
    """Number, mean and sample standard deviation (ddof 1) of values; null where too few."""

    n: int
    mean: float | None
    std: float | None


@dataclass(frozen=True)
class Difference:
    """A cell against its baseline, over the seeds that both have.

    `low` and `high` bound the mean difference at 95 %. Where all differences are equal, `no_variance` is true, both
    bounds are the difference itself, and there is no p-value: so few equal numbers say nothing about chance.
    """

    n_paired: int
    baseline_mean: float | None
    delta: float | None
    low: float | None
    high: float | None
    method: str
    p_value: float | None
    no_variance: bool = False


def summarise(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of finite `values`, shape [n]; std needs two."""
    if not values:
        return Summary(0, None, None)
    array = np.asarray(values, dtype=np.float64)
    return Summary(len(values), float(array.mean()), float(array.std(ddof=1)) if len(values) > 1 else None)


def paired_t(cell: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE) -> Difference:
    """The mean of `cell[seed] - baseline[seed]` over common seeds with Student's t interval and two-sided p-value.

    The interval is `mean ± t(n - 1) · s / √n` (Student 1908); it makes no assumption about other cells' variances.
    """
    seeds = sorted(cell.keys() & baseline.keys())
    return _paired(cell, baseline, seeds, seeds, PAIRED_T, confidence)


def stein_t(
    cell: Mapping[int, float], baseline: Mapping[int, float], first: Sequence[int], confidence: float = CONFIDENCE
) -> Difference:
    """`paired_t` where the number of seeds was chosen by the variance of the `first` ones: Stein's two stages.

    The interval is `mean of all n ± t(n₀ - 1) · s₀ / √n` with the n₀ pairs of the first block and their deviation s₀
    (Stein 1945, Annals of Mathematical Statistics 16). The block's residuals chose n and say nothing of any mean, so
    that it covers for every metric, whichever one decided, and for cells that got no more seeds as well.
    """
    seeds = sorted(cell.keys() & baseline.keys())
    block = [seed for seed in seeds if seed in first]
    whole = _paired(cell, baseline, seeds, seeds, STEIN, confidence)
    if len(seeds) < 2:
        return whole
    found = whole if len(block) < 2 else _paired(cell, baseline, seeds, block, STEIN, confidence)
    if len(block) < 2 or (found.no_variance and not whole.no_variance):
        return replace(whole, low=None, high=None, p_value=None, method=NO_FIRST_VARIANCE, no_variance=False)
    return found


def _paired(
    cell: Mapping[int, float],
    baseline: Mapping[int, float],
    seeds: Sequence[int],
    block: Sequence[int],
    method: str,
    confidence: float,
) -> Difference:
    """The mean difference over `seeds` with the variance and the degrees of freedom of those in `block`."""
    n = len(seeds)
    if n == 0:
        return Difference(0, None, None, None, None, NO_PAIR, None)
    theirs = np.array([baseline[seed] for seed in seeds])
    differences = np.array([cell[seed] for seed in seeds]) - theirs
    reference, delta = float(theirs.mean()), float(differences.mean())
    if n == 1:
        return Difference(1, reference, delta, None, None, ONE_SEED, None)
    of_block = differences[[seeds.index(seed) for seed in block]]
    error = float(of_block.std(ddof=1)) / math.sqrt(n)
    if error <= _ROUNDING * max(1e-300, float(np.abs(theirs).max()), float(np.abs(differences).max())):
        return Difference(n, reference, delta, delta, delta, method, None, no_variance=True)
    reach = float(stdtrit(len(block) - 1, (1 + confidence) / 2)) * error
    p_value = 2 * float(stdtr(len(block) - 1, -abs(delta) / error))
    return Difference(n, reference, delta, delta - reach, delta + reach, method, p_value)


def pooled_dunnett(
    cells: Mapping[Name, Mapping[int, float]], baseline: Name, confidence: float = CONFIDENCE
) -> dict[Name, Difference]:
    """Every cell against `baseline` with one residual variance for all, and intervals that hold simultaneously.

    The model is value = cell + seed + noise with equal variance everywhere; its residuals have
    (cells - 1)(seeds - 1) degrees of freedom. The critical value is Dunnett's (1955) for equal correlation 1/2, so
    that all intervals together cover with `confidence`; p-values are single comparisons, to be corrected by the
    caller. Only seeds that every cell has take part. Where variances differ between cells, use `paired_t`.

    Raises:
        ValueError: fewer than two cells, fewer than two common seeds, or residuals without any variance.
    """
    seeds = sorted(set.intersection(*(set(values) for values in cells.values())))
    names = list(cells)
    if len(names) < 2 or len(seeds) < 2:
        raise ValueError(f"pooling needs 2 cells and 2 common seeds; given: {len(names)} and {len(seeds)}")
    values_CS = np.array([[cells[name][seed] for seed in seeds] for name in names])  # C cells, S seeds
    centred_CS = values_CS - values_CS.mean(axis=1, keepdims=True)
    residuals_CS = centred_CS - centred_CS.mean(axis=0, keepdims=True)
    freedom = (len(names) - 1) * (len(seeds) - 1)
    error = math.sqrt(2 * float((residuals_CS**2).sum()) / freedom / len(seeds))
    if error <= _ROUNDING * max(1e-300, float(np.abs(values_CS).max())):
        raise ValueError("the residuals have no variance to pool")
    reach = dunnett_critical(len(names) - 1, freedom, confidence) * error
    reference = float(values_CS[names.index(baseline)].mean())
    found = {}
    for name, row in zip(names, values_CS, strict=True):
        if name != baseline:
            delta = float(row.mean()) - reference
            p_value = 2 * float(stdtr(freedom, -abs(delta) / error))
            bounds = (delta - reach, delta + reach)
            found[name] = Difference(len(seeds), reference, delta, *bounds, POOLED_DUNNETT, p_value)
    return found


def dunnett_critical(comparisons: int, freedom: int, confidence: float = CONFIDENCE) -> float:
    """c with P(|T_i| ≤ c for all i) = `confidence`, T a multivariate t with correlations 1/2, `freedom` degrees.

    By quadrature rather than by the random sampling of scipy.stats.dunnett: the same input gives the same digits.
    """
    high = 2.0
    while _dunnett_probability(high, comparisons, freedom) < confidence:
        high *= 2
    return float(brentq(lambda c: _dunnett_probability(c, comparisons, freedom) - confidence, 0.0, high, xtol=1e-9))


def _dunnett_probability(c: float, comparisons: int, freedom: int) -> float:
    """∫ over the scale s (s² is chi-square over its degrees) and the baseline's noise z, by Gauss–Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(96)
    z = 8.0 * nodes
    density_z = 8.0 * weights * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    longest = 1 + 12 / math.sqrt(freedom) if freedom > 4 else 8.0
    s = longest * (nodes + 1) / 2
    half = freedom / 2
    log_density = math.log(2) + half * math.log(half) - math.lgamma(half) + (freedom - 1) * np.log(s) - half * s**2
    density_s = longest / 2 * weights * np.exp(log_density)
    reach = math.sqrt(2) * c * s[:, None]
    inside = ndtr(z[None, :] + reach) - ndtr(z[None, :] - reach)
    return float(density_s @ (inside**comparisons) @ density_z)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's (1979) step-down adjusted p-values in the given order; a null stays null and is not counted.

    They control the chance of any false positive in the family, whatever the tests' dependence.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = highest
    return adjusted
