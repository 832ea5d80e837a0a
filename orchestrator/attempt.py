"""One attempt at a trial in this process: the log, the globals, and what became of it; knows nothing of Ray."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.layout import TrialLayout

Report = Callable[[int, Mapping[str, float]], None]

TRAIN = "orchestrator.training:run"  # "module:function"; benchmarks and tests put others in its place

# Errors that the same settings may survive on another try; everything else is the user's or ours, and final.
_TRANSIENT = ("OSError", "ConnectionError", "TimeoutError", "BrokenPipeError", "CUDAError", "AcceleratorError")


@dataclass(frozen=True)
class Job:
    """All that a process needs to run a trial, as plain values that travel anywhere."""

    trial_id: str
    name: str
    config: Mapping[str, Any]  # the resolved TrialConfig as JSON
    folder: str  # the trial's folder
    cache: str
    stop_file: str  # its existence asks every trial of this driver to checkpoint and leave
    threads: int
    train: str = TRAIN


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: finished, diverged, stopped, interrupted (resumable) or failed."""

    status: str
    steps: int = 0
    seconds: float = 0.0
    images_per_second: float | None = None
    device: str | None = None
    threads: int | None = None
    data_fingerprint: str | None = None
    error: Mapping[str, str] | None = None
    retryable: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_attempt(job: Job, number: int, report: Report) -> Outcome:
    """Run attempt `number` of `job`; every exception becomes an Outcome with its traceback.

    `report` is called with (step, {name: value}) from this thread.
    """
    layout = TrialLayout(Path(job.folder))
    started = time.monotonic()
    with _log_to(layout.log(number)):
        try:
            module, _, function = job.train.partition(":")
            train = getattr(importlib.import_module(module), function)
            outcome = train(job, layout, number, report, _StopRequest(job, layout))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            logging.getLogger(__name__).exception("attempt %d of %s failed", number, job.name)
            outcome = failure(error)
        finally:
            _reset_globals()
    return Outcome(**{**outcome.to_json(), "seconds": time.monotonic() - started})


def failure(error: BaseException) -> Outcome:
    """An exception as the outcome of an attempt."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return Outcome(
        status="failed",
        error={
            "type": type(error).__name__,
            "message": str(error)[:4000],
            "traceback": "".join(traceback.format_exception(error))[-20_000:],
        },
        retryable=not kinds.isdisjoint(_TRANSIENT),
    )


class _StopRequest:
    """Whether the attempt should leave, asked at every step and looked up at most twice a second."""

    def __init__(self, job: Job, layout: TrialLayout) -> None:
        self._files: Sequence[Path] = (layout.stop_request, Path(job.stop_file))
        self._next = 0.0
        self._answer: str | None = None

    def __call__(self) -> str | None:
        """`stopped` to end the trial, `interrupted` to leave it resumable, None to go on."""
        now = time.monotonic()
        if self._answer is None and now >= self._next:
            self._next = now + 0.5
            for path, answer in zip(self._files, ("stopped", "interrupted"), strict=True):
                if path.exists():
                    self._answer = answer
        return self._answer


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Everything that our packages log goes to the attempt's own log file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("trainers", "orchestrator")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _reset_globals() -> None:
    """Leave the process as the next trial expects it; torch is only touched where a trial imported it."""
    gc.enable()
    gc.collect()
    import sys

    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_default_dtype(torch.float32)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def process_name() -> str:
    """Host and process, for the ledger."""
    return f"{os.uname().nodename}:{os.getpid()}"
