"""Short real trials through the orchestrator, one at a time, against the same trials in a bare loop."""

from __future__ import annotations

import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import one_at_a_time
from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.turns import Partner, serve_turns
from orchestrator import run
from orchestrator.plan import PlannedTrial

RAY_NICENESS = 15  # Ray's default for its workers; with another one, other users of the machine would decide the ratio
WARM_UP = 1  # trials: process start, imports, decoding and MLflow's schema are in the first

# sweeps/quickstart.yaml, cut to two or three seconds
TRIAL: dict[str, Any] = {
    "preset": "short",
    "model": {"size": "nano", "patch_size": 8},
    "data": {
        "train": "scenes",
        "decode_size": 32,
        "scenes": {"num_train": 2_000, "num_validation": 256, "num_test": 256},
    },
    "optim": {"optimizer": "adamw", "lr": 3.0e-3, "steps": 60, "batch_size": 32},
    "deit3": {"cutmix": 0.0, "flip": False, "color_jitter": 0.0, "three_augment": False},
    "evaluation": {"points": 2, "train_images": 1_000, "linear": {"steps": 100}},
    "execution": {"threads": 1, "device": "cpu"},
}


def measure(settings: Settings) -> Report:
    """Seconds of a trial in the sweep : seconds of `train` for the same configuration in a bare loop."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of both sides' processes
    swept: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, Partner(_bare_loop, name) as partner:

        def between(trial: PlannedTrial, seconds: float) -> None:
            swept.append(seconds)
            bare.append(partner.turn(trial.config.model_dump_json()))

        with run.cluster() as ray:
            one_at_a_time.sweep(ray, Path(name), TRIAL, range(settings.pairs + WARM_UP), between)
    sides = (
        "a trial in a sweep: end of the one before to its own end, recorded and published; Ray Tune, warm rank "
        "process, ledger, MLflow; one at a time, one thread",
        "the same trial: trainers.train.train in a bare loop in one process, one thread, as nice as Ray's workers",
    )
    comparison = Comparison("sweep overhead", sides, swept[WARM_UP:], bare[WARM_UP:], "s", Goal(1.10))
    sums = {"swept_seconds": sum(swept[WARM_UP:]), "bare_seconds": sum(bare[WARM_UP:])}
    return Report(
        [comparison], {"trials": len(comparison.first), "warm_up": WARM_UP, **{k: round(v, 2) for k, v in sums.items()}}
    )


def _bare_loop(connection: Connection, folder: str) -> None:
    """The other side's process: trains what it is sent, one after another."""
    import torch

    from trainers.config import TrialConfig
    from trainers.train import train

    os.nice(RAY_NICENESS)
    torch.set_num_threads(1)
    done = iter(range(10**6))

    def one(config: str) -> float:
        started = time.perf_counter()
        directory = Path(folder) / "bare" / str(next(done))
        result = train(
            TrialConfig.model_validate_json(config),
            lambda _step, _metrics: None,
            directory,
            cache=Path(folder) / "cache",
        )
        if result.status != "finished":
            raise RuntimeError(f"a bare trial ended as {result.status}")
        return time.perf_counter() - started

    serve_turns(connection, one)
