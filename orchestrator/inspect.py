"""The commands logs, stop, report and compare, and which sweep or trial a user means."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.who_runs import holder_of

_FOLLOW_SECONDS = 0.5


def logs(trial: str, storage: Path, state: Path, *, attempt: int | None = None, follow: bool = False) -> None:
    """Print the logs of a trial, of all its attempts or of one, each rank's; with `follow` go on while it runs.

    Raises:
        ValueError: no trial, or more than one, is meant, or it has no such attempt.
    """
    layout, row = find(trial, storage, state)
    folder = layout.trial(row.trial_id)
    if attempt is not None and attempt not in folder.attempts():
        known = ", ".join(map(str, folder.attempts())) or "none yet"
        raise ValueError(f"{row.name} has no attempt {attempt}; attempts: {known}")
    shown: dict[Path, int] = {}
    while True:
        over = not follow or not _is_awaited(layout, row.trial_id)
        for number in [attempt] if attempt is not None else folder.attempts():
            for log in _logs_of(folder, number):
                _print_more(log, shown, f"=== {row.name}, attempt {number}{_rank_of(log)} ===")
        if over:
            break
        time.sleep(_FOLLOW_SECONDS)
    if not any(shown.values()) and attempt is None and folder.log_file.is_file():  # those of attempts were cleaned
        print(folder.log_file.read_text(errors="replace"), end="")
    error = _row(layout, row.trial_id).error
    if error is not None and attempt in (None, row.attempts):
        print(error.get("traceback") or error.get("message"))


def _logs_of(folder: TrialLayout, number: int) -> list[Path]:
    """The logs of an attempt, the first rank's first."""
    others = folder.attempt(number).glob("log.rank*.txt")
    return [folder.log(number), *sorted(others, key=lambda path: (len(path.name), path.name))]


def _rank_of(log: Path) -> str:
    rank = log.stem.removeprefix("log.rank")
    return f", rank {rank}" if rank != log.stem else ""


def _print_more(log: Path, shown: dict[Path, int], title: str) -> None:
    """Print what of a log was not printed before; a title comes before the first of it."""
    if log not in shown:
        print(title)
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(shown.get(log, 0))
        content = file.read()
        print(content.decode(errors="replace"), end="", flush=True)
        shown[log] = file.tell()
    shown.setdefault(log, 0)


def _is_awaited(layout: SweepLayout, trial_id: str) -> bool:
    """Whether a trial may still log something: it is not over, and somebody runs the sweep."""
    holder = holder_of(layout.lock)
    return holder is not None and holder.alive and _row(layout, trial_id).state in ("planned", "running")


def _row(layout: SweepLayout, trial_id: str) -> TrialRow:
    with Ledger.open(layout.ledger, writer=False) as ledger:
        return ledger.row(trial_id)


def stop(trial: str, storage: Path, state: Path) -> None:
    """Ask a running trial to end.

    Raises:
        ValueError: no trial, or more than one, is meant, or it is not running.
    """
    layout, row = find(trial, storage, state)
    if row.state != "running":
        raise ValueError(f"{row.name} is {row.state}; only a running trial can be stopped")
    request = layout.trial(row.trial_id).stop_request
    request.parent.mkdir(parents=True, exist_ok=True)  # a trial on another machine has no folder here yet
    request.touch()
    print(f"{row.name} will checkpoint and end as stopped")


@dataclass(frozen=True)
class Pivots:
    """Which tables `report` prints instead of writing everything.

    Attributes:
        form: as `analysis.readable.Form`, or "terminal"; None: by the ending of `output`, else for the terminal.
        rows: axes; None: those that are not in `columns`, by default all but registers.
        metrics: None: the primary ones.
        output: a file; None: standard output.
    """

    form: str | None = None
    rows: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    metrics: tuple[str, ...] | None = None
    show: Literal["both", "spread", "difference"] = "both"
    output: Path | None = None


def report(names: Sequence[str], storage: Path, pivots: Pivots | None = None) -> None:
    """Write tables, figures and report of each sweep and print its table; or print or write `pivots` alone.

    Raises:
        ValueError: there is no such sweep, metric, axis or kind of file.
    """
    if pivots is not None:
        _print_pivots([sweep_layout(name, storage, storage) for name in names], pivots)
        return
    from rich.console import Console

    from analysis.run import analyse

    for name in names:
        layout = sweep_layout(name, storage, storage)
        analysis = analyse(layout.root)
        Console(soft_wrap=True).print(analysis.terminal)
        for problem in analysis.problems:
            print(f"note: {problem}")
        print(analysis.answer)
        print(f"tables {layout.tables}/*.parquet, ablation.csv, pivots/*\nreport {layout.report}")


