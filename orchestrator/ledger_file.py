"""The SQLite file of a ledger: opened under a hold, its version, its transactions, values of the whole sweep."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestrator.holder import Hold
from orchestrator.ledger_schema import MIGRATIONS, SCHEMA_VERSION
from orchestrator.who_runs import holder_of

_BUSY_S = 10.0  # readers meet a writer only for the moment of a checkpoint


class LedgerError(ValueError):
    """The ledger's file cannot be used; the message says why and what to do."""


def steady_clock() -> Callable[[], int]:
    """Milliseconds since 1970 by the time of day of now, carried on by a clock that nobody sets, so durations hold."""
    start = time.time_ns() - time.monotonic_ns()
    return lambda: (start + time.monotonic_ns()) // 1_000_000


class LedgerFile:
    """An open ledger file: one process writes (from any of its threads), any number may read.

    Every change is one transaction (WAL). What a trial has come to is on the disk when the call returns
    (synchronous=FULL); that an attempt has begun and what it reports comes there with the next of these, since an
    attempt that a lost machine forgets is run again from its checkpoint and reports the same.
    """

    def __init__(self, connection: sqlite3.Connection, hold: Hold | None, path: Path, clock: Callable[[], int]) -> None:
        """Use `Ledger.open`."""
        self.path = path
        self._connection = connection
        self._hold = hold
        self._clock = clock
        self._lock = threading.RLock()
        self._connection.row_factory = sqlite3.Row

    @classmethod
    def open(cls, path: Path, *, writer: bool = True, clock: Callable[[], int] | None = None) -> Self:
        """Open the ledger at `path`; a writer makes it where there is none, and holds the sweep until `close`.

        `clock` gives milliseconds since 1970; without one it is a `steady_clock`.

        Raises:
            SweepHeld: another live process writes this ledger; the message names it.
            LedgerError: there is no ledger to read, it is damaged, or a newer version of this program wrote it.
        """
        clock = clock or steady_clock()
        if not writer:
            return cls(_connect(path, "ro"), None, path, clock)
        path.parent.mkdir(parents=True, exist_ok=True)
        hold = Hold(path.with_suffix(".lock"))
        try:
            return cls(_connect(path, "rwc"), hold, path, clock)
        except BaseException:
            hold.release()
            raise

    def close(self) -> None:
        """Close the file and let go of the sweep. Closing twice is allowed."""
        with self._lock:
            self._connection.close()
            if self._hold is not None:
                self._hold.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _change(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction. What is not `durable` survives the end of this process, but only the next durable change
        brings it to the disk: a machine that loses its power may forget it.
        """
        with self._lock:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _read(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.OperationalError:  # locked, or a full disk: the file is whole
                raise
            except sqlite3.DatabaseError as error:
                raise LedgerError(f"{self.path} is damaged inside ({error}); {_mended(self.path)}") from error

    # Of the sweep as a whole

    def meta(self, key: str) -> Any:
        """The JSON value kept under `key`, or None."""
        found = self._read("SELECT value FROM meta WHERE key = ?", (f"sweep/{key}",))
        return json.loads(found[0][0]) if found else None

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a JSON value under `key`."""
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"sweep/{key}", json.dumps(value)))


def _mended(path: Path) -> str:
    """What makes a damaged ledger whole."""
    return f"orchestrate doctor {path.parent.name} --fix makes it anew from the trial folders"


def _why_empty(path: Path) -> str:
    holder = holder_of(path.with_suffix(".lock"))
    if holder is not None and holder.alive:
        return f"{path} is empty; the sweep is only just being started by {holder}"
    return f"{path} is empty and nobody runs the sweep; {_mended(path)}, and so does running the sweep again"


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    """A connection in autocommit mode to a ledger of our version, made first where `mode` allows it."""
    if mode == "ro" and not path.exists():
        raise LedgerError(f"there is no ledger at {path}; the sweep has not been run with this state folder")
    try:
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.OperationalError as error:
        raise LedgerError(f"{path} cannot be opened ({error})") from error
    try:
        _prepare(connection, path, create=mode == "rwc")
    except sqlite3.OperationalError as error:  # locked, not to be written, a full disk: the file is whole
        connection.close()
        raise LedgerError(f"{path} cannot be used now ({error})") from error
    except sqlite3.DatabaseError as error:
        connection.close()
        raise LedgerError(f"{path} cannot be read ({error}); {_mended(path)}") from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, create: bool) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise LedgerError(
            f"{path} was written by a newer version of this program (ledger version {version}, this one knows "
            f"{SCHEMA_VERSION}); update the program"
        )
    if not create:
        if version == 0:
            raise LedgerError(_why_empty(path))
        if version < SCHEMA_VERSION:
            raise LedgerError(f"{path} is of an older version of this program; running its sweep again updates it")
        return
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    if version < SCHEMA_VERSION:
        connection.execute("BEGIN IMMEDIATE")
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
