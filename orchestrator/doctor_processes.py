"""Checks of doctor: training processes on this machine that a dead driver left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator import ledger_attempts
from orchestrator.finding import Finding
from orchestrator.ledger import Ledger

_PROC = Path("/proc")
_RAYLET = b"RAY_RAYLET_PID="  # begins what a Ray worker has in its environment
# What Ray calls the processes of our actors: a trial's is named by Tune's wrapper of it while it is at work.
_OURS = ("ray::ThinTrial", "ray::ResourceTrainable", "ray::Rank")
_ROUNDING_S = 1.0  # of the boot time, from which the start of a process is counted
_LEAVE_S = 5.0


@dataclass(frozen=True)
class Process:
    """A process of this machine; `started` is in seconds since 1970, `raylet` is the node process of a Ray worker."""

    pid: int
    command: str
    started: float
    raylet: int | None


def read_process(pid: int) -> Process | None:
    """What the system knows of a process; None where there is none, or it is over and only waits to be noticed."""
    folder = _PROC / str(pid)
    try:
        after_name = (folder / "stat").read_text().rpartition(")")[2].split()
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    if after_name[0] == "Z":
        return None
    ticks = int(after_name[19])  # proc(5): field 22, since boot
    return Process(pid, command, _boot_time() + ticks / os.sysconf("SC_CLK_TCK"), _raylet(folder))


def _boot_time() -> float:
    lines = (_PROC / "stat").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("btime")).split()[1])


def _raylet(folder: Path) -> int | None:
    """The node process that a Ray worker was started by; None where there is none, or that is not ours to read."""
    try:
        pairs = (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = next((pair for pair in pairs if pair.startswith(_RAYLET)), None)
    number = b"" if found is None else found.removeprefix(_RAYLET)
    return int(number) if number.isdigit() else None


def check_processes(ledger: Ledger) -> Iterator[Finding]:
    """No process of an attempt of this sweep is left; call it where nobody runs the sweep.

    A process is this sweep's where it has the number that an attempt on this machine wrote down, is one of our actors,
    and began before that attempt did, so that the number was not given to another one since. Ray ends the ranks of a
    trial with the trial's process. Nothing else proves whose a process is: all workers of a node look alike.
    """
    for process in _of_attempts(ledger).values():
        what = f"{process.command} of a dead driver of this sweep still runs"
        mend = partial(end, process, _LEAVE_S)
        yield Finding("processes", f"process {process.pid}", what, "ends it, and with it its ranks", mend)


def check_orphans() -> Iterator[Finding]:
    """No training process is left whose Ray node is gone, whichever sweep it was of."""
    for process in _our_actors():
        if process.raylet is not None and read_process(process.raylet) is None:
            what = f"{process.command} still runs, but the Ray node that began it is gone"
            yield Finding("processes", f"process {process.pid}", what, f"kill {process.pid} ends it")


def _of_attempts(ledger: Ledger) -> dict[int, Process]:
    found: dict[int, Process] = {}
    for attempt in ledger_attempts.on_host(ledger.path, socket.gethostname()):
        process = read_process(attempt.pid)
        if process is None or not process.command.startswith(_OURS):
            continue
        if process.started <= attempt.started_ms / 1000 + _ROUNDING_S:
            found[process.pid] = process
    return found


def _our_actors() -> list[Process]:
    pids = sorted(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    found = (read_process(pid) for pid in pids)
    return [process for process in found if process is not None and process.command.startswith(_OURS)]


def end(process: Process, seconds: float) -> None:
    """End a process: asked first, and killed where it is there after so many seconds.

    Raises:
        OSError: it is another user's.
    """
    deadline = time.monotonic() + seconds
    _signal(process, signal.SIGTERM)
    while _is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(process, signal.SIGKILL)


def _signal(process: Process, number: signal.Signals) -> None:
    if _is_alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _is_alive(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and abs(now.started - process.started) < _ROUNDING_S
