"""Checks of doctor: the runs of a sweep in MLflow against its ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.finding import Finding, shortened
from orchestrator.import_results import is_imported
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import TrialRow
from orchestrator.tracking import Sink, default_tracking_uri, is_beside
from orchestrator.tracking_records import check_tracking_uri, filter_key, redact
from orchestrator.tracking_runs import adopt, key_of
from orchestrator.tracking_store import Gone, Refused, Run, Store, Unavailable, environment

_TIMEOUT_S = 10.0
_DELIVERY_S = 60.0
_SUPERSEDED = "superseded"  # as a generation: of no ledger, so that the sink deletes the run when it makes the trial's


@dataclass(frozen=True)
class Tracked:
    """Where a sweep's runs are; `storage_key` is what they are tagged with."""

    layout: SweepLayout
    uri: str
    storage_key: str

    @classmethod
    def of(cls, layout: SweepLayout, ledger: Ledger, given: str | None, remote: str | None) -> Tracked:
        """The store that the user names, else the one in the state folder where there is one, as for a run of the
        sweep without that option, else the one that the sweep has fed.

        Raises:
            ValueError: the tracking URI is of a kind that is not supported.
        """
        key = str(layout.storage) if remote is None else remote.partition("?")[0]
        default = cls(layout, default_tracking_uri(layout.state), key)
        if given is not None or default.is_there:
            return cls(layout, check_tracking_uri(given or default.uri), key)
        known = (ledger.meta("mlflow") or {}, _read_json(layout.mlflow_map))  # the second where a ledger was rebuilt
        fed = [cls(layout, found["tracking_uri"], key) for found in known if found.get("tracking_uri")]
        return next((tracked for tracked in fed if tracked.is_there), default)

    @property
    def sweep_key(self) -> str:
        """The tag by which runs of this sweep are found."""
        return filter_key(redact(self.storage_key), self.layout.name)

    @property
    def is_there(self) -> bool:
        """Whether there is a store to ask; a database in a file would be made by asking."""
        return not self.uri.startswith("sqlite:///") or Path(self.uri.removeprefix("sqlite:///")).is_file()


def check_runs(tracked: Tracked, ledger: Ledger) -> Iterator[Finding]:
    """One run for each trial that was begun, none RUNNING, nothing undelivered; call it where nobody runs the sweep."""
    mend = _once(lambda: _deliver(tracked, ledger))
    where, remedy = redact(tracked.uri), "makes, ends and deletes runs as the ledger says, and delivers the rest"
    for what in list(_problems(tracked, ledger)):  # all of them before the first is mended
        if isinstance(what, str):
            yield Finding("MLflow", where, what, remedy, mend)
        else:
            advice = "give --tracking-uri, or try again when it answers"
            yield Finding("MLflow", where, f"the tracking store does not answer: {redact(str(what))[:200]}", advice)


def _problems(tracked: Tracked, ledger: Ledger) -> Iterator[str | Exception]:
    rows = {row.trial_id: row for row in ledger.rows(in_plan_only=False)}
    known = ledger.meta("mlflow") or {}
    lacking = [
        delivery
        for delivery in ledger.undelivered(leaving=True)
        if delivery.run_id is not None or not is_imported(rows[delivery.trial_id])  # fed when their sweep is run next
    ]
    if lacking:
        points = sum(delivery.pending for delivery in lacking)
        yield f"{len(lacking)} trials are not as the ledger has them; {points} points lack"
    if not any(row.run_id for row in rows.values()) and known.get("parent_run_id") is None:
        return
    if not tracked.is_there:
        yield "the store is gone"
        return
    try:
        with environment(_TIMEOUT_S):
            found = _found(tracked, known) if "experiment_id" in known else []
    except (Unavailable, Gone, Refused) as error:
        yield error
        return
    yield from compare(rows, found)


def _found(tracked: Tracked, known: Mapping[str, Any]) -> list[Run]:
    store = Store(tracked.uri, tracked.layout.state)
    key = key_of(store, known.get("parent_run_id")) if is_beside(tracked.uri, tracked.layout.state) else None
    return store.find(str(known["experiment_id"]), "sweep_key", key or tracked.sweep_key)


