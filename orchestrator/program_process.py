"""A program in a session of its own under the guard: started, awaited, ended with all that came of it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from orchestrator import program_guard

log = logging.getLogger("orchestrator.program")  # whose log an attempt keeps

_END_SECONDS = 10.0  # for everything to be dead that was killed
TAIL_BYTES = 16_000  # of the output, kept where the program fails


class Guarded:
    """A program that runs under the guard, which ends it and all that came of it when `kill` is called."""

    def __init__(self, process: subprocess.Popen[bytes], lifeline: socket.socket, output: Path) -> None:
        """`lifeline` is connected with the guard, whose processes alone have the other end."""
        self._process, self._lifeline, self._output = process, lifeline, output
        self._killed = False
        self._begin = output.stat().st_size if output.exists() else 0
        self._ended = os.pidfd_open(process.pid)

    def wait(self, seconds: float) -> int | None:
        """The exit code once it has ended, None after `seconds`; below 0 where a signal killed it."""
        return self._process.wait() if _is_ready(self._ended, seconds) else None

    def terminate(self) -> None:
        """Send SIGTERM to the program and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End everything now; repeating it does nothing."""
        if self._killed:
            return
        self._killed = True
        self._lifeline.shutdown(socket.SHUT_WR)
        if not _is_ready(self._lifeline.fileno(), _END_SECONDS):  # closed by the last process of the guard
            log.error("the program could not be killed within %g s", _END_SECONDS)

    def close(self) -> None:
        """End what is left of it."""
        self.kill()
        self._lifeline.close()
        with contextlib.suppress(ProcessLookupError):  # where the guard itself was killed
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._ended)

    def printed(self) -> int:
        """Bytes of output so far."""
        return self._output.stat().st_size - self._begin

    def output(self) -> str:
        """The end of the output."""
        with self._output.open("rb") as file:
            file.seek(max(self._begin, self._output.stat().st_size - TAIL_BYTES))
            return file.read(TAIL_BYTES).decode("utf-8", "replace")


@contextlib.contextmanager
def started(command: Sequence[str], root: Path, environment: Mapping[str, str], output: Path) -> Iterator[Guarded]:
    """The program in a session of its own; whatever happens in the block or to this process, it ends with it."""
    guard = [sys.executable, "-I", "-S", program_guard.__file__]
    lifeline, other = socket.socketpair()
    try:
        with other, output.open("ab") as log_file:
            process = subprocess.Popen(
                [*guard, str(other.fileno()), *command],
                cwd=root,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                pass_fds=(other.fileno(),),
                start_new_session=True,
            )
    except BaseException:
        lifeline.close()
        raise
    guarded = Guarded(process, lifeline, output)
    try:
        yield guarded
    finally:
        guarded.close()


def _is_ready(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read, an end included, within so many seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
