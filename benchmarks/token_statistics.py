"""What the token statistics cost, timed by themselves, against the training step without them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.trials import decoded, trial
from benchmarks.turns import Side, train_in_turns
from trainers import vit
from trainers.augment import normalize
from trainers.config import TrialConfig
from trainers.data import DataSet
from trainers.evaluate import Evaluation
from trainers.measurement import Subject
from trainers.streams import Streams
from trainers.tokens.stream import TrainingStream

# Shape → steps per turn. The steps between two probe passes are those of sweeps/num_registers.yaml.
STEPS = {"tiny/8 64px": 2, "nano/8 64px": 8, "nano/8 32px": 20}
PROBE_EVERY = 600
SECONDS = 50.0  # after which there are no more turns, per shape
REGISTERS = 4


def measure(settings: Settings) -> Report:
    """Per shape: statistics of a step : step without them; probe passes, plain and measured : steps between two."""
    torch.set_num_threads(settings.threads)
    comparisons = [comparison for shape in STEPS for comparison in _shape(shape, settings)]
    goals = [c for c in comparisons if c.goal is not None]
    rest = [c for c in comparisons if c.goal is None]
    return Report([*goals, *rest], {"steps_per_turn": STEPS, "registers": REGISTERS, "probe_every": PROBE_EVERY})


def _shape(shape: str, settings: Settings) -> Iterator[Comparison]:
    steps = STEPS[shape]
    config = trial(shape, settings.threads, model__num_registers=REGISTERS, tokens__training_stream=False)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        data = decoded(config, Path(name))
        stream = _StreamSide(config, data, steps)
        sides: list[Side] = [stream, _ProbeSide(config, data), _MeasuredSide(config, data)]
        seconds = train_in_turns(config, Path(name), sides, blocks=settings.pairs, seconds=SECONDS, steps=steps)
    without, statistics, probe, measured = (
        [1e3 * s / n for s in side] for side, n in zip(seconds, (steps, steps, 1, 1), strict=True)
    )
    step = f"trainers.train.train, deit3 {shape} fp32, batch {config.optim.batch_size}, statistics off, a whole step"
    taken = "norms of all tokens of all layers and TrainingStream.update, of one such step"
    yield Comparison(f"{shape}: training stream", (taken, step), statistics, without, "ms", Goal(0.01))
    passed = f"one pass over the {config.tokens.probe_images} probe images with exact statistics"
    between = f"{PROBE_EVERY} such steps"
    many = [PROBE_EVERY * s for s in without]
    yield Comparison(f"{shape}: probe pass, amortised", (passed, between), probe, many, "ms", None)
    named = f"{passed}, and {', '.join(config.tokens.measurements)}"
    yield Comparison(f"{shape}: probe pass with measurements, amortised", (named, between), measured, many, "ms", None)


class _StreamSide:
    """The statistics of a step as `trainers.train` takes them, on the residual streams of a real forward pass."""

    def __init__(self, config: TrialConfig, data: DataSet, steps: int) -> None:
        backbone = cast(vit.ViT, vit.build(config.model, Streams(0)))
        self._layers: list[Tensor] = []
        backbone.tap = lambda _, x_BTD: self._layers.append(x_BTD.detach())
        backbone.tokens(normalize(torch.from_numpy(data.train.images[: config.optim.batch_size].copy())))
        self._stream = TrainingStream(backbone.depth + 1, backbone.num_registers)
        self._steps = steps

    def __call__(self) -> float:
        started = time.perf_counter()
        for _ in range(self._steps):
            norms = [torch.linalg.vector_norm(x_BTD, dim=-1, dtype=torch.float32) for x_BTD in self._layers]
            self._stream.update(torch.stack(norms))
        return time.perf_counter() - started


class _ProbeSide:
    """One pass over the probe images, with the exact statistics of all layers."""

    def __init__(self, config: TrialConfig, data: DataSet) -> None:
        streams = Streams(0)
        self._backbone = vit.build(config.model, streams)
        self._evaluation = Evaluation(config, data, streams, torch.device("cpu"))

    def __call__(self) -> float:
        started = time.perf_counter()
        self._pass()
        return time.perf_counter() - started

    def _pass(self) -> Subject:
        subject = self._evaluation.subject(self._backbone, 0)
        self._evaluation.token_rows(subject, "raw")
        return subject


class _MeasuredSide(_ProbeSide):
    """The same, and what is measured at every evaluation besides norms."""

    def _pass(self) -> Subject:
        subject = super()._pass()
        self._evaluation.measure(subject, "raw", Path("unused"), at_end=False)
        return subject
