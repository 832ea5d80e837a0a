"""Many trials on simulated nodes: what ledger, files and tracking add to bare Ray Tune, in time and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.turns import Partner, serve_turns

TRIALS = 2_000
NODES, CPUS = 4, 4
MAX_PAIRS = 3
MAX_KB_PER_TRIAL = 100.0
WARM_TRIALS = 400  # while processes start; neither time nor memory of them counts


def measure(settings: Settings) -> Report:
    """Seconds per no-op trial of a sweep : of bare Ray Tune with the same thin trials; memory of the sweep's driver."""
    from benchmarks import simulated

    ours: list[float] = []
    theirs: list[float] = []
    memory: list[float] = []
    mlflow: list[float] = []
    pairs = min(settings.pairs, MAX_PAIRS)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, simulated.cluster(NODES, CPUS) as ray:
        address = ray.get_runtime_context().gcs_address
        for pair in range(pairs):
            folder = str(Path(name) / str(pair))
            with Partner(_sweeps, address, folder) as sweep:
                seconds, kilobytes, behind = sweep.turn(TRIALS)
            ours.append(seconds)
            memory.append(kilobytes)
            mlflow.append(round(behind, 1))
            with Partner(_bare, address, folder) as bare:
                theirs.append(bare.turn(TRIALS)[0])
    time_per_trial = Comparison(
        "time per no-op trial",
        (
            f"{TRIALS} trials of a sweep on {NODES} simulated nodes of {CPUS} CPUs: ledger, published files, MLflow",
            "the same thin trials in bare Ray Tune, actors reused, loggers off",
        ),
        ours,
        theirs,
        "s",
        Goal(1.15),
    )
    memory_per_trial = Comparison(
        "driver memory per trial",
        (f"growth of the driver's resident memory from {WARM_TRIALS} trials to {TRIALS}", "the goal"),
        memory,
        [MAX_KB_PER_TRIAL] * pairs,
        "KB",
        Goal(1.0),
    )
    return Report(
        [time_per_trial, memory_per_trial], {"trials": TRIALS, "slots": NODES * CPUS, "mlflow_behind_seconds": mlflow}
    )


def _sweeps(connection: Connection, address: str, folder: str) -> None:
    from benchmarks import simulated
    from orchestrator import run
    from orchestrator.run_request import Request

    def one(trials: int) -> tuple[float, float, float]:
        planned = simulated.plan(_made(folder), "noop", trials)
        clock = simulated.Clock(WARM_TRIALS)
        memory: dict[int, float] = {}

        def seen(_trial_id: str, event: Mapping[str, Any]) -> None:
            if event["kind"] == "ended":
                clock.ended()
                memory[len(memory)] = _resident_kb() if len(memory) in (WARM_TRIALS, trials - 1) else 0.0

        with run.cluster(address) as ray:
            behind = simulated.sweep(
                ray, Path(folder), "noop", planned, "benchmarks.noop:nothing", Request(1.0, 0.0), seen
            )
        grown = (memory[trials - 1] - memory[WARM_TRIALS]) / (trials - 1 - WARM_TRIALS)
        return clock.seconds_per_trial, grown, behind

    serve_turns(connection, one)


def _bare(connection: Connection, address: str, folder: str) -> None:
    from benchmarks import simulated
    from orchestrator import run
    from orchestrator.run_request import Request

    def one(trials: int) -> tuple[float, float]:
        planned = simulated.plan(_made(folder), "bare", trials)
        with run.cluster(address) as ray:
            clock = simulated.Clock(WARM_TRIALS)
            simulated.bare(ray, Path(folder), "bare", planned, "benchmarks.noop:nothing", Request(1.0, 0.0), clock)
            return clock.seconds_per_trial, 0.0

    serve_turns(connection, one)


def _made(folder: str) -> Path:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _resident_kb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return float(line.split()[1])
    raise RuntimeError("the system does not say how much memory a process has")
