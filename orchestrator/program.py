"""The bridge from an attempt to a program of others: configuration, report, requests to leave, and how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator import program_records
from orchestrator.attempt import Job, Outcome, Report
from orchestrator.layout import TrialLayout
from orchestrator.program_process import Guarded, started
from orchestrator.program_report import ProgramReport, WrongReports
from orchestrator.retry import has_room
from trainers.config import filled, flatten, is_execution
from trainers.files import write_whole

log = logging.getLogger(__name__)

TERM_SECONDS = 8.0  # from the request to leave to SIGTERM
KILL_SECONDS = 15.0  # from the request to leave to SIGKILL
TRY_AGAIN = os.EX_TEMPFAIL  # 75: the exit code of a program that was lost through no fault of its own
MOST_LOG_BYTES = 64 * 2**20  # of output, all of which is published

_POLL_SECONDS = 0.1  # between two looks at the report
_ASK_SECONDS = 0.5  # between two questions whether to leave
_LOST_CODES = (TRY_AGAIN, 128 + signal.SIGKILL, 128 + signal.SIGTERM)  # the latter as shells tell of their children


@dataclass(frozen=True)
class _Files:
    """What an attempt's program is given by name."""

    directory: Path
    rank: int

    @property
    def config(self) -> Path:
        return self.directory / "config.json"

    @property
    def report(self) -> Path:
        return self.directory / ("report.jsonl" if self.rank == 0 else f"report.rank{self.rank}.jsonl")

    @property
    def stop(self) -> Path:
        return self.directory / ("stop" if self.rank == 0 else f"stop.rank{self.rank}")

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"


def run(job: Job, layout: TrialLayout, number: int, report: Report, should_stop: Callable[[], str | None]) -> Outcome:
    """Run the command of `job` as attempt `number`; what its first rank's program reports is the trial's."""
    rank = int(os.environ.get("RANK", "0")) if job.ranks > 1 else 0
    files, execution = _Files(layout.attempt(number), rank), job.config["execution"]
    settings = {name: value for name, value in job.config.items() if name != "command" and not is_execution(name)}
    write_whole(files.config, (json.dumps(settings, indent=1) + "\n").encode())
    files.checkpoints.mkdir(exist_ok=True)
    root = Path(execution.get("program_root") or Path.cwd()).expanduser().resolve()
    environment = _environment(job, layout, files)
    command = filled(job.config["command"], _placeholders(settings, files))
    if (wrong := _wrong(command[0], root, environment["PATH"])) is not None:
        log.error("%s", wrong)
        return Outcome("failed", error={"type": "NoProgram", "message": wrong, "traceback": ""})
    _say(command, root)
    lines = ProgramReport(files.report)
    try:
        with started(command, root, environment, layout.log(number, rank)) as guarded:
            watch = _Watch(guarded, lines, files, report if rank == 0 else _ignore, should_stop)
            ended = watch.until_the_end(float(execution.get("no_progress_seconds") or 1_800.0))
    finally:
        lines.close()
    if lines.wrong:
        log.warning("%d lines of the report were left out, the first is %s", lines.wrong, lines.first_wrong)
    if rank == 0:
        program_records.sort_out(files.directory)
    with contextlib.suppress(OSError):  # what is in use is not empty
        files.checkpoints.rmdir()
    return _outcome(ended, lines, job, layout, guarded.output())


def _ignore(_step: int, _metrics: Mapping[str, float]) -> None:
    """Ranks but the first report nothing."""


