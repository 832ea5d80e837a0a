"""Use of processor, memory and GPU while a trial runs, reported beside its metrics where that is asked for."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

PREFIX = "system/"  # what MLflow's user interface shows under "System metrics"; no result of a trial
INTERVAL_SECONDS = 10.0  # as MLflow's own monitor
_MEGABYTE = 1e6

Report = Callable[[int, Mapping[str, float]], None]

log = logging.getLogger(__name__)


def is_system(name: str) -> bool:
    """Whether a metric says how a machine was used: the clock decides it, so it stands in no table."""
    return name.startswith(PREFIX)


def check_available() -> None:
    """Whether this machine can read how it is used.

    Raises:
        ValueError: a package is missing.
    """
    if find_spec("psutil") is None:
        raise ValueError("--system-metrics needs psutil, which is not installed; pip install psutil")


def with_samples(report: Report, clock: Callable[[], float] = time.monotonic) -> Report:
    """`report`, but a report that comes `INTERVAL_SECONDS` or more after the last sample carries one of this machine.

    There is no thread: what a trial that reports nothing uses is not seen. Processor time is the mean since the last
    sample. A machine that cannot be read is said once, in the log of the trial, which goes on.
    """
    try:
        _sample()  # processor time counts from here
    except Exception as error:  # noqa: BLE001 - of packages and drivers; no reason to lose a trial
        log.warning("system metrics cannot be read here: %s: %s", type(error).__name__, error)
        return report
    last, failed = clock(), False

    def sampled(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal last, failed
        now, found = clock(), dict[str, float]()
        if now - last >= INTERVAL_SECONDS and not failed:
            last = now
            try:
                found = _sample()
            except Exception as error:  # noqa: BLE001 - as above
                failed = True
                log.warning("system metrics end here: %s: %s", type(error).__name__, error)
        report(step, {**metrics, **found})

    return sampled


def _sample() -> dict[str, float]:
    """What is in use now, under the names that MLflow's own monitor gives; megabytes are 10⁶ bytes.

    Processor and memory are the whole machine's, GPUs those that the trial was given.
    """
    import psutil

    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system_memory_usage_percentage": 100 * memory.used / memory.total,
    }
    torch = sys.modules.get("torch")  # a trial that has not imported it uses no GPU of ours
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            found.update({f"gpu_{index}_{name}": value for name, value in _gpu(torch, index).items()})
    return {PREFIX + name: float(value) for name, value in found.items()}


def _gpu(torch: Any, index: int) -> dict[str, float]:
    """Of one GPU; its utilization and power are known only where nvidia-ml-py is installed."""
    free, total = torch.cuda.mem_get_info(index)
    found = {
        "memory_usage_megabytes": (total - free) / _MEGABYTE,
        "memory_usage_percentage": 100 * (total - free) / total,
    }
    if find_spec("pynvml") is not None:
        found["utilization_percentage"] = torch.cuda.utilization(index)
        found["power_usage_watts"] = torch.cuda.power_draw(index) / 1000
    return found
