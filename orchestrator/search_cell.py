"""The search in one cell: what it asks for next, when a suggestion is over, and which one becomes the cell's row."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import OVER, Role, TrialRow
from orchestrator.plan import PlannedTrial, canonical, cell_text
from orchestrator.room import Room
from orchestrator.scored import until_scored
from orchestrator.search_history import Event, History, Sample, asked, best, mean, pareto_front, restarted, told, warmed
from orchestrator.search_sampler import suggest
from orchestrator.search_space import Params, Space
from orchestrator.sweep import MAX_SAMPLES, Search, Sweep
from trainers.config import TrialConfig, identity, resolve, trial_id
from trainers.explain import ConfigError

Warm = Callable[[Mapping[str, Any]], list[tuple[Params, tuple[float, ...], str]]]  # see search_warm.WarmStart
Name = Callable[[TrialConfig, Mapping[str, Any]], str]


@dataclass(frozen=True)
class Question:
    """What the searches of all cells of a sweep have in common."""

    sweep: Sweep
    search: Search
    space: Space
    seeds: tuple[int, ...]  # of suggestions
    warm: Warm
    name: Name  # of a trial without the number of its suggestion

    @cached_property
    def limit(self) -> int:
        """Suggestions of a cell."""
        samples = self.search.samples or MAX_SAMPLES
        return min(samples, self.space.size(samples)) if self.search.name == "grid" else samples


class CellSearch:
    """One cell's study. All that it decides follows from the ledger's events of `study` and the states of its trials.

    `study` names what a suggestion's value depends on: another base configuration, space, metric or seed is another
    study, more samples or more at a time are the same.
    """

    def __init__(self, question: Question, cell: dict[str, Any], settings: Mapping[str, Any]) -> None:
        self.cell = cell
        self.study = _study_name(question, cell, settings)
        self._question = question
        self._settings = settings
        self._key = canonical(cell)
        self._history: History | None = None
        self._ids: dict[int, list[str]] = {}  # of the trials of each suggestion
        self._impossible: dict[int, str] = {}  # why a suggestion has no trials
        self._resumed = self._final_named = False

    @property
    def limit(self) -> int:
        """Suggestions that the cell gets."""
        return self._question.limit

    def restart(self, ledger: Ledger, everything: bool) -> list[str]:
        """Begin the study anew: always with `everything`, else where no suggestion finished and some trial failed.

        Returns:
            The ids of the trials that have to be reset so that the same suggestions are run again.
        """
        if everything:
            again = [row.trial_id for row in self._known_rows(ledger) if row.state in OVER]
        else:
            again = self.failed_in_vain(ledger)
        if not self._loaded(ledger).samples or not (everything or again):
            return []
        self._keep(ledger, restarted())
        self._ids.clear()
        return again

    def failed_in_vain(self, ledger: Ledger) -> list[str]:
        """The ids of failed trials of a study in which no suggestion finished; the next run tries them again."""
        if not self.is_told(ledger) or best(self._loaded(ledger).samples, self._question.search.modes) is not None:
            return []
        return [row.trial_id for row in self._known_rows(ledger) if row.state == "failed"]

    def named(self, ledger: Ledger) -> list[PlannedTrial]:
        """The trials of all suggestions so far."""
        return [trial for sample in self.samples(ledger) for trial in self._possible(sample)]

    def advance(self, ledger: Ledger) -> list[PlannedTrial]:
        """Tell the study what is over and ask it for more, until all that can run at once does; the trials to run.

        The first time, every suggestion of earlier runs comes first. Asking goes before telling, since that is the
        order of a run without interruption: told of one, asked for one in its place, and only then told of the next.
        """
        trials: list[PlannedTrial] = []
        if not self._resumed:
            trials += self.named(ledger)
            self._resumed = True
        self._warm_up(ledger)
        while True:
            trials += self._ask(ledger)
            if not self._tell_one(ledger):
                break
        chosen = None if self._final_named else self.chosen(ledger)
        if chosen is not None:
            trials += self.finals(chosen)
            self._final_named = True
        return trials

    def is_told(self, ledger: Ledger) -> bool:
        """Whether all suggestions have been made and are over."""
        samples = self.samples(ledger)
        return len(samples) >= self._question.limit and all(sample.state is not None for sample in samples)

    def samples(self, ledger: Ledger) -> list[Sample]:
        """The suggestions so far, those beyond a number of samples that has been lowered left out."""
        return self._loaded(ledger).samples[: self._question.limit]

    def chosen(self, ledger: Ledger) -> Sample | None:
        """The suggestion that becomes the cell's row; None before all are over, or where none finished."""
        return best(self.samples(ledger), self._question.search.modes) if self.is_told(ledger) else None

    def front(self, ledger: Ledger) -> list[Sample]:
        """The suggestions that none other beats in all metrics."""
        return pareto_front(self.samples(ledger), self._question.search.modes)

    def barren(self, ledger: Ledger) -> str | None:
        """Why the cell has no row, as a sentence; None where it has, or may still get one."""
        if not self.is_told(ledger) or self.chosen(ledger) is not None:
            return None
        reasons = Counter(sample.reason or str(sample.state) for sample in self.samples(ledger))
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        return f"{cell_text(self.cell)} has no row: none of {reasons.total()} suggestions finished ({listed})"

    def trials(self, sample: Sample) -> list[PlannedTrial]:
        """The trials of a suggestion, one for each seed that is set aside for searching.

        Raises:
            ConfigError: its settings are impossible together.
        """
        return self._seeded(sample, self._question.seeds, "search")

    def finals(self, chosen: Sample) -> list[PlannedTrial]:
        """The trials of the cell's row."""
        return self._seeded(chosen, self._question.sweep.seeds, "cell")

    def ids(self, sample: Sample) -> list[str]:
        """The ids of a suggestion's trials; none where its settings are impossible together."""
        if sample.number not in self._ids:
            self._possible(sample)
        return self._ids[sample.number]

    def _seeded(self, sample: Sample, seeds: Sequence[int], role: Role) -> list[PlannedTrial]:
        question = self._question
        resolved = resolve({**self._settings, **sample.params, "seed": seeds[0]})
        resources = question.sweep.resources_of(resolved.model.size)
        trials = []
        for seed in seeds:
            config = resolved.model_copy(update={"seed": seed})
            name = question.name(config, self.cell)
            label = f"{name} sample{sample.number}" if role == "search" else name
            trials.append(PlannedTrial(trial_id(config), label, self.cell, seed, config, resources, role))
        return trials

    def _possible(self, sample: Sample) -> list[PlannedTrial]:
        """The trials of a suggestion; none where its settings are impossible together."""
        try:
            trials = self.trials(sample)
        except ConfigError as error:
            trials = []
            self._impossible[sample.number] = f"impossible: {error.faults[0].message}"
        self._ids[sample.number] = [trial.trial_id for trial in trials]
        return trials

    def _ask(self, ledger: Ledger) -> list[PlannedTrial]:
        """Fill the free places; each suggestion is in the ledger before its trials are handed out."""
        question, history = self._question, self._loaded(ledger)
        trials: list[PlannedTrial] = []
        running = sum(sample.state is None for sample in history.samples)
        for _ in range(min(question.search.parallel - running, question.limit - len(history.samples))):
            params = suggest(question.search, question.space, self._key, history)
            assert params is not None, "a grid ends with its limit"
            self._keep(ledger, asked(len(history.samples), params))
            trials += self._possible(history.samples[-1])
        return trials

    def _tell_one(self, ledger: Ledger) -> bool:
        """Tell the study of the first suggestion all of whose trials are over; False where there is none."""
        for sample in self._loaded(ledger).samples:
            if sample.state is None:
                rows = self._rows(ledger, sample)
                over = [row for row in rows if row is not None and row.state in OVER]
                if not rows:
                    self._keep(ledger, told(sample.number, "fail", reason=self._impossible[sample.number]))
                elif len(over) == len(rows):
                    self._keep(ledger, _verdict(sample, over, self._question.search.metric, ledger))
                else:
                    continue
                return True
        return False

    def _known_rows(self, ledger: Ledger) -> list[TrialRow]:
        samples = self._loaded(ledger).samples
        return [row for sample in samples for row in self._rows(ledger, sample) if row is not None]

    def _rows(self, ledger: Ledger, sample: Sample) -> list[TrialRow | None]:
        return [_row(ledger, key) for key in self.ids(sample)]

    def _warm_up(self, ledger: Ledger) -> None:
        """Let a new study learn from earlier sweeps; what it learns is kept, so it does not depend on them any more."""
        history = self._loaded(ledger)
        if self._question.search.warm_start and history.warm is None and not history.samples:
            self._keep(ledger, warmed(self._question.warm(self.cell)))

    def _loaded(self, ledger: Ledger) -> History:
        if self._history is None:
            self._history = History.of(ledger.events(self.study))
        return self._history

    def _keep(self, ledger: Ledger, event: Event) -> None:
        event = json.loads(json.dumps(dict(event), allow_nan=False))  # as it will be read again
        Room(ledger.path.parent).wait_for(lambda: ledger.append_event(self.study, event))
        self._loaded(ledger).apply(event)


