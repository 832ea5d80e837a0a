"""Which share of the cores' matrix rate our whole training step reaches, against a plain loop on synthetic tensors."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import plain
from benchmarks.report import Comparison, Goal, Report, Settings, rounded
from benchmarks.trials import decoded, trial
from benchmarks.turns import train_in_turns
from orchestrator.estimate import forward_flops
from trainers.catalog import MODEL_SIZES
from trainers.config import TrialConfig

SHAPE = "tiny/8 64px"
STEPS = 3
SECONDS = 150.0  # after which there are no more turns
GEMM_SIDE, GEMM_SECONDS = 2_048, 0.3
_TRAINING_STEP = 3  # forward, and backward at twice its cost


def measure(settings: Settings) -> Report:
    """Whole step : synthetic loop as FLOP/s; the shares of the matrix rate of the same run are comparisons too."""
    torch.set_num_threads(settings.threads)
    config = trial(SHAPE, settings.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        num_classes = len(decoded(config, Path(name)).class_names)
        loop = plain.Loop(config, num_classes, plain.synthetic(config, num_classes))
        sides = [lambda: loop.steps(STEPS), _seconds_per_product]
        whole, synthetic, product = train_in_turns(
            config, Path(name), sides, blocks=settings.pairs, seconds=SECONDS, steps=STEPS
        )
    flops = STEPS * config.optim.batch_size * _TRAINING_STEP * _forward_flops(config, num_classes)
    ours, plainly = [flops / s / 1e9 for s in whole], [flops / s / 1e9 for s in synthetic]
    rate = [2 * GEMM_SIDE**3 / s / 1e9 for s in product]
    own = f"trainers.train.train, deit3 {SHAPE} fp32, batch {config.optim.batch_size}, whole step"
    other = "hand-written loop, same timm model and AdamW, one synthetic batch, no augmentation"
    gemm = f"fp32 product of {GEMM_SIDE} x {GEMM_SIDE} matrices"
    comparisons = [
        Comparison("synthetic loop", (own, other), ours, plainly, "GFLOP/s", Goal(0.97, at_most=False)),
        Comparison("share of the matrix rate", (own, gemm), ours, rate, "GFLOP/s", None),
        Comparison("synthetic loop's share", (other, gemm), plainly, rate, "GFLOP/s", None),
    ]
    gflops = rounded(flops / STEPS / 1e9)
    return Report(comparisons, {"steps_per_turn": STEPS, "gflop_per_step": gflops})


def _forward_flops(config: TrialConfig, num_classes: int) -> float:
    model = config.model
    assert isinstance(model.image_size, int)
    patches = (model.image_size // model.patch_size) ** 2
    return forward_flops(MODEL_SIZES[model.size], patches, model.num_registers, model.patch_size, num_classes)


def _seconds_per_product() -> float:
    """Median time of one large matrix product."""
    left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE)
    out = torch.empty(GEMM_SIDE, GEMM_SIDE)
    times: list[float] = []
    while len(times) < 3 or sum(times) < GEMM_SECONDS:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
