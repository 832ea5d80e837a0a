"""The command clean: frees checkpoints, what attempts left, unknown trial folders and unused caches, by rule."""

from __future__ import annotations

import fcntl
import itertools
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator import inspect, publish, rebuild, still_needed
from orchestrator.holder import Hold, SweepHeld
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger, LedgerError
from orchestrator.ledger_schema import OVER, TrialRow
from trainers import checkpoint_files

Keep = Literal["none", "last", "kept"]

DEFAULT_STATUSES = ("finished", "diverged", "pruned", "stopped")  # one that failed is tried again from its checkpoint
_DAY_MS = 86_400_000
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))


@dataclass(frozen=True)
class Options:
    """What the command line says; without a sweep, all of them are meant."""

    sweep: str | None
    storage: Path
    state: Path
    keep: Keep = "last"
    older_than_days: float | None = None
    statuses: tuple[str, ...] = DEFAULT_STATUSES
    orphans: bool = False
    cache: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Freed:
    """Something that goes: why, and how much it holds."""

    why: str
    paths: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(_size(path) for path in self.paths)


def clean(options: Options) -> None:
    """Free what the rules allow and print how much; with a dry run only print. Records and running sweeps stay.

    Raises:
        ValueError: there is no such sweep, a status is none of a trial that is over, or a ledger that has to say what
            is still needed cannot be read.
    """
    unknown = [status for status in options.statuses if status not in OVER]
    if unknown:
        allowed = ", ".join(sorted(OVER))
        raise ValueError(f"--status {unknown[0]}: trials that are not over keep theirs; allowed: {allowed}")
    total = 0
    needed = still_needed.checkpoints(options.storage, options.state)
    for layout in _layouts(options):
        total += _clean_sweep(layout, options, needed)
    if options.cache:
        total += _clean_cache(options)
    print(f"{_shown(total)} {'would be freed' if options.dry_run else 'freed'}")


def _layouts(options: Options) -> list[SweepLayout]:
    if options.sweep is not None:
        return [inspect.sweep_layout(options.sweep, options.storage, options.state)]
    return list(inspect.sweeps(options.storage, options.state))


def _clean_sweep(layout: SweepLayout, options: Options, needed: frozenset[str]) -> int:
    """Free what one sweep has to give; bytes."""
    try:
        with _held(layout, options.dry_run), Ledger.open(layout.ledger, writer=False) as ledger:
            freed = [*_of_trials(layout, ledger.rows(in_plan_only=False), options, needed)]
            if options.orphans:
                freed += _orphans(layout, ledger)
            return _free(layout.name, freed, options.dry_run)
    except SweepHeld as held:
        print(f"{layout.name}: nothing is freed; {held}")
    except LedgerError as error:
        print(f"{layout.name}: nothing is freed; {error}")
    return 0


@contextmanager
def _held(layout: SweepLayout, dry_run: bool) -> Iterator[None]:
    """The hold on a sweep, so that nobody runs it meanwhile; a dry run leaves no trace, not even a lock file."""
    if dry_run or not layout.ledger.is_file():
        yield
        return
    hold = Hold(layout.lock)
    try:
        yield
    finally:
        hold.release()


def _free(name: str, freed: list[Freed], dry_run: bool) -> int:
    total = 0
    for one in freed:
        size = one.bytes
        total += size
        print(f"{name}: {_shown(size)}  {one.why}")
        if not dry_run:
            for path in one.paths:
                _remove(path)
    return total


# What of a trial goes


def _of_trials(layout: SweepLayout, rows: list[TrialRow], options: Options, needed: frozenset[str]) -> Iterator[Freed]:
    now = time.time_ns() // 1_000_000
    for row in rows:
        young = options.older_than_days is not None and now - (row.ended_ms or now) < options.older_than_days * _DAY_MS
        if row.state not in options.statuses or young:
            continue
        trial = layout.trial(row.trial_id)
        if row.trial_id in needed:
            print(f"{layout.name}: the checkpoints of {row.name} stay, since a trial that is not over starts from them")
        elif paths := _checkpoints(trial, row, options.keep):
            yield Freed(f"checkpoints of {row.name}", paths)
        if paths := _leftovers(trial, row):
            yield Freed(f"what attempts of {row.name} left", paths)


def _checkpoints(trial: TrialLayout, row: TrialRow, keep: Keep) -> tuple[Path, ...]:
    """Everything in the folders of checkpoints but what stays: with `last` the newest whole one and the steps that
    execution.keep_steps names, with `kept` only these.
    """
    folders = [folder for folder in trial.checkpoint_folders() if folder.is_dir()]
    if row.config.get("command") is not None:  # a program's checkpoints have names of its own
        return tuple(folders) if keep == "none" else ()
    ours = checkpoint_files.by_step(folders)
    staying: list[Path] = []
    if keep != "none":
        steps = row.config.get("execution", {}).get("keep_steps") or ()
        staying += [path for path in ours if checkpoint_files.step_of(path) in steps]
    if keep == "last":
        staying += itertools.islice(filter(checkpoint_files.is_whole_file, ours), 1)
    kept = {*staying, *map(checkpoint_files.checksum_path, staying)}
    return tuple(path for folder in folders for path in sorted(folder.iterdir()) if path not in kept)


def _leftovers(trial: TrialLayout, row: TrialRow) -> tuple[Path, ...]:
    """What attempts wrote besides logs and checkpoints, where the trial's own folder has it too or does not need it."""
    paths: list[Path] = []
    for number in trial.attempts():
        source = trial.attempt(number)
        records = publish.records_in(source) if number == row.attempts else []
        unpublished = {path for path in records if not _is_published(path, trial, number)}
        files = (path for path in sorted(source.rglob("*")) if path.is_file())
        paths += [path for path in files if not _stays(path, source) and path not in unpublished]
    return tuple(paths)


def _stays(path: Path, attempt: Path) -> bool:
    """Logs stay, and checkpoints have rules of their own."""
    inside = path.relative_to(attempt)
    return inside.parts[0] == "checkpoints" or (len(inside.parts) == 1 and path.match("log*.txt"))


def _is_published(path: Path, trial: TrialLayout, number: int) -> bool:
    other = trial.root / path.relative_to(trial.attempt(number))
    return other.is_file() and other.read_bytes() == path.read_bytes()


def _orphans(layout: SweepLayout, ledger: Ledger) -> Iterator[Freed]:
    """Trial folders that the ledger does not know, but for those with a result, which doctor takes into it."""
    known = {row.trial_id for row in ledger.rows(in_plan_only=False)}
    for key in rebuild.trial_folders(layout):
        trial = layout.trial(key)
        if key not in known and not trial.result.exists():
            yield Freed(f"the folder of {key}, which the ledger does not know", (trial.root,))


def _clean_cache(options: Options) -> int:
    """Free decoded data sets that no trial names that is still to run; bytes."""
    total = 0
    for entry in still_needed.unused_caches(options.storage, options.state):
        freed = Freed(f"{entry.name}, which no trial needs that is still to run", (entry,))
        with entry.with_name(f".{entry.name}.lock").open("a") as file:  # under which it is built
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            total += _free("cache", [freed], options.dry_run)
    return total


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    return path.lstat().st_size


def _shown(count: int) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if count >= 0.1 * unit), _UNITS[0])
    return f"{count / unit:,.2f} {name}"
