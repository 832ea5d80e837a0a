"""The only training loop: one configuration in, reports, files and checkpoints out; resumes exactly."""

from __future__ import annotations

import gc
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from torch import Tensor, nn

from trainers import catalog, checkpoint, optim, vit
from trainers.config import TrialConfig, trial_id
from trainers.data import open_data
from trainers.dotted import load
from trainers.evaluate import Evaluation
from trainers.loader import TARGETS, Order, batches, split_batch
from trainers.methods import Batch, Method, Progress
from trainers.streams import Streams
from trainers.tokens import table as token_table
from trainers.tokens.norms import NormRow, last_layer_metrics
from trainers.tokens.stream import TrainingStream

log = logging.getLogger(__name__)

Report = Callable[[int, Mapping[str, float]], None]
Stop = Callable[[], str | None]

_LOG_POINTS = 50  # how often the loss is looked at and reported in a run
_COLLECT_EVERY = 150  # steps between runs of Python's garbage collector, which is off otherwise
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Result:
    """How training ended.

    Attributes:
        status: finished, diverged, or what `should_stop` answered (stopped, interrupted).
        steps: optimiser steps done; of a diverged run the last one whose loss was known to be finite.
        images_per_second: of training alone, evaluation left out; null before the second log point.
    """

    status: str
    steps: int
    images_per_second: float | None
    device: str
    data_fingerprint: str
    error: Mapping[str, str] | None = None


def train(
    config: TrialConfig,
    report: Report,
    directory: Path,
    *,
    cache: Path | None = None,
    resume_from: Iterable[Path] = (),
    should_stop: Stop = lambda: None,
) -> Result:
    """Run one trial to its end.

    Args:
        config: as `trainers.config.resolve` returns it.
        report: called with (step, {name: value}); after a resume also for what earlier attempts reported.
        directory: receives token_norms.parquet, probes.parquet, per_image.parquet, norm_map.npz and checkpoints/.
        cache: folder of decoded data sets, on a local disk; default is beside `directory`.
        resume_from: folders in which to look for the newest whole checkpoint, besides `directory`'s own.
        should_stop: asked at every step; an answer ends training there with a checkpoint and that status.

    Raises:
        ValueError: the data set or a setting cannot be used on this machine.
    """
    if not isinstance(config, TrialConfig) or not isinstance(config.model.image_size, int):
        raise ValueError("config is not a resolved TrialConfig; trainers.config.resolve makes one from settings")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    training = _Training(config, directory, cache or directory.parent / "cache")
    training.resume([*resume_from, directory / "checkpoints"], report)
    with _garbage_collector_off():
        try:
            return training.run(report, should_stop)
        except FloatingPointError as error:  # finite losses, but features that are not
            return training.diverged(str(error))


