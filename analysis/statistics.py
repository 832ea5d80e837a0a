"""Means, differences to a baseline with their intervals, and which interval fits the data; pure.

Seeds are few, so nothing here is a bootstrap: simulated, a percentile bootstrap's nominal 95 % interval covers
63–68 % of the time with 3 seeds and 84 % with 5, where Student's t covers 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincc, stdtr, stdtrit

from analysis import dunnett

Name = TypeVar("Name", bound=Hashable)

CONFIDENCE = 0.95
PAIRED_T = "paired_t"
PAIRED_BONFERRONI = "paired_t_bonferroni"
POOLED_DUNNETT = "pooled_dunnett"
STEIN = "stein two-stage t"
ONE_SEED = "none: one seed"
NO_PAIR = "none: no pair"
NO_FIRST_VARIANCE = "none: the first seeds show no variance"

# Differences whose spread is below this share of the values are equal but for rounding.
_ROUNDING = 1e-12
# Levels of the test before pooling, times the seeds less one.
_BASELINE_LEVEL, _OTHERS_LEVEL = 0.1, 0.5


@dataclass(frozen=True)
class Summary:
    """Number, mean and sample standard deviation (ddof 1) of values; null where too few."""

    n: int
    mean: float | None
    std: float | None


@dataclass(frozen=True)
class Difference:
    """A cell against its baseline, over the seeds that both have.

    `low` and `high` bound the mean difference at 95 %, by POOLED_DUNNETT and PAIRED_BONFERRONI together with those of
    all other cells that have the same baseline. `p_value` is of this comparison alone, that of the statistic `t` with
    `freedom` degrees. Where all differences are equal, `no_variance` is true, both bounds are the difference itself,
    and there is no p-value: so few equal numbers say nothing about chance.
    """

    n_paired: int
    baseline_mean: float | None
    delta: float | None
    low: float | None
    high: float | None
    method: str
    p_value: float | None
    no_variance: bool = False
    t: float | None = None
    freedom: int | None = None


def summarise(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of finite `values`, shape [n]; std needs two."""
    if not values:
        return Summary(0, None, None)
    array = np.asarray(values, dtype=np.float64)
    return Summary(len(values), float(array.mean()), float(array.std(ddof=1)) if len(values) > 1 else None)


def paired_t(
    cell: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE, comparisons: int = 1
) -> Difference:
    """The mean of `cell[seed] - baseline[seed]` over common seeds with Student's t interval and two-sided p-value.

    The interval is `mean ± t(n - 1) · s / √n` (Student 1908); it makes no assumption about other cells' variances. Of
    several `comparisons` the intervals cover together with `confidence`, by Bonferroni's inequality, which holds
    whatever their dependence; the p-value stays that of this one.
    """
    seeds = sorted(cell.keys() & baseline.keys())
    method = PAIRED_T if comparisons == 1 else PAIRED_BONFERRONI
    return _paired(cell, baseline, seeds, seeds, method, 1 - (1 - confidence) / comparisons)


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
    freedom = len(block) - 1
    reach = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    return _bounded(n, reference, delta, error, reach, method, freedom)


def _bounded(
    n: int, reference: float, delta: float, error: float, reach: float, method: str, freedom: int
) -> Difference:
    """`delta` with its standard `error` and the interval that reaches so far to either side."""
    p_value = 2 * float(stdtr(freedom, -abs(delta) / error))
    bounds = (delta - reach, delta + reach)
    return Difference(n, reference, delta, *bounds, method, p_value, t=delta / error, freedom=freedom)


def compare(
    cells: Mapping[Name, Mapping[int, float]], baseline: Name, confidence: float = CONFIDENCE
) -> dict[Name, Difference]:
    """Every cell of `cells` against the one named `baseline`, all intervals together covering with `confidence`.

    Two cells: `paired_t`. More: one residual variance for all (POOLED_DUNNETT) unless `variances_differ`; then, and
    where nothing can be pooled, `paired_t` at Bonferroni's level. A cell is compared over the seeds S that it shares
    with the baseline, and the variance is pooled over all cells that have all of S: a trial that failed costs the
    others nothing, and its own cell that seed alone.

    The pooled model is value = cell + seed + noise with equal variance everywhere; its residuals have
    (cells - 1)(seeds - 1) degrees of freedom. The critical value is Dunnett's (1955) for equal correlation 1/2;
    p-values are of single comparisons, to be corrected by the caller.

    Args:
        cells: values by seed, finite; by name of the cell, the baseline's included.
        baseline: a name of `cells`.
    """
    theirs = cells[baseline]
    pairs = {name: tuple(sorted(cells[name].keys() & theirs.keys())) for name in cells if name != baseline}
    several = max(1, sum(len(seeds) > 1 for seeds in pairs.values()))
    layouts: dict[tuple[int, ...], _Layout | None] = {}
    found = {}
    for name, seeds in pairs.items():
        if seeds not in layouts:
            layouts[seeds] = _layout(cells, baseline, seeds) if several > 1 else None
        layout = layouts[seeds]
        if layout is None:
            found[name] = paired_t(cells[name], theirs, confidence, several if len(seeds) > 1 else 1)
        else:
            found[name] = _pooled(layout, cells[name], theirs, several, confidence)
    return found


