"""What running trials are told from outside: which of them should leave, and as what."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Ask = Callable[[], str | None]  # `stopped`, `pruned` or `interrupted`, once the trial should leave

INTERRUPTED = "interrupted"  # leave resumable
STOPPED = "stopped"  # end, since a user said so
PRUNED = "pruned"  # end, since others of its cell do better


class Control:
    """Reasons to leave by trial, and one for all; what is said once stays said. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: dict[str | None, str] = {}
        self._everyone: str | None = None
        self._listeners: list[Callable[[str | None, str], None]] = []

    def ask(self, trial_id: str | None, reason: str) -> None:
        """Tell one trial, or all (None), to leave as `reason`; the first reason that a trial was given holds."""
        with self._lock:
            if trial_id in self._reasons or (trial_id is None and self._everyone is not None):
                return
            if trial_id is None:
                self._everyone = reason
            else:
                self._reasons[trial_id] = reason
            listeners = list(self._listeners)
        for listener in listeners:
            listener(trial_id, reason)

    def look(self, trial_id: str) -> str | None:
        """Why the trial should leave, or None; its own reason goes before that of everyone."""
        with self._lock:
            return self._reasons.get(trial_id) or self._everyone

    @contextmanager
    def heard_by(self, listener: Callable[[str | None, str], None]) -> Iterator[None]:
        """While the block runs `listener` is called with (trial id or None, reason), also for what was said before."""
        with self._lock:
            self._listeners.append(listener)
            said = [*self._reasons.items(), *([(None, self._everyone)] if self._everyone else [])]
        for trial_id, reason in said:
            listener(trial_id, reason)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(listener)
