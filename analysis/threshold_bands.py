"""The fraction of patches above τ/median for every τ, with bands that hold for all τ together; pure.

Which threshold makes a token an outlier is a choice, and no rule serves all models (paper.md §5). So the fraction, and
its difference to the baseline, are bounded for all thresholds at once: over which of them does the conclusion hold?

The band is mean ± c · s(τ) / √n over n seeds. s(τ) is the deviation over seeds at that τ, but no less than what patches
drawn independently would scatter. The constant c bounds the chance that the mean of any τ lies farther away:

    2 · P(t > c) + κ / π · (1 + c² / (n - 1))^(-(n - 2) / 2) = 5 %

is the expected number of excursions above c and below -c of a t process of n - 1 degrees (Worsley 1994, Advances in
Applied Probability 26; as bands: Liebl and Reimherr 2023, JRSS B 85), by which the chance is bounded. κ is the length
of the path of the standardised curve, Σ arccos of the correlations of neighbouring τ, of residuals pooled over all
cells. With few seeds Bonferroni's bound over all τ is the smaller one and counts. Nothing is drawn. One seed has no
band, and three have a wide one (c ≈ 63): docs/measurements.md has the simulated coverage. It holds over all τ of one
cell, not over all cells as well.

Shapes: S seeds, T thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from analysis.cells import cells, compared_with, is_baseline
from analysis.frames import SweepPlan
from analysis.norms import TokenNorms
from analysis.schemas import THRESHOLDS, setting_column
from analysis.thresholds import RATIOS, curve

Floats = NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Band:
    """A curve over τ with its simultaneous bounds, [T] each; without bounds where one seed says nothing of scatter."""

    n: int
    middle: Floats
    low: Floats | None
    high: Floats | None


@dataclass(frozen=True)
class Range:
    """Neighbouring thresholds, as τ/median, at all of which a difference has one sign: -1 below the baseline, or 1."""

    first: float
    last: float
    sign: int


@dataclass(frozen=True)
class CellBands:
    """The fraction of a cell, and its difference to the baseline over the seeds that both have; None without any."""

    ratios: Floats
    fraction: Band | None
    delta: Band | None

    def holds(self) -> tuple[Range, ...]:
        """Where the whole band of the difference lies on one side of 0, from low thresholds to high ones."""
        if self.delta is None or self.delta.low is None or self.delta.high is None:
            return ()
        return ranges(self.ratios, self.delta.low, self.delta.high)


@dataclass(frozen=True)
class _Sample:
    """Curves of the seeds of a cell, or their differences to the baseline's, and the least deviation of a seed."""

    curves_ST: Floats
    least_T: Floats

    @property
    def residuals_ST(self) -> Floats:
        return np.asarray(self.curves_ST - self.curves_ST.mean(axis=0))

    @property
    def deviation_T(self) -> Floats:
        return np.asarray(np.maximum(self.curves_ST.std(axis=0, ddof=1), self.least_T))


def bands(plan: SweepPlan, norms: Mapping[str, TokenNorms], ratios: Floats = RATIOS) -> dict[str, CellBands]:
    """Bands of every cell, by key in the order of cells.

    Args:
        norms: the patches of finished trials, `norms.patches`.
        ratios: τ/median, [T], rising.
    """
    everything = cells(plan)
    first = plan.first_seeds  # the seeds that were added by the variance of these are left out
    seen = {
        cell.key: {
            t.seed: (curve(norms[t.trial_id], ratios), norms[t.trial_id].histogram.total)
            for t in cell.trials
            if t.trial_id in norms and (first is None or t.seed in first)
        }
        for cell in everything
    }
    baselines = compared_with(everything, plan.baseline)
    own = {cell.key: _sample(seen[cell.key]) for cell in everything if seen[cell.key]}
    differences: dict[str, _Sample] = {}
    for cell in everything:
        baseline = None if is_baseline(cell, plan.baseline) else baselines[cell.key]
        if baseline is not None and seen[cell.key].keys() & seen[baseline.key].keys():
            differences[cell.key] = _difference(seen[cell.key], seen[baseline.key])
    fraction = {key: _bounded(band, 0.0, 1.0) for key, band in _banded(own).items()}
    delta = {key: _bounded(band, -1.0, 1.0) for key, band in _banded(differences).items()}
    return {cell.key: CellBands(ratios, fraction.get(cell.key), delta.get(cell.key)) for cell in everything}


def ranges(ratios: Floats, low: Floats, high: Floats) -> tuple[Range, ...]:
    """The stretches of neighbouring `ratios` at which bounds, [T], exclude 0 on the same side."""
    signs = np.where(low > 0, 1, np.where(high < 0, -1, 0))
    edges = np.flatnonzero(np.diff(signs)) + 1
    found = []
    for part in np.split(np.arange(len(signs)), edges):
        if len(part) and signs[part[0]]:
            found.append(Range(float(ratios[part[0]]), float(ratios[part[-1]]), int(signs[part[0]])))
    return tuple(found)


