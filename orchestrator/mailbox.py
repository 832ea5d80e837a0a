"""Between the driver and its thin trials: jobs go out, reasons to leave follow; an actor that ends with its driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.control import Control
from orchestrator.devices import Devices


class Mailbox:
    """Jobs of trials in flight, as plain values, and what their trials are told; thin trials ask it.

    Files would not do: the trials of a cluster may share no folder with the driver.
    """

    def __init__(self) -> None:
        self._control = Control()
        self._jobs: dict[str, Mapping[str, Any]] = {}
        self._devices = Devices()

    def put(self, trial_id: str, job: Mapping[str, Any]) -> None:
        """The trial is about to begin, or to begin again."""
        self._jobs[trial_id] = job
        self._devices.needs(job["gpus"] * job["ranks"])

    def job(self, trial_id: str) -> tuple[Mapping[str, Any], str | None, dict[str, bool]]:
        """The job that was put for the trial, why it should not even begin, if so, and `Devices.suspects`."""
        return self._jobs[trial_id], self._control.look(trial_id), self._devices.suspects()

    def device_failed(self, device: str, trial_id: str, held: float, total: float) -> dict[str, bool]:
        """As `Devices.failed`; then `Devices.suspects`."""
        self._devices.failed(device, trial_id, held, total)
        return self._devices.suspects()

    def device_works(self, device: str) -> None:
        """As `Devices.works`."""
        self._devices.works(device)

    def is_left_out(self, device: str) -> bool:
        """Whether the device gets no trials for now."""
        return self._devices.suspects().get(device, False)

    def ask(self, trial_id: str | None, reason: str) -> None:
        """As `Control.ask`."""
        self._control.ask(trial_id, reason)

    def look(self, trial_id: str) -> str | None:
        """As `Control.look`."""
        return self._control.look(trial_id)

    def take_back(self, trial_id: str) -> None:
        """The trial does not run; what it was told holds for the next time that it does."""
        self._jobs.pop(trial_id, None)
