"""What of a sweep stands in remote storage: the ledger's snapshots, published files, and which machine drives it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.holder import Hold
from orchestrator.layout import SweepLayout
from orchestrator.remote_trial import Mirror
from trainers.files import write_whole

log = logging.getLogger(__name__)

SNAPSHOT = "ledger-snapshot.db"
_CHECKSUM = ".sha256"
SNAPSHOT_SECONDS = 60.0
RENEW_SECONDS = 15.0  # between two signs of life of a driver
SILENT_SECONDS = 60.0  # without one, after which another machine may take over
_UNPUBLISHED = ("/attempts/", "/checkpoints/")  # parts of a trial's folder that are no results


class DrivenElsewhere(ValueError):
    """A process on another machine runs this sweep; the message names it."""


def restore(mirror: Mirror, layout: SweepLayout) -> bool:
    """Bring to this machine what it lacks of a sweep that it is about to run: the ledger and what `fetch` brings.

    The ledger's newest snapshot is taken where there is no ledger here, or where another machine has run the sweep
    since; what was here is then set aside. True where the snapshot was taken.

    Raises:
        SweepHeld: a process on this machine runs the sweep.
        OSError: the store does not answer, or does not let us in.
    """
    layout.ledger.parent.mkdir(parents=True, exist_ok=True)
    hold = Hold(layout.lock)
    try:
        brought = _restore_ledger(mirror, layout)
    finally:
        hold.release()
    fetch(mirror, layout)
    return brought


def fetch(mirror: Mirror, layout: SweepLayout) -> None:
    """Bring the sweep's plan and what its trials have published, where this machine lacks them.

    Raises:
        OSError: the store does not answer, or does not let us in.
    """
    keys = mirror.remote.sizes(layout.name)
    trials = f"{layout.name}/trials/"
    published = [key for key in keys if key.startswith(trials) and not any(part in key for part in _UNPUBLISHED)]
    described = [mirror.key(path) for path in (layout.sweep_file, layout.plan, layout.mlflow_map)]
    mirror.pull_missing([*published, *(key for key in described if key in keys)])


def _restore_ledger(mirror: Mirror, layout: SweepLayout) -> bool:
    key = f"{layout.name}/{SNAPSHOT}"
    there = _read_if_there(mirror, f"{key}{_CHECKSUM}")
    if there is None:  # nothing was ever pushed whole
        return False
    known = _last_pushed(layout)
    if layout.ledger.exists() and known.is_file() and known.read_bytes() == there:
        return False
    fresh = layout.ledger.with_name(f".{layout.ledger.name}.{os.getpid()}.pulled")
    try:
        mirror.remote.pull(key, fresh)
    except FileNotFoundError:  # somebody removed it
        return False
    if layout.ledger.exists():
        log.warning("another machine has run %s since; its ledger replaces the one here", layout.name)
    for end in ("-wal", "-shm", ""):
        old = layout.ledger.with_name(layout.ledger.name + end)
        if old.exists():
            old.replace(old.with_name(f"superseded-{old.name}"))
    fresh.replace(layout.ledger)
    write_whole(known, there)
    return True


def _read_if_there(mirror: Mirror, key: str) -> bytes | None:
    try:
        return mirror.remote.read(key)
    except FileNotFoundError:
        return None


def _last_pushed(layout: SweepLayout) -> Path:
    """Digest of the last snapshot that this machine pushed or took."""
    return layout.ledger.with_name(f"{SNAPSHOT}{_CHECKSUM}")


def pull_finished(mirror: Mirror, layout: SweepLayout, trial_ids: Collection[str]) -> None:
    """Bring what other sweeps in this storage have published of these trials, for them to be adopted."""
    if not trial_ids:
        return
    for sweep in mirror.remote.folders():
        if sweep == layout.name:
            continue
        for trial_id in sorted(set(trial_ids).intersection(mirror.remote.folders(f"{sweep}/trials"))):
            keys = mirror.remote.sizes(f"{sweep}/trials/{trial_id}")
            published = [key for key in keys if not any(part in key for part in _UNPUBLISHED)]
            if f"{sweep}/trials/{trial_id}/result.json" in keys:
                mirror.pull_missing(published)


def snapshot(ledger: Path, target: Path) -> None:
    """A whole copy of a ledger that may be written meanwhile, by SQLite's own means."""
    with (
        contextlib.closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True, timeout=10.0)) as source,
        contextlib.closing(sqlite3.connect(target)) as copy,
    ):
        source.backup(copy)


