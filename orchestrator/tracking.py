"""MLflow, fed from the ledger by one thread that never holds up the driver, loses a point or opens a second run."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import Delivery
from orchestrator.tracking_records import (
    STATUSES,
    check_tracking_uri,
    data_inputs,
    redact,
    status_tags,
    tag_values,
    ui_command,
)
from orchestrator.tracking_runs import Runs
from orchestrator.tracking_store import MAX_METRICS, Gone, Refused, Store, Unavailable, environment
from trainers.files import write_whole

__all__ = ["Sink", "Unavailable", "default_tracking_uri", "prepare_store", "ui_command"]

_LEAST_PAUSE_S = 0.2  # between two passes, so that many small reports become one batch
_BACK_OFF_S = (0.5, 10.0)  # first and longest; the longest bounds how late a server's return is noticed
_REST_BUSY, _REST_IDLE = 19.0, 1.0  # seconds of rest for each second of processor time, while a sweep runs
_BUSY = 0.3  # of a core, used by the rest of the process
_WARN_EVERY_S = 60.0

logger = logging.getLogger(__name__)


def default_tracking_uri(state: Path) -> str:
    """The SQLite store in the state folder."""
    return f"sqlite:///{(state / 'mlflow.db').absolute()}"


def is_beside(tracking_uri: str, state: Path) -> bool:
    """Whether a store is the one in the state folder, which is moved and copied together with the ledgers there."""
    return tracking_uri == default_tracking_uri(state)


def prepare_store(tracking_uri: str, state: Path) -> None:
    """Make the schema of a fresh database under a lock, as has to be before anything else opens it, the UI too.

    Raises:
        ValueError: the tracking URI is of a kind that is not supported.
        Unavailable: the store cannot be opened.
    """
    with environment(timeout_s=10.0):
        Store(tracking_uri, state)


class _Closing(Exception):
    """`close` has run out of time: the thread ends between two calls to MLflow."""


class Sink:
    """Brings everything in a ledger to MLflow, in a thread of its own, however often MLflow fails.

    One experiment per sweep, in it one parent run and one nested run per trial, found again by tags. The driver calls
    `notify` after it has changed the ledger; nothing here raises into the driver after `__init__`.
    """

    def __init__(
        self,
        ledger: Ledger,
        tracking_uri: str,
        sweep_name: str,
        storage_key: str,
        *,
        state: Path,
        description: str = "",
        poll_s: float = 1.0,
        request_timeout_s: float = 10.0,
    ) -> None:
        """`storage_key` tells storages apart that hold sweeps of one name; `description` is shown with the sweep.

        Raises:
            ValueError: the tracking URI is of a kind that is not supported.
        """
        self._ledger = ledger
        self._uri = check_tracking_uri(tracking_uri)
        self._sweep, self._storage, self._description = sweep_name, redact(storage_key), description
        self._state, self._poll_s, self._timeout_s = state, poll_s, request_timeout_s
        self._wake, self._leaving, self._abandon = threading.Event(), threading.Event(), threading.Event()
        self._hurry = threading.Event()  # set while somebody waits
        self._spent = (0.0, 0.0, 0.0)  # at the last rest: processor seconds of the thread, of the process, the clock
        self._thread = threading.Thread(target=self._loop, name="mlflow-sink", daemon=True)
        self._artifacts: list[Path] = []  # appended by the driver, taken off the front by the thread
        self._notes: list[str] = []  # likewise; only the newest counts
        self._upload_after = 0.0  # on the monotonic clock; later than now while uploads fail
        self._store: Store | None = None
        self._runs: Runs | None = None
        self._ended = False
        self._warned_at = -_WARN_EVERY_S

    # What the driver calls

    def start(self) -> None:
        """Begin to deliver; returns at once. A ledger that fed another store before starts anew with this one."""
        known = self._ledger.meta("mlflow") or {}
        before, uri = known.get("tracking_uri"), redact(self._uri)
        if before != uri and is_beside(self._uri, self._state) and Path(str(before)).name == Path(uri).name:
            self._ledger.set_meta("mlflow", {**known, "tracking_uri": uri})  # perhaps moved; runs are looked for first
        elif before != uri:
            self._ledger.forget_runs()
            self._ledger.set_meta("mlflow", {"tracking_uri": uri})
        self._thread.start()

    def notify(self) -> None:
        """The ledger has something new; takes microseconds."""
        self._wake.set()

    def log_artifacts(self, paths: Sequence[Path]) -> None:
        """Add files, and folders under their names, to the sweep's run; they are uploaded before `close` is done."""
        self._artifacts.extend(paths)
        self._wake.set()

    def describe(self, text: str) -> None:
        """Show `text`, which is Markdown, with the sweep's run from now on, in place of the description."""
        self._notes.append(text)
        self._wake.set()

    def flush(self, timeout: float) -> int:
        """Wait until MLflow has everything, `timeout` seconds at most; how much it lacks (see `close`).

        Files that it has just refused to take are not waited for: `close` tries them again.
        """
        deadline = time.monotonic() + timeout
        self._hurry.set()
        self._wake.set()
        while (lacking := self._lacking(leaving=False)) and time.monotonic() < deadline and self._thread.is_alive():
            time.sleep(0.05)
        if not self._leaving.is_set():
            self._hurry.clear()
        return lacking

    def close(self, timeout: float) -> int:
        """Deliver the rest, leave no run RUNNING, and end, within `timeout` seconds.

        Returns:
            How many points, statuses and artifacts MLflow lacks. They stay in the ledger, for the next start.
        """
        self._leaving.set()
        self._hurry.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._abandon.set()
        return self._lacking(leaving=True) + (not self._ended)

    def publish_map(self, path: Path) -> None:
        """Write which run belongs to which trial, as JSON, by rename."""
        known = self._ledger.meta("mlflow") or {}
        runs = {row.trial_id: row.run_id for row in self._ledger.rows() if row.run_id is not None}
        content = {
            "tracking_uri": redact(self._uri),
            "experiment_id": known.get("experiment_id"),
            "parent_run_id": known.get("parent_run_id"),
            "runs": runs,
        }
        write_whole(path, json.dumps(content, indent=2, sort_keys=True).encode())

    def _lacking(self, leaving: bool) -> int:
        trials = self._ledger.undelivered(leaving=leaving)
        put_off = not leaving and time.monotonic() < self._upload_after
        uploads = 0 if put_off else len(self._artifacts) + bool(self._notes)
        return sum(t.pending + (t.wanted != t.delivered) for t in trials) + uploads

    # The thread

    def _loop(self) -> None:
        pause = 0.0
        self._spent = (time.thread_time(), time.process_time(), time.monotonic())
        with environment(self._timeout_s), Ledger.open(self._ledger.path, writer=False) as reader:
            while not (self._ended or self._abandon.is_set()):
                try:
                    self._pass(reader)
                    pause = 0.0
                except _Closing:
                    return
                except (Unavailable, Gone, Refused) as error:
                    if isinstance(error, Gone):
                        self._runs = None  # perhaps the sweep's own run was deleted: look for all of them anew
                    pause = self._back_off(pause, error)
                except sqlite3.Error as error:
                    if self._abandon.is_set():
                        return  # the driver has closed its ledger under us, as it may
                    pause = self._back_off(pause, error)
                except Exception as error:
                    logger.debug("the MLflow sink failed", exc_info=True)
                    pause = self._back_off(pause, error)
                self._sleep(pause)

    def _sleep(self, pause: float) -> None:
        """After a failure the whole pause, cut short once by `close`; else until there is something new."""
        closing = self._leaving.is_set()
        if self._ended:
            return
        (self._abandon if closing else self._leaving).wait(pause or (0.0 if closing else _LEAST_PAUSE_S))
        if not pause and not closing:
            self._wake.wait(self._poll_s)
        self._wake.clear()

    def _back_off(self, pause: float, error: Exception) -> float:
        self._warn(error)
        return min(max(2 * pause, _BACK_OFF_S[0]), _BACK_OFF_S[1])

    def _warn(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._warned_at >= _WARN_EVERY_S:
            self._warned_at = now
            text = redact(" ".join(str(error).split()))[:300]
            logger.warning("MLflow at %s fails (%s); trials go on, delivery is tried again", redact(self._uri), text)

    def _pass(self, reader: Ledger) -> None:
        """Bring over all that is missing now; any call may fail, and what was marked before stays."""
        leaving = self._leaving.is_set()
        store, runs = self._connected(reader, leaving)
        failed: Exception | None = None
        for delivery in reader.undelivered(leaving=leaving):
            try:
                self._deliver(store, runs, reader, delivery)
            except Gone as error:  # somebody deleted the run: a new one gets everything
                self._ledger.mark_run(delivery.trial_id, delivery.generation, None)
                failed = error
            except Refused as error:
                failed = error
            self._rest()
        try:
            self._upload_in_time(store, runs.parent_id)
        except (Unavailable, Refused) as error:  # no reason to leave the sweep's run open
            failed = error
        if leaving and not reader.undelivered(leaving=True):
            runs.reconcile(reader, leaving)  # once more, for runs that a late request made
            if not reader.undelivered(leaving=True):  # else a run had vanished: another pass brings it back
                runs.end(reader)
                self._ended = failed is None
        if failed is not None:
            raise failed

    def _rest(self) -> None:
        """Leave the processor to the rest of this process, unless somebody waits: MLflow's client computes 60 ms for a
        run, many times what the whole orchestrator does. Where the process is busy, it rests for longer.
        """
        own, everything, now = time.thread_time(), time.process_time(), time.monotonic()
        used, others, passed = own - self._spent[0], everything - self._spent[1], now - self._spent[2]
        self._spent = (own, everything, now)
        busy = others - used > _BUSY * max(passed, 1e-3)
        self._hurry.wait(used * (_REST_BUSY if busy else _REST_IDLE))

    def _connected(self, reader: Ledger, leaving: bool) -> tuple[Store, Runs]:
        """The store and the sweep's runs in it, set right against the ledger when first reached."""
        self._check()
        if self._store is None:
            self._store = Store(self._uri, self._state)
        if self._runs is None:
            names, beside = (self._sweep, self._storage, self._description), is_beside(self._uri, self._state)
            runs = Runs(self._store, self._ledger, *names, self._check, beside=beside)
            runs.reconcile(reader, leaving)
            ids = {"experiment_id": runs.experiment_id, "parent_run_id": runs.parent_id}
            self._ledger.set_meta("mlflow", {"tracking_uri": redact(self._uri), **ids})
            self._runs = runs
        return self._store, self._runs

    def _deliver(self, store: Store, runs: Runs, reader: Ledger, delivery: Delivery) -> None:
        trial_id, run_id, seq = delivery.trial_id, delivery.run_id, delivery.seq
        row = reader.row(trial_id)
        if run_id is None:
            run_id, seq = runs.claim(row), 0
        while points := reader.since(trial_id, seq, MAX_METRICS):
            self._check()
            store.log_points(run_id, points)
            seq = points[-1].seq
            self._ledger.mark_delivered(trial_id, run_id, seq=seq)
        if delivery.wanted != delivery.delivered or delivery.run_id is None:
            self._check()
            tags = status_tags(row, delivery.wanted, reader.metrics(trial_id))
            store.log_texts(run_id, params={}, tags=tags)
            store.log_inputs(run_id, data_inputs(row))
            store.set_status(run_id, STATUSES[delivery.wanted], row.ended_ms)
            self._ledger.mark_delivered(trial_id, run_id, status=delivery.wanted)

    def _upload_in_time(self, store: Store, parent_id: str) -> None:
        """Upload what there is; while trials run, one upload that fails holds no points up: it is tried now and then.

        So it is where a server keeps its artifacts where only its own machine can write.
        """
        if self._leaving.is_set():
            self._upload(store, parent_id)
        elif time.monotonic() >= self._upload_after:
            try:
                self._upload(store, parent_id)
            except (Unavailable, Refused) as error:
                self._upload_after = time.monotonic() + _BACK_OFF_S[1]
                self._warn(error)

    def _upload(self, store: Store, parent_id: str) -> None:
        while count := len(self._notes):
            self._check()
            store.log_texts(parent_id, params={}, tags=tag_values({"mlflow.note.content": self._notes[count - 1]}))
            del self._notes[:count]
        while self._artifacts:
            self._check()
            if self._artifacts[0].exists():
                store.log_artifacts(parent_id, self._artifacts[0])
            else:
                logger.warning("%s does not exist and is not uploaded to MLflow", self._artifacts[0])
            self._artifacts.pop(0)

    def _check(self) -> None:
        if self._abandon.is_set():
            raise _Closing
