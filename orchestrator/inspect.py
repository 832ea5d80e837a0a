"""The commands that look at sweeps without running them: status, logs, stop, report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, LedgerError, TrialRow


def status(sweep: str | None, storage: Path, state: Path, *, failures: bool) -> None:
    """Print counts of all sweeps, or every trial of one.

    Raises:
        ValueError: there is no such sweep.
    """
    if sweep is None:
        layouts = list(_sweeps(storage, state))
        for layout in layouts:
            try:
                counts = _counts(_rows(layout))
            except LedgerError as error:
                print(f"{layout.name}: {error}")
                continue
            print(f"{layout.name}: {', '.join(f'{n} {name}' for name, n in counts.items())}")
        if not layouts:
            print(f"no sweeps under {state}")
        return
    layout = _layout(sweep, storage, state)
    if not layout.ledger.is_file():
        raise ValueError(
            f"{layout.ledger} is missing; running the sweep again takes finished trials from their folders"
        )
    for row in _rows(layout):
        print(_line(row))
        if failures and row.error is not None:
            print(row.error.get("traceback") or row.error.get("message"))


def _line(row: TrialRow) -> str:
    step = "" if row.last_step is None else f" step {row.last_step}{_of_steps(row)}"
    error = ""
    if row.error is not None:
        text = str(row.error.get("message") or row.error.get("type"))
        error = f" — {text.splitlines()[0][:100]}"
    return f"{row.trial_id} {row.state:9} attempts {row.attempts}{step}  {row.name}{error}"


def _of_steps(row: TrialRow) -> str:
    steps = row.config.get("optim", {}).get("steps")  # of programs and of imported trials only what was given
    return "" if steps is None else f"/{steps}"


def logs(trial: str, storage: Path, state: Path) -> None:
    """Print the logs of all attempts of a trial.

    Raises:
        ValueError: no trial, or more than one, is meant.
    """
    layout, row = find(trial, storage, state)
    folder = layout.trial(row.trial_id)
    for number in folder.attempts():
        print(f"=== {row.name}, attempt {number} ===")
        if folder.log(number).is_file():
            print(folder.log(number).read_text(errors="replace"), end="")
    if row.error is not None:
        print(row.error.get("traceback") or row.error.get("message"))


def stop(trial: str, storage: Path, state: Path) -> None:
    """Ask a running trial to end.

    Raises:
        ValueError: no trial, or more than one, is meant, or it is not running.
    """
    layout, row = find(trial, storage, state)
    if row.state != "running":
        raise ValueError(f"{row.name} is {row.state}; only a running trial can be stopped")
    layout.trial(row.trial_id).stop_request.touch()
    print(f"{row.name} will checkpoint and end as stopped")


def report(sweeps: Sequence[str], storage: Path) -> None:
    """Write tables, figures and report of each sweep and print its table.

    Raises:
        ValueError: there is no such sweep.
    """
    from rich.console import Console

    from analysis.run import analyse

    for name in sweeps:
        layout = _layout(name, storage, storage)
        analysis = analyse(layout.root)
        Console(soft_wrap=True).print(analysis.terminal)
        for problem in analysis.problems:
            print(f"note: {problem}")
        print(analysis.answer)
        print(f"tables {layout.tables}/*.parquet\nreport {layout.report}")


def _sweeps(storage: Path, state: Path) -> Iterator[SweepLayout]:
    folders = sorted(state.iterdir()) if state.is_dir() else []
    for folder in folders:
        layout = SweepLayout(storage.resolve(), state.resolve(), folder.name)
        if layout.ledger.is_file():
            yield layout


def _layout(sweep: str, storage: Path, state: Path) -> SweepLayout:
    layout = SweepLayout(storage.resolve(), state.resolve(), sweep)
    known = [folder.name for folder in storage.iterdir()] if storage.is_dir() else []
    if sweep not in known or not layout.plan.is_file():
        listed = ", ".join(found.name for found in _sweeps(storage, state)) or "none yet"
        raise ValueError(f"there is no sweep {sweep!r} under {storage}; sweeps: {listed}")
    return layout


def _rows(layout: SweepLayout) -> list[TrialRow]:
    if not layout.ledger.is_file():
        return []
    with Ledger.open(layout.ledger, writer=False) as ledger:
        return ledger.rows()


def _counts(rows: Sequence[TrialRow]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.state] = counts.get(row.state, 0) + 1
    return counts


def find(trial: str, storage: Path, state: Path) -> tuple[SweepLayout, TrialRow]:
    """The one trial that is meant.

    Raises:
        ValueError: none is, or more than one.
    """
    return one_of(matching(trial, storage, state), trial)


def matching(trial: str, storage: Path, state: Path) -> list[tuple[SweepLayout, TrialRow]]:
    """All trials that `trial` may mean: an id, the beginning of one, or a name, after SWEEP/ of one sweep alone."""
    sweep, _, wanted = trial.rpartition("/")
    return [
        (layout, row)
        for layout in _sweeps(storage, state)
        if not sweep or layout.name == sweep
        for row in _rows(layout)
        if wanted and (row.trial_id.startswith(wanted) or row.name == wanted)
    ]


def one_of(found: list[tuple[SweepLayout, TrialRow]], trial: str) -> tuple[SweepLayout, TrialRow]:
    """The only one of `found`.

    Raises:
        ValueError: there is none, or more than one.
    """
    if len(found) != 1:
        several = "; ".join(f"{layout.name}/{row.trial_id} {row.name}" for layout, row in found[:5])
        raise ValueError(f"{len(found)} trials are meant by {trial!r}{': ' + several if several else ''}")
    return found[0]