class Keeper:
    """Holds a sweep against drivers on other machines, and keeps its copy in the store up to date, by a thread."""

    def __init__(
        self,
        mirror: Mirror,
        layout: SweepLayout,
        every: float = SNAPSHOT_SECONDS,
        taken_over: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep `layout`'s sweep, whose ledger this process has open; a snapshot at most `every` seconds.

        `taken_over` is called, from the thread, where another machine has the sweep since this one fell silent.
        """
        self.mirror, self._layout, self._every, self._taken_over = mirror, layout, every, taken_over
        here = hashlib.sha256(f"{socket.gethostname()} {layout.ledger.resolve()}".encode()).hexdigest()[:16]
        self._drivers = f"{layout.name}/drivers"
        self._key = f"{self._drivers}/{here}.json"  # of one ledger on one machine, which the ledger's lock guards
        self._who = {"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}
        self._sent: dict[str, str] = {}  # digest of what was pushed last, by key
        self._over = threading.Event()
        self._pushing = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="storage keeper", daemon=True)

    def __enter__(self) -> Keeper:
        """Take the sweep and begin.

        Raises:
            DrivenElsewhere: a process on another machine gave a sign of life within the last minute.
            OSError: the store does not answer, or does not let us write.
        """
        self._renew()
        try:
            self._refuse_others()
        except BaseException:
            self.mirror.remote.remove(self._key)
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread and let go of the sweep. Call `push` before, where its error matters."""
        self._over.set()
        self._thread.join()
        try:
            self.mirror.remote.remove(self._key)
        except OSError as error:
            log.warning("the hold on %s could not be given back and ends in a minute: %s", self._layout.name, error)

    def push(self) -> None:
        """Push what changed of the ledger, the plan, tables, figures and report.

        Raises:
            DrivenElsewhere: another machine has taken the sweep over, and its files stay.
            OSError: the store does not answer.
        """
        with self._pushing:
            self._check_own()
            for path in _sweep_files(self._layout):
                self._push_changed(path, self.mirror.key(path))
            with tempfile.TemporaryDirectory(dir=self._layout.ledger.parent, prefix=".snapshot-") as folder:
                copy = Path(folder) / SNAPSHOT
                snapshot(self._layout.ledger, copy)
                self._push_ledger(copy)

    def _push_ledger(self, copy: Path) -> None:
        """Push a snapshot, then its digest, by which a machine knows whether it was the last to run the sweep."""
        key = f"{self._layout.name}/{SNAPSHOT}"
        digest = self._push_changed(copy, key)
        if digest is not None:
            self.mirror.remote.put(f"{key}{_CHECKSUM}", digest.encode())
            write_whole(_last_pushed(self._layout), digest.encode())

    def _push_changed(self, path: Path, key: str) -> str | None:
        """Push a file that is not there as it is; its digest where it was pushed."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if self._sent.get(key) == digest:
            return None
        self.mirror.remote.push(path, key)
        self._sent[key] = digest
        return digest

    def _keep(self) -> None:
        pushed = time.monotonic()
        while not self._over.wait(min(RENEW_SECONDS, self._every)):
            try:
                self._check_own()
                self._renew()
                if time.monotonic() - pushed >= self._every:
                    self.push()
                    pushed = time.monotonic()
            except DrivenElsewhere as error:
                log.error("%s", error)
                self._taken_over()
                return
            except (OSError, sqlite3.Error) as error:  # tried again in a moment, and at the end where it counts
                log.warning("the sweep could not be copied to storage: %s", error)

    def _renew(self) -> None:
        self.mirror.remote.put(self._key, json.dumps({**self._who, "renewed": _now()}).encode())

    def _check_own(self) -> None:
        """Whoever takes a sweep over removes the sign of life of the one before."""
        if not self.mirror.remote.exists(self._key):
            raise DrivenElsewhere(
                f"{self._layout.name} was taken over by another machine, since this one had given no sign of life for "
                f"{SILENT_SECONDS:.0f} s; what it has is not copied to storage any more"
            )

    def _refuse_others(self) -> None:
        remote = self.mirror.remote
        for key in remote.sizes(self._drivers):
            if key == self._key:
                continue
            try:
                silent, who = remote.age(key, self._key), json.loads(remote.read(key))
            except FileNotFoundError:  # it has just ended
                continue
            if silent < SILENT_SECONDS:
                raise DrivenElsewhere(
                    f"{self._layout.name} is being run by process {who['pid']} on {who['host']}, since "
                    f"{who['started']}; wait for it or end it. Its last sign of life is {max(silent, 0):.0f} s old; "
                    f"after {SILENT_SECONDS:.0f} s this machine may take over"
                )
            remote.remove(key)


def _sweep_files(layout: SweepLayout) -> Iterator[Path]:
    """Files of the sweep as a whole that are here."""
    single = (layout.sweep_file, layout.plan, layout.mlflow_map, layout.report)
    folders = (layout.tables, layout.figures)
    yield from (path for path in single if path.is_file())
    for folder in folders:
        yield from sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
