"""The hold on a sweep: a file lock that one process has, that names who it is, and that ends with the process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PATIENCE_S = 1.0  # a loser waits at most this long for the winner to write who it is
_RETRY_S = 0.02


class SweepHeld(ValueError):
    """Another live process runs this sweep; `holder` has its pid, host and start where they could be read."""

    def __init__(self, path: Path, holder: Mapping[str, Any]) -> None:
        self.holder = dict(holder)
        who = (
            f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
            if holder
            else "a process that has not said who it is"
        )
        super().__init__(f"{path.parent.name} is being run by {who}; wait for it or end it, then start again")


class Hold:
    """An exclusive flock on a file. The kernel drops it when the process ends, however it ends.

    A child made by a bare `fork` shares the hold; programs started with `subprocess` do not.
    """

    def __init__(self, path: Path) -> None:
        """Take the hold at once.

        Raises:
            SweepHeld: another process, or another Hold in this one, has it; raised within about a second.
        """
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SweepHeld(path, _read_holder(path)) from None
        self._write(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )

    def _write(self, holder: Mapping[str, Any]) -> None:
        self._file.truncate(0)
        self._file.write(json.dumps(holder) if holder else "")  # mode "a": always at the end, which is the start now
        self._file.flush()

    def release(self) -> None:
        """Give the hold back. The file stays: removing it would let two processes lock two files of one name."""
        if not self._file.closed:
            self._write({})
            self._file.close()


def _read_holder(path: Path) -> dict[str, Any]:
    """Who holds `path`. What a killed holder left is passed over until the new one has written."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            holder = None
        if isinstance(holder, dict) and {"pid", "host", "started"} <= holder.keys() and not _is_dead(holder):
            return holder
        time.sleep(_RETRY_S)
    return {}


def _is_dead(holder: Mapping[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return False  # not ours to say
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # it lives, under another user
    return False
