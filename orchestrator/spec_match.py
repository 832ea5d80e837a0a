"""Checks what a sweep file says of equal training and of the scoring step: `match` and `score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator import match
from orchestrator.cells import Cell
from orchestrator.draft import Draft, Path
from orchestrator.spec_checks import Parts
from orchestrator.spec_combinations import blame
from orchestrator.sweep import Sweep, score_settings
from trainers.catalog import METHODS
from trainers.config import TrialConfig, resolve
from trainers.explain import ConfigError

_MOST_NAMED = 5  # cells whose steps are reported one by one
_DECISIVE = ("preset", "method", "model.size")  # settings whose recipes may say how long training is


def check_score(draft: Draft, parts: Parts, sweep: Sweep) -> None:
    """Put the rule of `score` among the settings of every cell; a setting of its own elsewhere would contradict it."""
    if sweep.score is None:
        return
    if sweep.score.best is None and sweep.score.step is None:
        draft.report(("score",), "score says neither best nor step; leave it out to score the last step")
        return
    if "command" in parts.trial or "command" in parts.axes or any("command" in when.settings for when in parts.when):
        draft.report(("score",), "score is for our own trainers; a program decides itself at which step it is tested")
        return
    before = len(draft.problems)
    for name in (name for name in (*parts.trial_paths, *parts.axis_paths) if name.startswith("evaluation.score.")):
        place = parts.trial_paths.get(name) or parts.axis_paths[name]
        draft.report(place, f"{name} is given, and score as well; set the rule in one place")
    for paths in parts.when_paths:
        for name in (name for name in paths if name.startswith("evaluation.score.")):
            draft.report(paths[name], f"when sets {name}, and score gives all cells one rule")
    if len(draft.problems) == before:
        parts.score = score_settings(sweep.score)
        parts.trial_paths |= {name: ("score", name.rpartition(".")[2]) for name in parts.score}


def check_match(
    draft: Draft, parts: Parts, sweep: Sweep, baseline: Mapping[str, Any] | None, configs: Sequence[TrialConfig]
) -> None:
    """Compared cells can be trained equally long, and are where the file says so.

    Args:
        configs: those of all cells; nothing is said where some are impossible.
    """
    if sweep.match is None:
        return
    complaint = _senseless(parts, sweep, baseline, configs)
    if complaint is not None:
        draft.report(*complaint)
    elif baseline is not None and not draft.problems:
        cells = list(parts.grid().cells())
        check = _check_steps if sweep.match == "steps" else _check_flops
        check(draft, parts, cells, configs, baseline)


def _senseless(
    parts: Parts, sweep: Sweep, baseline: Mapping[str, Any] | None, configs: Sequence[TrialConfig]
) -> tuple[Path, str] | None:
    """Where and why `match` cannot be met whatever the cells are."""
    place: Path = ("match",)
    if baseline is None:
        return place, f"match is {sweep.match}, which is about cells that are compared; name a baseline"
    if any(config.command is not None for config in configs):
        return place, f"match is {sweep.match}, but how long a program trains only it knows; leave match out"
    still = sorted({c.method for c in configs if c.method in METHODS and not METHODS[c.method].trains})
    if still:
        return place, f"match is {sweep.match}, and method {still[0]} trains nothing"
    if sweep.search is not None and match.STEPS in sweep.search.space:
        return ("search", "space", match.STEPS), f"search.space has {match.STEPS}, which match: {sweep.match} fixes"
    if sweep.match == "flops" and match.STEPS in parts.axes:
        return parts.axis_paths[
            match.STEPS
        ], f"{match.STEPS} is an axis, and match: flops sets it; leave one of them out"
    if sweep.match == "flops" and sweep.search is not None:
        return place, "match is flops, but what a search suggests may change FLOPs; use match: steps with a search"
    return None


def _check_steps(
    draft: Draft, parts: Parts, cells: Sequence[Cell], configs: Sequence[TrialConfig], baseline: Mapping[str, Any]
) -> None:
    unequal = [
        (cells[position], configs[position].optim.steps, configs[base].optim.steps)
        for position, base in match.pairs(cells, configs, baseline)
        if configs[position].optim.steps != configs[base].optim.steps
    ]
    for cell, steps, wanted in unequal[:_MOST_NAMED]:
        message = f"{_words(cell)} trains {steps} steps and its baseline {wanted}, but match is steps"
        draft.report(_place(parts, cell), message)
    if len(unequal) > _MOST_NAMED:
        draft.report(("match",), f"{len(unequal) - _MOST_NAMED} more cells train other numbers of steps")


def _check_flops(
    draft: Draft, parts: Parts, cells: Sequence[Cell], configs: Sequence[TrialConfig], baseline: Mapping[str, Any]
) -> None:
    for position, base in match.pairs(cells, configs, baseline):
        given, others = (cells[at].settings.get(match.STEPS) for at in (position, base))
        if given != others:
            message = f"{match.STEPS} is {given} for {_words(cells[position])}, which match: flops sets; leave it out"
            draft.report(_place(parts, cells[position]), message)
    said: set[str] = set()
    for cell in match.with_equal_flops(cells, configs, baseline):
        try:
            resolve(cell.settings)
        except ConfigError as error:
            for fault in error.faults:
                if fault.message not in said:
                    said.add(fault.message)
                    draft.report(("match",), f"with the FLOPs of its baseline, {_words(cell)}: {fault.message}")


def _place(parts: Parts, cell: Cell) -> Path:
    """Where it is said how long the cell trains."""
    given = blame(parts, cell, (match.STEPS,))
    if given[0] in ("axes", "when") and len(given) > 1:
        return given
    return next((parts.value_paths[name, cell.values[name]] for name in _DECISIVE if name in cell.values), ("match",))


def _words(cell: Cell) -> str:
    return "{" + ", ".join(f"{name}: {value}" for name, value in cell.values.items()) + "}"
