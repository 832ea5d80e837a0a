"""What a reader of a cell's numbers must know: lost trials, mixed provenance, unequal conditions; pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from analysis import image_bootstrap, statistics
from analysis.cells import Cell
from analysis.collect import IMPORTED, Frames, SweepPlan
from analysis.schemas import STATUSES
from analysis.scores import Score

NO_BASELINE = "none: no baseline"
IS_BASELINE = "none: baseline"

# Provenance that all finished trials of a cell, and of its baseline, should share: column of `runs`, name in flags.
_PROVENANCE = {
    "device": "device",
    "threads": "threads",
    "git_commit": "git_commit",
    "versions": "versions",
    "data_fingerprint": "data",
    "precision": "precision",  # a setting, which `auto` decides by the size of the model
}
# More than rounding to whole steps costs from 50 steps on, and than the formula leaves out (norms, losses, optimiser);
# less than three registers cost of the 197 tokens of an image of 224 px.
FLOPS_TOLERANCE = 0.01
_WEIGHTS = "model.weights"  # a setting: the weights that are measured where none are trained
_SELECT_ON = "evaluation.linear.select_on"
_STEPS = "optim.steps"
_BEST, _SCORE_STEP = "evaluation.score.best", "evaluation.score.step"  # the rule of the scoring step
_SETTINGS = (_WEIGHTS, _SELECT_ON, IMPORTED, _STEPS, _BEST, _SCORE_STEP)
_TRIAL = re.compile(r"[0-9a-f]{16}([@:].*)?")  # of these, those of a trial: ID[@STEP][:raw, ema or teacher]


def states_of(frames: Frames) -> dict[str, dict[str, Any]]:
    """Status, provenance and, where there are any, the settings that flags are about, of every trial by trial_id."""
    wanted = ["trial_id", "status", "steps", *_PROVENANCE, *_SETTINGS]
    columns = frames.runs.select([name for name in wanted if name in frames.runs.column_names])
    return {row["trial_id"]: row for row in columns.to_pylist()}


def of_row(
    cell: Cell,
    row: Mapping[str, Any],
    difference: statistics.Difference,
    by_trial: Mapping[str, Score],
    states: Mapping[str, Mapping[str, Any]],
) -> set[str]:
    """Flags of one metric of a cell; that scores are of different steps is not said where a rule chose them."""
    ruled = any(states[trial.trial_id].get(_BEST) is not None for trial in cell.trials)
    scores = [by_trial[trial.trial_id] for trial in cell.trials if trial.trial_id in by_trial]
    reasons = [score.missing for score in scores if score.missing is not None]
    flags = {f"{status}" for status in STATUSES[1:] if row[f"n_{status}"]} | set(reasons)
    if row["n_missing"] == len(reasons):
        flags.discard("missing")
    conditions = {
        "baseline": row["interval_method"] == IS_BASELINE,
        "mixed_steps": not ruled and len({score.step for score in scores}) > 1,
        "no_baseline": row["interval_method"] == NO_BASELINE,
        "no_pair": difference.method == statistics.NO_PAIR and not reasons,
        "no_variance": difference.no_variance,
        "not_finite": any(math.isnan(score.value) and score.missing is None for score in scores),
        image_bootstrap.FLAG: difference.method == image_bootstrap.METHOD,
        "one_seed": row["n"] == 1 or difference.n_paired == 1,
        "partly_paired": 0 < difference.n_paired < row["n"],
    }
    return flags | {flag for flag, holds in conditions.items() if holds}


def chosen(cell: Cell, metric: str, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """`chosen_on_val`: linear heads were chosen by their scores on validation images, which are then optimistic."""
    linear = metric.startswith(("val/linear", "test/linear"))
    return (
        {"chosen_on_val"} if linear and any(states[t.trial_id].get(_SELECT_ON) == "val" for t in cell.trials) else set()
    )


def of_cell(cell: Cell, baseline: Cell | None, plan: SweepPlan, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Flags of all rows of a cell.

    `observational`: its weights were not trained here, but named, and by no trial's id; `imported`: results of some of
    its trials come from other tools; `adaptive`: it got more seeds than the first ones, whose variance decided how
    many; `censored`: a scheduler stopped some of its trials by their scores, so those that finished are no sample of
    all; `best_checkpoint`, `scored_early`: a declared rule scores another step than the last. Besides `_provenance` and
    `_unequal`.
    """
    rows = [states[trial.trial_id] for trial in cell.trials]
    weights = {row.get(_WEIGHTS) for row in rows}
    conditions = {
        "observational": any(name is not None and not _TRIAL.fullmatch(name) for name in weights),
        "imported": any(row.get(IMPORTED) for row in rows),
        "adaptive": plan.first_seeds is not None and any(t.seed not in plan.first_seeds for t in cell.trials),
        "censored": plan.scheduler is not None and any(row["status"] == "pruned" for row in rows),
        "best_checkpoint": any(row.get(_BEST) is not None for row in rows),
        "scored_early": any(row.get(_SCORE_STEP) is not None for row in rows),
    }
    found = {flag for flag, holds in conditions.items() if holds} | _provenance(cell, baseline, states)
    return found if baseline is None else found | _unequal(cell, baseline, plan.match, states)


