"""Faults of devices, numbers and clocks, put into the process of a driver before it begins."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator import training
from orchestrator.attempt import Job, Outcome, Report
from orchestrator.layout import TrialLayout


def little_memory(_: Path) -> None:
    """A device on which a step fits with activation checkpointing alone."""
    _before_each_step(lambda config: not config.execution.activation_checkpointing)


def too_little_memory(_: Path) -> None:
    """A device on which a model with registers does not fit at all."""
    _before_each_step(lambda config: config.model.num_registers > 0)


def _before_each_step(is_too_large: Callable[[Any], bool]) -> None:
    import torch

    from trainers.step import Stepper

    real = Stepper.__call__

    @functools.wraps(real)
    def step(self: Stepper, *arguments: Any) -> None:
        if is_too_large(self.config):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        real(self, *arguments)

    Stepper.__call__ = step  # type: ignore[method-assign]


def not_a_number(_: Path) -> None:
    """Of a model with registers the loss is NaN from the fifth step on."""
    from trainers.step import Stepper

    real = Stepper.take_losses
    calls: dict[int, itertools.count[int]] = {}

    @functools.wraps(real)
    def losses(self: Stepper) -> dict[str, float]:
        found = real(self)
        step = next(calls.setdefault(id(self), itertools.count(1)))
        return dict.fromkeys(found, float("nan")) if step >= 5 and self.config.model.num_registers else found

    Stepper.take_losses = losses  # type: ignore[method-assign]


def jumping_clock(_: Path) -> None:
    """The time of day goes back by an hour and on by a day again and again, as a clock does that is set."""
    real, real_ns, jumps = time.time, time.time_ns, itertools.cycle((0, -3600, 86400, -1800))

    def now() -> float:
        return real() + next(jumps)

    def now_ns() -> int:
        return real_ns() + next(jumps) * 10**9

    time.time, time.time_ns = now, now_ns


class AcceleratorError(RuntimeError):
    """Named as the error of torch after which no call to the device works any more in a process."""


def loses_its_device(
    job: Job, layout: TrialLayout, number: int, report: Report, asked: Callable[[], str | None]
) -> Outcome:
    """Real training in a process whose device fails for ever in the middle of the first attempt at each trial."""
    (layout.attempt(number) / "process").write_text(str(os.getpid()))

    def breaks(step: int, metrics: Any) -> None:
        report(step, metrics)
        if number == 1 and step == 3:
            os.environ["RELIABILITY_BROKEN"] = "1"
        if "RELIABILITY_BROKEN" in os.environ:
            raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    return training.run(job, layout, number, breaks, asked)


def one_gpu_is_broken(
    job: Job, layout: TrialLayout, number: int, report: Report, asked: Callable[[], str | None]
) -> Outcome:
    """A second on a GPU whose number the attempt leaves behind; the second GPU of a node never works."""
    import ray

    (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    (layout.attempt(number) / "gpu").write_text(gpu)
    if gpu == "1":
        raise AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    time.sleep(1.0)
    report(1, {"train/loss": 1.0})
    return Outcome("finished", steps=1)
