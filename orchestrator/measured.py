"""Speeds and memory that were measured, of finished trials and of dry steps, and what follows for plans."""

from __future__ import annotations

import json
import math
import socket
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.estimate import (
    ASSUMED_TRIAL_SECONDS,
    Price,
    by_formula,
    memory_bytes,
    num_gpus,
    state_bytes,
    training_flops,
    trial_flops,
)
from orchestrator.ledger import Ledger, LedgerError, TrialRow
from orchestrator.plan import PlannedTrial
from orchestrator.sweep import Resources
from trainers.config import TrialConfig
from trainers.files import write_whole

CPU = "cpu"
SPARE = 1.15  # of the measured peak: what evaluations, fragments and other drivers take besides
_RAY_UNITS = 10_000  # Ray counts shares in these
SHARES = (8, 4, 3, 2, 1)  # trials on one GPU, most first
_MOST_ROWS = 400  # finished trials that are looked at, over all sweeps
_VERSION = 1

Group = tuple[Any, ...]


@dataclass(frozen=True)
class Shape:
    """What decides how long a step takes and how much memory it needs.

    `flops` are of one image in a step and `memory` is in bytes, both by formula: they order the trials of a group,
    which differ in registers above all.
    """

    group: Group
    flops: float
    memory: int


def shape_of(config: TrialConfig) -> Shape:
    """The shape of a resolved configuration."""
    model, optim = config.model, config.optim
    group = (
        *(config.method, model.size, model.patch_size, model.image_size, config.precision, config.compile),
        *(optim.batch_size, optim.micro_batch_size, config.execution.activation_checkpointing),
    )
    return Shape(group, training_flops(config), memory_bytes(config))


@dataclass(frozen=True)
class Sample:
    """What trials of one shape took on one kind of device.

    `device` is `cpu`, or a GPU's name where it is known; `share` are the GPUs, or the CPU threads on a CPU. Of
    `rest_seconds`, what a trial took besides its steps, `rest_flops` are the work by formula. `peak` and `capacity`
    are bytes of the device's memory (on a CPU of the process and of the machine).
    """

    shape: Shape
    device: str
    share: float
    images_per_second: float
    rest_seconds: float | None = None
    rest_flops: float | None = None
    peak: int | None = None
    capacity: int | None = None
    source: str = "dry steps"

    @property
    def on_gpu(self) -> bool:
        """Whether it ran on a GPU."""
        return self.device != CPU


def samples_of_ledgers(ledgers: Iterable[tuple[str, Path]]) -> tuple[list[Sample], list[str]]:
    """Samples of the newest finished trials in these ledgers (name of the sweep, file), and what could not be read."""
    rows: list[tuple[str, TrialRow]] = []
    notes: list[str] = []
    for sweep, path in ledgers:
        try:
            with Ledger.open(path, writer=False) as ledger:
                rows += [(sweep, row) for row in ledger.newest_finished(_MOST_ROWS)]
        except LedgerError as error:
            notes.append(f"speeds of {sweep} are left out: {error}")
    rows.sort(key=lambda item: item[1].ended_ms or 0, reverse=True)
    known: dict[str, TrialConfig | None] = {}
    found = [_of_row(sweep, row, known) for sweep, row in rows[:_MOST_ROWS]]
    return _merged([sample for sample in found if sample is not None]), notes


def _of_row(sweep: str, row: TrialRow, known: dict[str, TrialConfig | None]) -> Sample | None:
    """None where the trial says no speed, or is of a version whose settings this one does not know."""
    result = row.result or {}
    speed, seconds = result.get("images_per_second"), result.get("seconds")
    if not speed or not seconds or result.get("device") is None:
        return None
    text = json.dumps({name: value for name, value in row.config.items() if name != "seed"}, sort_keys=True)
    if text not in known:
        known[text] = _config(row.config)
    config = known[text]
    if config is None or config.command is not None:
        return None
    gpus = (result.get("gpu_seconds") or 0.0) / seconds
    on_cpu = result["device"] == CPU
    images = config.optim.steps * config.optim.batch_size
    rest = max(0.0, seconds - images / speed) if result.get("attempts") == 1 else None
    work = trial_flops(config) - images * training_flops(config)
    share = float(result.get("threads") or 1) if on_cpu else gpus or 1.0
    return Sample(shape_of(config), str(result["device"]), share, speed, rest, work, source=sweep)


