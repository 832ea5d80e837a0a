"""The command ui: MLflow's user interface on a store, and the addresses under which it compares the runs of sweeps."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlencode

from orchestrator import inspect, tracking
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, LedgerError
from orchestrator.tracking_records import check_tracking_uri, redact
from orchestrator.tracking_store import Store, environment

FIRST_PORT, PORTS = 5000, 100
MOST_SIDE_BY_SIDE = 100  # runs on the page that has a column for each
_READY_S, _LEAVE_S, _POLL_S = 120.0, 10.0, 0.2
_PR_SET_PDEATHSIG = 1  # of Linux
_MOST_LISTED = 20


@dataclass(frozen=True)
class Asked:
    """What the command line says; without a port the first free one is taken, without a sweep all are listed."""

    sweep: str | None
    storage: Path
    state: Path
    tracking_uri: str | None = None
    port: int | None = None


@dataclass(frozen=True)
class Tracked:
    """A sweep in MLflow; `run_ids` are those of its trials, in the order of the plan, as far as they are known."""

    sweep: str
    experiment_id: str
    parent_run_id: str
    run_ids: tuple[str, ...] = ()

    @property
    def curves(self) -> str:
        """The route at which MLflow draws the metrics of all trials, by name (verified with its version 3.17).

        Sorted by name, trials stand beside each other; in MLflow's own order they hide in the sweep's run.
        """
        query = {
            "compareRunsMode": "CHART",
            "orderByKey": "tags.`mlflow.runName`",
            "orderByAsc": "true",
            "searchFilter": f"tags.`mlflow.parentRunId` = '{self.parent_run_id}'",
        }
        return f"/#/experiments/{quote(self.experiment_id)}/runs?{urlencode(query, quote_via=quote)}"

    @property
    def side_by_side(self) -> str | None:
        """The route of params and metrics with a column for each trial; None where there are none, or too many."""
        if not 0 < len(self.run_ids) <= MOST_SIDE_BY_SIDE:
            return None
        runs, experiments = (json.dumps(ids, separators=(",", ":")) for ids in (self.run_ids, [self.experiment_id]))
        return f"/#/compare-runs?runs={quote(runs)}&experiments={quote(experiments)}"

    @property
    def artifacts(self) -> str:
        """The route of the sweep's tables, figures and report."""
        return f"/#/experiments/{quote(self.experiment_id)}/runs/{quote(self.parent_run_id)}/artifacts"


def ui(asked: Asked, say: Callable[[str], None]) -> None:
    """Serve MLflow's user interface on 127.0.0.1 until Ctrl-C, and say where it compares which sweep.

    Where the tracking store is a server, which has its user interface already, only the addresses are said.

    Raises:
        ValueError: there is no such sweep, the store cannot be opened, the port is taken, or MLflow does not start.
    """
    uri = check_tracking_uri(asked.tracking_uri or tracking.default_tracking_uri(asked.state.resolve()))
    if uri.startswith("http"):
        found = _tracked(asked, uri)
        _say_where(found, redact(uri).rstrip("/"), asked, say)
        return
    port = _port(asked.port)
    if asked.port is None and port != FIRST_PORT:
        say(f"port {FIRST_PORT} is taken: {port} is used")
    with _opened(lambda: tracking.prepare_store(uri, asked.state)):
        found = _tracked(asked, uri)
    command, variables = tracking.ui_command(uri, port)
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log, _server(command, variables, log) as server:
        _wait_until_ready(server, port, log)
        say(f"MLflow at {address} (Ctrl-C ends it)")
        _say_where(found, address, asked, say)
        code = server.wait()
        raise ValueError(f"MLflow's server ended by itself (exit code {code}): {_tail(log)}")


def _say_where(found: list[Tracked], base: str, asked: Asked, say: Callable[[str], None]) -> None:
    """One sweep with all of its addresses; of several, the newest first, one each."""
    if asked.sweep is None:
        for one in found[:_MOST_LISTED]:
            say(f"{one.sweep}: {base}{one.curves}")
        if len(found) > _MOST_LISTED:
            say(f"{len(found) - _MOST_LISTED} older sweeps: orchestrate ui SWEEP")
        return
    for one in found:
        say(f"comparison of {one.sweep}: {base}{one.curves}")
        if one.side_by_side is not None:
            say(f"side by side: {base}{one.side_by_side}")
        say(f"tables, figures, report: {base}{one.artifacts}")


