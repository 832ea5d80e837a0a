"""Pooled differences by statsmodels' least squares with a dummy for every cell and seed, to check ours against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import statsmodels.api as sm

from analysis import dunnett
from analysis.statistics import POOLED_DUNNETT, Difference


def pooled(cells: Mapping[int, Mapping[int, float]], baseline: int) -> dict[int, Difference]:
    """Every cell against `baseline`; all cells have the same seeds."""
    names = [baseline, *(name for name in cells if name != baseline)]
    seeds = sorted(cells[baseline])
    values = np.array([[cells[name][seed] for seed in seeds] for name in names])
    cell, block = (index.ravel() for index in np.indices(values.shape))
    dummies = [
        np.ones(values.size),
        *(cell == c for c in range(1, len(names))),
        *(block == s for s in range(1, len(seeds))),
    ]
    fit = sm.OLS(values.ravel(), np.column_stack(dummies).astype(float)).fit()
    critical = dunnett.critical(len(names) - 1, int(fit.df_resid), 0.95)
    found = {}
    for number, name in enumerate(names[1:], start=1):
        delta, reach = float(fit.params[number]), critical * float(fit.bse[number])
        found[name] = Difference(
            n_paired=len(seeds),
            baseline_mean=float(values[0].mean()),
            delta=delta,
            low=delta - reach,
            high=delta + reach,
            method=POOLED_DUNNETT,
            p_value=float(fit.pvalues[number]),
            t=float(fit.tvalues[number]),
            freedom=int(fit.df_resid),
        )
    return found


def numbers(differences: Mapping[int, Difference]) -> dict[int, list[float]]:
    """The numbers of differences, to be compared approximately."""
    names = ("n_paired", "baseline_mean", "delta", "low", "high", "p_value", "t", "freedom")
    return {name: [float(getattr(found, one)) for one in names] for name, found in differences.items()}
