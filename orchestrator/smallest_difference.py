"""What a plan's seeds can show: how far its intervals reach, and which difference they find; without scipy.

The quantiles are those of analysis/dunnett.py. A plan that loaded scipy for them would take twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.cells import baseline_of
from orchestrator.plan import Plan, plain_cell

CONFIDENCE, POWER = 0.95, 0.80
# Steps of the trapezoidal rule, which converges geometrically on these smooth integrands.
_SCALES, _NOISE_STEP, _WIDEST = 60, 0.5, 6.0


@dataclass(frozen=True)
class Resolution:
    """What so many seeds show of the cells that are compared with one baseline.

    `half_width` and `detectable` are in standard deviations of a run, that is of the noise that is drawn for every run
    anew; a paired difference has √2 times as much. None where one seed gives no interval.

    Attributes:
        pooled: residuals of all cells give one variance; else pairs alone do.
        half_width: of the 95 % interval of a difference, all intervals of the baseline together.
        detectable: the difference that is claimed with a chance of `POWER`.
    """

    seeds: int
    comparisons: int
    pooled: bool
    half_width: float | None
    detectable: float | None

    @property
    def smallest_sign_flip_p(self) -> float:
        """Of the exact test that flips the signs of the paired differences, of which there are 2^seeds ways."""
        return min(1.0, 2.0 ** (1 - self.seeds))


def resolution(plan: Plan) -> Resolution:
    """What the seeds of `plan` show where cells scatter alike, of the baseline whose cells get the widest intervals.

    With 3 or more cells residuals are pooled (cells × (seeds - 1) degrees, Dunnett's quantile), else intervals are the
    paired t. Where cells get more seeds by their variance, it is what the first ones show, each cell for itself
    (Stein). Claims are corrected over all baselines and primary metrics, of which one at least is assumed; without a
    declared baseline one comparison is.
    """
    sweep = plan.sweep
    seeds, sizes = len(sweep.seeds), _groups(plan)
    blocks = sum(sizes.values()) * max(1, len(sweep.primary))
    adaptive = sweep.more_seeds is not None
    if seeds < 2:
        return Resolution(seeds, max(sizes), False, None, None)
    return max((_of_group(seeds, size, blocks, adaptive) for size in sizes), key=lambda found: found.half_width or 0.0)


def _groups(plan: Plan) -> dict[int, int]:
    """How many baselines are compared with so many cells, by that number; one with one where nothing is."""
    baseline = plan.sweep.model_dump(mode="json")["baseline"]
    cells = [plain_cell(cell) for cell in plan.cells]
    sizes: dict[str, int] = {}
    for cell in cells if baseline is not None else []:
        found = baseline_of(cell, cells, baseline)
        if found is not None and any(cell.get(axis) != value for axis, value in baseline.items()):
            sizes[str(found)] = sizes.get(str(found), 0) + 1
    counts = list(sizes.values()) or [1]
    return {size: counts.count(size) for size in sorted(set(counts))}


def _of_group(seeds: int, comparisons: int, blocks: int, adaptive: bool) -> Resolution:
    pooled = comparisons > 1 and not adaptive
    freedom = (comparisons if pooled else 1) * (seeds - 1)
    together = comparisons if pooled else 1
    level = (1 - CONFIDENCE) / blocks / (comparisons if adaptive else 1)
    reach = quantile(CONFIDENCE, together, freedom)
    claimed = max(reach, quantile(1 - level, together, freedom))
    error = math.sqrt(2 / seeds)
    return Resolution(seeds, comparisons, pooled, reach * error, shift(claimed, freedom, POWER) * error)


def quantile(confidence: float, comparisons: int, freedom: int) -> float:
    """c with P(|T_i| ≤ c for all i) = `confidence`: Dunnett's (1955), Student's of one comparison; to 4 digits."""
    scales = _scales(freedom)
    inside = _within if comparisons == 1 else _all_within(comparisons)
    return _rising(lambda c: sum(weight * inside(c * s) for s, weight in scales), confidence)


def _within(reach: float) -> float:
    """P(|Z| ≤ reach) of one standard normal Z."""
    return math.erf(reach / math.sqrt(2))


def _all_within(comparisons: int) -> Callable[[float], float]:
    """P(|Z_i| ≤ reach for all i) of normal Z_i with correlations 1/2: given the baseline's noise they are independent.

    Of the noise only one half is integrated over, since both are alike.
    """
    points = [k * _NOISE_STEP for k in range(round(_WIDEST / _NOISE_STEP) + 1)]
    density = [(2 if z else 1) * _NOISE_STEP * math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in points]

    def inside(reach: float) -> float:
        wide = math.sqrt(2) * reach
        each = (_normal(z + wide) - _normal(z - wide) for z in points)
        return sum(weight * one**comparisons for weight, one in zip(density, each, strict=True))

    return inside


def shift(critical: float, freedom: int, power: float) -> float:
    """The true difference, in standard errors, with P(|T| > `critical`) = `power`: T is Student's noncentral t."""
    scales = _scales(freedom)

    def found(true: float) -> float:
        return sum(w * (_normal(true - critical * s) + _normal(-true - critical * s)) for s, w in scales)

    return _rising(found, power)


def _scales(freedom: int) -> list[tuple[float, float]]:
    """Values s, evenly on a logarithmic axis, and weights of the density of √(chi-square / its degrees)."""
    low = -max(16 / freedom, 8 / math.sqrt(2 * freedom))
    high = math.log(1 + 12 / math.sqrt(freedom)) if freedom > 4 else math.log(8.0)
    step = (high - low) / _SCALES
    half = freedom / 2
    constant = math.log(2) + half * math.log(half) - math.lgamma(half)
    logs = [low + step * k for k in range(_SCALES + 1)]
    return [(math.exp(v), step * math.exp(constant + freedom * v - half * math.exp(2 * v))) for v in logs]


def _normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _rising(function: Callable[[float], float], wanted: float) -> float:
    """Where a distribution function of x ≥ 0 has a value: bisection to 1 %, between which its tail is exponential."""
    low, high = 0.0, 2.0
    below, above = 0.0, function(high)
    while above < wanted:
        low, below, high = high, above, 2 * high
        above = function(high)
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        value = function(middle)
        if value < wanted:
            low, below = middle, value
        else:
            high, above = middle, value
    tails = [math.log1p(-value) for value in (below, above, wanted)]
    return low + (high - low) * (tails[2] - tails[0]) / (tails[1] - tails[0])


def sentences(found: Resolution) -> list[str]:
    """What `orchestrate plan` says of all metrics."""
    if found.half_width is None or found.detectable is None:
        return ["1 seed: no interval, so no difference can be told from noise"]
    cells = f"{found.comparisons} cells" if found.comparisons > 1 else "1 cell"
    return [
        f"{found.seeds} seeds, {cells} against a baseline: 95 % intervals reach {found.half_width:.2f} standard "
        f"deviations of a run to either side; a true difference of {found.detectable:.2f} is found with "
        f"{POWER:.0%} power",
        f"smallest p-value: those of t have no bound but rest on normal noise; an exact sign-flip test of "
        f"{found.seeds} pairs cannot go below {found.smallest_sign_flip_p:.3g}",
    ]


def to_json(found: Resolution, run_deviations: Mapping[str, float]) -> dict[str, Any]:
    """`run_deviations`: of metrics of earlier trials, a run's standard deviation by name."""

    def both(size: float | None) -> dict[str, Any]:
        of_metrics = {} if size is None else {metric: size * sd for metric, sd in run_deviations.items()}
        return {"in_run_deviations": size, "of_metrics": of_metrics}

    return {
        "comparisons": found.comparisons,
        "pooled": found.pooled,
        "half_width": both(found.half_width),
        "detectable": {"power": POWER, **both(found.detectable)},
        "smallest_p": {"t": None, "sign_flip": found.smallest_sign_flip_p if found.seeds > 1 else None},
    }
