"""The baseline's outlier threshold, frozen as τ/median and applied to all cells that are compared with it; pure.

Rule 3 looks at each model's own bulk: where registers change the bulk, its threshold moves. So the trials without
registers decide once, at the same step and layer, and each trial's norms are set against its own median, since the
scale of norms shifts with the number of registers (paper.md §5). It is computed here from stored histograms: no trial
depends on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.cells import Cell, cells, compared_with
from analysis.collect import Frames
from analysis.histograms import ROUNDING, Floats, mixture
from analysis.norms import PATCH, EvaluatedNorms, TokenNorms, patches

METRIC = "tokens/last/outlier_fraction_frozen"
FLAG = "no_frozen_threshold"
NO_OUTLIERS = 0.005  # a baseline of which rule 3 flags no more than this has no outliers, so no threshold
RATIOS = np.geomspace(1.0, 30.0, 200)  # τ/median of `curve`


@dataclass(frozen=True)
class Frozen:
    """What the baselines of a sweep decide.

    Attributes:
        thresholds: τ/median of its baseline for every cell, by key; None where the baseline has no outliers, or where
            there is no finished baseline.
        fractions: of each finished trial with token norms, its last step and the fraction of its patches whose norm
            over their own median exceeds it; None where there is no threshold.
    """

    thresholds: Mapping[str, float | None]
    fractions: Mapping[str, tuple[int, float | None]]


def frozen(frames: Frames) -> Frozen:
    """Thresholds and fractions of all cells; nothing where the sweep declares no baseline."""
    if frames.plan.baseline is None:
        return Frozen({}, {})
    everything = cells(frames.plan)
    baselines = compared_with(everything, frames.plan.baseline)
    norms = patches(EvaluatedNorms(frames).last_layer(PATCH))
    own = {cell.key: threshold(cell, norms) for cell in baselines.values() if cell is not None}
    thresholds: dict[str, float | None] = {}
    fractions: dict[str, tuple[int, float | None]] = {}
    for cell in everything:
        baseline = baselines[cell.key]
        ratio = None if baseline is None else own[baseline.key]
        thresholds[cell.key] = ratio
        for trial in cell.trials:
            if trial.trial_id in norms:
                end = norms[trial.trial_id]
                fractions[trial.trial_id] = end.step, None if ratio is None else float(curve(end, np.array([ratio]))[0])
    return Frozen(thresholds, fractions)


def threshold(cell: Cell, norms: Mapping[str, TokenNorms]) -> float | None:
    """τ/median by rule 3 over the patches of a cell's trials, each trial's over its own median; None if it has none."""
    found = [norms[trial.trial_id].histogram for trial in cell.trials if trial.trial_id in norms]
    if not found:
        return None
    relative = [one.distribution().over_median() for one in found]
    together = mixture(relative, [one.total for one in found])
    ratio = together.rule3_threshold() / together.median()
    fraction = float(together.fraction_above(ratio * together.median()))
    return None if fraction <= NO_OUTLIERS + ROUNDING else ratio


def curve(end: TokenNorms, ratios: Floats = RATIOS) -> Floats:
    """The fraction of patches above each τ/median, shape of `ratios`: for every threshold there could be."""
    return end.histogram.distribution().over_median().fraction_above(ratios)
