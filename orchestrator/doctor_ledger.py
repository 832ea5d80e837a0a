"""Checks of doctor: the ledger itself, and the ledger against the folders of its trials."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from orchestrator import publish, rebuild
from orchestrator.finding import Finding, shortened
from orchestrator.import_results import is_imported
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger, LedgerError
from orchestrator.ledger_schema import OVER, TrialRow

_ALWAYS = ("token_norms.parquet", "token_statistics.parquet")  # what our trainers record of every trial
_ANEW = "orchestrate sweep FILE --rerun makes it anew, with all other trials of the sweep"


def check_file(layout: SweepLayout) -> Iterator[Finding]:
    """The ledger is there, whole, and of this version."""
    path = layout.ledger
    if path.is_dir():
        remedy = f"sets it aside as {path.name}.damaged and rebuilds the ledger from the trial folders"
        yield Finding("ledger", str(path), "a folder is where the ledger should be", remedy, lambda: _rebuild(layout))
        return
    if not path.is_file():
        yield Finding(
            "ledger",
            str(path),
            "the ledger is missing",
            "rebuilds it from its snapshot, the plan and the trial folders",
            lambda: _rebuild(layout),
        )
        return
    problem = rebuild.problem_of(path)
    if problem is not None:
        remedy = f"sets it aside as {path.name}.damaged and rebuilds it from the trial folders"
        yield Finding("ledger", str(path), f"the ledger is damaged: {problem}", remedy, lambda: _rebuild(layout))
        return
    try:
        Ledger.open(path, writer=False).close()
    except LedgerError as error:
        remedy = "brings it to this version, unless it is of a newer one"
        yield Finding("ledger", str(path), str(error), remedy, lambda: Ledger.open(path).close())


def _rebuild(layout: SweepLayout) -> None:
    rebuild.rebuild(layout)


def check_running(ledger: Ledger) -> Iterator[Finding]:
    """Nothing is marked as running; call it where nobody runs the sweep."""
    left = [row for row in ledger.rows(in_plan_only=False) if row.state == "running"]
    if left:
        what = f"{_trials(left)} still marked as running, but nobody runs the sweep"
        remedy = "puts them back to planned, uncharged"
        yield Finding("states", str(ledger.path), what, remedy, lambda: _release(ledger))


def _release(ledger: Ledger) -> None:
    ledger.release_running()


def check_folders(layout: SweepLayout, ledger: Ledger, clock: rebuild.Clock) -> Iterator[Finding]:
    """The ledger knows every trial folder, and what has come to its end there."""
    rows = {row.trial_id: row for row in ledger.rows(in_plan_only=False)}
    behind = []
    for key in rebuild.trial_folders(layout):
        ended = rebuild.read_ended(layout.trial(key))
        if ended is not None and rebuild.is_behind(rows.get(key), ended):
            behind.append(key)
        elif key not in rows:
            what = "the ledger does not know this trial, and it is not over"
            yield Finding("folders", str(layout.trial(key).root), what, "orchestrate clean --orphans frees it")
    if behind:
        what = f"the ledger does not know what {len(behind)} trials came to: {shortened(behind)}"
        where = str(layout.trial(behind[0]).root.parent)
        mend = partial(_update, ledger, clock, layout)
        yield Finding("folders", where, what, "takes their results from their folders", mend)


def _update(ledger: Ledger, clock: rebuild.Clock, layout: SweepLayout) -> None:
    rebuild.update(ledger, clock, layout)


def check_published(layout: SweepLayout, ledger: Ledger) -> Iterator[Finding]:
    """The files of every trial that is over say what the ledger says, and its records are whole."""
    for row in ledger.rows(in_plan_only=False):
        if row.state not in OVER or row.result is None:
            continue
        trial = layout.trial(row.trial_id)
        if not publish.is_published(ledger, row, trial):
            what = f"{row.name}: configuration, metrics or result are not as the ledger has them"
            mend = partial(publish.trial, ledger, trial, row.trial_id)
            yield Finding("published", str(trial.root), what, "publishes them again from the ledger", mend)
        yield from _check_records(trial, row)


def _check_records(trial: TrialLayout, row: TrialRow) -> Iterator[Finding]:
    source = trial.attempt(row.attempts)
    of_attempt = {path.relative_to(source) for path in publish.records_in(source)}
    differing = [name for name in sorted(of_attempt) if not _is_same(source / name, trial.root / name)]
    if differing:
        what = f"{row.name}: {shortened([str(name) for name in differing])} not as attempt {row.attempts} recorded it"
        mend = partial(publish.records, trial, row.attempts)
        yield Finding("records", str(trial.root), what, "publishes the attempt's records again", mend)
    for path in publish.records_in(trial.root):
        if path.relative_to(trial.root) not in of_attempt and path.suffix == ".parquet" and not _is_readable(path):
            what = f"{row.name}: the file is damaged, and the attempt that wrote it is gone"
            yield Finding("records", str(path), what, _ANEW)


def check_recorded(layout: SweepLayout, ledger: Ledger) -> Iterator[Finding]:
    """What our own trainers record of every trial that they finish is there, in its folder or in its attempt's."""
    for row in ledger.rows(in_plan_only=False):
        if row.state != "finished" or row.config.get("command") is not None or is_imported(row):
            continue
        trial = layout.trial(row.trial_id)
        places = (trial.root, trial.attempt(row.attempts))
        lost = [name for name in _ALWAYS if not any((place / name).is_file() for place in places)]
        if lost:
            what = f"{row.name}: {' and '.join(lost)} of a finished trial are gone, as may be other records"
            yield Finding("records", str(trial.root), what, _ANEW)


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _is_readable(path: Path) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.read_table(path)
    except (OSError, pa.ArrowException):
        return False
    return True


def _trials(rows: list[TrialRow]) -> str:
    return f"{len(rows)} trials are ({shortened([row.name for row in rows])})"