def _print_pivots(layouts: Sequence[SweepLayout], wanted: Pivots) -> None:
    from analysis import readable
    from analysis.collect import collect
    from analysis.pivots import pivot
    from analysis.results import evaluate

    found = []
    for layout in layouts:
        results = evaluate(collect(layout.root))
        metrics = wanted.metrics or readable.default_metrics(results)
        if not metrics:
            raise ValueError(f"{layout.name} has no metric yet: no trial has finished, or none is planned")
        found += [pivot(results, metric, wanted.rows, wanted.columns) for metric in metrics]
        _note_problems(results.frames.problems)
    form = readable.form_of(wanted.form, wanted.output)
    if wanted.output is not None:
        readable.write(wanted.output, found, form, wanted.show)
    else:
        print(readable.text(found, form, wanted.show), end="")


def _note_problems(problems: Sequence[str]) -> None:
    """What could not be read, on standard error: standard output holds a table or JSON alone."""
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)


def compare(
    names: tuple[str, str], storage: Path, *, as_json: bool, metrics: Sequence[str], output: Path | None
) -> None:
    """Print what changed between two sweeps, cell by cell, or write it as a file.

    Args:
        names: of sweeps in `storage`, or their folders.
        metrics: those to show; empty: the primary ones.

    Raises:
        ValueError: there is no such sweep or metric, nothing can be compared, or no such kind of file is written.
    """
    from analysis import comparisons
    from analysis.collect import collect
    from analysis.compare import compare as compared
    from analysis.results import evaluate

    folders = [folder_of(name, storage) for name in names]
    if folders[0].resolve() == folders[1].resolve():
        raise ValueError(f"{names[0]} and {names[1]} are the same sweep; compare takes two")
    results = [evaluate(collect(folder)) for folder in folders]
    for one in results:
        _note_problems(one.frames.problems)
    same_name = len({one.frames.plan.sweep for one in results}) == 1
    comparison = compared(results[0], results[1], names if same_name else None)
    if output is not None:
        comparisons.write(output, comparison, metrics or None)
    if as_json:
        print(comparisons.json_text(comparison), end="")
    elif output is None:
        print(comparisons.terminal_text(comparison, metrics or None), end="")


def folder_of(sweep: str, storage: Path) -> Path:
    """The folder of a sweep that is named, or given as a folder itself.

    Raises:
        ValueError: there is no such sweep.
    """
    if is_folder(sweep):
        return Path(sweep)
    return sweep_layout(sweep, storage, storage).root


def is_folder(sweep: str) -> bool:
    """Whether a user means a folder by it, and not a name in the storage: it has a slash, and is a sweep's folder."""
    return os.sep in sweep and (Path(sweep) / "plan.json").is_file()


def sweeps(storage: Path, state: Path) -> Iterator[SweepLayout]:
    """All sweeps that have a ledger under `state`, by name."""
    folders = sorted(state.iterdir()) if state.is_dir() else []
    for folder in folders:
        layout = SweepLayout(storage.resolve(), state.resolve(), folder.name)
        if layout.ledger.is_file():
            yield layout


def sweep_layout(sweep: str, storage: Path, state: Path) -> SweepLayout:
    """The files of a sweep.

    Raises:
        ValueError: there is no such sweep.
    """
    layout = SweepLayout(storage.resolve(), state.resolve(), sweep)
    known = [folder.name for folder in storage.iterdir()] if storage.is_dir() else []
    if sweep not in known or not layout.plan.is_file():
        listed = ", ".join(found.name for found in sweeps(storage, state)) or "none yet"
        raise ValueError(f"there is no sweep {sweep!r} under {storage}; sweeps: {listed}")
    return layout


def _rows(layout: SweepLayout) -> list[TrialRow]:
    if not layout.ledger.is_file():
        return []
    with Ledger.open(layout.ledger, writer=False) as ledger:
        return ledger.rows()


def find(trial: str, storage: Path, state: Path) -> tuple[SweepLayout, TrialRow]:
    """The one trial that is meant.

    Raises:
        ValueError: none is, or more than one.
    """
    return one_of(matching(trial, storage, state), trial)


def matching(trial: str, storage: Path, state: Path) -> list[tuple[SweepLayout, TrialRow]]:
    """All trials that `trial` may mean: an id, the beginning of one, or a name, after SWEEP/ of one sweep alone."""
    return [
        (layout, row) for layout in sweeps(storage, state) for row in _rows(layout) if _is_meant(trial, layout, row)
    ]


def _is_meant(trial: str, layout: SweepLayout, row: TrialRow) -> bool:
    """Names of trials may have slashes of their own."""
    wanted = {trial, trial.removeprefix(f"{layout.name}/")} - {""}
    return any(row.trial_id.startswith(one) or row.name == one for one in wanted)


def one_of(found: list[tuple[SweepLayout, TrialRow]], trial: str) -> tuple[SweepLayout, TrialRow]:
    """The only one of `found`.

    Raises:
        ValueError: there is none, or more than one.
    """
    if not found:
        raise ValueError(f"there is no trial {trial!r}; orchestrate status SWEEP lists names and ids")
    if len(found) > 1:
        several = "; ".join(f"{layout.name}/{row.trial_id} {row.name}" for layout, row in found[:5])
        raise ValueError(f"{len(found)} trials are meant by {trial!r}: {several}")
    return found[0]