def _environment(job: Job, layout: TrialLayout, files: _Files) -> dict[str, str]:
    """What the program finds in its environment besides that of this process."""
    threads = str(job.config["execution"].get("threads") or job.threads)
    earlier = [folder for folder in layout.checkpoint_folders() if folder != files.checkpoints and _has_files(folder)]
    found = {
        "ORCHESTRATE_TRIAL_CONFIG": str(files.config),
        "ORCHESTRATE_REPORT": str(files.report),
        "ORCHESTRATE_DIRECTORY": str(files.directory),
        "ORCHESTRATE_STOP": str(files.stop),
        "ORCHESTRATE_RESUME_FROM": os.pathsep.join(map(str, earlier)),
        "ORCHESTRATE_SEED": str(job.config.get("seed", 0)),
        "ORCHESTRATE_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        # What is installed beside this interpreter is found where nothing else has the name.
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]),
    }
    if job.gpus == 0:  # a trial that asked for none does not take one that happens to be there
        found["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **found}


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _placeholders(settings: Mapping[str, Any], files: _Files) -> dict[str, str]:
    """What stands in a command for names in braces: every setting that is handed over, and the program's places."""
    own = {"config": str(files.config), "directory": str(files.directory), "seed": str(settings.get("seed", 0))}
    return {name: _word(value) for name, value in flatten(settings).items()} | own


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value
    return ",".join(map(_word, value)) if isinstance(value, list | tuple) else json.dumps(value)


def _wrong(program: str, root: Path, path: str) -> str | None:
    """Why the first word of a command is no program; None where it is one."""
    if "/" not in program:
        if shutil.which(program, path=path) is not None:
            return None
        here = f"; did you mean ./{program}?" if (root / program).is_file() else ""
        return f"there is no program {program} on the PATH{here}"
    file = root / Path(program).expanduser()
    if not file.is_file():
        return f"the program {program} is not in {root}; execution.program_root says where commands are run"
    if not os.access(file, os.X_OK):
        return f"{file} may not be executed; chmod +x it, or name what runs it, as in [sh, {program}]"
    return None


def _say(command: Sequence[str], root: Path) -> None:
    """Name the command in the log, with checksums of its files, which are no part of the trial's identity."""
    log.info("in %s: %s", root, " ".join(command))
    for word in command:
        file = root / word
        with contextlib.suppress(OSError, ValueError):
            if file.is_file() and file.stat().st_size < MOST_LOG_BYTES:
                log.info("%s has sha256 %s", word, hashlib.sha256(file.read_bytes()).hexdigest())


@dataclass(frozen=True)
class _Ended:
    """How a program ended: its exit code, what it was asked before, or why this side ended it."""

    code: int
    asked: str | None = None
    error: Mapping[str, Any] | None = None


class _Watch:
    """Follows a running program: what it reports, whether it should leave, whether it still does anything."""

    def __init__(
        self,
        program: Guarded,
        lines: ProgramReport,
        files: _Files,
        report: Report,
        should_stop: Callable[[], str | None],
    ) -> None:
        self._program, self._lines, self._files = program, lines, files
        self._report, self._should_stop = report, should_stop
        self._asked: str | None = None
        self._asked_at = 0.0
        self._terminated = False

    def until_the_end(self, patience_seconds: float) -> _Ended:
        """Follow it until it ends, or is ended: it floods, hangs, or does not leave when it is asked to."""
        look, alive, printed = 0.0, time.monotonic(), 0
        while (code := self._program.wait(0.0 if self._lines.behind else _POLL_SECONDS)) is None:
            now = time.monotonic()
            try:
                heard = self._forward()
            except WrongReports as error:
                return self._end("WrongReports", str(error))
            before, printed = printed, self._program.printed()
            alive = now if heard or printed != before else alive
            if printed > MOST_LOG_BYTES:
                return self._end("TooMuchOutput", f"the program printed more than {MOST_LOG_BYTES:,} bytes")
            if now - alive > patience_seconds and self._asked is None:
                reason = f"the program neither reported nor printed anything for {patience_seconds:g} s"
                return self._end("Hung", reason, retryable=True)
            if now - look >= _ASK_SECONDS:
                look = now
                self._ask(now)
        try:
            self._forward(at_end=True)
        except WrongReports as error:
            return self._end("WrongReports", str(error))
        return _Ended(code, self._asked)

    def _forward(self, *, at_end: bool = False) -> bool:
        """Pass on what it has reported since the last time; whether there was anything."""
        heard = False
        for step, metrics in self._lines.new(at_end=at_end):
            heard = True
            self._report(step, metrics)
        return heard

    def _ask(self, now: float) -> None:
        """Ask whether it should leave and, once it should, more and more firmly."""
        if self._asked is None:
            self._asked, self._asked_at = self._should_stop(), now
            if self._asked is not None:
                log.info("asked to leave: %s", self._asked)
                self._files.stop.touch()
            return
        if now - self._asked_at > KILL_SECONDS:
            log.warning("killed, since it has not left within %g s", KILL_SECONDS)
            self._program.kill()
        elif now - self._asked_at > TERM_SECONDS and not self._terminated:
            self._terminated = True
            self._program.terminate()

    def _end(self, kind: str, message: str, *, retryable: bool = False) -> _Ended:
        self._program.kill()
        log.error("ended: %s", message)
        return _Ended(-signal.SIGKILL, self._asked, {"type": kind, "message": message, "retryable": retryable})


def _signal_name(number: int) -> str:
    """Its name; those of real time between the first and the last have none."""
    names = {one.value: one.name for one in signal.Signals}
    return names.get(number, f"signal {number}")


def _outcome(ended: _Ended, lines: ProgramReport, job: Job, layout: TrialLayout, output: str) -> Outcome:
    """What the end of a program means for its trial."""
    threads = int(job.config["execution"].get("threads") or job.threads)
    known = Outcome("finished", steps=lines.steps or 0, threads=threads)
    if ended.error is not None:
        error = {"type": ended.error["type"], "message": ended.error["message"], "traceback": output}
        again = ended.error["retryable"]
        return replace(known, status="failed", error=error, retryable=again, lost=again)
    if lines.status == "diverged":
        message = lines.message or "the program says that it diverged"
        return replace(known, status="diverged", error={"type": "Diverged", "message": message, "traceback": output})
    if ended.asked is not None and lines.status != "finished":
        return replace(known, status=ended.asked)
    if ended.code == 0:
        if lines.steps is None:
            log.warning("the program reported nothing")
        return known
    said = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it printed nothing")
    if ended.code < 0:
        kind, how = "ProcessLost", f"was killed by {_signal_name(-ended.code)}"
    else:
        kind, how = ("ProcessLost" if ended.code in _LOST_CODES else "ProgramFailed"), f"ended with code {ended.code}"
    error = {"type": kind, "message": f"the program {how}: {said[:2000]}", "traceback": output}
    is_lost, full = kind == "ProcessLost", not has_room(layout.root)
    return replace(known, status="failed", error=error, retryable=is_lost, lost=is_lost, disk_full=full)