def critical(residuals: Floats, seeds: int, confidence: float = CONFIDENCE) -> float:
    """The constant c for bands over `seeds` ≥ 2 curves, of the file's docstring.

    Args:
        residuals: [m, T] of any scale at each τ; a τ without any residual takes no part. Infinite where none has any.
    """
    length, count = path_length(residuals)
    if not count:
        return math.inf
    freedom, wrong = seeds - 1, 1 - confidence
    bonferroni = -float(stdtrit(freedom, wrong / 2 / count))
    low, high = 0.0, bonferroni
    while low < (middle := (low + high) / 2) < high:  # the expected number falls with c: bisection
        crossings = length / math.pi * (1 + middle**2 / freedom) ** (-(freedom - 1) / 2)
        low, high = (middle, high) if 2 * float(stdtr(freedom, -middle)) + crossings > wrong else (low, middle)
    return high


def path_length(residuals: Floats) -> tuple[float, int]:
    """κ, the sum of angles between residuals, [m, T], of neighbouring τ, and of how many τ there are any."""
    norm = np.sqrt((residuals**2).sum(axis=0))
    kept = residuals[:, norm > 0] / norm[norm > 0]
    cosines = np.clip((kept[:, 1:] * kept[:, :-1]).sum(axis=0), -1.0, 1.0)
    return float(np.arccos(cosines).sum()), kept.shape[1]


def thresholds_table(plan: SweepPlan, found: Mapping[str, CellBands]) -> pa.Table:
    """The table `thresholds`: the axes, then schemas.THRESHOLDS, a row a cell and τ; cells without norms have none."""
    kept = [(cell, found[cell.key]) for cell in cells(plan) if found[cell.key].fraction is not None]
    lengths = [len(bands_.ratios) for _, bands_ in kept]
    columns = {
        axis: setting_column([cell.values[axis] for cell, _ in kept]).take(_repeated(lengths)) for axis in plan.axes
    }
    numbers = [_columns(bands_) for _, bands_ in kept]
    for name in THRESHOLDS.names:
        whole = np.concatenate([one[name] for one in numbers]) if numbers else np.empty(0)
        columns[name] = pa.array(whole, type=pa.float64(), from_pandas=True).cast(THRESHOLDS.field(name).type)
    return pa.table(columns)


def _repeated(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.repeat(np.arange(len(lengths)), lengths), type=pa.int64())


def _columns(found: CellBands) -> dict[str, Floats]:
    """Columns of the table, [T] each, with NaN for null."""
    nothing = np.full(len(found.ratios), np.nan)
    columns = {"ratio": found.ratios}
    for band, names in (
        (found.fraction, ("n", "fraction", "low", "high")),
        (found.delta, ("n_paired", "delta", "delta_low", "delta_high")),
    ):
        numbers = (0, nothing, None, None) if band is None else (band.n, band.middle, band.low, band.high)
        columns[names[0]] = np.full(len(found.ratios), float(numbers[0]))
        columns |= {
            name: nothing if value is None else value for name, value in zip(names[1:], numbers[1:], strict=True)
        }
    return columns


def _sample(seen: Mapping[int, tuple[Floats, int]]) -> _Sample:
    curves = np.stack([seen[seed][0] for seed in sorted(seen)])
    return _Sample(curves, np.sqrt(_scatter(curves, seen)))


def _difference(own: Mapping[int, tuple[Floats, int]], theirs: Mapping[int, tuple[Floats, int]]) -> _Sample:
    seeds = sorted(own.keys() & theirs.keys())
    both = [{seed: one[seed] for seed in seeds} for one in (own, theirs)]
    curves = [np.stack([one[seed][0] for seed in seeds]) for one in both]
    variance = sum((_scatter(c, one) for c, one in zip(curves, both, strict=True)), np.zeros(curves[0].shape[1]))
    return _Sample(curves[0] - curves[1], np.sqrt(variance))


def _scatter(curves_ST: Floats, seen: Mapping[int, tuple[Floats, int]]) -> Floats:
    """The variance of a fraction of independent patches, of one patch where none or all are above."""
    patches = min(count for _, count in seen.values())
    share = np.clip(curves_ST.mean(axis=0), 1 / (patches + 1), 1 - 1 / (patches + 1))
    return np.asarray(share * (1 - share) / patches)


def _banded(samples: Mapping[str, _Sample]) -> dict[str, Band]:
    several = {key: sample for key, sample in samples.items() if len(sample.curves_ST) > 1}
    found = {key: Band(len(s.curves_ST), s.curves_ST.mean(axis=0), None, None) for key, s in samples.items()}
    if several:
        residuals = np.concatenate([sample.residuals_ST / sample.deviation_T for sample in several.values()])
        constants = {n: critical(residuals, n) for n in {found[key].n for key in several}}
        for key, sample in several.items():
            n, middle = found[key].n, found[key].middle
            reach = constants[n] * sample.deviation_T / math.sqrt(n)
            found[key] = Band(n, middle, middle - reach, middle + reach)
    return found


def _bounded(band: Band, least: float, most: float) -> Band:
    if band.low is None or band.high is None:
        return band
    return Band(band.n, band.middle, np.clip(band.low, least, most), np.clip(band.high, least, most))
