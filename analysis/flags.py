"""What a reader of a cell's numbers must know: lost trials, mixed provenance, unequal conditions; pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from analysis import statistics
from analysis.cells import Cell
from analysis.collect import IMPORTED, Frames
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
}
_WEIGHTS = "model.weights"  # a setting: the weights that are measured where none are trained
_SELECT_ON = "evaluation.linear.select_on"
_TRIAL = re.compile(r"[0-9a-f]{16}([@:].*)?")  # of these, those of a trial: ID[@STEP][:raw, ema or teacher]


def states_of(frames: Frames) -> dict[str, dict[str, Any]]:
    """Status, provenance and, where there are any, the settings that flags are about, of every trial by trial_id."""
    settings = [name for name in (_WEIGHTS, _SELECT_ON, IMPORTED) if name in frames.runs.column_names]
    columns = frames.runs.select(["trial_id", "status", *_PROVENANCE, *settings])
    return {row["trial_id"]: row for row in columns.to_pylist()}


def of_row(
    cell: Cell, row: Mapping[str, Any], difference: statistics.Difference, by_trial: Mapping[str, Score]
) -> set[str]:
    scores = [by_trial[trial.trial_id] for trial in cell.trials if trial.trial_id in by_trial]
    reasons = [score.missing for score in scores if score.missing is not None]
    flags = {f"{status}" for status in STATUSES[1:] if row[f"n_{status}"]} | set(reasons)
    if row["n_missing"] == len(reasons):
        flags.discard("missing")
    conditions = {
        "baseline": row["interval_method"] == IS_BASELINE,
        "mixed_steps": len({score.step for score in scores}) > 1,
        "no_baseline": row["interval_method"] == NO_BASELINE,
        "no_pair": difference.method == statistics.NO_PAIR and not reasons,
        "no_variance": difference.no_variance,
        "not_finite": any(math.isnan(score.value) and score.missing is None for score in scores),
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


def of_cell(cell: Cell, baseline: Cell | None, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Flags of all rows of a cell.

    `mixed_X`: its finished trials differ in X; `baseline_other_X`: they differ in it from the baseline's;
    `observational`: its weights were not trained here, but named, and by no trial's id; `imported`: results of some of
    its trials come from other tools.
    """
    weights = {states[trial.trial_id].get(_WEIGHTS) for trial in cell.trials}
    named = any(name is not None and not _TRIAL.fullmatch(name) for name in weights)
    flags: set[str] = {"observational"} if named else set()
    flags |= {"imported"} if any(states[trial.trial_id].get(IMPORTED) for trial in cell.trials) else set()
    for column, name in _PROVENANCE.items():
        own = _finished(cell, column, states)
        if len(own) > 1:
            flags.add(f"mixed_{name}")
        elif baseline is not None and len(_finished(baseline, column, states) | own) > 1 and own:
            other_data = name == "data" and any(axis.startswith("data.") for axis in _changed(cell, baseline))
            flags |= set() if other_data else {f"baseline_other_{name}"}
    return flags


def adaptive(cell: Cell, first_seeds: Sequence[int] | None) -> set[str]:
    """`adaptive`: the cell got more seeds than the first ones, whose variance decided how many."""
    return {"adaptive"} if first_seeds is not None and any(t.seed not in first_seeds for t in cell.trials) else set()


def censored(cell: Cell, scheduler: str | None, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """`censored`: a scheduler stopped some of the cell's trials by their scores, so those that finished are no sample
    of all.
    """
    pruned = any(states[trial.trial_id]["status"] == "pruned" for trial in cell.trials)
    return {"censored"} if scheduler is not None and pruned else set()


def _finished(cell: Cell, column: str, states: Mapping[str, Mapping[str, Any]]) -> set[Any]:
    rows = (states[trial.trial_id] for trial in cell.trials)
    return {row[column] for row in rows if row["status"] == "finished"}


def _changed(cell: Cell, other: Cell) -> list[str]:
    return [axis for axis, value in cell.values.items() if other.values[axis] != value]
