"""What a run of a sweep is told by the command line, and by signals while it lasts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from orchestrator.attempt import TRAIN

LAST_SECONDS = 28.0  # after a signal, when this process ends whatever it waits for; the ledger is always resumable


@dataclass(frozen=True)
class Options:
    """What the command line says about a run of a sweep."""

    file: Path
    storage: Path
    state: Path
    remote: str | None = None  # URI of the storage, of which `storage` then is this machine's copy
    tracking_uri: str | None = None
    overrides: Sequence[str] = ()
    name: str | None = None
    address: str | None = None
    max_concurrent: int | None = None
    in_process: bool = False
    smoke: bool = False
    rerun: bool = False
    accept_data_change: bool = False
    quiet: bool = False
    system_metrics: bool = False
    train: str = TRAIN


@dataclass
class Stop:
    """Whether the driver should leave."""

    signal: int | None = None
    since: float = field(default=0.0)

    def __call__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Leave what has no checkpoints to write.

        Raises:
            Interrupted: a signal came.
        """
        if self.signal is not None:
            raise Interrupted(self.signal)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """First signal: trials checkpoint and leave. Second: this process ends at once."""
        if self.signal is not None:
            os.write(2, b"ended at once; the same command goes on from the checkpoints\n")
            os._exit(128 + number)
        self.signal, self.since = number, time.monotonic()
        last = threading.Timer(LAST_SECONDS, os._exit, (128 + number,))  # Ray may be gone too, and calls to it hang
        last.daemon = True
        last.start()


class Interrupted(Exception):
    """A signal came at a moment when no trial was running."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


@contextmanager
def signals(stop: Stop) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 (the warning of Slurm and spot machines) ask trials to leave, while the block runs.

    It must run in the main thread, as Python has it.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop.receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
