"""What becomes of a plan while it runs: trials that searches have named and will name, and the content of plan.json."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.import_results import is_imported
from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import TrialRow
from orchestrator.match import training_flops
from orchestrator.plan import Plan, PlannedTrial, canonical, plain_cell
from orchestrator.search import SearchGrowth
from orchestrator.search_cell import CellSearch
from orchestrator.search_history import Sample
from trainers.config import TrialConfig

PENDING = "pending-"  # begins the id of a trial that a search has not chosen yet
_BASE = Sample(0, {})  # the settings of a cell without a suggestion


def plan_json(
    plan: Plan, rows: Sequence[TrialRow], ledger: Ledger, cost: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of plan.json: the trials of the current plan that are rows of the table, in the order of the cells,
    those that were added while the sweep ran included.

    With a search, a cell without chosen settings has a `pending-…` trial for each seed, so that tables show it as
    missing, and `search` has every suggestion of every cell with its values and trials.
    """
    content = plan.to_json(cost)
    flops = _training_flops(content["trials"])
    cells = [_entry(row, flops) for row in rows if row.role == "cell" and row.in_plan]
    if plan.sweep.search is None:
        return {**content, "trials": cells}
    searches = SearchGrowth(plan, Path()).cells
    by_cell: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for trial in cells:
        by_cell[canonical(trial["cell"])].append(trial)
    trials: list[dict[str, Any]] = []
    for search in searches:
        trials += by_cell[canonical(search.cell)] or [_pending(trial) for trial in search.finals(_BASE)]
    suggestions = [entry for search in searches for entry in _suggestions(search, plan, ledger)]
    return {**content, "trials": trials, "search": suggestions}


@dataclass(frozen=True)
class Progress:
    """How far the trials of a plan are known: those that are named, and one with its cell's base settings in the place
    of each that a search will still name. `again` are ids of suggestions that failed and will be run again.
    """

    named: list[PlannedTrial]
    to_come: list[PlannedTrial]
    again: set[str]


def progress(plan: Plan, ledger: Ledger | None) -> Progress:
    """What the searches of `plan` have named by the ledger (None: nothing) and will; without a search, its trials."""
    if plan.sweep.search is None:
        return Progress(list(plan.trials), [], set())
    named: dict[str, PlannedTrial] = {}  # equal suggestions are one trial
    to_come: list[PlannedTrial] = []
    again: set[str] = set()
    for cell in SearchGrowth(plan, Path()).cells:
        if ledger is None:
            to_come += [*cell.trials(_BASE) * cell.limit, *cell.finals(_BASE)]
            continue
        to_come += cell.trials(_BASE) * (cell.limit - len(cell.samples(ledger)))
        named |= {trial.trial_id: trial for trial in cell.named(ledger)}
        in_vain = cell.failed_in_vain(ledger)
        again |= set(in_vain)
        if (chosen := cell.chosen(ledger)) is not None:
            named |= {trial.trial_id: trial for trial in cell.finals(chosen)}
        elif in_vain or not cell.is_told(ledger):
            to_come += cell.finals(_BASE)
    return Progress(list(named.values()), to_come, again)


def expected(plan: Plan) -> list[PlannedTrial]:
    """As many trials as the searches of `plan` run altogether, those of the chosen settings included, all with the
    cell's base settings: what an estimate of the cost is made of. Without a search, the plan's own trials.
    """
    whole = progress(plan, None)
    return whole.named + whole.to_come


def _training_flops(planned: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of every planned cell, by its canonical text: seeds do not change what training costs."""
    return {canonical(trial["cell"]): trial["training_flops"] for trial in planned}


def _entry(row: TrialRow, known: Mapping[str, float | None]) -> dict[str, Any]:
    """A trial of plan.json; what a search chose is priced by its own configuration, an import is not."""
    flops = None
    if not is_imported(row):
        key = canonical(row.cell)
        flops = known[key] if key in known else training_flops(TrialConfig.model_validate(row.config))
    entry = {"trial_id": row.trial_id, "name": row.name, "cell": row.cell, "seed": row.seed}
    return {**entry, "training_flops": flops}


def _pending(trial: PlannedTrial) -> dict[str, Any]:
    key = hashlib.sha256(canonical(trial.cell).encode()).hexdigest()[:12]
    return {
        "trial_id": f"{PENDING}{key}-{trial.seed}",
        "name": trial.name,
        "cell": plain_cell(trial.cell),
        "seed": trial.seed,
    }


def _suggestions(search: CellSearch, plan: Plan, ledger: Ledger) -> list[dict[str, Any]]:
    """Every suggestion of a cell: `state` is open, complete, pruned or fail; `values` are null where it has none."""
    assert plan.sweep.search is not None, "the sweep has no search"
    chosen, front = search.chosen(ledger), search.front(ledger)
    return [
        {
            "cell": plain_cell(search.cell),
            "number": sample.number,
            "params": sample.params,
            "state": sample.state or "open",
            "reason": sample.reason,
            "values": _values(sample, plan.sweep.search.metric),
            "chosen": sample == chosen,
            "pareto_front": sample in front,
            "trials": search.ids(sample),
        }
        for sample in search.samples(ledger)
    ]


def _values(sample: Sample, metrics: Sequence[str]) -> dict[str, float] | None:
    return None if sample.values is None else dict(zip(metrics, sample.values, strict=True))
