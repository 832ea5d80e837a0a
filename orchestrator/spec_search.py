"""Checks search and scheduler of a sweep file: the space, its conditions, and what it suggests in every cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from orchestrator.cells import Cell
from orchestrator.draft import Draft, Path, is_execution_setting, nearest
from orchestrator.layout import SweepLayout
from orchestrator.search_space import Entry, Params, Space, among, in_order, is_whole, same
from orchestrator.spec_checks import Parts
from orchestrator.spec_combinations import not_measured
from orchestrator.sweep import MAX_SAMPLES, MAX_TRIALS, Range, Resources, Search, Sweep
from trainers.config import TrialConfig, is_setting, resolve
from trainers.explain import ConfigError, shown

MAX_RESOLVED = 1_000  # suggestions that are tried in cells, about 1 ms each; of more cells an even choice is taken
MAX_GRID = 100_000  # suggestions of a grid of which `samples` are taken: all are listed and put into a random order

_SPACE: Path = ("search", "space")


def check_search(
    draft: Draft, parts: Parts, sweep: Sweep, configs: list[TrialConfig], resources: Resources | Mapping[str, Resources]
) -> None:
    """A search chooses among allowed values of settings that are no axes, by a metric that is measured.

    `sweep` has the parts that need no other one; `configs` are those of all cells.
    """
    before = len(draft.problems)
    if sweep.scheduler is not None:
        _check_measured(draft, "scheduler.metric", ("scheduler", "metric"), sweep.scheduler.metric, configs)
    ranges = _checked_ranges(draft, parts)
    search = sweep.search
    if search is None:
        return
    for metric in search.metric:
        _check_measured(draft, "search.metric", ("search", "metric"), metric, configs)
    _check_counts(draft, search)
    _check_seeds(draft, search, sweep)
    _check_warm_start(draft, search, sweep.name)
    if len(ranges) == len(search.space):
        _check_conditions(draft, ranges)
    if len(draft.problems) == before and configs:
        space = Space(search.space)
        _check_size(draft, search, space, sweep, len(configs))
        _check_cells(draft, parts, space, resources)


def _check_measured(draft: Draft, part: str, place: Path, metric: str, configs: list[TrialConfig]) -> None:
    if (reason := not_measured(metric, configs)) is not None:
        draft.report(place, f"{part} has {metric}{reason}")


def _check_counts(draft: Draft, search: Search) -> None:
    """Samples and modes go with sampler and metrics."""
    if search.samples is None and search.name != "grid":
        draft.report(("search",), f"search.samples is missing; {search.name} wants a number of suggestions per cell")
    if len(search.mode) not in (1, len(search.metric)):
        modes, metrics = len(search.mode), len(search.metric)
        draft.report(("search", "mode"), f"search.mode has {modes} modes for {metrics} metrics; give one, or as many")


def _check_seeds(draft: Draft, search: Search, sweep: Sweep) -> None:
    """Seeds of suggestions are none that the cells are compared by."""
    if sweep.more_seeds is not None:
        draft.report(("search",), "search cannot be combined with seeds that are added by need; list the seeds")
    given = search.seeds or ()
    for index, seed in enumerate(given):
        place: Path = ("search", "seeds", index)
        if seed in sweep.seeds:
            draft.report(place, f"search.seeds has {seed}, which is one of seeds; replicates choose no settings")
        if seed in given[:index]:
            draft.report(place, f"search.seeds has {seed} twice")


def _check_warm_start(draft: Draft, search: Search, name: str) -> None:
    if search.warm_start and search.name != "tpe":
        draft.report(("search", "warm_start"), f"search.warm_start is for tpe; {search.name} learns from nothing")
    for index, other in enumerate(search.warm_start):
        if other == name:
            draft.report(("search", "warm_start", index), f"search.warm_start has {other}, which is this sweep")


def check_earlier(draft: Draft, search: Search, name: str, state: FilePath) -> None:
    """The sweeps that a search learns from have ledgers in `state`; one that has begun needs them no more."""
    if search.name != "tpe" or SweepLayout(state, state, name).ledger.is_file():
        return
    there = sorted(path.parent.name for path in state.glob(f"*/{SweepLayout(state, state, name).ledger.name}"))
    for index, other in enumerate(search.warm_start):
        if other not in there and other != name:
            hint = nearest(other, there) if there else "; there are no sweeps yet"
            place: Path = ("search", "warm_start", index)
            draft.report(place, f"search.warm_start names {other}, a sweep that {state} lacks{hint}")


def _checked_ranges(draft: Draft, parts: Parts) -> dict[str, Range]:
    """The entries of the space that are right by themselves."""
    raw = draft.raw.get("search")
    space = raw.get("space") if isinstance(raw, dict) else None
    grid = isinstance(raw, dict) and raw.get("name") == "grid"
    found: dict[str, Range] = {}
    for name, given in space.items() if isinstance(space, dict) else ():
        place: Path = (*_SPACE, name)
        before = len(draft.problems)
        try:
            bounds = Range.model_validate(given)
        except ValidationError:
            continue  # reported by the schema
        if name in parts.axis_paths:
            draft.report(place, f"{name} is an axis; a search is over settings that are not")
        elif name == "seed" or is_execution_setting(name):
            draft.report(place, f"{name} cannot be searched: it is no choice about the method")
        elif bounds.choices is not None:
            _check_choices(draft, name, bounds, place)
        else:
            _check_bounds(draft, name, bounds, place, grid)
        if len(draft.problems) == before:
            found[name] = bounds
    return found


def _check_choices(draft: Draft, name: str, bounds: Range, place: Path) -> None:
    choices = list(bounds.choices or ())
    if bounds.log or any(bound is not None for bound in (bounds.low, bounds.high, bounds.step)):
        draft.report(place, f"{name} has choices and a range; give one of them")
    for index, choice in enumerate(choices):
        here = (*place, "choices", index)
        if any(same(choice, other) for other in choices[:index]):
            draft.report(here, f"{name} has {shown(choice)} twice")
        draft.checked(name, choice, here)


def _check_bounds(draft: Draft, name: str, bounds: Range, place: Path, grid: bool) -> None:
    low, high = bounds.low, bounds.high
    if low is None or high is None:
        draft.report(place, f"{name} wants {{low, high}} or {{choices}}")
        return
    for key, value in (("low", low), ("high", high)):
        if not draft.checked(name, int(value) if float(value).is_integer() else value, (*place, key)):
            return
    if low >= high:
        draft.report(place, f"{name} has low {low} and high {high}; low must be below high")
    elif bounds.log and low <= 0:
        draft.report(place, f"{name} has low {low} with log: true; low must be above 0")
    elif bounds.step is not None:
        _check_step(draft, name, bounds, place)
    elif grid:
        draft.report(place, f"{name} wants {{low, high, step}} or {{choices}} in a grid")


def _check_step(draft: Draft, name: str, bounds: Range, place: Path) -> None:
    low, high, step = (Decimal(str(bound)) for bound in (bounds.low, bounds.high, bounds.step))
    here = (*place, "step")
    if bounds.log:
        draft.report(here, f"{name} has log and step; give one of them")
    elif step <= 0 or (high - low) % step != 0:
        draft.report(here, f"{name} has step {step}; allowed: a number that divides high - low, {high - low}")
    elif (high - low) / step >= MAX_SAMPLES:
        draft.report(here, f"{name} has {int((high - low) / step) + 1:,} steps; allowed: at most {MAX_SAMPLES:,}")
    elif step != int(step) or low != int(low):
        draft.checked(name, float(low + step) if low + step != int(low + step) else float(low + 2 * step), here)


def _check_conditions(draft: Draft, ranges: Mapping[str, Range]) -> None:
    """What an entry depends on is another entry with such a value, and none depends on itself in the end."""
    before = len(draft.problems)
    for name, bounds in ranges.items():
        for other, allowed in bounds.condition.items():
            place = (*_SPACE, name, "if", other)
            if other not in ranges:
                word = "no entry of the space" if is_setting(other) else f"none{nearest(other, list(ranges))}"
                draft.report(place, f"if of {name} names {other}, which is {word}; it may name entries of space only")
                continue
            entry = Entry(other, ranges[other], is_whole(other, ranges[other]))
            if entry.listed is None and not entry.whole:
                draft.report(place, f"if of {name} names {other}, which takes any number; give that choices or a step")
                continue
            for value in [] if entry.has(list(allowed)) else [value for value in allowed if not entry.has(value)]:
                draft.report(place, f"if of {name} names {other} {shown(value)}, which is never suggested")
    if len(draft.problems) == before:
        try:
            in_order(ranges)
        except ValueError as error:
            for name in error.args[1]:
                draft.report((*_SPACE, name, "if"), f"if of {name} depends on {name} itself in the end")


def _check_size(draft: Draft, search: Search, space: Space, sweep: Sweep, num_cells: int) -> None:
    samples = search.samples or MAX_SAMPLES
    if search.name == "grid":
        size = space.size(MAX_GRID)
        if size > MAX_GRID:
            message = f"search.space has more than {MAX_GRID:,} suggestions, which a grid lists; use random"
            draft.report(_SPACE, message)
            return
        if search.samples is None and size > MAX_SAMPLES:
            draft.report(_SPACE, f"search.space has more than {MAX_SAMPLES:,} suggestions; give search.samples")
            return
        samples = min(samples, size)
    trials = num_cells * (samples * len(search.seeds_beside(sweep.seeds)) + len(sweep.seeds))
    if trials > MAX_TRIALS:
        draft.report(("search",), f"search makes {trials:,} trials in all cells; allowed: at most {MAX_TRIALS:,}")


def _check_cells(draft: Draft, parts: Parts, space: Space, resources: Resources | Mapping[str, Resources]) -> None:
    """Each bound and choice by itself makes a possible configuration in every cell."""
    cells = list(parts.grid().cells())
    tried = [(*trial, entry.name) for entry in space.entries for trial in _extremes(space, entry)]
    stride = math.ceil(len(cells) * len(tried) / MAX_RESOLVED)
    for params, place, name in tried:
        found: dict[str, tuple[int, Cell]] = {}
        for cell in cells[::stride]:
            for message in _impossible(cell, params, resources):
                count, first = found.get(message, (0, cell))
                found[message] = (count + 1, first)
        for message, (count, first) in found.items():
            value = shown(params[name]).strip("'")
            where = "every cell" if count == len(cells[::stride]) else f"cell {shown(dict(first.values))}"
            draft.report(place, f"{name} {value} makes an impossible trial in {where}: {message}")


def _impossible(cell: Cell, params: Params, resources: Resources | Mapping[str, Resources]) -> list[str]:
    try:
        config = resolve({**cell.settings, **params})
    except ConfigError as error:
        return [fault.message for fault in error.faults]
    if isinstance(resources, Resources) or config.model.size in resources:
        return []
    return [f"resources has nothing for model.size {config.model.size}; it has {', '.join(resources)}"]


def _extremes(space: Space, entry: Entry) -> Iterator[tuple[Params, Path]]:
    """The ends of an entry's range or all its choices, with what must hold for it to be suggested, and the place."""
    place: Path = (*_SPACE, entry.name)
    bounds = entry.range
    values: list[tuple[Any, Path]] = [((bounds.low), (*place, "low")), (bounds.high, (*place, "high"))]
    if bounds.choices is not None:
        values = [(choice, (*place, "choices", index)) for index, choice in enumerate(bounds.choices)]
    for context in itertools.islice(_contexts(space, entry), 16):
        for value, here in values:
            number = entry.whole and isinstance(value, float)
            yield {**context, entry.name: int(value) if number else value}, here


def _contexts(space: Space, entry: Entry) -> Iterator[Params]:
    """The combinations of other entries' values under which an entry is suggested."""
    entries = {other.name: other for other in space.entries}
    options: list[list[Params]] = []
    for other, allowed in entry.range.condition.items():
        values = [list(allowed)] if entries[other].has(list(allowed)) else list(allowed)
        options.append([{**above, other: value} for value in values for above in _contexts(space, entries[other])])
    for parts in itertools.product(*options):
        merged: Params = {}
        if all(_merge(merged, part) for part in parts):
            yield merged


def _merge(into: Params, part: Params) -> bool:
    """Put `part` into a combination; False where the two contradict each other."""
    if any(name in into and not among(into[name], [value]) for name, value in part.items()):
        return False
    into.update(part)
    return True
