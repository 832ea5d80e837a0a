"""Finished suggestions of earlier sweeps, from which the study of an equal cell learns beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, LedgerError
from orchestrator.ledger_schema import TrialRow
from orchestrator.search_cell import last_values
from orchestrator.search_history import mean
from orchestrator.search_space import Params, Space, same
from orchestrator.sweep import Search
from trainers.config import flatten

Known = tuple[Params, tuple[float, ...], str]  # a suggestion, its value of each metric, and the sweep it is from


class WarmStart:
    """Reads the ledgers of the named sweeps once, when a study that has no history yet asks for the first time."""

    def __init__(self, search: Search, space: Space, state: Path) -> None:
        self._search = search
        self._space = space
        self._state = state
        self._found: list[tuple[str, TrialRow, tuple[float, ...]]] | None = None

    def __call__(self, cell: Mapping[str, Any]) -> list[Known]:
        """The suggestions that finished in an equal cell and that this space could have made, with the mean over
        seeds of the last value of each metric; in the order of the sweeps and of their plans.

        Raises:
            ValueError: a sweep has no ledger in this state folder, or none that can be read.
        """
        if self._found is None:
            self._found = [found for sweep in self._search.warm_start for found in self._finished(sweep)]
        seeds: dict[tuple[str, str], tuple[Params, list[tuple[float, ...]]]] = {}
        for sweep, row, values in self._found:
            params = self._space.restricted(flatten(row.config)) if _equal(row.cell, cell) else None
            if params is not None:
                seeds.setdefault((sweep, repr(params)), (params, []))[1].append(values)
        return [(params, _means(found), sweep) for (sweep, _), (params, found) in seeds.items()]

    def _finished(self, sweep: str) -> list[tuple[str, TrialRow, tuple[float, ...]]]:
        path = SweepLayout(self._state, self._state, sweep).ledger
        try:
            with Ledger.open(path, writer=False) as ledger:
                rows = [row for row in ledger.rows(in_plan_only=False) if row.role == "search"]
                lasts = [
                    (row, last_values(ledger.metrics(row.trial_id), self._search.metric))
                    for row in rows
                    if row.state == "finished"
                ]
        except LedgerError as error:
            raise ValueError(f"search.warm_start names {sweep}: {error}") from error
        return [(sweep, row, last[0]) for row, last in lasts if last is not None]


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())


def _means(values: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(mean(column) for column in zip(*values, strict=True))
