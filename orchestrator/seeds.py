"""More seeds where they matter: how many a cell needs by its first block's variance, and the trials that this adds."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cells import baseline_of
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.ledger_schema import OVER, State
from orchestrator.plan import Plan, PlannedTrial, canonical, interval_half_width
from orchestrator.scored import until_scored
from trainers.config import TrialConfig, trial_id

log = logging.getLogger(__name__)

Values = Mapping[str, Any]  # of the axes, as JSON has them


def sample_size(differences: Sequence[float], halfwidth: float) -> int:
    """How many paired differences make the 95 % interval of their mean `halfwidth` wide to either side, at least.

    Stein's two stages (C. Stein, "A two-sample test for a linear hypothesis whose power is independent of the
    variance", Annals of Mathematical Statistics 16, 1945): N = max(n, ⌈(t(0.975, n - 1) · s / halfwidth)²⌉ with the
    standard deviation s of the first n differences. The interval around the mean of all N keeps that s and that
    quantile, mean ± t(0.975, n - 1) · s / √N, and then covers with 95 % whatever the true variance is, since N depends
    on the differences through s alone, which says nothing of their mean.

    Args:
        differences: of the first block, two or more finite ones.
        halfwidth: above 0.

    Raises:
        ValueError: fewer than two differences.
    """
    n = len(differences)
    width = interval_half_width(n)  # t / √n
    if width is None:
        raise ValueError(f"a variance needs two differences; given: {n}")
    mean = sum(differences) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / (n - 1))
    return max(n, math.ceil((width * math.sqrt(n) * deviation / halfwidth) ** 2))


@dataclass
class _Cell:
    """One cell of the ledger: its values, its trials of the first block, how many seeds it gets (None: undecided)."""

    values: Values
    block: dict[int, TrialRow] = field(default_factory=dict)  # by seed
    seeds: int | None = None
    further: dict[int, PlannedTrial] = field(default_factory=dict)  # by seed, made once


class SeedGrowth:
    """The `Growth` of `seeds: {first, most, until}`: whole pairs of a cell and its baseline cell with further seeds.

    A cell is decided once the first block of it and of its baseline is over, by the metric's last value up to the
    step that a trial is scored at, of each pair that has one. Fewer than two such pairs show no variance: then nothing
    is added, and the next run of the sweep, in which failed trials run again, decides. Decisions are kept in the ledger
    in their order, so that a budget of trials cuts the same pairs off however often the driver was killed, and a larger
    one adds them.
    """

    def __init__(self, plan: Plan) -> None:
        """`plan`: of a sweep with `more_seeds`.

        Raises:
            ValueError: the sweep has none.
        """
        if plan.sweep.more_seeds is None:
            raise ValueError(f"sweep {plan.sweep.name} lists its seeds and gets no more")
        self._sweep, self._more = plan.sweep, plan.sweep.more_seeds
        self._study = f"seeds {json.dumps(self._more.model_dump(mode='json'), sort_keys=True)}"
        self._baseline: Values | None = plan.sweep.model_dump(mode="json")["baseline"]
        self._configs = {trial.trial_id: trial.config for trial in plan.trials}
        self._cells: dict[str, _Cell] = {}
        self._pairs: dict[str, str | None] = {}  # of each cell the key of its baseline, as long as no cell is new
        self._order: list[str] = []  # keys of cells as they were decided, not all of which need be in the plan
        self._kept: dict[str, int] | None = None  # decisions of earlier runs
        self._left_out = 0
        self._known: set[str] = set()  # trials of the ledger, and those that were named here

    def more(self, ledger: Ledger) -> list[PlannedTrial]:
        """As `Growth.more`."""
        states = ledger.states("cell")
        self._learn(ledger, states)
        for key, cell, baseline in self._undecided():
            block = [*cell.block.values(), *baseline.block.values()]
            if len(block) == 2 * self._more.first and all(states.get(row.trial_id) in OVER for row in block):
                self._decide(ledger, key, cell, baseline)
        return self._new_pairs(ledger, states)

    def left_out(self) -> str | None:
        """What the budget of trials left undone, as a sentence; None where nothing."""
        if not self._left_out:
            return None
        return f"{self._left_out} trials of more seeds do not fit into the budget; a larger budget.trials runs them"

    def _learn(self, ledger: Ledger, states: Mapping[str, State]) -> None:
        """Note trials of first blocks that are new to this object, and what earlier runs decided."""
        if self._kept is None:
            self._kept = {event["cell"]: event["seeds"] for event in ledger.events(self._study)}
            self._order = list(self._kept)
        for trial in [name for name in states if name not in self._known]:
            self._known.add(trial)
            row = ledger.row(trial)
            if row.seed in self._more.block:
                key = canonical(row.cell)
                if key not in self._cells:
                    self._cells[key] = _Cell(row.cell, seeds=self._kept.get(key))
                    self._pairs.clear()
                self._cells[key].block[row.seed] = row

    def _undecided(self) -> list[tuple[str, _Cell, _Cell]]:
        """Cells that are compared with a baseline and wait for first blocks: key, cell, baseline cell."""
        pairs = ((key, cell, self._baseline_of(cell)) for key, cell in self._cells.items() if cell.seeds is None)
        return [(key, cell, baseline) for key, cell, baseline in pairs if baseline is not None]

    def _baseline_of(self, cell: _Cell) -> _Cell | None:
        """The cell that `cell` is compared with; None for baselines themselves and where there is none."""
        if self._baseline is None:
            return None
        key = canonical(cell.values)
        if key not in self._pairs:
            found = baseline_of(cell.values, [other.values for other in self._cells.values()], self._baseline)
            self._pairs[key] = None if found is None or found == cell.values else canonical(found)
        paired = self._pairs[key]
        return None if paired is None else self._cells[paired]

    def _decide(self, ledger: Ledger, key: str, cell: _Cell, baseline: _Cell) -> None:
        metric, first = self._more.until.metric, self._more.first
        values = [
            tuple(_last(ledger, one.block[seed], metric) for one in (cell, baseline)) for seed in self._more.block
        ]
        differences = [a - b for a, b in values if a is not None and b is not None]
        if len(differences) < 2:
            cell.seeds = first
            log.warning("%s has %s in fewer than two pairs of its first seeds; it gets no more", key, metric)
            return
        lacking = sample_size(differences, self._more.until.halfwidth) - len(differences)
        cell.seeds = min(self._more.most, first + lacking)
        ledger.append_event(self._study, {"cell": key, "seeds": cell.seeds})
        self._order.append(key)

    def _new_pairs(self, ledger: Ledger, states: Mapping[str, State]) -> list[PlannedTrial]:
        """Whole pairs of what was decided, in that order, as long as the budget has room for them."""
        limit = None if self._sweep.budget is None else self._sweep.budget.trials
        room, counted = math.inf if limit is None else float(limit), ledger.begun()
        if limit is not None:
            counted |= {name for name, state in {**states, **ledger.states("search")}.items() if state not in OVER}
        trials: list[PlannedTrial] = []
        left_out: set[str] = set()
        for cell in (self._cells[key] for key in self._order if key in self._cells):
            baseline = self._baseline_of(cell)
            for seed in range(self._more.first, cell.seeds or 0):
                pair = [self._trial(one, seed) for one in (baseline, cell) if one is not None]
                new = [trial for trial in pair if trial.trial_id not in self._known]
                counted |= {trial.trial_id for trial in new}
                if len(counted) > room:
                    left_out |= {trial.trial_id for trial in new}
                    continue
                self._known.update(trial.trial_id for trial in new)
                trials += new
        self._left_out = len(left_out)
        return trials

    def _trial(self, cell: _Cell, seed: int) -> PlannedTrial:
        """The cell with another seed, named as its first trial is."""
        if seed in cell.further:
            return cell.further[seed]
        row = next(iter(cell.block.values()))
        like = self._configs.get(row.trial_id) or TrialConfig.model_validate(row.config)
        config = like.model_copy(update={"seed": seed})
        key = trial_id(config)
        begin, _, distinct = row.name.rpartition(f"seed{row.seed}")
        name = f"{begin}seed{seed} {key[:8]}" if distinct else f"{begin}seed{seed}"
        resources = self._sweep.resources_of(config.model.size)
        cell.further[seed] = PlannedTrial(key, name, dict(row.cell), seed, config, resources)
        return cell.further[seed]


def _last(ledger: Ledger, row: TrialRow, metric: str) -> float | None:
    """The value of the metric that a finished trial is scored with; None where there is none or it is not finite."""
    if ledger.row(row.trial_id).state != "finished":
        return None
    points = until_scored(ledger.metrics(row.trial_id))
    last = next((value for _, name, value in reversed(points) if name == metric), None)
    return last if last is not None and math.isfinite(last) else None