def _config(raw: Mapping[str, Any]) -> TrialConfig | None:
    try:
        return TrialConfig.model_validate(raw)
    except ValueError:
        return None


def _merged(samples: Sequence[Sample]) -> list[Sample]:
    """One sample for those that differ in nothing but speed: of median speed and rest."""
    groups: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.shape, sample.device, sample.share, sample.source), []).append(sample)
    merged = []
    for (shape, device, share, source), alike in groups.items():
        speed = statistics.median(sample.images_per_second for sample in alike)
        rests = [sample.rest_seconds for sample in alike if sample.rest_seconds is not None]
        rest = statistics.median(rests) if rests else None
        merged.append(Sample(shape, device, share, speed, rest, alike[0].rest_flops, source=source))
    return merged


# Dry steps, kept in a file of the state folder by machine and device


def measured_file(state: Path) -> Path:
    """Where dry steps are kept."""
    return state / "measured.json"


def read(state: Path) -> list[Sample]:
    """Samples of dry steps of all machines; none where nothing was measured.

    Raises:
        ValueError: the file is not one of ours.
    """
    path = measured_file(state)
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            raise ValueError(f"it is of version {content['version']}, this program knows {_VERSION}")
        return [_sample(raw) for samples in content["measured"].values() for raw in samples]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); remove it and run orchestrate plan --measure again"
        ) from error


def keep(state: Path, new: Sequence[Sample]) -> None:
    """Put `new` into the file under this machine's name; samples of the same shape, device and share are replaced."""
    path = measured_file(state)
    read(state)  # refuses a file that is not ours
    measured: dict[str, list[Any]] = json.loads(path.read_text())["measured"] if path.is_file() else {}
    for sample in new:
        place = f"{socket.gethostname()}/{sample.device}"
        known = [_sample(raw) for raw in measured.get(place, [])]
        kept = [old for old in known if (old.shape, old.share) != (sample.shape, sample.share)]
        measured[place] = [asdict(one) for one in (*kept, sample)]
    state.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps({"version": _VERSION, "measured": measured}, indent=1) + "\n").encode())


def _sample(raw: Mapping[str, Any]) -> Sample:
    shape = Shape(tuple(raw["shape"]["group"]), float(raw["shape"]["flops"]), int(raw["shape"]["memory"]))
    return Sample(**{**raw, "shape": shape})


# What follows from samples


def price(trial: PlannedTrial, samples: Sequence[Sample]) -> Price | None:
    """The price of `trial` by the nearest sample on its kind of device, by formula where there is none; None for a
    program, of which nothing is known.

    Nearest are trials that differ in registers alone, then those of the same method and precision, then by FLOPs. Steps
    are scaled by their FLOPs, what a trial does besides by its own, and device time is kept over shares.
    """
    if trial.config.command is not None:
        return None
    gpus = num_gpus(trial)
    shape = shape_of(trial.config)
    alike = [sample for sample in samples if sample.on_gpu == (gpus > 0)]
    if not alike or not shape.flops:
        return by_formula(trial)
    share = gpus or trial.resources.cpus
    nearest = min(alike, key=lambda sample: _distance(sample, shape, share))
    config = trial.config
    images = config.optim.steps * config.optim.batch_size
    seconds = images / nearest.images_per_second * shape.flops / nearest.shape.flops
    rest = trial_flops(config) - images * training_flops(config)
    if nearest.rest_seconds is None or not nearest.rest_flops:
        own = nearest.images_per_second * nearest.shape.flops  # FLOP/s
        seconds += rest / own + ASSUMED_TRIAL_SECONDS
    else:
        seconds += nearest.rest_seconds * rest / nearest.rest_flops
    device_seconds = seconds * nearest.share
    how = "the same shape" if nearest.shape.group == shape.group else "the nearest shape by FLOPs"
    return Price(device_seconds / share, device_seconds, f"{how} on {nearest.device} ({nearest.source})")


