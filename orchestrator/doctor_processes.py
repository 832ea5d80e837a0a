"""Checks of doctor: processes of trials on this machine that a dead driver left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from orchestrator import ledger_attempts
from orchestrator.finding import Finding, shortened
from orchestrator.ledger import Ledger

_PROC = Path("/proc")
_RAYLET = b"RAY_RAYLET_PID="  # begins what a Ray worker has in its environment
_ATTEMPT = b"ORCHESTRATE_DIRECTORY="  # begins what a program, its guard and all that came of them have there
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
    number = _variable(folder, _RAYLET) or b""
    return int(number) if number.isdigit() else None


def _variable(folder: Path, begin: bytes) -> bytes | None:
    """What of a process's environment follows `begin`; None where nothing does, or that is not ours to read."""
    try:
        pairs = (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((pair.removeprefix(begin) for pair in pairs if pair.startswith(begin)), None)


def check_processes(ledger: Ledger) -> Iterator[Finding]:
    """No process of an attempt of this sweep is left; call it where nobody runs the sweep.

    A process is this sweep's where it has the number that an attempt on this machine wrote down, is one of our actors,
    and began before that attempt did, so that the number was not given to another one since. Ray ends the ranks of a
    trial with the trial's process. Nothing else proves whose a process is: all workers of a node look alike.
    """
    for process in _of_attempts(ledger).values():
        what = f"{process.command} of a dead driver of this sweep still runs"
        mend = partial(end, [process], _LEAVE_S)
        yield Finding("processes", f"process {process.pid}", what, "ends it, and with it its ranks", mend)


def check_orphans() -> Iterator[Finding]:
    """No training process is left whose Ray node is gone, whichever sweep it was of."""
    for process in _our_actors():
        if process.raylet is not None and read_process(process.raylet) is None:
            what = f"{process.command} still runs, but the Ray node that began it is gone"
            yield Finding("processes", f"process {process.pid}", what, f"kill {process.pid} ends it")


def check_programs(root: Path) -> Iterator[Finding]:
    """No process of a program is left whose attempt is below `root`; call it where nobody runs the sweep."""
    left = of_programs(root)
    if left:
        shown = shortened([f"{process.pid} {process.command[:60]}" for process in left])
        what = f"{len(left)} processes of programs of a dead driver of this sweep still run ({shown})"
        yield Finding("processes", str(root), what, "ends them", partial(end, left, _LEAVE_S))


def of_programs(root: Path) -> list[Process]:
    """Processes of this machine that came of programs whose attempts are below `root`, but for this one and those
    above it.
    """
    above, pid = {os.getpid()}, os.getppid()
    while pid > 0 and (parent := _parent(pid)) is not None:
        above.add(pid)
        pid = parent
    found = [read_process(pid) for pid in _pids() if pid not in above and _is_below(root, _PROC / str(pid))]
    return [process for process in found if process is not None]


def _is_below(root: Path, process: Path) -> bool:
    directory = _variable(process, _ATTEMPT)
    return directory is not None and Path(os.fsdecode(directory)).is_relative_to(root)


def _parent(pid: int) -> int | None:
    try:
        return int((_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _pids() -> list[int]:
    return sorted(int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


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
    found = map(read_process, _pids())
    return [process for process in found if process is not None and process.command.startswith(_OURS)]


def end(processes: Sequence[Process], seconds: float) -> None:
    """End processes: asked first, and killed where they are there after so many seconds.

    Raises:
        OSError: one is another user's.
    """
    deadline = time.monotonic() + seconds
    for process in processes:
        _signal(process, signal.SIGTERM)
    while any(map(_is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        _signal(process, signal.SIGKILL)


def _signal(process: Process, number: signal.Signals) -> None:
    if _is_alive(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def _is_alive(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and abs(now.started - process.started) < _ROUNDING_S
