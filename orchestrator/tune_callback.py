"""What Ray Tune calls in the driver: which trial comes next, events inside results, and whether all is to end.

Tune pickles its callbacks, searchers and stoppers so as to restore an experiment, which is never done here, the ledger
being the truth: what these hold stays in the driver, and their copies hold nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from orchestrator.queue import Source
from orchestrator.retry import is_of_node

log = logging.getLogger(__name__)


class Draws(Searcher):
    """Gives Tune the jobs of a source one by one: its "suggestions" are the trials of the sweep."""

    def __init__(
        self, source: Source | None = None, mailbox: Any = None, should_stop: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(metric=None, mode=None)
        self._source, self._mailbox, self._should_stop = source, mailbox, should_stop

    def __reduce__(self) -> tuple[Any, ...]:
        return Draws, ()

    def suggest(self, trial_id: str) -> Any:
        """The next trial's id and request; None for none now, FINISHED for none any more."""
        if self._source is None or self._should_stop():
            return Searcher.FINISHED
        drawn = self._source.draw()
        if drawn is None:
            return Searcher.FINISHED if self._source.is_over() else None
        job, request = drawn
        self._mailbox.put.remote(job.trial_id, asdict(job))
        return {"trial": job.trial_id, "request": asdict(request)}

    def over(self, trial_id: str) -> None:
        """Tune has ended the trial."""
        if self._source is not None:
            self._mailbox.take_back.remote(trial_id)
            self._source.over(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: `Events` knows our own id of the trial."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the truth."""


def _nothing(*_: Any) -> None: ...


class Events(Callback):
    """Forwards (trial id, event) to a handler that never raises: an exception here would end the whole sweep."""

    def __init__(
        self,
        handle: Callable[[str, Mapping[str, Any]], None] = _nothing,
        over: Callable[[str], None] = _nothing,
        begun: Callable[[], None] = _nothing,
    ) -> None:
        """`begun` is called once Tune has set itself up, before its first trial."""
        self._handle, self._over, self._begun = handle, over, begun
        self._guards: set[str] = set()  # Tune's ids of trials that hold a device that is left out, and nothing else

    def __reduce__(self) -> tuple[Any, ...]:
        return Events, ()

    def setup(self, *_: Any, **__: Any) -> None:
        """Tune is about to begin."""
        self._begun()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Events of an attempt, whose outcome is the last."""
        for event in result.get("events", ()):
            if event["kind"] == "left_out":
                log.warning("%s has failed twice; this sweep leaves it out", event["device"])
                self._guards.add(trial.trial_id)
                self._over(result["trial"])
            else:
                self._handle(result["trial"], event)

    def has_guards(self) -> bool:
        """Whether places in the cluster are held only so that nothing runs on a device that is left out."""
        return bool(self._guards)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """The trial has said its last."""
        if trial.trial_id in self._guards:
            self._guards.discard(trial.trial_id)
        else:
            self._over(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """The thin trial's own process is gone, with its node perhaps."""
        if trial.trial_id in self._guards:
            self._guards.discard(trial.trial_id)
            return
        reason = _reason(trial)
        event = {"kind": "process_lost", "reason": reason[-4000:], "node": is_of_node(reason)}
        self._handle(trial.config["trial"], event)
        self._over(trial.config["trial"])


def _reason(trial: Any) -> str:
    """What Tune wrote down of a trial's error, which it brings to its storage only later."""
    written = trial.error_file
    if written is None or not Path(written).is_file():
        return "the trial's process ended"
    return Path(written).read_text(errors="replace")


class DriverStops(Stopper):
    """Ends the experiment when the driver wants to leave; single trials end by themselves."""

    def __init__(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._should_stop = should_stop

    def __reduce__(self) -> tuple[Any, ...]:
        return DriverStops, ()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether one trial should end: never."""
        return False

    def stop_all(self) -> bool:
        """Whether the experiment should end."""
        return self._should_stop()
