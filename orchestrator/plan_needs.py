"""What a plan needs of the machines that it will run on: disk, memory, places; and results that are there already."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.budget import Spent
from orchestrator.cells import baseline_of
from orchestrator.estimate import checkpoint_bytes, num_gpus, state_bytes
from orchestrator.layout import SweepLayout
from orchestrator.ledger import TrialRow
from orchestrator.measured import Sample, need, settled
from orchestrator.plan import Plan, PlannedTrial, cell_text, plain_cell
from orchestrator.sweep import Budget

_GB = 1e9
_MOST_FOLDERS = 20  # of finished trials whose files are counted
_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU of this machine, known without loading CUDA
_FRACTIONS = ("top1", "top5", "miou", "corloc", "outlier_fraction")  # metrics between 0 and 1


def _size(count: float) -> str:
    return f"{count / _GB:,.2f} GB" if count >= 0.1 * _GB or not count else f"{count / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Disk:
    """Bytes that trials will write, and that are free in storage; records are None until some trial left any."""

    checkpoints: int
    records: int | None
    free: int
    where: str

    def __str__(self) -> str:
        records = "records not known yet" if self.records is None else f"{_size(self.records)} of records"
        return f"disk: {_size(self.checkpoints)} of checkpoints, {records}; {_size(self.free)} are free at {self.where}"

    def warnings(self) -> list[str]:
        """That it does not suffice."""
        needed = self.checkpoints + (self.records or 0)
        if needed <= self.free:
            return []
        return [f"the disk at {self.where} has {_size(self.free)} free, and {_size(needed)} are needed"]


def disk(trials: Sequence[PlannedTrial], layout: SweepLayout, rows: Sequence[TrialRow]) -> Disk:
    """What `trials` will leave; a trial's records are as large as the median of trials of this sweep that finished."""
    finished = [layout.trial(row.trial_id).root for row in rows if row.state == "finished"][-_MOST_FOLDERS:]
    sizes = [_records(folder) for folder in finished if folder.is_dir()]
    records = round(statistics.median(sizes) * len(trials)) if sizes else None
    where = next(folder for folder in (layout.root, *layout.root.parents) if folder.is_dir())
    checkpoints = sum(checkpoint_bytes(trial.config) for trial in trials if trial.config.command is None)
    return Disk(checkpoints, records, shutil.disk_usage(where).free, str(where))