@dataclass(frozen=True)
class _Layout:
    """Cells that all have the same seeds: the variance of their residuals and its degrees of freedom."""

    seeds: tuple[int, ...]
    residuals_CS: NDArray[np.float64]  # C cells, the baseline first; S seeds
    variance: float
    freedom: int


def _layout(cells: Mapping[Name, Mapping[int, float]], baseline: Name, seeds: tuple[int, ...]) -> _Layout | None:
    """Of all cells that have `seeds`; None where there is nothing to pool, or variances differ."""
    others = [name for name in cells if name != baseline and all(seed in cells[name] for seed in seeds)]
    if len(others) < 2 or len(seeds) < 2:
        return None
    values_CS = _values(cells, baseline, others, seeds)
    layout = _fit(values_CS, seeds)
    if layout is None:
        return None
    tiny = _ROUNDING * max(1e-300, float(np.abs(values_CS).max()))
    constant = np.ptp(values_CS, axis=1).min() <= tiny or np.ptp(values_CS[1:] - values_CS[0], axis=1).min() <= tiny
    return None if constant or variances_differ(layout.residuals_CS) else layout


def _values(
    cells: Mapping[Name, Mapping[int, float]], baseline: Name, others: Sequence[Name], seeds: tuple[int, ...]
) -> NDArray[np.float64]:
    """Values [C, S], the baseline first, all others in an order by which sums have the same digits, however named."""
    rows = sorted([cells[name][seed] for seed in seeds] for name in others)
    return np.array([[cells[baseline][seed] for seed in seeds], *rows])


def _fit(values_CS: NDArray[np.float64], seeds: tuple[int, ...]) -> _Layout | None:
    """Least squares of cell + seed; None where the residuals are rounding errors."""
    centred_CS = values_CS - values_CS.mean(axis=1, keepdims=True)
    residuals_CS = centred_CS - centred_CS.mean(axis=0, keepdims=True)
    freedom = (len(values_CS) - 1) * (len(seeds) - 1)
    variance = float((residuals_CS**2).sum()) / freedom
    if math.sqrt(2 * variance / len(seeds)) <= _ROUNDING * max(1e-300, float(np.abs(values_CS).max())):
        return None
    return _Layout(seeds, residuals_CS, variance, freedom)


def _pooled(
    layout: _Layout, cell: Mapping[int, float], baseline: Mapping[int, float], comparisons: int, confidence: float
) -> Difference:
    n = len(layout.seeds)
    reference = float(np.mean([baseline[seed] for seed in layout.seeds]))
    delta = float(np.mean([cell[seed] - baseline[seed] for seed in layout.seeds]))
    error = math.sqrt(2 * layout.variance / n)
    reach = dunnett.critical(comparisons, layout.freedom, confidence) * error
    return _bounded(n, reference, delta, error, reach, POOLED_DUNNETT, layout.freedom)


def variances_differ(residuals_CS: NDArray[np.float64]) -> bool:
    """Whether cells scatter too unequally to share one variance, by their residuals of cell + seed.

    Of normal noise with equal variances, the squares of one cell's residuals times C / (C - 1) are a
    Beta((S - 1) / 2, (C - 2)(S - 1) / 2) share of the squares of all (Russell and Bradley 1958, Biometrika 45: an
    exact F test). Levene's and Bartlett's tests are not exact here: seed effects make residuals correlate. A share
    is too large at the level 0.1 / (S - 1) for the baseline, whose scatter is in every comparison, and at 0.5 / (S - 1)
    by Bonferroni for all others. These levels fall with the number of seeds, as those of tests before pooling should
    (Bancroft 1944, Annals of Mathematical Statistics 15): a test of few numbers that is as strict as usual finds
    nothing, and the interval that follows is too narrow. They were chosen by simulation: with 3, 5 or 10 seeds and any
    one cell, or the baseline, scattering 1.5 to 20 times as much as others, each interval covers in 94 % or more, and
    all of a metric together in 90 %. With 2 seeds, whose pairs alone have one degree of freedom and tell nothing, the
    levels are those of 3, and each interval covers in 90 %.

    Args:
        residuals_CS: of C ≥ 3 cells, the baseline first, and S ≥ 2 seeds; shape [C, S].
    """
    cells, seeds = residuals_CS.shape
    squares_C = (residuals_CS**2).sum(axis=1)
    share_C = np.minimum(1.0, squares_C / squares_C.sum() * cells / (cells - 1))
    p_C = betaincc((seeds - 1) / 2, (cells - 2) * (seeds - 1) / 2, share_C)
    divisor = max(2, seeds - 1)
    by_baseline = p_C[0] < _BASELINE_LEVEL / divisor
    return bool(by_baseline or p_C[1:].min() * (cells - 1) < _OTHERS_LEVEL / divisor)
