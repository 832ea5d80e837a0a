"""A few training steps of a trial in a process of its own, for their time and memory: `plan --measure`."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orchestrator.attempt import Job
from orchestrator.estimate import num_gpus
from orchestrator.layout import TrialLayout
from orchestrator.measured import Sample, shape_of
from orchestrator.plan import PlannedTrial
from trainers.config import TrialConfig, resolve

WARM_UP, STEPS, SECONDS = 2, 12, 30.0  # steps that are left out, steps at most, and time at most once two are counted
LIMIT_SECONDS = 900.0  # of the whole process, data and compiling included
_BEGIN = "measured "  # of the line that the process prints


def shapes(trials: Sequence[PlannedTrial]) -> list[PlannedTrial]:
    """Of each group of trials that differ in little the one that needs least memory and the one that needs most.

    Trials that train nothing and programs have no steps of ours and are left out.
    """
    groups: dict[Any, list[PlannedTrial]] = {}
    for trial in trials:
        if trial.config.method != "pretrained" and trial.config.command is None:
            groups.setdefault((shape_of(trial.config).group, num_gpus(trial) > 0), []).append(trial)
    extremes = []
    for group in groups.values():
        ordered = sorted(group, key=lambda trial: shape_of(trial.config).memory)
        extremes += [
            ordered[0],
            *([ordered[-1]] if shape_of(ordered[-1].config) != shape_of(ordered[0].config) else []),
        ]
    return extremes


def measure(trial: PlannedTrial, state: Path) -> Sample:
    """Run dry steps of `trial` in a process of its own, on generated images, so that no data need be here.

    Raises:
        ValueError: it failed, took too long, or asks for a GPU where there is none; the message has the reason.
    """
    state.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".dry_steps_", dir=state) as folder:
        asked = {
            "config": dry(trial.config).model_dump(mode="json"),
            "on_gpu": num_gpus(trial) > 0,
            "threads": max(1, int(trial.resources.cpus / trial.resources.num_ranks)),
            "folder": folder,
            "cache": str(state / "cache"),
        }
        command = [sys.executable, "-m", "orchestrator.dry_steps"]
        try:
            done = subprocess.run(
                command, input=json.dumps(asked), capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"dry steps of {trial.name} took longer than {LIMIT_SECONDS:.0f} s") from error
    found = [line.removeprefix(_BEGIN) for line in done.stdout.splitlines() if line.startswith(_BEGIN)]
    if done.returncode or not found:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise ValueError(f"dry steps of {trial.name} failed: {lines[-1][:300]}")
    measured = json.loads(found[0])
    return Sample(shape_of(trial.config), **measured)


def dry(config: TrialConfig) -> TrialConfig:
    """`config` on generated images, without probes and measurements, from random weights: its steps are the same, and
    no fewer than are counted.
    """
    settings = config.model_dump(mode="json")
    few = {"num_train": max(64, config.optim.batch_size), "num_validation": 16, "num_test": 16}
    settings["data"] = {"train": "scenes", "decode_size": config.model.side, "scenes": few}
    settings["model"]["init_from"] = None
    settings["evaluation"] = {"probes": [], "points": 1}
    settings["tokens"] = {**settings["tokens"], "probe_images": 1, "measurements": []}
    settings["execution"]["data_root"] = None
    settings["optim"]["steps"] = max(config.optim.steps, WARM_UP + STEPS + 1)
    return resolve(settings)


class _Watch:
    """Counts steps by how often it is asked whether training should stop, and says so once there are enough."""

    def __init__(self, wait: Callable[[], object]) -> None:
        """`wait` returns once the device has done all that it was given."""
        self._wait = wait
        self.moments: list[float] = []

    def __call__(self) -> str | None:
        self._wait()
        self.moments.append(time.monotonic())
        counted = len(self.moments) - 1 - WARM_UP
        late = counted >= 2 and self.moments[-1] - self.moments[0] > SECONDS
        return "interrupted" if counted >= STEPS or late else None

    def seconds(self) -> float:
        """Of a step, the median."""
        between = [after - before for before, after in zip(self.moments, self.moments[1:], strict=False)]
        return statistics.median(between[WARM_UP:] or between)


def main() -> None:
    """What the process does: a job as JSON in, one line with what was measured out."""
    import torch

    from orchestrator import training

    asked = json.load(sys.stdin)
    config = TrialConfig.model_validate(asked["config"])
    on_gpu = asked["on_gpu"]
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("it asks for a GPU and this machine has none; measure where the sweep will run")
    gpus = 1.0 if on_gpu else 0.0  # the whole one: what a share must hold is the question
    job = Job("dry", "dry", asked["config"], asked["folder"], asked["cache"], asked["threads"], gpus=gpus)
    watch = _Watch(torch.cuda.synchronize if on_gpu else lambda: None)
    layout = TrialLayout(Path(asked["folder"]))
    layout.attempt(1).mkdir(parents=True)
    training.run(job, layout, 1, lambda step, metrics: None, watch)
    if len(watch.moments) < 2:
        raise SystemExit("it ended before its first step")
    found = _of_gpu(torch) if on_gpu else _of_cpu(torch)
    found["images_per_second"] = config.optim.batch_size / watch.seconds()
    print(_BEGIN + json.dumps(found))


def _of_gpu(torch: Any) -> dict[str, Any]:
    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "share": 1.0,
        "peak": torch.cuda.max_memory_allocated(),
        "capacity": device.total_memory,
    }


def _of_cpu(torch: Any) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"device": "cpu", "share": float(torch.get_num_threads()), "peak": peak, "capacity": whole}


if __name__ == "__main__":
    main()
