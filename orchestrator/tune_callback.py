"""What Ray Tune calls in the driver: events inside results are handed on, and the experiment ends when told to.

Tune pickles its callbacks and stoppers so as to restore an experiment, which is never done here, the ledger being the
truth: what these hold stays in the driver, and their copies hold nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Callback, Stopper


class Events(Callback):
    """Forwards (trial id, event) to a handler that never raises: an exception here would end the whole sweep."""

    def __init__(self, handle: Callable[[str, Mapping[str, Any]], None] = lambda _trial_id, _event: None) -> None:
        self._handle = handle

    def __reduce__(self) -> tuple[Any, ...]:
        return Events, ()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Events of an attempt, whose outcome is the last."""
        for event in result.get("events", ()):
            self._handle(result["trial"], event)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """The thin trial's own process died; Tune begins it again."""
        self._handle(trial.config["trial"], {"kind": "process_lost", "reason": "the trial's process ended"})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """The thin trial's own process died too often."""
        reason = str(trial.get_error() or "the trial's process ended")
        self._handle(trial.config["trial"], {"kind": "process_gone", "reason": reason})


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
