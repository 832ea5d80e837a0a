"""How often intervals cover, null sweeps claim something and real effects are found: simulated sweeps, as tabled."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from analysis import corrections
from analysis.answer import supported
from analysis.collect import Frames, PlannedTrial, SweepPlan
from analysis.schemas import METRICS, RUNS, TOKEN_NORMS, TOKEN_STATISTICS
from analysis.scores import Score
from analysis.tables import ablation
from benchmarks.report import Comparison, Goal, Report, Settings

SWEEPS = 2_000  # of each scenario
SEEDS = (3, 5, 10)
REGISTERS = (0, 1, 2, 4, 8, 16)
COVERED, FALSE, FOUND = 0.93, 0.05, 0.80  # the goals
_AXIS = "model.num_registers"
_PRIMARY = ("test/linear/top1", "tokens/last/outlier_fraction")
_SEED_EFFECT = 1.0  # standard deviation of what all cells with one seed share, in that of a run's noise
_LOG_DEVIATION = 0.5  # of log-normal noise: skewness 1.75
_FALLING = (1.0, 0.7, 0.5, 0.3, 0.1, 0.0)
_ODD = (1.0, 1.0, 1.0, 1.0, 1.0, 3.0)


@dataclass(frozen=True)
class Scenario:
    """What sweeps are drawn from; `effects` and `deviations` are those of the six cells, the baseline first.

    Args:
        noise: "normal", "log-normal" (additive, of mean 0), or "log-normal scores", whose means are 1 + effect and
            whose deviations are in proportion.
        effects: in standard deviations of the noise of a run of the baseline, in each of the first `affected` metrics.
    """

    name: str
    seeds: int
    noise: str = "normal"
    deviations: tuple[float, ...] = (1.0,) * len(REGISTERS)
    effects: tuple[float, ...] = (0.0,) * len(REGISTERS)
    primary: int = 2
    affected: int = 2


@dataclass(frozen=True)
class Outcome:
    """Shares of a scenario's sweeps, or of its comparisons.

    Attributes:
        covered: of comparisons whose interval has the true difference; `least_covered` those of the worst cell.
        covered_all: of sweeps and metrics whose intervals all have it.
        false_claims: of sweeps with a claim (`answer.supported`) where there is no effect; None where all have one.
        any_found: of sweeps with a claim where there is an effect; `each_found` of those comparisons; None likewise.
        each_found_by_holm: as `each_found`, with Holm's correction over all single comparisons instead.
        pooled: of comparisons whose residuals were pooled.
    """

    covered: float
    least_covered: float
    covered_all: float
    false_claims: float | None
    any_found: float | None
    each_found: float | None
    each_found_by_holm: float | None
    pooled: float


def measure(settings: Settings) -> Report:
    """All scenarios on at most two processes; goals are those of equal variances, the others are counted."""
    planned = scenarios()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, len(os.sched_getaffinity(0))), mp_context=context) as pool:
        outcomes = dict(zip(planned, pool.map(simulate, planned), strict=True))
    additive = {one: found for one, found in outcomes.items() if one.name in ("normal", "log-normal")}
    errors = math.sqrt(FALSE * (1 - FALSE) / SWEEPS)
    comparisons = [
        _against(f"coverage, {one.name} noise, {one.seeds} seeds", found.least_covered, COVERED, at_most=False)
        for one, found in additive.items()
    ]
    comparisons += [
        # Two standard errors of so many sweeps are allowed.
        _against(f"claims of null sweeps, {one.name} noise, {one.seeds} seeds", found.false_claims, FALSE + 2 * errors)
        for one, found in additive.items()
    ]
    comparisons += [
        _against(f"any claim, {one.name}", found.any_found, FOUND, at_most=False)
        for one, found in outcomes.items()
        if any(one.effects) and one.noise == "normal"
    ]
    table = [
        {"scenario": one.name, "seeds": one.seeds, "primary": one.primary, **asdict(found)}
        for one, found in outcomes.items()
    ]
    return Report(comparisons, {"sweeps": SWEEPS, "cells": len(REGISTERS), "scenarios": table})


def scenarios() -> list[Scenario]:
    """Null sweeps with equal and unequal variances, scores that are skewed, and effects of two deviations."""
    listed = []
    for seeds in SEEDS:
        baseline = (3.0, *(1.0,) * (len(REGISTERS) - 1))
        listed += [
            Scenario("normal", seeds),
            Scenario("log-normal", seeds, "log-normal"),
            Scenario("baseline scatters 3 times as much", seeds, deviations=baseline),
            Scenario("one cell scatters 3 times as much", seeds, deviations=_ODD),
            Scenario("scatter falls to none", seeds, deviations=_FALLING),
            Scenario("log-normal scores", seeds, "log-normal scores", effects=(0.0, -0.2, -0.4, -0.5, -0.6, -0.7)),
        ]
    # Of the noise that pairing leaves, or of a whole run or a paired difference: seed effect and noise together.
    sizes = {"2 sd of a run's noise": 2.0, "2 sd of a run or pair": 2.0 * math.hypot(1.0, _SEED_EFFECT)}
    for label, size in sizes.items():
        for where, count in (("one cell", 1), ("all cells", len(REGISTERS) - 1)):
            effects = (*(0.0,) * (len(REGISTERS) - count), *(size,) * count)
            for primary, affected in ((1, 1), (2, 1), (2, 2)):
                name = f"{label} in {where}, {affected} of {primary} primary metrics"
                listed.append(Scenario(name, 5, effects=effects, primary=primary, affected=affected))
    return listed


def simulate(scenario: Scenario) -> Outcome:
    """What the table `ablation` says of the scenario's sweeps; every draw is of a generator with a fixed seed."""
    random = np.random.default_rng([scenarios().index(scenario), SWEEPS])
    frames = _frames(scenario.seeds, _PRIMARY[: scenario.primary])
    effects = np.array(scenario.effects)
    true = {m: effects[1:] * (i < scenario.affected) for i, m in enumerate(frames.plan.primary)}
    tally: list[list[dict[str, Any]]] = []
    for _ in range(SWEEPS):
        scores = {m: _draw(scenario, i, frames.plan.trials, random) for i, m in enumerate(frames.plan.primary)}
        rows = [row for row in ablation(frames, scores=scores).to_pylist() if row["delta"] is not None]
        whole = corrections.holm([row["p_value"] for row in rows])
        for row, by_holm in zip(rows, whole, strict=True):
            effect = float(true[row["metric"]][REGISTERS.index(row[_AXIS]) - 1])
            row["effect"] = effect
            row["covered"] = row["delta_low"] <= effect <= row["delta_high"]
            row["claimed"] = supported(row)
            row["by_holm"] = supported({**row, "p_adjusted": by_holm}) if by_holm is not None else False
        tally.append(rows)
    return _outcome(tally)


