"""How often bands over all thresholds hold the true curve, and how often few outliers are claimed to be none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from analysis.cells import cells
from analysis.elimination import seeds_bound
from analysis.frames import PlannedTrial, SweepPlan
from analysis.histograms import BINS_PER_DECADE, LOWEST, Histogram
from analysis.norms import TokenNorms
from analysis.threshold_bands import CellBands, bands
from analysis.thresholds import RATIOS
from benchmarks.report import Comparison, Goal, Report, Settings

SWEEPS = 500  # of each scenario of bands
CLAIMS = 20_000  # of each scenario of elimination
SEEDS = (3, 5, 10)
COVERED, FALSE = 0.93, 0.05  # the goals
LIMIT = 0.005
REGISTERS = "model.num_registers"
SHARES = {0: 0.05, 1: 0.03, 2: 0.01, 4: 0.005, 8: 0.001, 16: 0.0}  # mean fraction of outliers by registers
TWO_CELLS = (0, 4)
SPREAD = 0.3  # of a run's fraction, relative to its mean
PATCHES = 4_096
# Fractions whose mean is at the limit: deviation of the logarithm, or share of runs that have outliers at all.
LOG_NORMAL, RARE = (0.3, 0.5, 1.0), (0.5, 0.2)

Floats = NDArray[np.float64]


def _run_level(noise: tuple[Floats, ...], share: float, skewed: bool) -> tuple[Floats, ...]:
    """Width of the bulk, place of the outliers and their share, of runs with the given standard normal noise."""
    width, middle, own = noise
    scatter = np.exp(SPREAD * own - SPREAD**2 / 2) if skewed else np.maximum(0.0, 1 + SPREAD * own)
    return 0.12 * (1 + 0.1 * width), 4 * np.exp(0.15 * middle), np.minimum(1.0, share * scatter)


def run(random: np.random.Generator, share: float, skewed: bool, patches: int = PATCHES) -> Floats:
    """Norms of one run, [patches]: a bulk of random width, and a random share of outliers near four medians."""
    width, middle, own = _run_level(tuple(random.normal(size=3)), share, skewed)
    bulk, outliers = width * random.normal(size=patches), np.log(middle) + 0.4 * random.normal(size=patches)
    return np.asarray(20 * np.exp(np.where(random.random(patches) < own, outliers, bulk)))


def histogram(norms: Floats) -> TokenNorms:
    """The norms on the grid of token_norms."""
    bins = np.floor((np.log10(norms) - np.log10(LOWEST)) * BINS_PER_DECADE).astype(np.int64) + 1
    places, counts = np.unique(bins, return_counts=True)
    return TokenNorms(20, 4, Histogram(places, counts, float(norms.max())), None)


@lru_cache(maxsize=2)
def truth(skewed: bool) -> dict[int, Floats]:
    """The mean curve of each number of registers, [T], as the average of 40,000 runs of infinitely many patches."""
    random = np.random.default_rng(7)
    noise = random.normal(size=(40, 3, 1_000, 1))
    found = {}
    for count, share in SHARES.items():
        parts = []
        for part in noise:
            width, middle, own = _run_level(tuple(part), share, skewed)
            # Outliers lie above the median of all, which is then a higher quantile of the bulk.
            logs = np.log(RATIOS) + width * ndtri(0.5 / (1 - own))
            above = own * ndtr((np.log(middle) - logs) / 0.4) + (1 - own) * ndtr(-logs / width)
            parts.append(above.mean(axis=0))
        found[count] = np.mean(parts, axis=0)
    return found


def sweep(random: np.random.Generator, seeds: int, skewed: bool, shares: Mapping[int, float]) -> dict[int, CellBands]:
    """The bands of one simulated sweep, by number of registers."""
    trials = [PlannedTrial(f"{c}-{s}", "", {REGISTERS: c}, s) for c in shares for s in range(seeds)]
    plan = SweepPlan("s", "", {REGISTERS: tuple(shares)}, {REGISTERS: 0}, (), tuple(trials))
    norms = {t.trial_id: histogram(run(random, shares[t.cell[REGISTERS]], skewed)) for t in trials}
    found = bands(plan, norms)
    return {cell.values[REGISTERS]: found[cell.key] for cell in cells(plan)}


def coverage(seeds: int, sweeps: int, skewed: bool, counts: tuple[int, ...] = tuple(SHARES)) -> dict[str, float]:
    """The share of bands that hold the true curve at every threshold, of `fractions` and of `differences`."""
    random = np.random.default_rng([seeds, sweeps, skewed, len(counts)])
    true = truth(skewed)
    held: dict[str, list[bool]] = {"fractions": [], "differences": []}
    for _ in range(sweeps):
        for count, found in sweep(random, seeds, skewed, {count: SHARES[count] for count in counts}).items():
            pairs = (("fractions", found.fraction, true[count]), ("differences", found.delta, true[count] - true[0]))
            for name, band, wanted in pairs:
                if band is not None and band.low is not None and band.high is not None:
                    inside = (band.low <= wanted + 1e-12) & (wanted - 1e-12 <= band.high)
                    held[name].append(bool(inside.all()))
    return {name: round(float(np.mean(one)), 4) for name, one in held.items()}


def false_claims(
    seeds: int, *, log_deviation: float = SPREAD, with_outliers: float = 1.0, draws: int = CLAIMS
) -> float:
    """How often the bound over seeds lies below LIMIT, which is the true mean fraction.

    Args:
        log_deviation: of log-normal fractions.
        with_outliers: the share of runs that have outliers at all; the others have none.
    """
    random = np.random.default_rng([seeds, draws])
    noise = np.exp(log_deviation * random.standard_normal((draws, seeds)) - log_deviation**2 / 2)
    values = LIMIT / with_outliers * noise * (random.random((draws, seeds)) < with_outliers)
    bounds = (seeds_bound(row) for row in values.tolist())
    return sum(bound is not None and bound < LIMIT for bound in bounds) / draws


def measure(settings: Settings) -> Report:
    """All scenarios; goals are those of bands of six cells and of moderate scatter, the others are counted."""
    table: list[dict[str, Any]] = []
    comparisons = []
    for skewed in (False, True):
        for counts in (tuple(SHARES), TWO_CELLS):
            for seeds in SEEDS:
                found = coverage(seeds, SWEEPS, skewed, counts)
                table.append({"skewed": skewed, "cells": len(counts), "seeds": seeds, **found})
                name = f"coverage over all thresholds, {'log-normal' if skewed else 'normal'}, {seeds} seeds"
                if counts == tuple(SHARES):
                    comparisons.append(_against(name, min(found.values()), COVERED, at_most=False))
    claims = [
        {"seeds": seeds, "log_deviation": deviation, "share": false_claims(seeds, log_deviation=deviation)}
        for seeds in SEEDS
        for deviation in LOG_NORMAL
    ]
    claims += [
        {"seeds": seeds, "with_outliers": share, "share": false_claims(seeds, with_outliers=share)}
        for seeds in SEEDS
        for share in RARE
    ]
    moderate = [one["share"] for one in claims if one.get("log_deviation", math.inf) <= max(LOG_NORMAL[:2])]
    comparisons.append(_against("false claims of elimination, log-normal to 0.5", max(moderate), FALSE))
    return Report(comparisons, {"sweeps": SWEEPS, "draws": CLAIMS, "bands": table, "claims": claims})


def _against(name: str, share: float, goal: float, *, at_most: bool = True) -> Comparison:
    return Comparison(name, ("share of bands or claims", "the goal"), [share], [goal], "share", Goal(1.0, at_most))
