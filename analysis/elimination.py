"""Which cells have no outliers, as an equivalence statement, and how few registers suffice for it; pure.

"No outliers" is a claim of absence: not that a difference was not found, but that the mean fraction of outlier patches
lies below a declared limit (0.5 % of patches by default) with 95 % confidence, one-sided. There are two sources of
error, and the claim is made where both bounds lie below the limit (an intersection-union test: no correction needed).

Further seeds: the larger of two bounds. Fractions near 0 are skewed, and a skewed mean's t bound is too low: simulated
at the limit with 3 seeds it is wrong in 9–12 % of cases for log-normal noise of 30–50 %, not 5 %. So Student's bound
takes the deviation to be no smaller than the mean, as of an exponential distribution, and where all fractions are
positive the log-normal bound of Cox's method (Zhou and Gao 1997, Statistics in Medicine 16) counts as well, with
Student's quantile for the normal one (Olsson 2005, Journal of Statistics Education 13).

Further images: the fractions of single images are independent and lie in [0, 1], however outliers cluster within an
image, which is all that Hoeffding's bound needs (1963, JASA 58, Theorem 1). Without any outlier in m images it is the
binomial bound 1 - 0.05^(1/m), so that 0.5 % needs 598 images. Test images serve where per-image results exist, since
they did not set the threshold; else the probe images.

Where no seed has any outlier, seeds have no variance and give no bound: the statement is then one about these runs.
`runs_above_upper` says what n runs say of further ones without any assumption: with 3 of 3 below the limit, up to 63 %
of further runs may still be above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import betaincinv, stdtrit

from analysis import thresholds
from analysis.aggregates import by_seed, table
from analysis.cells import Cell, cells
from analysis.frames import SweepPlan
from analysis.labels import REGISTERS
from analysis.schemas import ELIMINATION
from analysis.scores import Scores
from analysis.trends import along

CONFIDENCE = 0.95
FRACTION = "tokens/last/outlier_fraction"
METRICS = (FRACTION, thresholds.METRIC)

BOTH = "t over seeds and Hoeffding over images"
SEEDS = "t over seeds"
IMAGES = "Hoeffding over images"
ONE_SEED = "one_seed"
NO_VARIANCE = "no_variance"
NO_IMAGES = "no_images"  # how many images there were is not known
PROBE_IMAGES = "probe_images"  # the bound over images is of those that set the threshold
FIRST_SEEDS = "first_seeds"


@dataclass(frozen=True)
class Images:
    """The mean fraction of outliers of so many images; whether they are the probe images."""

    mean: float
    n: int
    probe: bool


# Of a cell's trials (at least one), a metric and its mean over them; None where the number of images is not known.
ReadImages = Callable[[Sequence[str], str, float], Images | None]


def elimination(plan: SweepPlan, scores: Scores, images: ReadImages) -> pa.Table:
    """The table `elimination`: the axes, then schemas.ELIMINATION, a row a metric of METRICS that exists and cell.

    `smallest` marks the smallest number of registers that is below the limit with all larger ones, all else equal: the
    cells are tested from the largest number down until one is not below, each at 5 %. In such a fixed sequence the
    chance of any false claim is 5 % as well (Maurer, Hothorn and Lehmacher 1995). Images are read only where they can
    decide: where seeds give no bound or one below the limit.
    """
    everything = cells(plan)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    metrics = [metric for metric in METRICS if metric in scores]
    for metric in metrics:
        for cell in everything:
            values = by_seed(cell, scores[metric])
            added = plan.first_seeds is not None and any(seed not in plan.first_seeds for seed in values)
            if plan.first_seeds is not None:
                values = {seed: value for seed, value in values.items() if seed in plan.first_seeds}
            row = _row(cell, metric, values, plan.outlier_limit, images)
            reasons = {scores[metric][t.trial_id].missing for t in cell.trials if t.trial_id in scores[metric]}
            row["flags"] = sorted({*row["flags"], *([FIRST_SEEDS] if added else []), *(reasons - {None})})
            rows[cell.key, metric] = row
        _mark_smallest(everything, metric, rows)
    return table(plan.axes, [rows[cell.key, metric] for cell in everything for metric in metrics], ELIMINATION)


def seeds_bound(values: Sequence[float], confidence: float = CONFIDENCE) -> float | None:
    """The upper bound of the mean over further seeds, of fractions [n]; None of fewer than 2 or where all are 0."""
    n = len(values)
    array = np.asarray(values, np.float64)
    if n < 2 or not array.any():
        return None
    mean, critical = float(array.mean()), float(stdtrit(n - 1, confidence))
    bound = mean + critical * max(float(array.std(ddof=1)), mean) / math.sqrt(n)
    if array.min() > 0:
        logs = np.log(array)
        variance = float(logs.var(ddof=1))
        cox = critical * math.sqrt(variance / n + variance**2 / (2 * (n - 1)))
        bound = max(bound, math.exp(min(0.0, float(logs.mean()) + variance / 2 + cox)))
    return min(1.0, bound)


def images_bound(mean: float, n: int, confidence: float = CONFIDENCE) -> float:
    """The μ ≥ `mean` with n · KL(mean ‖ μ) = -log(1 - confidence), KL of Bernoulli distributions: Hoeffding's bound."""
    wanted = -math.log1p(-confidence) / n
    low, high = mean, 1.0
    while low < (middle := (low + high) / 2) < high:  # KL rises with μ: bisection down to neighbouring floats
        low, high = (middle, high) if _divergence(mean, middle) < wanted else (low, middle)
    return high


