"""Which MLflow run belongs to what: one per sweep and per trial, found by tag, made once, set right at both ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from orchestrator.ledger import Ledger, TrialRow
from orchestrator.tracking_records import STATUSES, filter_key, params, redact, tag_values, trial_tags
from orchestrator.tracking_store import Run, Store, Unavailable

_CREATE_TRIES = 3


def key_of(store: Store, parent_id: str | None) -> str | None:
    """The key that the runs of a sweep have whose own run is `parent_id`; None where there is no such run."""
    return None if parent_id is None else store.tags(parent_id).get("sweep_key")


def adopt(store: Store, experiment_id: str, parent_id: str | None, sweep_key: str, storage: str) -> None:
    """Give the runs of a sweep the key that they have under the name that its storage has now.

    For a store that was moved or copied together with the sweep; the sweep's own run, `parent_id`, comes last, so that
    what is cut off is made good by the next call.
    """
    before = key_of(store, parent_id)
    if before is None or before == sweep_key:
        return
    runs = store.find(experiment_id, "sweep_key", before)
    for run in sorted(runs, key=lambda run: run.run_id == parent_id):
        key = {"trial_key": filter_key(sweep_key, run.tags.get("trial_id", ""))}
        if run.tags.get("role") == "sweep":
            key = {"parent_key": filter_key("parent", sweep_key), "storage": storage}
        store.log_texts(run.run_id, params={}, tags=tag_values({"sweep_key": sweep_key, **key}))


class Runs:
    """The runs of one sweep in one store. All calls raise the errors of `Store`; any may be made again."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        sweep: str,
        storage: str,
        description: str,
        check: Callable[[], None],
        *,
        beside: bool = False,
    ) -> None:
        """Find or make the experiment and the sweep's own run and open that; `check` may raise to end early.

        A store that lies `beside` the ledger moves with it: what the ledger knows there is this sweep's.
        """
        self._store, self._ledger, self._check = store, ledger, check
        self._sweep_key = filter_key(redact(storage), sweep)
        tags = {
            "sweep_key": self._sweep_key,
            "parent_key": filter_key("parent", self._sweep_key),
            "role": "sweep",
            "sweep": sweep,
            "storage": storage,
            "status": "running",
            **({"mlflow.note.content": description} if description else {}),
        }
        check()
        self.experiment_id = store.experiment(sweep)
        if beside:
            parent = (ledger.meta("mlflow") or {}).get("parent_run_id")
            adopt(store, self.experiment_id, parent, self._sweep_key, redact(storage))
        self.parent_id = self._one("parent_key", sweep, tag_values(tags), time.time_ns() // 1_000_000)
        self._store.set_status(self.parent_id, "RUNNING", None)
        self._store.log_texts(self.parent_id, params={}, tags=tag_values(tags))

    def _one(self, tag: str, name: str, tags: dict[str, str], start_ms: int) -> str:
        """The one run with this key: looked for before each try to make one, since the reply to a try may be lost."""
        for left in reversed(range(_CREATE_TRIES)):
            self._check()
            found = self._store.find(self.experiment_id, tag, tags[tag])
            kept = _kept([run for run in found if run.tags.get("generation") == tags.get("generation")], None)
            self._check()
            try:
                run_id = kept or self._store.create(self.experiment_id, name, tags, start_ms)
                break
            except Unavailable:
                if not left:
                    raise
        for run in found:
            if run.run_id != run_id:
                self._store.delete(run.run_id)
        return run_id

    def claim(self, row: TrialRow) -> str:
        """The run of a trial, described; remembered only then, so that a description is never left out."""
        texts, cut = params(row.config)
        keys = {"sweep_key": self._sweep_key, "trial_key": filter_key(self._sweep_key, row.trial_id)}
        tags = trial_tags(row, keys, self.parent_id, cut)
        run_id = self._one("trial_key", row.name, tags, row.started_ms or 0)
        self._store.log_texts(run_id, params=texts, tags=tags)
        self._ledger.mark_run(row.trial_id, row.generation, run_id)
        return run_id

    def reconcile(self, reader: Ledger, leaving: bool) -> None:
        """Make MLflow's runs and the ledger agree: one run per trial, none lost, none RUNNING that does not run."""
        found = self._store.find(self.experiment_id, "sweep_key", self._sweep_key)
        rows = {row.trial_id: row for row in reader.rows(in_plan_only=False)}
        for row in rows.values():
            if row.run_id is not None and all(run.run_id != row.run_id for run in found):
                self._ledger.mark_run(row.trial_id, row.generation, None)
        trials: dict[str, list[Run]] = {}
        for run in found:
            if run.tags.get("role") == "trial":
                trials.setdefault(run.tags.get("trial_id", ""), []).append(run)
        for trial_id, runs in trials.items():
            self._check()
            self._reconcile_trial(rows.get(trial_id), runs, leaving)

    def _reconcile_trial(self, row: TrialRow | None, runs: list[Run], leaving: bool) -> None:
        generation = "0" if row is None else str(row.generation)
        current = [run for run in runs if run.tags.get("generation") == generation]
        kept = _kept(current, None if row is None else row.run_id)
        running = row is not None and row.state == "running" and not leaving
        for run in runs:
            if kept is not None and run.run_id != kept:
                self._store.delete(run.run_id)
                continue
            if run.tags.get("mlflow.parentRunId") != self.parent_id:
                self._store.log_texts(run.run_id, params={}, tags={"mlflow.parentRunId": self.parent_id})
            if run.status == "RUNNING" and not running:
                over = row is not None and row.state in STATUSES and row.state != "running"
                status = row.state if row is not None and over else "interrupted"
                self._store.log_texts(run.run_id, params={}, tags={"status": status})
                self._store.set_status(run.run_id, STATUSES[status], None if row is None else row.ended_ms)

    def end(self, reader: Ledger) -> None:
        """Close the sweep's own run: FINISHED, or KILLED where trials of the plan are left."""
        counts = reader.counts()
        over = not (counts["planned"] or counts["running"])
        tags = {"status": "finished" if over else "interrupted", "trials": json.dumps(counts)}
        self._store.log_texts(self.parent_id, params={}, tags=tags)
        self._store.set_status(self.parent_id, "FINISHED" if over else "KILLED", time.time_ns() // 1_000_000)


def _kept(runs: Sequence[Run], marked: str | None) -> str | None:
    """Of several runs for one thing the one that the ledger knows, else the earliest."""
    ids = [run.run_id for run in runs]
    return marked if marked in ids else (ids[0] if ids else None)
