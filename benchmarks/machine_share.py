"""Which share of the cores' matrix rate our whole training step reaches, against a plain loop on synthetic tensors."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import plain
from benchmarks.report import Comparison, Goal, Report, Settings, rounded
from benchmarks.trials import decoded, described, trial
from benchmarks.turns import train_in_turns
from orchestrator.estimate import forward_flops
from trainers.catalog import MODEL_SIZES
from trainers.config import TrialConfig

# Shape and precision → steps per turn. A step of small at 224 px is three seconds of two cores in fp32.
STEPS = {("small/16 224px", "fp32"): 1, ("small/16 224px", "bf16"): 1, ("tiny/8 64px", "fp32"): 3}
SECONDS = 200.0  # after which there are no more turns, per shape
GEMM_SIDE, GEMM_SECONDS = 2_048, 0.3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TRAINING_STEP = 3  # forward, and backward at twice its cost


def measure(settings: Settings) -> Report:
    """Whole step : synthetic loop as FLOP/s; the shares of the matrix rate of the same run are comparisons too."""
    torch.set_num_threads(settings.threads)
    gflops: dict[str, float] = {}
    comparisons = [comparison for shape in STEPS for comparison in _shape(*shape, settings, gflops)]
    goals = [c for c in comparisons if c.goal is not None]
    shares = [c for c in comparisons if c.goal is None]
    return Report([*goals, *shares], {"steps_per_turn": list(STEPS.values()), "gflop_per_step": gflops})


def _shape(shape: str, precision: str, settings: Settings, gflops: dict[str, float]) -> Iterator[Comparison]:
    steps, config = STEPS[shape, precision], trial(shape, settings.threads, precision=precision)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        num_classes = len(decoded(config, Path(name)).class_names)
        loop = plain.Loop(config, num_classes, plain.synthetic(config, num_classes))
        sides = [lambda: loop.steps(steps), lambda: seconds_per_product(DTYPES[precision])]
        whole, synthetic, product = train_in_turns(
            config, Path(name), sides, blocks=settings.pairs, seconds=SECONDS, steps=steps
        )
    flops = steps * config.optim.batch_size * _TRAINING_STEP * _forward_flops(config, num_classes)
    ours, plainly = [flops / s / 1e9 for s in whole], [flops / s / 1e9 for s in synthetic]
    rate = [2 * GEMM_SIDE**3 / s / 1e9 for s in product]
    own = f"{described(shape, config)}, whole step"
    other = "hand-written loop, same timm model and AdamW, one synthetic batch, no augmentation"
    gemm = f"{precision} product of {GEMM_SIDE} x {GEMM_SIDE} matrices"
    label = f"{shape} {precision}"
    gflops[label] = rounded(flops / steps / 1e9)
    yield Comparison(f"{label}: synthetic loop", (own, other), ours, plainly, "GFLOP/s", Goal(0.97, at_most=False))
    yield Comparison(f"{label}: share of the matrix rate", (own, gemm), ours, rate, "GFLOP/s", None)
    yield Comparison(f"{label}: synthetic loop's share", (other, gemm), plainly, rate, "GFLOP/s", None)


def _forward_flops(config: TrialConfig, num_classes: int) -> float:
    model = config.model
    assert isinstance(model.image_size, int)
    patches = (model.image_size // model.patch_size) ** 2
    return forward_flops(MODEL_SIZES[model.size], patches, model.num_registers, model.patch_size, num_classes)


def seconds_per_product(dtype: torch.dtype) -> float:
    """Median time of one large matrix product on the CPU."""
    left, right = torch.randn(2, GEMM_SIDE, GEMM_SIDE).to(dtype)
    out = torch.empty(GEMM_SIDE, GEMM_SIDE, dtype=dtype)
    times: list[float] = []
    while len(times) < 3 or sum(times) < GEMM_SECONDS:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
