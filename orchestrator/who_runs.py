"""Who runs a sweep, as its lock file says; looked up without taking the hold."""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """Who wrote a lock file; `alive` says whether that process still has the hold."""

    pid: int
    host: str
    started: str
    alive: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


def holder_of(lock: Path) -> Holder | None:
    """Who has the hold, or left its name when it was killed; None where the last one gave it back in order.

    Nothing is written, and a hold that is free is touched only where a killed process left its name.
    """
    try:
        with lock.open(encoding="utf-8") as file:
            said = json.loads(file.read() or "null")
            if not isinstance(said, dict) or not {"pid", "host", "started"} <= said.keys():
                return None
            return Holder(int(said["pid"]), str(said["host"]), str(said["started"]), _is_taken(file.fileno()))
    except (FileNotFoundError, ValueError):
        return None


def _is_taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False
