"""A program in a session of its own under the guard: started, awaited, ended with all that came of it."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
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

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int, output: Path) -> None:
        self._process, self._lifeline, self._output = process, lifeline, output
        self._begin = output.stat().st_size if output.exists() else 0
        self._ended = os.pidfd_open(process.pid)

    def wait(self, seconds: float) -> int | None:
        """The exit code once it has ended, None after `seconds`; below 0 where a signal killed it."""
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        return self._process.wait() if poll.poll(seconds * 1000) else None

    def terminate(self) -> None:
        """Send SIGTERM to the program and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End everything now; repeating it does nothing."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
            if self.wait(_END_SECONDS) is None:
                log.error("the program could not be killed within %g s", _END_SECONDS)

    def close(self) -> None:
        """End what is left of it."""
        self.kill()
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
    reading, writing = os.pipe()
    try:
        with output.open("ab") as log_file:
            process = subprocess.Popen(
                [*guard, str(reading), *command],
                cwd=root,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                pass_fds=(reading,),
                start_new_session=True,
            )
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    guarded = Guarded(process, writing, output)
    try:
        yield guarded
    finally:
        guarded.close()
