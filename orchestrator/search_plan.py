"""The content of plan.json once a sweep has run: the rows that the ledger has, and what its searches have found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import TrialRow
from orchestrator.plan import Plan, PlannedTrial
from orchestrator.search import SearchGrowth
from orchestrator.search_cell import CellSearch
from orchestrator.search_history import Sample

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
    cells = [_entry(row) for row in rows if row.role == "cell" and row.in_plan]
    if plan.sweep.search is None:
        return {**content, "trials": cells}
    searches = SearchGrowth(plan, Path()).cells
    trials: list[dict[str, Any]] = []
    for search in searches:
        found = [trial for trial in cells if _canonical(trial["cell"]) == _canonical(search.cell)]
        trials += found or [_pending(trial) for trial in search.finals(_BASE)]
    suggestions = [entry for search in searches for entry in _suggestions(search, plan, ledger)]
    return {**content, "trials": trials, "search": suggestions}


def expected(plan: Plan) -> list[PlannedTrial]:
    """As many trials as the searches of `plan` will run, those of the chosen settings included, all with the cell's
    base settings: what an estimate of the cost is made of. Without a search, the plan's own trials.
    """
    if plan.sweep.search is None:
        return list(plan.trials)
    cells = SearchGrowth(plan, Path()).cells
    return [trial for cell in cells for trial in [*cell.trials(_BASE) * cell.limit, *cell.finals(_BASE)]]


def _entry(row: TrialRow) -> dict[str, Any]:
    return {"trial_id": row.trial_id, "name": row.name, "cell": row.cell, "seed": row.seed}


def _pending(trial: PlannedTrial) -> dict[str, Any]:
    key = hashlib.sha256(_canonical(trial.cell).encode()).hexdigest()[:12]
    return {
        "trial_id": f"{PENDING}{key}-{trial.seed}",
        "name": trial.name,
        "cell": _plain(trial.cell),
        "seed": trial.seed,
    }


def _suggestions(search: CellSearch, plan: Plan, ledger: Ledger) -> list[dict[str, Any]]:
    """Every suggestion of a cell: `state` is open, complete, pruned or fail; `values` are null where it has none."""
    assert plan.sweep.search is not None, "the sweep has no search"
    chosen, front = search.chosen(ledger), search.front(ledger)
    return [
        {
            "cell": _plain(search.cell),
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


def _plain(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in cell.items()}


def _canonical(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)
