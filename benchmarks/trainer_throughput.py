"""Images per second of our whole training step against hand-written loops with the same model and data.

Against plain PyTorch for deit3, and for dinov2 against the loop that users of lightly write.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import plain
from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.trials import decoded, described, trial
from benchmarks.turns import train_in_turns
from trainers import vit
from trainers.config import TrialConfig
from trainers.methods import Batch, Upcoming, Views
from trainers.methods.dinov2 import DinoV2
from trainers.multicrop import NUM_GLOBAL
from trainers.step import Stepper
from trainers.streams import Streams

WORKERS = 2
REFILL_SECONDS = 0.5  # for the workers to fill their queue and rest, so that they disturb nobody else's turn

# Shape → steps per turn, which make a turn about a second, and seconds after which there are no more turns.
DEIT3 = {"tiny/8 64px": 2, "nano/8 64px": 8}
DEIT3_SECONDS = 75.0
DINOV2 = {"dinov2 tiny/8 64px": ("fp32", 1), "dinov2 small/16 224px": ("bf16", 1)}
DINOV2_SECONDS = 400.0
KEPT = 4  # batches whose crops and masks are made beforehand for the models alone

_BY_BATCH = "hand-written loop, timm model, AdamW, torchvision v2 on whole batches (one draw per batch)"
_BY_IMAGE = f"the same loop, torchvision v2 image by image in {WORKERS} DataLoader workers"
_LIGHTLY = f"lightly's DINOv2 in the loop of its example, DINOTransform image by image in {WORKERS} DataLoader workers"
_LIGHTLY_MODEL = "the same of lightly's loop, on the same crops and masks"


def measure(settings: Settings) -> Report:
    """Whole step of `trainers.train` : plain loop, : loop with DataLoader workers, : lightly's, as images/s, per shape.

    All sides have as many cores as training has threads, as trials of a sweep have that fills its machine.

    Raises:
        ModuleNotFoundError: lightly is not installed.
    """
    lightly_dinov2 = _lightly_dinov2()
    torch.set_num_threads(settings.threads)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-settings.threads :])  # workers get no cores of their own
    comparisons = [comparison for shape in DEIT3 for comparison in _deit3(shape, settings)]
    counts: dict[str, object] = {"steps_per_turn": DEIT3, "workers": WORKERS}
    for shape in DINOV2:
        comparisons += _dinov2(shape, settings, lightly_dinov2, counts)
    return Report(comparisons, counts)


def _lightly_dinov2() -> ModuleType:
    try:
        from benchmarks import lightly_dinov2
    except ModuleNotFoundError as error:
        error.add_note("the other side of this benchmark is installed by: pip install -e '.[bench]'")
        raise
    return lightly_dinov2


def _deit3(shape: str, settings: Settings) -> Iterator[Comparison]:
    config, steps = trial(shape, settings.threads), DEIT3[shape]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        data = decoded(config, Path(name))
        images, classes = data.train.images, np.asarray(data.train.targets["classes"])
        num_classes = len(data.class_names)
        batched = plain.Loop(config, num_classes, plain.batched(config, images, classes, num_classes))
        source = plain.WorkerBatches(config, images, classes, num_classes, WORKERS)
        workers = plain.Loop(config, num_classes, source)

        def with_workers() -> float:
            workers.steps(source.prefetched)  # what waited in the queue cost nothing in this turn
            return _rested(lambda: workers.steps(steps))

        sides = [lambda: batched.steps(steps), with_workers]
        seconds = train_in_turns(config, Path(name), sides, blocks=settings.pairs, seconds=DEIT3_SECONDS, steps=steps)
    ours, plainly, worked = (_rates(side, steps, config) for side in seconds)
    own = f"{described(shape, config)}, whole step"
    yield Comparison(f"{shape}: plain loop", (own, _BY_BATCH), ours, plainly, "images/s", Goal(1.00, at_most=False))
    yield Comparison(f"{shape}: loader workers", (own, _BY_IMAGE), ours, worked, "images/s", Goal(1.10, at_most=False))


def _dinov2(
    shape: str, settings: Settings, lightly_dinov2: ModuleType, counts: dict[str, object]
) -> Iterator[Comparison]:
    """Whole steps first, then the models alone: what both do once crops and masks are there."""
    precision, steps = DINOV2[shape]
    config = trial(shape, settings.threads, precision=precision)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        data = decoded(config, Path(name))
        model = ModelAlone(config, data.train.images)
        source = lightly_dinov2.from_workers(config, data.train.images, WORKERS)
        whole, alone = lightly_dinov2.Loop(config, source), lightly_dinov2.Loop(config, model.batches())
        sides = [
            lambda: _rested(lambda: whole.steps(steps)),
            lambda: model.steps(steps),
            lambda: float(alone.steps(steps)),
        ]
        seconds = train_in_turns(config, Path(name), sides, blocks=settings.pairs, seconds=DINOV2_SECONDS, steps=steps)
    counts[shape] = _equal_settings(config) | {"lightly_attention": lightly_dinov2.attention_form(whole)}
    ours, theirs, our_model, their_model = (_rates(side, steps, config) for side in seconds)
    goal, own = Goal(1.3, at_most=False), described(shape, config)
    yield Comparison(f"{shape}: lightly", (f"{own}, whole step", _LIGHTLY), ours, theirs, "images/s", goal)
    model_side = f"trainers.step.Stepper, {shape} {precision}, crops and masks made beforehand"
    yield Comparison(
        f"{shape}: lightly, model alone", (model_side, _LIGHTLY_MODEL), our_model, their_model, "images/s", None
    )


def _rested(work: Callable[[], float]) -> float:
    seconds = work()
    time.sleep(REFILL_SECONDS)
    return seconds


def _rates(seconds: list[float], steps: int, config: TrialConfig) -> list[float]:
    return [steps * config.optim.batch_size / s for s in seconds]


def _equal_settings(config: TrialConfig) -> dict[str, object]:
    """What both sides have alike."""
    assert config.dinov2 is not None
    crops, head = config.dinov2.crops, config.dinov2.head
    return {
        "registers": config.model.num_registers,
        "drop_path": config.model.drop_path,
        "head": [head.hidden, head.bottleneck, head.prototypes],
        "crops": [f"{NUM_GLOBAL} x {config.model.image_size} px", f"{crops.num_local} x {crops.local_size} px"],
    }


class ModelAlone:
    """The dinov2 step of `trainers.train` on a few batches of crops and masks made beforehand."""

    def __init__(self, config: TrialConfig, images: NDArray[np.uint8]) -> None:
        streams = Streams(config.seed)
        method = _OnKeptViews(config, vit.build(config.model, streams), 1, streams)
        self._size = config.optim.batch_size
        self._batches = [
            Batch(torch.from_numpy(images[i * self._size :][: self._size].copy()), {}) for i in range(KEPT)
        ]
        self._views = [self._made(method, batch, step) for step, batch in enumerate(self._batches)]
        method.kept = itertools.cycle(self._views)
        self.method = method.train()
        self._stepper = Stepper(config, method, streams, torch.device("cpu"))
        self._step = 0

    def _made(self, method: DinoV2, batch: Batch, step: int) -> Views:
        prepared = method.prepare(Upcoming(step, self._size, np.arange(self._size)))
        return DinoV2.views(method, Batch(batch.images, {}, prepared), method.streams)

    def batches(self) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        """The same crops, one tensor [B, 3, side, side] each, and masks [2B, N], for ever."""
        for views in itertools.cycle(self._views):
            crops = [crop for name in ("global", "local") for crop in torch.split(views[name], self._size)]
            yield crops, views["masks"]

    def steps(self, count: int) -> float:
        """Train on so many batches; seconds."""
        started = time.perf_counter()
        for _ in range(count):
            self._stepper([self._batches[self._step % KEPT]], self._step)
            self._step += 1
        return time.perf_counter() - started


class _OnKeptViews(DinoV2):
    """DINOv2 whose views are not made of the batch, but taken from `kept`."""

    kept: Iterator[Views]

    def views(self, batch: Batch, streams: Streams) -> Views:
        """The next of `kept`."""
        return next(self.kept)