def _tracked(asked: Asked, uri: str) -> list[Tracked]:
    """The sweep that is meant, else all that have runs in the store, the newest first.

    Raises:
        ValueError: the sweep has no runs there.
    """
    layouts = [*inspect.sweeps(asked.storage, asked.state)]
    if asked.sweep is None:
        layouts.sort(key=lambda layout: -layout.ledger.stat().st_mtime_ns)
        return [one for layout in layouts if (one := known(layout, uri)) is not None]
    layout = SweepLayout(asked.storage.resolve(), asked.state.resolve(), asked.sweep)
    one = known(layout, uri) if asked.sweep in {other.name for other in layouts} or layout.plan.is_file() else None
    if one is not None:
        return [one]
    with _opened(lambda: None), environment(timeout_s=10.0):
        in_store = [Tracked(asked.sweep, *ids) for ids in Store(uri, asked.state).sweeps(asked.sweep)]
    if not in_store:
        names = ", ".join(other.name for other in layouts) or "none yet"
        raise ValueError(f"the sweep {asked.sweep!r} has no runs in {redact(uri)}; sweeps: {names}")
    return in_store


def known(layout: SweepLayout, uri: str) -> Tracked | None:
    """Where the runs of a sweep are in the store `uri`, as its ledger says, else its published files."""
    try:
        with Ledger.open(layout.ledger, writer=False) as ledger:
            meta = ledger.meta("mlflow") or {}
            runs = tuple(row.run_id for row in ledger.rows() if row.run_id is not None)
    except (LedgerError, OSError):
        meta = _read_json(layout.mlflow_map)
        runs = tuple(map(str, (meta.get("runs") or {}).values()))
    here = str(meta.get("tracking_uri", ""))
    moved = tracking.is_beside(uri, layout.state) and Path(here).name == Path(uri).name
    if (here != redact(uri) and not moved) or not (meta.get("experiment_id") and meta.get("parent_run_id")):
        return None
    return Tracked(layout.name, str(meta["experiment_id"]), str(meta["parent_run_id"]), runs)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _opened(prepare: Callable[[], None]) -> Iterator[None]:
    try:
        prepare()
        yield
    except tracking.Unavailable as error:
        raise ValueError(f"the tracking store cannot be opened: {error}") from error


# The server


def _port(asked: int | None) -> int:
    """The port that is asked for, else the first free one.

    Raises:
        ValueError: it is taken, or the system's alone.
    """
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if asked is None else [asked]
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(("127.0.0.1", port))
            except PermissionError as error:
                raise ValueError(f"port {port} may not be used by you; choose one above 1023 with --port") from error
            except OSError:
                continue
            return port
    which = f"ports {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are" if asked is None else f"port {asked} is"
    raise ValueError(f"{which} taken by another program, perhaps by another orchestrate ui; choose one with --port")


@contextmanager
def _server(command: list[str], variables: dict[str, str], log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server in a group of its own, which ends with the block, with a signal and with this process."""
    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _leave) for number in heeded}  # nohup has SIGHUP ignored
    server = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    try:
        yield server
    finally:
        _end(server)
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _end_with_parent() -> None:
    """Where this process is killed, the server is told to end; MLflow passes the signal on to its workers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(_LEAVE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    """Until the server answers.

    Raises:
        ValueError: it has ended, or does not answer for two minutes.
    """
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ValueError(f"MLflow's server does not start (exit code {server.returncode}): {_tail(log)}")
        if _is_healthy(port):
            return
        time.sleep(_POLL_S)
    raise ValueError(f"MLflow's server does not answer on port {port}: {_tail(log)}")


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: IO[bytes]) -> str:
    """The last line that the server said, without secrets."""
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return redact(next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing"))[:500]