def _provenance(cell: Cell, baseline: Cell | None, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """`mixed_X`: the cell's finished trials differ in X; `baseline_other_X`: they differ in it from the baseline's."""
    flags: set[str] = set()
    changed = [] if baseline is None else _changed(cell, baseline)
    for column, name in _PROVENANCE.items():
        own = _finished(cell, column, states)
        if len(own) > 1:
            flags.add(f"mixed_{name}")
        elif baseline is not None and len(_finished(baseline, column, states) | own) > 1 and own:
            other_data = name == "data" and any(axis.startswith("data.") for axis in changed)
            flags |= set() if other_data or column in changed else {f"baseline_other_{name}"}
    return flags


def _unequal(cell: Cell, baseline: Cell, match: str | None, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """`unequal_steps`, `unequal_flops`: the cell's finished trials trained longer or shorter than the baseline's, or at
    another cost. Where `match` declares one of them equal, the other one follows from that and is not flagged; nor
    are steps where they are an axis in which both differ, which is then what is asked.

    FLOPs are those of the plan and differ where they do by more than FLOPS_TOLERANCE of the baseline's.
    """
    flags: set[str] = set()
    steps = (
        {_steps(row) for row in _finished_rows(cell, states)},
        {_steps(row) for row in _finished_rows(baseline, states)},
    )
    if match != "flops" and _STEPS not in _changed(cell, baseline) and all(steps) and len(steps[0] | steps[1]) > 1:
        flags.add("unequal_steps")
    own, theirs = ([t.training_flops for t in one.trials if t.training_flops is not None] for one in (cell, baseline))
    furthest = max((abs(a - b) - FLOPS_TOLERANCE * b for a in own for b in set(theirs)), default=0.0)
    if match != "steps" and furthest > 0:
        flags.add("unequal_flops")
    return flags


def _steps(row: Mapping[str, Any]) -> int | None:
    """Optimiser steps of a trial as configured or, of a program that was not told them, as it said."""
    configured: int | None = row.get(_STEPS)
    reported: int | None = row["steps"]
    return reported if configured is None else configured


def _finished_rows(cell: Cell, states: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    rows = (states[trial.trial_id] for trial in cell.trials)
    return [row for row in rows if row["status"] == "finished"]


def _finished(cell: Cell, column: str, states: Mapping[str, Mapping[str, Any]]) -> set[Any]:
    return {row.get(column) for row in _finished_rows(cell, states)}


def _changed(cell: Cell, other: Cell) -> list[str]:
    return [axis for axis, value in cell.values.items() if other.values[axis] != value]
