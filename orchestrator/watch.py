"""What a running sweep hears from outside, looked up twice a second: signals, stop requests, other limits."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from types import TracebackType

from orchestrator.control import INTERRUPTED, STOPPED, Control
from orchestrator.layout import SweepLayout
from orchestrator.queue import Queue

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5


class Watch:
    """A thread that tells trials to leave and the queue how many may run, while the block runs."""

    def __init__(
        self,
        layout: SweepLayout,
        queue: Queue,
        control: Control,
        leaving: Callable[[], bool],
        spent: Callable[[], str | None],
        say: Callable[[str], None],
    ) -> None:
        """`spent` says why the budget is used up, or None."""
        self._layout, self._queue, self._control = layout, queue, control
        self._leaving, self._spent, self._say = leaving, spent, say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._layout.settings.unlink(missing_ok=True)  # of an earlier run, which this command's options replace
        self._try_to_look()  # before the first trial begins
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._ended.wait(_LOOK_SECONDS):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self._look()
        except Exception:
            log.exception("what the sweep was told could not be looked up")

    def _look(self) -> None:
        if self._leaving():
            self._control.ask(None, INTERRUPTED)
        for trial_id in self._queue.flying:
            if self._layout.trial(trial_id).stop_request.exists():
                self._control.ask(trial_id, STOPPED)
        reason = self._spent()
        if reason is not None and self._queue.closed is None:
            self._queue.closed = reason
            self._say(reason)
            self._control.ask(None, INTERRUPTED)
        self._read_settings()  # last: what cannot be read there hides nothing else

    def _read_settings(self) -> None:
        """The number of trials at a time that `orchestrate set` asked for, if it did."""
        if not self._layout.settings.is_file():
            return
        limit = json.loads(self._layout.settings.read_text())["max_concurrent"]
        if limit != self._queue.limit:
            self._say(f"from now on {limit} trials at a time")
            self._queue.limit = limit
