"""Trials of a quarter of a GPU up to four of them on simulated nodes: what of the GPUs is in use while trials wait."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import simulated
from benchmarks.report import Comparison, Goal, Report, Settings
from orchestrator.attempt import Job, Outcome
from orchestrator.attempt import Report as Tell
from orchestrator.layout import TrialLayout
from orchestrator.plan import PlannedTrial
from orchestrator.run_request import Request

NODES, GPUS, CPUS = 2, 4, 16  # each node's
SECONDS = 20.0
CPUS_OF_RANK = 0.5
GPUS_AND_RANKS = ((0.25, 1), (0.5, 1), (1.0, 1), (2.0, 2), (4.0, 4))
SIZES = tuple(Request(CPUS_OF_RANK * ranks, gpus, ranks) for gpus, ranks in GPUS_AND_RANKS)
COUNTS = (32, 16, 12, 8, 6)  # of each size; 8, 8, 12, 16 and 24 GPUs together, 170 s of 8 GPUs
_SAMPLE_SECONDS = 0.25
_SECONDS_VARIABLE = "BENCHMARK_SECONDS"


def hold(job: Job, layout: TrialLayout, number: int, report: Tell, should_stop: Any) -> Outcome:
    """Hold the GPUs for the seconds that the environment names, and write down which they were and when."""
    begun = time.monotonic()
    time.sleep(float(os.environ[_SECONDS_VARIABLE]))
    context = sys.modules["ray"].get_runtime_context()
    held = {
        "node": context.get_node_id(),
        "gpus": os.environ["CUDA_VISIBLE_DEVICES"].split(","),
        "share": job.gpus,
        "begun": begun,
        "ended": time.monotonic(),
    }
    (layout.attempt(number) / f"held_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(held))
    report(1, {"x": 1.0})
    return Outcome("finished", steps=1)


def measure(settings: Settings) -> Report:
    """GPUs that placement groups have taken : all GPUs, while trials wait."""
    use = run(NODES, CPUS, GPUS, COUNTS, SECONDS)
    all_gpus = float(NODES * GPUS)
    taken = Comparison(
        "GPUs in use while trials wait",
        ("the mean number of GPUs that trials have", "GPUs of all nodes"),
        [use.taken],
        [all_gpus],
        "GPUs",
        Goal(0.95, at_most=False),
    )
    working = Comparison(
        "GPUs whose trial works, its processes having started",
        ("their mean number", "GPUs of all nodes"),
        [use.working],
        [all_gpus],
        "GPUs",
        None,
    )
    counts = {
        "trials": sum(COUNTS),
        "trial_seconds": SECONDS,
        "seconds_while_trials_wait": round(use.waiting_seconds, 1),
        "seconds": round(use.seconds, 1),
        "ideal_seconds": SECONDS * sum(n * size.gpus for n, size in zip(COUNTS, SIZES, strict=True)) / all_gpus,
        "most_of_one_gpu": use.most_of_one_gpu,
        "median_wait_by_gpus": use.median_wait_by_gpus,
    }
    return Report([taken, working], counts)


@dataclass(frozen=True)
class Held:
    """What one rank held: a share of GPUs of a node, and when, on the machine's monotonic clock."""

    node: str
    gpus: Sequence[str]
    share: float
    begun: float
    ended: float


@dataclass(frozen=True)
class Use:
    """How a sweep of mixed sizes used the GPUs; `taken` and `working` are means while trials waited."""

    taken: float
    working: float
    waiting_seconds: float
    seconds: float
    most_of_one_gpu: float  # of the shares of one GPU, at any moment
    held: Sequence[Held]
    median_wait_by_gpus: Mapping[str, float]  # seconds from the first trial's beginning to that of trials of a size


def run(nodes: int, cpus: int, gpus: int, counts: Sequence[int], seconds: float) -> Use:
    """A sweep of `counts` trials of each size in random order, on simulated nodes of so many CPUs and fake GPUs.

    Raises:
        RuntimeError: a trial did not finish.
    """
    sizes = [size for count, size in zip(counts, SIZES, strict=True) for _ in range(count)]
    random.Random(0).shuffle(sizes)
    os.environ[_SECONDS_VARIABLE] = str(seconds)  # of the nodes, and so of all ranks
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as name,
        simulated.cluster(nodes, cpus, gpus) as ray,
        _sampled(ray, gpus * nodes) as samples,
    ):
        planned = simulated.plan(Path(name), "mixed", len(sizes))
        wanted = {trial.trial_id: size for trial, size in zip(planned, sizes, strict=True)}
        begun: dict[str, float] = {}

        def seen(trial_id: str, event: Mapping[str, Any]) -> None:
            if event["kind"] == "started":
                begun[trial_id] = time.monotonic()

        def request(trial: PlannedTrial) -> Request:
            return wanted[trial.trial_id]

        simulated.sweep(ray, Path(name), "mixed", planned, f"{__name__}:hold", request, seen)
        held = [Held(**json.loads(path.read_text())) for path in Path(name).rglob("held_*.json")]
    return _use(samples, held, begun, wanted)


def _use(
    samples: Sequence[tuple[float, float]],
    held: Sequence[Held],
    begun: Mapping[str, float],
    wanted: Mapping[str, Request],
) -> Use:
    since, until = min(begun.values()), max(begun.values())
    waits: dict[str, list[float]] = defaultdict(list)
    for trial_id, moment in begun.items():
        waits[f"{wanted[trial_id].gpus:g}"].append(moment - since)
    working = sum(each.share * max(0.0, min(each.ended, until) - max(each.begun, since)) for each in held)
    return Use(
        taken=statistics.mean(gpus for moment, gpus in samples if since <= moment <= until),
        working=working / (until - since),
        waiting_seconds=until - since,
        seconds=max(each.ended for each in held) - since,
        most_of_one_gpu=max(most(each) for each in _by_gpu(held).values()),
        held=held,
        median_wait_by_gpus={size: round(statistics.median(each), 1) for size, each in sorted(waits.items())},
    )


def _by_gpu(held: Sequence[Held]) -> Mapping[tuple[str, str], list[Held]]:
    found: dict[tuple[str, str], list[Held]] = defaultdict(list)
    for each in held:
        for gpu in each.gpus:
            found[each.node, gpu].append(each)
    return found


def most(held: Sequence[Held]) -> float:
    """The largest sum of shares that were held at one moment."""
    changes = sorted([(each.ended, -each.share) for each in held] + [(each.begun, each.share) for each in held])
    most = now = 0.0
    for _, change in changes:  # at equal times ends come first
        now += change
        most = max(most, now)
    return most


@contextmanager
def _sampled(ray: Any, gpus: int) -> Iterator[list[tuple[float, float]]]:
    """(moment, number of GPUs that placement groups have), several times a second while the block runs."""
    samples: list[tuple[float, float]] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            samples.append((time.monotonic(), gpus - ray.available_resources().get("GPU", 0.0)))

    thread = threading.Thread(target=sample, name="samples", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
