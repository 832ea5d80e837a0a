"""One attempt at a trial in this process: the log, the globals, and what became of it; knows nothing of Ray."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.layout import TrialLayout

Report = Callable[[int, Mapping[str, float]], None]

log = logging.getLogger(__name__)

TRAIN = "orchestrator.training:run"  # "module:function"; benchmarks and tests put others in its place

# Errors that the same settings may survive on another try; everything else is the user's or ours, and final.
_TRANSIENT = frozenset({"OSError", "CUDAError", "AcceleratorError"})
_FINAL = frozenset({"FileNotFoundError", "NotADirectoryError", "PermissionError", "OutOfMemoryError"})

# Errors after which a process is of no more use, since every later call to the device fails.
_POISONOUS = frozenset({"CUDAError", "AcceleratorError"})

_LOGGERS = ("trainers", "orchestrator.attempt")

_MEMORY_ADVICE = "; use a smaller optim.micro_batch_size, a larger share of a GPU, or precision bf16"


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
    attempts: int = 0  # number of the newest attempt that the ledger knows
    cpu_only: bool = False  # a trial that asked for no GPU does not take one that happens to be there
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
    poisoned: bool = False  # the process must not run anything else

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_attempt(job: Job, number: int, report: Report) -> Outcome:
    """Run attempt `number` of `job`; every exception becomes an Outcome with its traceback.

    `report` is called with (step, {name: value}) from this thread.
    """
    layout = TrialLayout(Path(job.folder))
    started = time.monotonic()
    try:
        with _log_to(layout.log(number)):
            outcome = _logged(job, layout, number, report)
        _reset_globals()
    except BaseException as error:  # noqa: BLE001 - of the log file or the device; the trial's own are caught inside
        outcome = failure(error)
    return Outcome(**{**outcome.to_json(), "seconds": time.monotonic() - started})


def _logged(job: Job, layout: TrialLayout, number: int, report: Report) -> Outcome:
    try:
        module, _, function = job.train.partition(":")
        train = getattr(importlib.import_module(module), function)
        outcome: Outcome = train(job, layout, number, report, StopRequest(job, layout))
        return outcome
    except BaseException as error:
        log.exception("attempt %d of %s failed", number, job.name)
        return failure(error)


def failure(error: BaseException) -> Outcome:
    """An exception as the outcome of an attempt."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    advice = _MEMORY_ADVICE if "OutOfMemoryError" in kinds else ""
    return Outcome(
        status="failed",
        error={
            "type": type(error).__name__,
            "message": str(error)[:4000] + advice,
            "traceback": "".join(traceback.format_exception(error))[-20_000:],
        },
        retryable=not kinds.isdisjoint(_TRANSIENT) and kinds.isdisjoint(_FINAL),
        poisoned=not kinds.isdisjoint(_POISONOUS),
    )


class StopRequest:
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
            answers = zip(self._files, ("stopped", "interrupted"), strict=True)  # what the user asked for goes first
            self._answer = next((answer for path, answer in answers if path.exists()), None)
        return self._answer


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Everything that our packages log goes to the attempt's own log file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = [(logger, logger.level, logger.propagate) for logger in map(logging.getLogger, _LOGGERS)]
    for logger, _, _ in before:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a trial's log is no business of the driver's console
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
        handler.close()


def _reset_globals() -> None:
    """Leave the process as the next trial expects it; torch is only touched where a trial imported it.

    What survives a collection is frozen: the 400,000 objects of torch and timm would cost each later one 0.2 s.
    """
    gc.enable()
    gc.collect()
    gc.freeze()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_default_dtype(torch.float32)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def process_name() -> str:
    """Host and process, for the ledger."""
    return f"{os.uname().nodename}:{os.getpid()}"
