"""The only training loop: one configuration in, reports, files and checkpoints out; resumes exactly."""

from __future__ import annotations

import gc
import io
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import torch
from torch import Tensor, nn

from trainers import catalog, checkpoint, distributed, pretrained, vit, weights
from trainers.config import TrialConfig, trial_id
from trainers.data import facts_of, fingerprint_of, open_data, open_evaluation_sets
from trainers.dotted import load
from trainers.evaluate import Evaluation
from trainers.loader import CAPTIONS, TARGETS, Order, Reader, Shares, batches
from trainers.measurement import Subject
from trainers.methods import Method
from trainers.score_settings import SCORE_STEP
from trainers.scoring import Scoring
from trainers.step import Stepper
from trainers.streams import Streams
from trainers.tokens import statistics as token_statistics
from trainers.tokens import table as token_table
from trainers.tokens.norms import NormRow, last_layer_metrics, onset_step
from trainers.tokens.statistics import StatisticRow

log = logging.getLogger(__name__)

Report = Callable[[int, Mapping[str, float]], None]
Stop = Callable[[], str | None]

_LOG_POINTS = 50  # how often the loss is looked at and reported in a run
_COLLECT_EVERY = 150  # steps between runs of Python's garbage collector, which is off otherwise


@dataclass(frozen=True)
class Result:
    """How training ended.

    Attributes:
        status: finished, diverged, or what `should_stop` answered (stopped, interrupted).
        steps: optimiser steps done; of a diverged run the last one whose loss was known to be finite.
        images_per_second: of training alone, evaluation left out; null before the second log point.
        data_fingerprint: of the data set, and of those that only probes run on.
        data_sets: each of them, the one that is trained on first: `name`, `fingerprint`, `use` (training, evaluation)
            and `images`, how many each split has.
    """

    status: str
    steps: int
    images_per_second: float | None
    device: str
    data_fingerprint: str
    error: Mapping[str, str] | None = None
    data_sets: Sequence[Mapping[str, Any]] = ()


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
        directory: receives token_norms.parquet, token_statistics.parquet, probes.parquet, per_image.parquet,
            norm_map.npz, what measurements leave (NAME.npz, attention/NAME.png), and checkpoints/.
        cache: folder of decoded data sets, on a local disk; default is beside `directory`.
        resume_from: folders in which to look for the newest whole checkpoint, besides `directory`'s own.
        should_stop: asked at every step; an answer ends training there with a checkpoint and that status. With
            several ranks the first one is asked, 50 times in a run.

    Several ranks: torchrun's environment, or a process group that the caller has initialised, makes every rank train
    its share of each batch; the first one reports and writes.

    Raises:
        ValueError: the data set or a setting cannot be used on this machine.
    """
    if not isinstance(config, TrialConfig) or not isinstance(config.model.image_size, int):
        raise ValueError("config is not a resolved TrialConfig; trainers.config.resolve makes one from settings")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    device = _device(config)
    if config.execution.threads is not None:
        torch.set_num_threads(config.execution.threads)
    with distributed.process_group(device):
        training = _Training(config, directory, cache or directory.parent / "cache", device)
        training.resume([*resume_from, directory / "checkpoints"], report)
        with _garbage_collector_off():
            try:
                return training.run(report, should_stop)
            except FloatingPointError as error:  # finite losses, but features that are not
                return training.diverged(str(error))


class _Training:
    """State of one run: what a step changes, random streams, where it stands, and what was recorded."""

    def __init__(self, config: TrialConfig, directory: Path, cache: Path, device: torch.device) -> None:
        self.config, self.directory, self.device = config, directory, device
        self.data = open_data(config.data, config.execution, config.model.side, cache)
        self.streams = Streams(config.seed)
        with _seeded(self.streams, "backbone"):
            self.backbone, self.started_from = self._backbone()
        with _seeded(self.streams, "method"):
            self.method = self._build_method().to(device)
        self._make_fast(cache)
        self.stepper = Stepper(config, self.method, self.streams, device)
        rule = config.evaluation.score
        self.scoring = None if rule is None else Scoring(rule, self.method, self.stepper.ema)
        self.others = open_evaluation_sets(config, cache)
        self.evaluation = Evaluation(
            config, self.data, self.streams, device, method=self.method, others=self.others, scratch=directory
        )
        self.step = 0
        self.history: list[tuple[int, dict[str, float]]] = []
        self.rows: list[NormRow] = []
        self.statistics: list[StatisticRow] = []
        self.subject: Subject | None = None  # of the newest evaluation
        self._images, self._seconds = 0, 0.0
        self._last_good = 0  # the last step whose loss was looked at and finite

    def _backbone(self) -> tuple[nn.Module, str | None]:
        """The backbone, and the fingerprint of the weights that it starts from; None where they are random."""
        model, execution = self.config.model, self.config.execution
        if model.weights is not None:
            return pretrained.open_backbone(model, execution, self.streams)
        backbone = vit.build(model, self.streams)
        if model.init_from is None:
            return backbone, None
        if not isinstance(backbone, vit.ViT):
            raise ValueError(
                "model.init_from loads into the built-in ViT only, and model.factory names another backbone"
            )
        return backbone, weights.start_from(backbone, model.init_from, execution)

    def _build_method(self) -> Method:
        name = self.config.method
        build = load(catalog.METHODS[name].build if name in catalog.METHODS else name)
        return cast(Method, build(self.config, self.backbone, len(self.data.class_names), self.streams))

    def _make_fast(self, cache: Path) -> None:
        """Compiles the blocks of all ViTs that the method holds, and sets up activation checkpointing."""
        if self.config.compile:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))  # trials of a node share it
            torch.compiler.reset()  # what this process has compiled for earlier trials would only pile up
        for module in self.method.modules():
            if isinstance(module, vit.ViT):
                module.activation_checkpointing = self.config.execution.activation_checkpointing
                if self.config.compile:
                    module.compile_blocks()

    def run(self, report: Report, should_stop: Stop) -> Result:
        """Train from `self.step` to the end."""
        config, steps = self.config, self.config.optim.steps
        log_every = max(1, steps // _LOG_POINTS)
        evaluate_at = {round(steps * i / config.evaluation.points) for i in range(1, config.evaluation.points + 1)}
        shares = Shares(config.optim.batch_size, cast(int, config.optim.micro_batch_size))
        alone = distributed.world_size() == 1
        self.method.train()
        self._saved = looked = time.monotonic()
        for batch in batches(self._reader(shares), self.step, steps):
            is_log_point = self.step % log_every == 0
            if (alone or is_log_point) and (reason := distributed.from_first(should_stop())):
                self._save()
                return self._result(reason)
            self.stepper(list(shares.parts(batch)), self.step)
            self.step += 1
            if self.scoring is not None and distributed.rank() == 0:
                self.scoring.after_step(self.step)
            self._images += config.optim.batch_size
            if self.step % _COLLECT_EVERY == 0:
                gc.collect()
            if self.step % log_every and self.step not in evaluate_at and self.step < steps:
                self._save_if_due(ask=alone)
                continue
            metrics = self.stepper.take_losses()  # the only wait for the device
            if not all(map(math.isfinite, metrics.values())):
                bad = ", ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))
                return self.diverged(f"{bad} between steps {self._last_good} and {self.step}")
            self._last_good = self.step
            self._seconds += time.monotonic() - looked
            if self.step in evaluate_at and (self.step < steps or self.scoring is not None):
                metrics |= self._evaluate()
            self._record(report, metrics)
            self._save_if_due(ask=True)
            looked = time.monotonic()
        self._finish(report)
        return self._result("finished")

    def _reader(self, shares: Shares) -> Reader:
        config = self.config
        needs = catalog.METHODS[config.method].needs if config.method in catalog.METHODS else (*TARGETS, CAPTIONS)
        repeats = 1 if config.deit3 is None else config.deit3.repeats
        order = Order(len(self.data.train), config.optim.batch_size, self.streams, repeats)
        return Reader(self.data.train, order, shares, needs, self.method.prepare, self.device, config.optim.steps)

    def _save_if_due(self, *, ask: bool) -> None:
        """Save at the end, at a step that is to be kept, and after a while: the first rank's clock, where we `ask`."""
        execution = self.config.execution
        due = self.step == self.config.optim.steps or self.step in execution.keep_steps
        if ask:
            due = distributed.from_first(due or time.monotonic() - self._saved >= execution.checkpoint_seconds)
        if due:
            self._save()
            self._saved = time.monotonic()

    def _record(self, report: Report, metrics: dict[str, float], step: int | None = None) -> None:
        step = self.step if step is None else step
        self.history.append((step, metrics))
        if distributed.rank() == 0:
            report(step, metrics)

    def _evaluate(self, splits: tuple[str, ...] = ("validation",)) -> dict[str, float]:
        """Probes on `splits` and token norms of all weights, at the current step; done by the first rank."""
        stream = self.stepper.token_stream
        if stream is not None:
            stream.reduce_to_first()
        with distributed.together() as on_first:
            metrics = self._measure(splits, self.step) if on_first else {}
            if on_first and self.scoring is not None:
                self.scoring.after_evaluation(self.step, metrics)
        if stream is not None:
            drained = stream.drain(trial_id=trial_id(self.config), step=self.step, weights="raw")
            self.rows += drained if distributed.rank() == 0 else []
        self.method.train()
        distributed.barrier()
        return metrics

    def _score(self, scoring: Scoring, report: Report) -> None:
        """Goes back to the weights of the scoring step and evaluates them on both sets.

        What was reported of that step stays: the values by which it was chosen.
        """
        step, new = self.step, dict[str, float]()
        with distributed.together() as on_first:
            if on_first:
                step = scoring.restore()
                self.rows = [row for row in self.rows if row.step != step or row.source != "probe"]
                self.statistics = [row for row in self.statistics if row.step != step]
                known = {name for at, metrics in self.history if at == step for name in metrics}
                metrics = self._measure(("validation", "test"), step)
                new = {name: value for name, value in metrics.items() if name not in known}
        self._record(report, {**new, SCORE_STEP: float(step)}, step)

    def _measure(self, splits: tuple[str, ...], step: int) -> dict[str, float]:
        entry = catalog.METHODS.get(self.config.method)
        name, trains = ("raw", True) if entry is None else (entry.weights, entry.trains)
        evaluated, ema = self.method.evaluated(), self.stepper.ema
        at_end = "test" in splits
        fitted = self.evaluation.probes.fit(evaluated, at_end=at_end)
        metrics = self.evaluation.score(evaluated, fitted, splits)
        known = (fitted, metrics) if at_end else (None, None)
        subject = self.evaluation.subject(evaluated, step, at_end=at_end, fitted=known[0], scores=known[1])
        self.subject = subject
        if at_end:
            self.evaluation.keep_outliers(subject)
        rows = self.evaluation.token_rows(subject, name)
        self.rows += rows
        if name != "raw":
            self.rows += self.evaluation.token_rows(self.evaluation.subject(self.backbone, step), "raw")
        if ema is not None and name != "ema":
            self.rows += self.evaluation.token_rows(self.evaluation.subject(ema.module, step), "ema")
        findings = self.evaluation.measure(subject, name, self.directory, at_end=at_end)
        self.statistics += findings.statistics
        so_far = [row for row in self.rows if row.weights == name and row.step <= step]
        onset = onset_step(so_far) if at_end and trains else {}
        return {**last_layer_metrics(rows), **metrics, **findings.metrics, **onset}

    def _finish(self, report: Report) -> None:
        """The last evaluation, the only look at the test set, and the files of the trial."""
        if self.step == 0 and self.config.model.weights is None:  # nothing was trained, so nothing has been saved
            self._save()
        if self.scoring is not None:
            self._score(self.scoring, report)
        else:
            self._record(report, self._evaluate(("validation", "test")))
        if distributed.rank() == 0:
            assert self.subject is not None
            self.evaluation.write_norm_map(self.subject, self.directory)
            self.evaluation.write_probes(sorted(self.history, key=lambda entry: entry[0]), self.directory)
            self.evaluation.write_per_image(self.directory)
            self._write_tokens()
        distributed.barrier()

    def diverged(self, message: str) -> Result:
        """How a run ends whose numbers are no longer finite; what was recorded until then is kept."""
        log.warning("diverged: %s", message)
        if distributed.rank() == 0:
            self._write_tokens()
        error = {"type": "Diverged", "message": message, "traceback": ""}
        return replace(self._result("diverged"), steps=self._last_good, error=error)

    def _write_tokens(self) -> None:
        token_table.write(self.rows, self.directory / "token_norms.parquet")
        token_statistics.write(self.statistics, self.directory / "token_statistics.parquet")

    def _result(self, status: str) -> Result:
        own = self._fingerprint()
        return Result(status, self.step, self._speed(), self.device.type, own, data_sets=self._data_sets())

    def _fingerprint(self) -> str:
        return fingerprint_of(self.data.fingerprint, {name: data.fingerprint for name, data in self.others.items()})

    def _data_sets(self) -> tuple[dict[str, Any], ...]:
        others = (facts_of(self.others[name], "evaluation") for name in sorted(self.others))
        return (facts_of(self.data, "training"), *others)

    def _speed(self) -> float | None:
        return self._images / self._seconds if self._seconds else None

    def _save(self) -> None:
        state = {
            "trial_id": trial_id(self.config),
            "step": self.step,
            "last_good": self._last_good,
            "started_from": self.started_from,
            "model": self.config.model.model_dump(mode="json"),
            "streams": self.streams.state_dict(),
            "history": self.history,
            "rows": _to_tensor(token_table.to_table(self.rows)),
            "statistics": _to_tensor(token_statistics.to_table(self.statistics)),
            "scoring": None if self.scoring is None else self.scoring.state_dict(),
            **self.stepper.state_dict(),
        }
        execution = self.config.execution
        if distributed.rank() == 0:
            folder = self.directory / "checkpoints"
            checkpoint.save(folder, self.step, state, execution.keep_checkpoints, execution.keep_steps)
        distributed.barrier()

    def resume(self, folders: Iterable[Path], report: Report) -> None:
        """Go on from the newest whole checkpoint, if there is one, reporting again what it had reported."""
        state = distributed.from_first(checkpoint.load_newest(folders) if distributed.rank() == 0 else None)
        if state is None:
            return
        if state["trial_id"] != trial_id(self.config):
            raise ValueError(f"the checkpoint belongs to trial {state['trial_id']}, not to this configuration")
        if state["started_from"] != self.started_from:
            setting = "model.init_from" if self.config.model.weights is None else "model.weights"
            raise ValueError(
                f"{setting} gives other weights ({self.started_from}) than when this trial began "
                f"({state['started_from']}); bring the former ones back, or start another trial"
            )
        self.step, self._last_good = state["step"], state["last_good"]
        self.stepper.load_state_dict(state)
        self.streams.load_state_dict(state["streams"])
        self.history = [(step, dict(metrics)) for step, metrics in state["history"]]
        if distributed.rank() == 0:
            self.rows = token_table.from_table(_from_tensor(state["rows"]))
            if "statistics" in state:  # older checkpoints have none
                self.statistics = token_statistics.from_table(_from_tensor(state["statistics"]))
            if self.scoring is not None:
                self.scoring.load_state_dict(state["scoring"])
        log.info("resumed at step %d", self.step)
        if distributed.rank() == 0:
            for step, metrics in self.history:
                report(step, metrics)


def _device(config: TrialConfig) -> torch.device:
    wanted = config.execution.device
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("execution.device is cuda, but this machine has no usable GPU")
    device = torch.device("cpu")
    if wanted != "cpu" and available:  # torchrun numbers the ranks of a machine
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    return device


@contextmanager
def _seeded(streams: Streams, purpose: str) -> Iterator[None]:
    """PyTorch's global generator, from which users' own parts may draw, at a seed of this trial, and then as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(streams.seed_for(f"global:{purpose}"))
        yield


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