def _divergence(p: float, q: float) -> float:
    """KL(p ‖ q) of Bernoulli distributions, 0 ≤ p < 1 and 0 < q < 1."""
    first = p * math.log(p / q) if p > 0 else 0.0
    return first + (1 - p) * (math.log1p(-p) - math.log1p(-q))


def share_bound(above: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The upper bound of a share of which `above` of n were seen (Clopper and Pearson 1934)."""
    return 1.0 if above == n else float(betaincinv(above + 1, n - above, confidence))


def _row(cell: Cell, metric: str, values: Mapping[int, float], limit: float, images: ReadImages) -> dict[str, Any]:
    row: dict[str, Any] = {**cell.values, **dict.fromkeys(ELIMINATION.names), "metric": metric, "n": len(values)}
    row |= {"limit": limit, "flags": []}
    if not values:
        return row
    ordered = [values[seed] for seed in sorted(values)]
    mean = float(np.mean(ordered))
    of_seeds = seeds_bound(ordered)
    flags = {ONE_SEED} if len(values) == 1 else {NO_VARIANCE} if of_seeds is None else set()
    of_images: float | None = None
    if of_seeds is None or of_seeds < limit:
        trials = [trial.trial_id for trial in cell.trials if trial.seed in values]
        seen = images(trials, metric, mean)
        if seen is None:
            flags.add(NO_IMAGES)
        else:
            of_images = images_bound(min(1.0, seen.mean), seen.n)
            row["n_images"] = seen.n
            flags |= {PROBE_IMAGES} if seen.probe else set()
    bounds = [bound for bound in (of_seeds, of_images) if bound is not None]
    above = sum(value >= limit for value in ordered)
    return row | {
        "mean": mean,
        "upper_seeds": of_seeds,
        "upper_images": of_images,
        "upper": max(bounds, default=None),
        "below": max(bounds) < limit if bounds else None,
        "runs_above": above,
        "runs_above_upper": share_bound(above, len(ordered)),
        "method": BOTH if len(bounds) == 2 else SEEDS if of_seeds is not None else IMAGES if bounds else None,
        "flags": sorted(flags),
    }


def _mark_smallest(everything: Sequence[Cell], metric: str, rows: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Sets `smallest` of the rows of a metric; null where the number of registers is no axis."""
    if not everything or REGISTERS not in everything[0].values:
        return
    verdicts: dict[str, list[bool]] = {cell.key: [] for cell in everything}
    for one in along(REGISTERS, everything):
        passed: list[Cell] = []
        for _, cell in reversed(one.levels):
            if rows[cell.key, metric]["below"] is not True:
                break
            passed.append(cell)
        for _, cell in one.levels:
            verdicts[cell.key].append(bool(passed) and cell is passed[-1])
    for key, verdict in verdicts.items():
        rows[key, metric]["smallest"] = bool(verdict) and all(verdict)