def _distance(sample: Sample, shape: Shape, share: float) -> tuple[bool, float, float]:
    other = (sample.shape.group[0] != shape.group[0]) + (sample.shape.group[4] != shape.group[4])  # method, precision
    flops = abs(math.log(sample.shape.flops / shape.flops)) if sample.shape.flops else math.inf
    return sample.shape.group != shape.group, other + flops, abs(math.log(sample.share / share))


@dataclass(frozen=True)
class Need:
    """Memory that a trial needs, in bytes, and of what device where it was measured (else by formula, None)."""

    peak: int
    device: str | None
    capacity: int | None


def need(config: TrialConfig, samples: Sequence[Sample], *, on_gpu: bool) -> Need:
    """The peak of the sample of the same group that needs as much or more; by formula where there is none.

    A trial that needs more than every sample of its group is scaled by the formula.
    """
    shape = shape_of(config)
    own = [s for s in samples if s.peak is not None and s.on_gpu == on_gpu and s.shape.group == shape.group]
    if not own:
        return Need(shape.memory, None, None)
    least = min(s.capacity or 0 for s in own)
    own = [s for s in own if (s.capacity or 0) == least]  # of several kinds of devices that with least memory
    above = [s for s in own if s.shape.memory >= shape.memory]
    chosen = min(above, key=lambda s: s.shape.memory) if above else max(own, key=lambda s: s.shape.memory)
    assert chosen.peak is not None, "samples without a peak were left out"
    peak = chosen.peak if above else math.ceil(chosen.peak * shape.memory / chosen.shape.memory)
    return Need(peak, chosen.device, chosen.capacity)


def settled(resources: Resources, config: TrialConfig, samples: Sequence[Sample]) -> Resources:
    """`resources` with a number in the place of `gpus: auto`: the smallest of 1/8, 1/4, 1/3, 1/2 and 1 GPU that holds
    1.15 times the measured peak, else as many GPUs with a rank each as hold it.

    Each of k ranks has the weights and their optimiser state whole, and a k-th of the rest.

    Raises:
        ValueError: nothing was measured for the trial's shape, or no number of GPUs holds it; one line.
    """
    if resources.gpus != "auto":
        return resources
    if config.command is not None:
        raise ValueError("resources.gpus is auto, and what a program needs is not known; give a number")
    needed = need(config, samples, on_gpu=True)
    name = f"{config.method} {config.model.size}"
    if needed.capacity is None:
        raise ValueError(
            f"resources.gpus is auto, and the memory of {name} was never measured on a GPU; run orchestrate plan FILE "
            "--measure where there is one, with the same --state"
        )
    peak = SPARE * needed.peak
    for trials in SHARES:
        if peak <= needed.capacity / trials:
            share = math.floor(_RAY_UNITS / trials) / _RAY_UNITS
            return resources.model_copy(update={"gpus": share})
    micro = config.optim.micro_batch_size
    assert isinstance(micro, int), "the configuration is not resolved"
    state = min(state_bytes(config), needed.peak)
    for ranks in (k for k in range(2, micro + 1) if micro % k == 0):
        if SPARE * (state + (needed.peak - state) / ranks) <= needed.capacity:
            return resources.model_copy(update={"gpus": float(ranks)})
    raise ValueError(
        f"resources.gpus is auto, and {name} fits on no number of GPUs of {needed.capacity / 1e9:.3g} GB: weights and "
        f"their optimiser state take {state / 1e9:.3g} GB of each; use a smaller optim.micro_batch_size, "
        "execution.activation_checkpointing or a smaller model"
    )
