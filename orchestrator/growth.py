"""The seam of trials that follow from results of others: the suggestions of a search, more seeds where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orchestrator.ledger import Ledger
from orchestrator.plan import PlannedTrial


class Growth(Protocol):
    """Trials that a sweep gains while it runs. Everything it decides follows from the ledger alone, so that a sweep
    whose driver was killed gains the same trials as one that was left alone.
    """

    def more(self, ledger: Ledger) -> Sequence[PlannedTrial]:
        """The trials that should exist by now and that this object has not named before, in the order to run them.

        Called when a run of the sweep begins, and whenever a trial is over, by one thread, again until it names
        nothing new. What it names may be over already; it is then not run again.
        """
        ...
