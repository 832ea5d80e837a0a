"""The trials of a search as they follow from one another: each cell's suggestions, then its best one run anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.ledger import Ledger
from orchestrator.plan import Plan, PlannedTrial
from orchestrator.search_cell import CellSearch, Question
from orchestrator.search_space import Space
from orchestrator.search_warm import WarmStart
from orchestrator.trial_names import trial_names
from trainers.config import TrialConfig, resolve


class SearchGrowth:
    """The seam `orchestrator.growth.Growth` for a sweep with a search: one study per cell, all at the same time.

    With one suggestion of a cell at a time nothing but the ledger decides what is suggested. With more of them
    (`parallel`) it also depends on the order in which they end.
    """

    def __init__(self, plan: Plan, state: Path) -> None:
        """Args:
        plan: of a sweep with a search.
        state: the folder in which the ledgers of sweeps to learn from (`warm_start`) are.
        """
        sweep = plan.sweep
        assert sweep.search is not None, "the sweep has no search"
        space = Space(sweep.search.space)
        question = Question(
            sweep=sweep,
            search=sweep.search,
            space=space,
            seeds=sweep.search.seeds_beside(sweep.seeds),
            warm=WarmStart(sweep.search, space, state),
            name=_Names(plan),
        )
        pairs = zip(plan.cells, plan.settings, strict=True)
        self.cells = tuple(CellSearch(question, cell, settings) for cell, settings in pairs)
        self._named: set[str] = set()

    def restart(self, ledger: Ledger, everything: bool) -> list[str]:
        """Call it before `more` in each run of a sweep: begins those studies anew in which no suggestion finished and
        some trial failed, and with `everything` (--rerun) all of them.

        Returns:
            The ids of the trials to reset, whatever role they have, so that they are run again.
        """
        return list(dict.fromkeys(key for cell in self.cells for key in cell.restart(ledger, everything)))

    def more(self, ledger: Ledger) -> list[PlannedTrial]:
        """The trials that should exist by now and that have not been named before, in the order to run them.

        Raises:
            ValueError: a sweep to learn from has no ledger; only at the beginning of a study.
        """
        new: dict[str, PlannedTrial] = {}
        for cell in self.cells:
            for trial in cell.advance(ledger):
                if trial.trial_id not in self._named:  # equal suggestions are one trial
                    new.setdefault(trial.trial_id, trial)
        self._named |= new.keys()
        return list(new.values())

    def is_over(self, ledger: Ledger) -> bool:
        """Whether no trial will follow any more, however those that still run will end."""
        return all(cell.is_told(ledger) for cell in self.cells)

    def barren(self, ledger: Ledger) -> list[str]:
        """A sentence for each cell that has no row since none of its suggestions finished."""
        return [reason for cell in self.cells if (reason := cell.barren(ledger)) is not None]


class _Names:
    """Names of a search's trials, spelled out as far as the cells of the plan need it to be told apart."""

    def __init__(self, plan: Plan) -> None:
        pairs = zip(plan.cells, plan.settings, strict=True)
        cells = [(cell, resolve({**settings, "seed": plan.sweep.seeds[0]})) for cell, settings in pairs]
        short = [trial_names([cell])[0] for cell in cells]
        self._others = [] if trial_names(cells) == short else cells

    def __call__(self, config: TrialConfig, cell: Mapping[str, Any]) -> str:
        """The name of a trial of `cell`."""
        others = [(values, other.model_copy(update={"seed": config.seed})) for values, other in self._others]
        return trial_names([(cell, config), *(pair for pair in others if pair[0] != cell)])[0]
