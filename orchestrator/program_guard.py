"""Runs one program so that nothing of it outlives the process that asked for it; a script of its own, stdlib alone.

    python -I -S program_guard.py FD WORD…

FD is one end of a socket or pipe whose other end only the asking process has. When that closes, and when the program
ends, every process that came of it is killed, also one that left its session. The exit code is the program's; where a
signal killed it, the same one kills this process.

The guard is two processes, one below the other, each of which ends everything where the other one is killed: Ray kills
the children of a worker that loses its driver, before the worker itself ends, but not the children of these.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux
_NOT_STARTED = 127  # as shells say it
_ROUND_SECONDS = 0.01


def main(lifeline: int, command: list[str]) -> int:
    """Run `command` until it ends or `lifeline` closes; the exit code, 128 + n of one that signal n killed."""
    os.set_inheritable(lifeline, False)
    libc = ctypes.CDLL(None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the program, whose process group this one is in
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans among its descendants become children of this process
    outer = os.pidfd_open(os.getpid())
    inner = os.fork()
    if inner == 0:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return _guarded(libc, [lifeline, outer], command)
    return _end_as(inner)


def _guarded(libc: ctypes.CDLL, needed: list[int], command: list[str]) -> int:
    """In the inner process: run `command` until it ends, or one of the `needed` descriptors says that something is gone
    without which it may not go on.
    """
    child = os.fork()
    if child == 0:
        _become(libc, command)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([*needed, ended], [], [])
    if ended not in ready:
        _kill_descendants()
        return _NOT_STARTED
    return _end_as(child)


def _end_as(child: int) -> int:
    """Wait for a child, kill what else came of it, and end as it did: with its exit code, or of its signal."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    _kill_descendants()
    if status < 0:
        _die_of(-status)
    return status


def _become(libc: ctypes.CDLL, command: list[str]) -> None:
    """In the child: turn into the program, which dies with this process, however that ends."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be started: {error.strerror}\n".encode())
    finally:
        os._exit(_NOT_STARTED)


def _kill_descendants() -> None:
    """Kill everything below this process, round by round, until nothing is left to wait for."""
    while True:
        for process in _descendants():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(_ROUND_SECONDS)


def _descendants() -> list[int]:
    """All processes below this one, parents before children."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()  # names may hold spaces and brackets
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [os.getpid()]
    for process in found:
        found += children.get(process, [])
    return found[1:]


def _die_of(number: int) -> None:
    """End as the program did, without a core file of this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