class _Training:
    """State of one run: model, optimiser, random streams, where it stands, and what was recorded."""

    def __init__(self, config: TrialConfig, directory: Path, cache: Path) -> None:
        self.config, self.directory = config, directory
        self.device = _device(config)
        assert isinstance(config.model.image_size, int), "the configuration is not resolved"
        self.data = open_data(config.data, config.execution, config.model.image_size, cache)
        self.streams = Streams(config.seed)
        self.backbone = vit.build(config.model, self.streams).to(self.device)
        self.method = self._build_method().to(self.device)
        self.optimizer = optim.build_optimizer(self.method, config.optim)
        self.ema = (
            None if config.optim.ema_decay is None else optim.EMA(self.backbone, cast(float, config.optim.ema_decay))
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.evaluation = Evaluation(config, self.data, self.streams, self.device)
        self.token_stream = self._build_token_stream()
        self.step = 0
        self.history: list[tuple[int, dict[str, float]]] = []
        self.rows: list[NormRow] = []
        self._loss_sums: dict[str, Tensor] = {}
        self._loss_steps = 0
        self._images, self._seconds = 0, 0.0
        self._last_good = 0  # the last step whose loss was looked at and finite

    def _build_method(self) -> Method:
        name = self.config.method
        build = load(catalog.METHODS[name].build if name in catalog.METHODS else name)
        return cast(Method, build(self.config, self.backbone, len(self.data.class_names), self.streams))

    def _build_token_stream(self) -> TrainingStream | None:
        if not (self.config.tokens.training_stream and isinstance(self.backbone, vit.ViT)):
            return None
        return TrainingStream(self.backbone.depth + 1, self.backbone.num_registers, self.device)

    def run(self, report: Report, should_stop: Stop) -> Result:
        """Train from `self.step` to the end."""
        config, steps = self.config, self.config.optim.steps
        log_every = max(1, steps // _LOG_POINTS)
        evaluate_at = {round(steps * i / config.evaluation.points) for i in range(1, config.evaluation.points + 1)}
        order = Order(len(self.data.train), config.optim.batch_size, self.streams)
        needs = catalog.METHODS[config.method].needs if config.method in catalog.METHODS else TARGETS
        self.method.train()
        saved = looked = time.monotonic()
        for batch in batches(self.data.train, order, self.step, steps, self.device, needs):
            if reason := should_stop():
                self._save()
                return self._result(reason)
            self._one_step(batch)
            if self.step % log_every and self.step not in evaluate_at and self.step < steps:
                if time.monotonic() - saved >= config.execution.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
                continue
            metrics = self._take_losses()  # the only wait for the device
            if not all(map(math.isfinite, metrics.values())):
                bad = ", ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))
                return self.diverged(f"{bad} between steps {self._last_good} and {self.step}")
            self._last_good = self.step
            self._seconds += time.monotonic() - looked
            if self.step in evaluate_at and self.step < steps:
                metrics |= self._evaluate()
            self._record(report, metrics)
            if self.step == steps or time.monotonic() - saved >= config.execution.checkpoint_seconds:
                self._save()
                saved = time.monotonic()
            looked = time.monotonic()
        self._finish(report)
        return self._result("finished")

    def _one_step(self, batch: Batch) -> None:
        """One optimiser step, nothing of which waits for the device."""
        optim.set_learning_rate(self.optimizer, optim.learning_rate(self.step, self.config.optim))
        progress = Progress(self.step, self.config.optim.steps)
        size = cast(int, self.config.optim.micro_batch_size)
        parts = len(batch.images) // size
        for part in split_batch(batch, size):
            with self._tapped():
                views = self.method.views(part, self.streams)
                with self._autocast():
                    losses = self.method.losses(views, progress)
            total = torch.stack(list(losses.values())).sum() / parts
            self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
            for name, loss in {"loss": total * parts, **(losses if len(losses) > 1 else {})}.items():
                self._loss_sums[name] = self._loss_sums.get(name, 0.0) + loss.detach() / parts
        self.scaler.unscale_(self.optimizer)
        if self.config.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.method.parameters(), self.config.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.backbone)
        self.method.after_step(progress)
        self.step += 1
        self._loss_steps += 1
        self._images += len(batch.images)
        if self.step % _COLLECT_EVERY == 0:
            gc.collect()

    @contextmanager
    def _tapped(self) -> Iterator[None]:
        """Adds the token norms of the forward pass inside to the statistics of the training stream."""
        if self.token_stream is None:
            yield
            return
        backbone = cast(vit.ViT, self.backbone)
        norms: list[Tensor] = []
        backbone.tap = lambda _, x_BTD: norms.append(
            torch.linalg.vector_norm(x_BTD.detach(), dim=-1, dtype=torch.float32)
        )
        try:
            yield
        finally:
            backbone.tap = None
        self.token_stream.update(torch.stack(norms))

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES.get(self.config.precision, torch.bfloat16)
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.config.precision != "fp32")

    def _take_losses(self) -> dict[str, float]:
        """Mean losses since they were last taken, in one transfer."""
        names = list(self._loss_sums)
        values = (torch.stack([self._loss_sums[name] for name in names]) / self._loss_steps).tolist()
        self._loss_sums, self._loss_steps = {}, 0
        return {f"train/{name}": value for name, value in zip(names, values, strict=True)}

    def _record(self, report: Report, metrics: dict[str, float]) -> None:
        self.history.append((self.step, metrics))
        report(self.step, metrics)

    def _evaluate(self, splits: tuple[str, ...] = ("validation",)) -> dict[str, float]:
        """Probes on `splits` and token norms of all weights, at the current step."""
        name = catalog.METHODS[self.config.method].weights if self.config.method in catalog.METHODS else "raw"
        evaluated = self.method.evaluated()
        rows = self.evaluation.token_rows(evaluated, name, self.step)
        metrics = {**last_layer_metrics(rows), **self.evaluation.score(evaluated, splits, self.directory)}
        self.rows += rows
        if name != "raw":
            self.rows += self.evaluation.token_rows(self.backbone, "raw", self.step)
        if self.ema is not None and name != "ema":
            self.rows += self.evaluation.token_rows(self.ema.module, "ema", self.step)
        if self.token_stream is not None:
            self.rows += self.token_stream.drain(trial_id=trial_id(self.config), step=self.step, weights="raw")
        self.method.train()
        return metrics

    def _finish(self, report: Report) -> None:
        """The last evaluation, the only look at the test set, and the files of the trial."""
        self._record(report, self._evaluate(("validation", "test")))
        self.evaluation.write_norm_map(self.method.evaluated(), self.directory)
        self.evaluation.write_probes(self.history, self.directory)
        token_table.write(self.rows, self.directory / "token_norms.parquet")

    def diverged(self, message: str) -> Result:
        """How a run ends whose numbers are no longer finite; what was recorded until then is kept."""
        log.warning("diverged: %s", message)
        token_table.write(self.rows, self.directory / "token_norms.parquet")
        error = {"type": "Diverged", "message": message, "traceback": ""}
        return Result("diverged", self._last_good, self._speed(), self.device.type, self.data.fingerprint, error)

    def _result(self, status: str) -> Result:
        return Result(status, self.step, self._speed(), self.device.type, self.data.fingerprint)

    def _speed(self) -> float | None:
        return self._images / self._seconds if self._seconds else None

    def _save(self) -> None:
        state = {
            "trial_id": trial_id(self.config),
            "step": self.step,
            "last_good": self._last_good,
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "streams": self.streams.state_dict(),
            "token_stream": None if self.token_stream is None else self.token_stream.state_dict(),
            "losses": (dict(self._loss_sums), self._loss_steps),
            "history": self.history,
            "rows": _to_tensor(token_table.to_table(self.rows)),
        }
        checkpoint.save(self.directory / "checkpoints", self.step, state, self.config.execution.keep_checkpoints)

    def resume(self, folders: Iterable[Path], report: Report) -> None:
        """Go on from the newest whole checkpoint, if there is one, reporting again what it had reported."""
        state = checkpoint.load_newest(folders)
        if state is None:
            return
        if state["trial_id"] != trial_id(self.config):
            raise ValueError(f"the checkpoint belongs to trial {state['trial_id']}, not to this configuration")
        self.step, self._last_good = state["step"], state["last_good"]
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.scaler.load_state_dict(state["scaler"])
        self.streams.load_state_dict(state["streams"])
        if self.token_stream is not None:
            self.token_stream.load_state_dict(state["token_stream"])
        sums, self._loss_steps = state["losses"]
        self._loss_sums = {name: value.to(self.device) for name, value in sums.items()}
        self.history = [(step, dict(metrics)) for step, metrics in state["history"]]
        self.rows = token_table.from_table(_from_tensor(state["rows"]))
        log.info("resumed at step %d", self.step)
        for step, metrics in self.history:
            report(step, metrics)


def _device(config: TrialConfig) -> torch.device:
    wanted = config.execution.device
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("execution.device is cuda, but this machine has no usable GPU")
    device = torch.device("cuda" if wanted != "cpu" and available else "cpu")
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    return device


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """Python's cycle collector pauses at random moments; the loop runs it itself, over what the loop has made."""
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def _to_tensor(table: pa.Table) -> Tensor:
    """A table as bytes in a tensor, which `weights_only` loading accepts."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8)


def _from_tensor(stored: Tensor) -> Any:
    return pa.ipc.open_stream(stored.numpy().tobytes()).read_all()
