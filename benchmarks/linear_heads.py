"""DINOv2's 52 heads of the linear probe trained at once, against one head: with the features, and on them alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.turns import Side
from trainers.config import LinearConfig, TrialConfig, resolve
from trainers.data import DataSet, Split
from trainers.probe_presets import PRESETS
from trainers.probes import Context, heads
from trainers.probes.crops import RandomCrops
from trainers.probes.heads import Group
from trainers.probes.linear import Linear
from trainers.probes.seen import SeenSplit
from trainers.streams import Streams
from trainers.vit import ViT

AT_MOST = 3.0  # times one head
SECONDS = 60.0  # after which there are no more pairs, per comparison
IMAGES = 2_000  # that the nano recipe's probes learn from
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # DINOv2's
SIDES = (
    "52 heads at once: 13 learning rates, last 1 and 4 blocks, without and with mean patch",
    "one: last class token",
)

NANO = {"model.size": "nano", "model.patch_size": 8, "model.image_size": 32}
SMALL = {"model.size": "small", "model.patch_size": 16, "model.image_size": 224}

Run = Callable[[bool], None]  # of all heads, or of one


def measure(settings: Settings) -> Report:
    """Seconds of all heads over those of one; the goal is for the whole probe, features included."""
    torch.set_num_threads(settings.threads)
    goal = Goal(AT_MOST)
    nano, small = _seen(resolve(NANO), IMAGES, 10), _seen(resolve(SMALL), 64, 1_000)
    rows: list[tuple[str, Run, Goal | None]] = [
        ("nano, 10 classes: 2,000 images extracted once, 500 steps of 256", _whole(nano), goal),
        ("nano, 10 classes: 8 steps of 256 random crops", _cropped(nano, 256, 8, 10), goal),
        ("small at 224 px, 1,000 classes: 1 step of 32 random crops", _cropped(small, 32, 1, 1_000), goal),
        ("nano, 10 classes: 200 steps of 256 on features", _alone(64, 256, 200, 10), None),
        ("small, 1,000 classes: 1 step of 1,024 on features", _alone(384, 1_024, 1, 1_000), None),
    ]
    return Report([Comparison(name, SIDES, *_in_turns(run, settings.pairs), "s", wanted) for name, run, wanted in rows])


def _seen(config: TrialConfig, count: int, classes: int) -> SeenSplit:
    """Noise, and a ViT that has not learned."""
    random = np.random.Generator(np.random.PCG64(0))
    assert isinstance(config.model.image_size, int)
    side = config.model.image_size
    pixels = random.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    split = Split(pixels, {"classes": random.integers(0, classes, count)})
    names = tuple(str(number) for number in range(classes))
    data = DataSet("noise", names, ("classes",), split, split, split, "0" * 16)
    backbone = ViT(config.model, Streams(0)).requires_grad_(False)
    return SeenSplit(backbone, config.model, data, "train", np.arange(count), torch.device("cpu"))


def _whole(seen: SeenSplit) -> Run:
    """The probe as a trial has it: features, heads, and the choice among them; for one head there is none."""
    probe = Linear(LinearConfig.model_validate(PRESETS["linear"]["grid"]), Context(Streams(0), None, "deit3"))
    batches = [torch.randint(0, IMAGES, (256,)) for _ in range(500)]

    def run(many: bool) -> None:
        fresh = replace(seen, reads=probe.reads if many else frozenset({"cls"}))  # what was read before is forgotten
        if many:
            probe.fit(fresh, fresh)
            return
        cls_nD, classes = fresh.features["cls"], fresh.classes
        pairs = ((cls_nD[index], classes[index]) for index in batches)
        heads.train(pairs, len(batches), _groups(cls_nD.shape[1], len(seen.data.class_names), many), torch.ones(1))

    return run


def _cropped(seen: SeenSplit, batch: int, steps: int, classes: int) -> Run:
    """Steps on features that are extracted anew, as in the protocol of the paper."""
    index = torch.arange(batch)

    def run(many: bool) -> None:
        reads = ("cls_blocks", "mean_patch") if many else ("cls",)
        random = RandomCrops(seen, reads, torch.Generator().manual_seed(0))

        def wide() -> Tensor:
            rows = random.features(index)
            return torch.cat([rows[name].flatten(1) for name in reads], dim=1)

        width = seen.backbone.embed_dim
        assert isinstance(width, int)
        pairs = ((wide(), seen.classes[index]) for _ in range(steps))
        heads.train(pairs, steps, _groups(width, classes, many), _rates(many))

    return run


def _alone(width: int, batch: int, steps: int, classes: int) -> Run:
    """Steps on features that are there."""
    features, labels = torch.randn(IMAGES, 5 * width), torch.randint(0, classes, (IMAGES,))
    batches = [torch.randint(0, IMAGES, (batch,)) for _ in range(steps)]

    def run(many: bool) -> None:
        read = features if many else features[:, :width]
        pairs = ((read[index], labels[index]) for index in batches)
        heads.train(pairs, steps, _groups(width, classes, many), _rates(many))

    return run


def _groups(width: int, classes: int, many: bool) -> list[Group]:
    """What trainers.probes.linear.inputs_of gives for blocks 1 and 4, or the class token of one block alone."""
    ends = [(3, 4), (0, 4), (3, 5), (0, 5)] if many else [(0, 1)]
    return [Group(slice(a * width, b * width), torch.zeros((b - a) * width, classes)) for a, b in ends]


def _rates(many: bool) -> Tensor:
    return torch.tensor(RATES if many else RATES[:1])


def _in_turns(run: Run, pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of all heads and of one, pair by pair after one that does not count."""
    sides: Sequence[Side] = [lambda many=many: _seconds(run, many) for many in (True, False)]  # type: ignore[misc]
    deadline = time.perf_counter() + SECONDS
    rows = [[side() for side in sides] for _ in range(2)][1:]
    while len(rows) < pairs and time.perf_counter() < deadline:
        rows.append([side() for side in sides])
    return [row[0] for row in rows], [row[1] for row in rows]


def _seconds(run: Run, many: bool) -> float:
    started = time.perf_counter()
    run(many)
    return time.perf_counter() - started