def _verdict(sample: Sample, rows: Sequence[TrialRow], metrics: Sequence[str], ledger: Ledger) -> Event:
    """What the study is told of a suggestion whose trials are over: the mean over seeds of what each is scored with."""
    states = Counter(row.state for row in rows)
    lasts = [last_values(ledger.metrics(row.trial_id), metrics) for row in rows]
    known = [last for last in lasts if last is not None]
    values = None if len(known) < len(rows) else tuple(mean([v[i] for v, _ in known]) for i in range(len(metrics)))
    step = min((step for _, step in known), default=None)
    bad = [state for state in ("failed", "diverged", "stopped") if states[state]]
    if bad:
        return told(sample.number, "fail", reason=bad[0])
    if states["pruned"]:
        return told(sample.number, "pruned", values, None if values is None else step, "pruned")
    if values is None:
        return told(sample.number, "fail", reason=f"no finite {' or '.join(metrics)}")
    return told(sample.number, "complete", values, step)


def last_values(
    points: Sequence[tuple[int, str, float]], metrics: Sequence[str]
) -> tuple[tuple[float, ...], int] | None:
    """The last value of each metric among (step, name, value) in the order of steps, and the last step of the first.

    Where a rule chooses the step that a trial is scored at, what came after that step does not count.

    None where a metric has no value, or its last one is not finite.
    """
    last = {name: (step, value) for step, name, value in until_scored(points) if name in metrics}
    if any(name not in last or not math.isfinite(last[name][1]) for name in metrics):
        return None
    return tuple(last[name][1] for name in metrics), last[metrics[0]][0]


def _row(ledger: Ledger, key: str) -> TrialRow | None:
    """A trial's row; None before the driver has taken the trial up."""
    try:
        return ledger.row(key)
    except KeyError:
        return None


def _study_name(question: Question, cell: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    search = question.search.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    asked_for = {key: value for key, value in search.items() if key not in ("samples", "parallel")}
    base = identity(resolve({**settings, "seed": 0}))
    whole = {"cell": cell, "base": base, "search": asked_for, "seeds": list(question.seeds)}
    return hashlib.sha256(canonical(whole).encode()).hexdigest()[:16]