def _records(folder: Path) -> int:
    """Bytes of what a trial keeps besides checkpoints."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if "checkpoints" not in path.relative_to(folder).parts)


@dataclass(frozen=True)
class Memory:
    """What the largest trial of a size needs of one device, in bytes, where that is known from, and what there is."""

    what: str
    needed: int
    device: str | None  # that it was measured on; None: by formula
    available: int | None

    @property
    def fits(self) -> bool | None:
        """None where nobody knows how much there is."""
        return None if self.available is None else self.needed <= self.available

    def __str__(self) -> str:
        how = "by formula" if self.device is None else f"measured on {self.device}"
        needs = f"memory: {self.what} needs {_size(self.needed)} ({how})"
        if self.available is None:
            return f"{needs}; --gpu-memory GB says whether it fits"
        return f"{needs} and {'fits' if self.fits else 'does not fit'} into {_size(self.available)}"


def memory(trials: Sequence[PlannedTrial], samples: Sequence[Sample], gpu_memory: float | None) -> list[Memory]:
    """What each method and size needs of its share of a GPU, or of this machine where it runs on CPUs.

    Args:
        gpu_memory: of one GPU in GB; None: of the GPU that was measured, if one was.
    """
    largest: dict[tuple[str, str, bool], Memory] = {}
    for trial in trials:
        if trial.config.command is not None:
            continue
        gpus = num_gpus(trial)
        needed = need(trial.config, samples, on_gpu=gpus > 0)
        capacity = needed.capacity
        if gpus > 0 and gpu_memory is not None:
            capacity = round(gpu_memory * _GB)
        if gpus == 0:
            capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = None if capacity is None else round(capacity * min(1.0, gpus or 1.0))
        name = (trial.config.method, trial.config.model.size, gpus > 0)
        found = Memory(f"{name[0]} {name[1]}", _of_rank(trial, needed.peak), needed.device, available)
        if name not in largest or _tighter(found, largest[name]):
            largest[name] = found
    return list(largest.values())


def _of_rank(trial: PlannedTrial, peak: int) -> int:
    """One rank of k has the weights and their optimiser state whole, and a k-th of the rest."""
    state = min(peak, state_bytes(trial.config))
    return state + round((peak - state) / trial.resources.num_ranks)


def _tighter(one: Memory, other: Memory) -> bool:
    return one.needed / (one.available or 1) > other.needed / (other.available or 1)


def settle(trials: Sequence[PlannedTrial], samples: Sequence[Sample]) -> tuple[list[PlannedTrial], list[str]]:
    """The trials with a number for `gpus: auto` where it is known; what was chosen or is lacking, each said once."""
    done, notes = [], []
    for trial in trials:
        try:
            resources = settled(trial.resources, trial.config, samples)
        except ValueError as error:
            notes.append(str(error))
            resources = trial.resources
        if resources != trial.resources:
            name = f"{trial.config.method} {trial.config.model.size}"
            notes.append(f"resources.gpus auto is {resources.num_gpus:g} for {name}")
            trial = dataclasses.replace(trial, resources=resources)
        done.append(trial)
    return done, list(dict.fromkeys(notes))


def at_a_time(trials: Sequence[PlannedTrial]) -> int:
    """How many of the largest of `trials` this machine runs at a time; one at least, as without a GPU here."""
    gpus = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
    places = [
        (gpus / num_gpus(trial)) if num_gpus(trial) else (os.cpu_count() or 1) / trial.resources.cpus
        for trial in trials
    ]
    return max(1, int(min(places, default=1)))


def published(trial_ids: Collection[str], layout: SweepLayout) -> set[str]:
    """Those trials that another sweep under the same storage has finished."""
    if not trial_ids or not layout.storage.is_dir():
        return set()
    found: set[str] = set()
    for folder in sorted(layout.storage.iterdir()):
        place = folder / "trials"
        there = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
        for trial_id in there & set(trial_ids) - found:
            if _is_finished(place / trial_id / "result.json"):
                found.add(trial_id)
    return found


def _is_finished(result: Path) -> bool:
    try:
        read = json.loads(result.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(read, dict) and read.get("status") == "finished"


def of_seeds(plan: Plan) -> list[str]:
    """What the seeds of `seeds: {first, most, until}` are about."""
    more = plan.sweep.more_seeds
    if more is None:
        return []
    metric, width = more.until.metric, more.until.halfwidth
    points = f", which are {100 * width:g} points," if metric.rpartition("/")[2] in _FRACTIONS else ""
    return [
        f"each cell gets up to {more.most} seeds, {more.first} at first, until the interval of its difference in "
        f"{metric} is ± {width:g}{points} or narrower; more seeds are not in the estimate"
    ]


def of_baseline(plan: Plan) -> list[str]:
    """That `exclude` takes from some cells the one that they would differ from."""
    baseline = plan.sweep.model_dump(mode="json")["baseline"]
    if baseline is None or not plan.sweep.exclude:
        return []
    cells = [plain_cell(cell) for cell in plan.cells]
    baselines = [cell for cell in cells if all(cell[name] == value for name, value in baseline.items())]
    alone = [cell for cell in cells if baseline_of(cell, baselines, baseline) is None]
    if not alone:
        return []
    return [
        f"{len(alone)} of {len(cells)} cells have no baseline cell, so they get no difference; the first is "
        f"{cell_text(alone[0])}"
    ]


def of_budget(
    budget: Budget | None, spent: Spent, begun: Collection[str], waiting: Sequence[PlannedTrial]
) -> str | None:
    """What is used of a sweep's budget, and how many of the trials that wait it lets begin; None without one.

    Args:
        budget: of the sweep file.
        spent: by all runs so far.
        begun: ids of trials that count already; those of them that wait may go on.
        waiting: trials to run.
    """
    if budget is None:
        return None
    units = {"trials": "trials", "gpu_hours": "GPU-hours", "hours": "hours"}
    limits = {name: limit for name in units if (limit := getattr(budget, name)) is not None}
    used = ", ".join(f"{getattr(spent, name):.4g} of {limit:g} {units[name]}" for name, limit in limits.items())
    known = sum(trial.trial_id in begun for trial in waiting)
    room = len(waiting) if budget.trials is None else known + max(0, budget.trials - len(begun))
    if any(getattr(spent, name) >= limit for name, limit in limits.items() if name != "trials"):
        room = 0
    if room >= len(waiting):
        return f"budget: {used} used"
    return f"budget: {used} used; {f'{room} of {len(waiting)} trials run' if room else 'nothing begins'}"