def compare(rows: Mapping[str, TrialRow], found: list[Run]) -> Iterator[str]:
    """What is wrong with the runs of a sweep that nobody runs, one sentence each."""
    by_trial: dict[str, list[Run]] = {}
    for run in found:
        if run.tags.get("role") == "trial":
            by_trial.setdefault(run.tags.get("trial_id", ""), []).append(run)
    several: list[str] = []
    gone: list[str] = []
    for key, row in rows.items():
        runs = [run for run in by_trial.get(key, []) if run.tags.get("generation") == str(row.generation)]
        if len(runs) > 1:
            several.append(row.name)
        if row.run_id is not None and all(run.run_id != row.run_id for run in runs):
            gone.append(row.name)
    if several:
        yield f"{len(several)} trials have more than one run ({shortened(several)})"
    if gone:
        yield f"{len(gone)} runs are gone ({shortened(gone)})"
    left = [run for run in found if run.status == "RUNNING"]
    if left:
        yield f"{len(left)} runs are RUNNING, but nobody runs the sweep"


def _deliver(tracked: Tracked, ledger: Ledger) -> None:
    """Bring MLflow's runs in line with the ledger. Raises OSError where something is not delivered in a minute."""
    recover(tracked, ledger)
    layout = tracked.layout
    asked = str(_read_json(layout.plan).get("question") or "")
    sink = Sink(ledger, tracked.uri, layout.name, tracked.storage_key, state=layout.state, description=asked)
    sink.start()
    sink.flush(_DELIVERY_S)
    lacking = sink.close(_DELIVERY_S)
    sink.publish_map(layout.mlflow_map)
    if lacking:
        raise OSError(f"MLflow still lacks {lacking} records")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def recover(tracked: Tracked, ledger: Ledger) -> None:
    """Let a ledger that was rebuilt know which runs its trials have, so that those are neither doubled nor fed twice.

    A run has all of an attempt once it has the status with which that attempt ended: statuses are delivered last.
    What another run has is not known, so it gives way to a new one as soon as its trial has something to deliver.
    Nothing happens where the ledger knows its runs.
    """
    if ledger.meta("mlflow") is not None or not tracked.is_there:
        return
    with environment(_TIMEOUT_S):
        store = Store(tracked.uri, tracked.layout.state)
        experiment = store.experiment(tracked.layout.name)
        if is_beside(tracked.uri, tracked.layout.state):
            parent = _read_json(tracked.layout.mlflow_map).get("parent_run_id")
            adopt(store, experiment, parent, tracked.sweep_key, redact(tracked.storage_key))
        found = store.find(experiment, "sweep_key", tracked.sweep_key)
        trials = [run for run in found if run.tags.get("role") == "trial"]
        newest = {run.tags.get("trial_id", ""): run for run in sorted(trials, key=_generation)}
        for row in ledger.rows(in_plan_only=False):
            if row.trial_id in newest:
                _remember(store, ledger, row, newest[row.trial_id])
    ledger.set_meta("mlflow", {"tracking_uri": redact(tracked.uri)})


def _generation(run: Run) -> int:
    said = run.tags.get("generation", "0")
    return int(said) if said.isdigit() else 0


def _remember(store: Store, ledger: Ledger, row: TrialRow, run: Run) -> None:
    is_complete = run.tags.get("status") == row.state and run.tags.get("attempts") == str(row.attempts)
    generation = str(row.generation) if is_complete else _SUPERSEDED  # a rebuilt ledger counts them anew
    if run.tags.get("generation") != generation:
        store.log_texts(run.run_id, params={}, tags={"generation": generation})
    if not is_complete:
        return
    ledger.mark_run(row.trial_id, row.generation, run.run_id)
    points = ledger.since(row.trial_id, 0, -1)  # of SQLite: without a limit
    ledger.mark_delivered(row.trial_id, run.run_id, seq=points[-1].seq if points else None, status=row.state)


def _once(do: Callable[[], None]) -> Callable[[], None]:
    """`do` for several findings that it mends together."""
    done: list[bool] = []

    def once() -> None:
        if not done:
            do()
            done.append(True)

    return once
