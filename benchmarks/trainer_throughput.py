"""Images per second of our whole training step against two hand-written loops with the same model and data."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import plain
from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.trials import decoded, trial
from benchmarks.turns import train_in_turns

WORKERS = 2
SECONDS = 75.0  # after which there are no more turns, per shape
REFILL_SECONDS = 0.5  # for the workers to fill their queue and rest, so that they disturb nobody else's turn

# Shape → steps per turn, which make a turn about a second.
STEPS = {"tiny/8 64px": 2, "nano/8 64px": 8}


def measure(settings: Settings) -> Report:
    """Whole step of `trainers.train` : plain loop, and : loop with DataLoader workers, as images/s, per shape.

    All sides have as many cores as training has threads, as trials of a sweep have that fills its machine.
    """
    torch.set_num_threads(settings.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-settings.threads :])  # workers get no cores of their own
    comparisons = [comparison for shape in STEPS for comparison in _shape(shape, settings)]
    return Report(comparisons, {"steps_per_turn": STEPS, "workers": WORKERS})


def _shape(shape: str, settings: Settings) -> Iterator[Comparison]:
    config, steps = trial(shape, settings.threads), STEPS[shape]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        data = decoded(config, Path(name))
        images, classes = data.train.images, np.asarray(data.train.targets["classes"])
        num_classes = len(data.class_names)
        batched = plain.Loop(config, num_classes, plain.batched(config, images, classes, num_classes))
        source = plain.WorkerBatches(config, images, classes, num_classes, WORKERS)
        workers = plain.Loop(config, num_classes, source)

        def with_workers() -> float:
            workers.steps(source.prefetched)  # what waited in the queue cost nothing in this turn
            seconds = workers.steps(steps)
            time.sleep(REFILL_SECONDS)
            return seconds

        sides = [lambda: batched.steps(steps), with_workers]
        seconds = train_in_turns(config, Path(name), sides, blocks=settings.pairs, seconds=SECONDS, steps=steps)
    ours, plainly, worked = ([steps * config.optim.batch_size / s for s in side] for side in seconds)
    own = f"trainers.train.train, deit3 {shape} fp32, batch {config.optim.batch_size}, whole step"
    by_batch = "hand-written loop, timm model, AdamW, torchvision v2 on whole batches (one draw per batch)"
    by_image = f"the same loop, torchvision v2 image by image in {WORKERS} DataLoader workers"
    yield Comparison(f"{shape}: plain loop", (own, by_batch), ours, plainly, "images/s", Goal(1.00, at_most=False))
    yield Comparison(f"{shape}: loader workers", (own, by_image), ours, worked, "images/s", Goal(1.10, at_most=False))