def _outcome(tally: Sequence[Sequence[Mapping[str, Any]]]) -> Outcome:
    rows = [row for sweep in tally for row in sweep]
    cells: dict[Any, list[bool]] = {}
    whole: dict[tuple[int, str], list[bool]] = {}
    for number, sweep in enumerate(tally):
        for row in sweep:
            cells.setdefault((row[_AXIS], row["metric"]), []).append(row["covered"])
            whole.setdefault((number, row["metric"]), []).append(row["covered"])
    null, real = ([[row for row in sweep if bool(row["effect"]) == kind] for sweep in tally] for kind in (False, True))
    affected = [row for sweep in real for row in sweep]
    return Outcome(
        covered=_share([row["covered"] for row in rows]),
        least_covered=min(_share(found) for found in cells.values()),
        covered_all=_share([all(found) for found in whole.values()]),
        false_claims=_share([any(row["claimed"] for row in sweep) for sweep in null]) if any(null) else None,
        any_found=_share([any(row["claimed"] for row in sweep) for sweep in real]) if affected else None,
        each_found=_share([row["claimed"] for row in affected]) if affected else None,
        each_found_by_holm=_share([row["by_holm"] for row in affected]) if affected else None,
        pooled=_share([row["interval_method"] == "pooled_dunnett" for row in rows]),
    )


def _share(found: Sequence[bool]) -> float:
    return round(found.count(True) / len(found), 4)


def _against(name: str, share: float | None, goal: float, *, at_most: bool = True) -> Comparison:
    assert share is not None
    sides = ("share of sweeps or comparisons", "the goal")
    return Comparison(name, sides, [share], [goal], "share", Goal(1.0, at_most))


def _draw(
    scenario: Scenario, metric: int, trials: Sequence[PlannedTrial], random: np.random.Generator
) -> dict[str, Score]:
    """A score of every trial: the cell's, the seed's, and noise that is drawn for every run."""
    shape = (len(REGISTERS), scenario.seeds)
    effects = np.array(scenario.effects)[:, None] * (metric < scenario.affected)
    noise = random.standard_normal(shape)
    spread = _LOG_DEVIATION
    ratio = np.exp(spread * noise - spread**2 / 2)  # log-normal of mean 1
    if scenario.noise == "log-normal scores":
        values_CS = (1 + effects) * ratio
    else:
        if scenario.noise == "log-normal":
            noise = (ratio - 1) / math.sqrt(math.exp(spread**2) - 1)
        shared = _SEED_EFFECT * random.standard_normal((1, scenario.seeds))
        values_CS = effects + np.array(scenario.deviations)[:, None] * noise + shared
    return {
        trial.trial_id: Score(1, float(values_CS[REGISTERS.index(trial.cell[_AXIS]), trial.seed])) for trial in trials
    }


def _frames(seeds: int, primary: tuple[str, ...]) -> Frames:
    """A finished sweep, its scores left out."""
    trials = tuple(
        PlannedTrial(f"reg{count}-seed{seed}", f"reg{count} seed{seed}", {_AXIS: count}, seed)
        for count in REGISTERS
        for seed in range(seeds)
    )
    plan = SweepPlan("simulated", "Does it matter?", {_AXIS: REGISTERS}, {_AXIS: 0}, primary, trials)
    runs = pa.Table.from_pylist([{"trial_id": trial.trial_id, "status": "finished"} for trial in trials], schema=RUNS)
    empty = {"token_norms": TOKEN_NORMS.empty_table(), "token_statistics": TOKEN_STATISTICS.empty_table()}
    return Frames(Path(), plan, runs, METRICS.empty_table(), **empty, mlflow=None, problems=())
