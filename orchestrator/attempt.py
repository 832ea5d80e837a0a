"""One attempt at a trial in this process: the log, the globals, and what became of it; knows nothing of Ray."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import importlib
import logging
import os
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator import system_metrics
from orchestrator.control import Ask
from orchestrator.layout import TrialLayout
from orchestrator.variables import environment

Report = Callable[[int, Mapping[str, float]], None]

log = logging.getLogger(__name__)

PROGRAM = "orchestrator.program:run"  # of trials that have a command
TRAIN = "orchestrator.training:run"  # "module:function"; benchmarks and tests put others in its place

# Errors that the same settings may survive on another try; everything else is the user's or ours, and final.
_TRANSIENT = frozenset({"OSError", "CUDAError", "AcceleratorError"})
_FINAL = frozenset({"FileNotFoundError", "NotADirectoryError", "PermissionError", "OutOfMemoryError"})

# Errors after which a process is of no more use, since every later call to the device fails.
_POISONOUS = frozenset({"CUDAError", "AcceleratorError"})

_LOGGERS = (
    *("trainers", "orchestrator.attempt", "orchestrator.program", "orchestrator.training"),
    "orchestrator.system_metrics",
)
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface

_MEMORY_ADVICE = "; use a smaller optim.micro_batch_size, a larger share of a GPU, or precision bf16"


@dataclass(frozen=True)
class Job:
    """All that a process needs to run a trial, as plain values that travel anywhere."""

    trial_id: str
    name: str
    config: Mapping[str, Any]  # the resolved TrialConfig as JSON
    folder: str  # the trial's folder
    cache: str
    threads: int  # of each rank
    attempts: int = 0  # number of the newest attempt that the ledger knows
    last_step: int = 0  # the last step that earlier attempts reported
    stalled: int = 0  # attempts lost in a row without getting further
    gpus: float = 0.0  # of each rank; a trial that asked for none does not take one that happens to be there
    ranks: int = 1
    save_memory: bool = False  # an earlier attempt ran out of device memory
    remote: str | None = None  # URI of the storage, where that is no folder
    system_metrics: bool = False  # whether reports carry how the machine is used
    train: str = TRAIN


@dataclass(frozen=True)
class Place:
    """Which of a trial's ranks a process is, and where the first one is found."""

    rank: int = 0
    ranks: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    interface: str | None = None  # of the network between ranks; None leaves the choice to PyTorch

    def environment(self) -> dict[str, str]:
        """What torch.distributed reads; the device is always the first, as Ray shows a process only its own."""
        if self.ranks == 1:
            return {}
        own = {"RANK": self.rank, "WORLD_SIZE": self.ranks, "LOCAL_RANK": 0}
        found = {"MASTER_ADDR": self.address, "MASTER_PORT": self.port}
        names = () if self.interface is None else ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
        return {name: str(value) for name, value in {**own, **found, **dict.fromkeys(names, self.interface)}.items()}


def free_address(interface: str | None) -> tuple[str, int]:
    """An address of this machine by which others reach it, on `interface` where one is named, and a free port.

    Raises:
        ValueError: there is no such interface, or it has no IPv4 address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if interface is None:
            address = _node_address()
        else:
            request = struct.pack("256s", interface.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError as error:
                known = ", ".join(name for _, name in socket.if_nameindex())
                raise ValueError(
                    f"execution.network_interface {interface} cannot be used ({error.strerror}); allowed: {known}"
                ) from error
            address = socket.inet_ntoa(answer[20:24])
    with socket.socket() as listener:
        listener.bind((address, 0))
        return address, int(listener.getsockname()[1])


def _node_address() -> str:
    """The address by which Ray knows this node; loopback where Ray is not loaded."""
    ray = sys.modules.get("ray")
    return str(ray.util.get_node_ip_address()) if ray is not None and ray.is_initialized() else "127.0.0.1"


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
    data_sets: Sequence[Mapping[str, Any]] = ()  # as `trainers.train.Result`
    error: Mapping[str, str] | None = None
    retryable: bool = False
    lost: bool = False  # retryable as long as attempts get further: the process was lost, or made no progress
    poisoned: bool = False  # the process must not run anything else
    out_of_memory: bool = False  # of the device
    disk_full: bool = False
    storage_away: bool = False  # remote storage does not answer

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_ALONE = Place()


def run_attempt(job: Job, number: int, report: Report, asked: Ask, place: Place = _ALONE) -> Outcome:
    """Run attempt `number` of `job` as one of its ranks; every exception becomes an Outcome with its traceback.

    `report` is called with (step, {name: value}), and `asked` at every step, from this thread.
    """
    layout = TrialLayout(Path(job.folder))
    started = time.monotonic()
    try:
        with (
            _travel(job, layout, number, place.rank),
            environment(place.environment()),
            _log_to(layout.log(number, place.rank)),
        ):
            outcome = _logged(job, layout, number, report, asked)
        _reset_globals()
    except BaseException as error:  # noqa: BLE001 - of the log file or the device; the trial's own are caught inside
        outcome = failure(error)
    return Outcome(**{**outcome.to_json(), "seconds": time.monotonic() - started})


def _travel(job: Job, layout: TrialLayout, number: int, rank: int) -> contextlib.AbstractContextManager[None]:
    """Checkpoints come from remote storage before an attempt and go there during it, where storage is remote."""
    if job.remote is None:
        return contextlib.nullcontext()
    from orchestrator import remote_trial

    return remote_trial.travel(layout, job.remote, number, rank)


def _logged(job: Job, layout: TrialLayout, number: int, report: Report, asked: Ask) -> Outcome:
    try:
        module, _, function = job.train.partition(":")
        train = getattr(importlib.import_module(module), function)
        if job.system_metrics:
            report = system_metrics.with_samples(report)
        outcome: Outcome = train(job, layout, number, report, asked)
        return outcome
    except BaseException as error:
        log.exception("attempt %d of %s failed", number, job.name)
        return failure(error)


def failure(error: BaseException) -> Outcome:
    """An exception as the outcome of an attempt."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    out_of_memory = "OutOfMemoryError" in kinds
    advice = _MEMORY_ADVICE if out_of_memory else ""
    return Outcome(
        status="failed",
        error={
            "type": type(error).__name__,
            "message": str(error)[:4000] + advice,
            "traceback": "".join(traceback.format_exception(error))[-20_000:],
        },
        retryable=not kinds.isdisjoint(_TRANSIENT) and kinds.isdisjoint(_FINAL),
        poisoned=not kinds.isdisjoint(_POISONOUS),
        out_of_memory=out_of_memory,
        disk_full=is_disk_full(error),
        storage_away="StorageAway" in kinds,
    )


def is_disk_full(error: BaseException) -> bool:
    """Whether the error, or one that it came of, is that a disk or a quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in _DISK_FULL or "disk is full" in str(seen):  # the latter SQLite's
            return True
        seen = seen.__cause__ or seen.__context__
    return False


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
