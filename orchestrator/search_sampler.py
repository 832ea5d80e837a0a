"""What a search suggests next: a pure function of what it has suggested and been told, by Optuna's samplers."""

from __future__ import annotations

import functools
import hashlib
import random
import warnings
from typing import TYPE_CHECKING, Any

from orchestrator.search_history import History, Sample
from orchestrator.search_space import Entry, Params, Space, same
from orchestrator.sweep import Search

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial


def suggest(search: Search, space: Space, cell: str, history: History) -> Params | None:
    """The next suggestion of the study of `cell`, a text that only equal cells share; None after the end of a grid.

    Every suggestion has a random stream of its own, from the seed of the search, the cell and the suggestion's number.
    So nothing but the arguments decides it, and a study whose process was killed goes on with the same suggestions.
    """
    number = len(history.samples)
    if search.name == "grid":
        return _of_grid(search, space, number)
    digest = hashlib.sha256(f"{search.seed}|{cell}|{number}".encode()).digest()
    study = _study(search, space, history, _sampler(search, space, int.from_bytes(digest[:4])))
    trial = study.ask()
    params: Params = {}
    for entry in space.entries:
        if entry.holds(params):
            params[entry.name] = _drawn(trial, entry)
    return space.in_file_order(params)


def _of_grid(search: Search, space: Space, number: int) -> Params | None:
    """The grid in a random order, so that any first part of it covers the space; the same one in every cell."""
    if number >= len(space.grid):
        return None
    return space.grid[_order(len(space.grid), search.seed)[number]]


@functools.lru_cache(maxsize=1)
def _order(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _sampler(search: Search, space: Space, seed: int) -> BaseSampler:
    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import RandomSampler, TPESampler

    if search.name == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # `group`, which conditional spaces need
        return TPESampler(
            n_startup_trials=search.startup,
            seed=seed,
            multivariate=len(search.metric) == 1 or space.conditional,  # as Optuna decides by itself without `group`
            group=space.conditional,
            constant_liar=search.parallel > 1,  # those that run count as bad, so that the next ones lie elsewhere
        )


def _study(search: Search, space: Space, history: History, sampler: BaseSampler) -> Study:
    """An Optuna study in memory with all that its sampler learns from, in the order in which it was asked."""
    import optuna
    from optuna.study import StudyDirection

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would tell of every study that is made
    try:
        names = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
        directions = [names[mode] for mode in search.modes]
        study = optuna.create_study(directions=directions, sampler=sampler)
        single = len(search.metric) == 1
        known = () if search.name == "random" else (*(history.warm or ()), *history.samples)
        study.add_trials([_frozen(sample, space, single) for sample in known])
    finally:
        optuna.logging.set_verbosity(before)
    return study


def _frozen(sample: Sample, space: Space, single: bool) -> FrozenTrial:
    """A suggestion as Optuna keeps it; how far a pruned one came is known to it only where there is one metric."""
    from optuna.trial import TrialState, create_trial

    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "fail": TrialState.FAIL}
    entries = [entry for entry in space.entries if entry.name in sample.params]
    reached: dict[int, float] = {}
    if sample.state == "pruned" and single and sample.values is not None and sample.step is not None:
        reached = {sample.step: sample.values[0]}
    return create_trial(
        state=TrialState.RUNNING if sample.state is None else states[sample.state],
        values=list(sample.values or ()) if sample.state == "complete" else None,
        params={entry.name: _internal(entry, sample.params[entry.name]) for entry in entries},
        distributions={entry.name: _distribution(entry) for entry in entries},
        intermediate_values=reached,
    )


def _distribution(entry: Entry) -> BaseDistribution:
    """What Optuna draws from: choices and steps by their position, which may be lists or need exact decimals."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    bounds = entry.range
    if bounds.choices is not None:
        return CategoricalDistribution(tuple(range(len(bounds.choices))))
    if entry.listed is not None:
        return IntDistribution(0, len(entry.listed) - 1)
    assert bounds.low is not None and bounds.high is not None, "read_sweep checks that"
    if entry.whole:
        return IntDistribution(int(bounds.low), int(bounds.high), log=bounds.log)
    return FloatDistribution(float(bounds.low), float(bounds.high), log=bounds.log)


def _internal(entry: Entry, value: Any) -> Any:
    if entry.listed is not None:
        return next(index for index, item in enumerate(entry.listed) if same(item, value))
    return value if entry.whole else float(value)


def _drawn(trial: Trial, entry: Entry) -> Any:
    bounds, listed = entry.range, entry.listed
    if bounds.choices is not None:
        return bounds.choices[trial.suggest_categorical(entry.name, tuple(range(len(bounds.choices))))]
    if listed is not None:
        return listed[trial.suggest_int(entry.name, 0, len(listed) - 1)]
    assert bounds.low is not None and bounds.high is not None, "read_sweep checks that"
    if entry.whole:
        return trial.suggest_int(entry.name, int(bounds.low), int(bounds.high), log=bounds.log)
    return trial.suggest_float(entry.name, float(bounds.low), float(bounds.high), log=bounds.log)
