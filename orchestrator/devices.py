"""Which GPUs have failed, and which of them get no trials any more; pure."""

from __future__ import annotations

from typing import Any

FAILURES = 2  # of a GPU, after which it is left out


class Devices:
    """Failures of GPUs by the trials that met them.

    A GPU that fails twice, with no trial finished on it in between, is left out while the largest trial still fits on
    the others. What fails on two GPUs is the trial: its failures then speak against neither.
    """

    def __init__(self) -> None:
        self._total = 0.0
        self._needed = 0.0
        self._met: dict[str, list[str]] = {}  # ids of the trials that failed on a device, in order
        self._held: dict[str, float] = {}
        self._guilty: set[str] = set()

    def needs(self, gpus: float) -> None:
        """A trial is about to run that asks for so many GPUs."""
        self._needed = max(self._needed, gpus)

    def failed(self, device: str, trial_id: str, held: float, total: float) -> None:
        """A trial that holds `held` of the cluster's `total` GPUs met an error after which `device` did not work."""
        self._total = total
        self._held[device] = max(held, 1.0)  # of a share the rest is of no more use either
        elsewhere = any(trial_id in trials for other, trials in self._met.items() if other != device)
        if elsewhere or trial_id in self._guilty:
            self._guilty.add(trial_id)
            self._met = {other: [one for one in trials if one != trial_id] for other, trials in self._met.items()}
        else:
            self._met.setdefault(device, []).append(trial_id)

    def works(self, device: str) -> None:
        """A trial has finished on `device`."""
        self._met.pop(device, None)

    def suspects(self) -> dict[str, bool]:
        """Devices that have failed since they last worked, and whether each is left out."""
        found, left = {}, self._total
        for device, trials in self._met.items():
            out = len(trials) >= FAILURES and left - self._held[device] >= self._needed
            left -= self._held[device] if out else 0.0
            if trials:
                found[device] = out
        return found


def names(context: Any, host: str) -> tuple[str, ...]:
    """The GPUs of a process by its Ray runtime context, in words that hold all over the cluster."""
    node = context.get_node_id()[:12]
    return tuple(f"GPU {gpu} of {host} (node {node})" for gpu in context.get_accelerator_ids().get("GPU", ()))
