"""The command ui: which sweep's runs it points at, under which addresses, and what becomes of its server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from orchestrator import tracking, ui
from orchestrator.ledger import Ledger
from orchestrator.tracking import default_tracking_uri
from orchestrator.tracking_store import Store
from orchestrator.ui import MOST_SIDE_BY_SIDE, Asked, Tracked
from tests.orchestrator.sweeps import ORCHESTRATE, environment
from tests.orchestrator.test_ledger import FakeTrial

SERVER = "http://127.0.0.1:1"  # nobody listens there

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's own use of SQLAlchemy


def _sweep(folder: Path, name: str, *, uri: str, trials: int = 2, when: int = 0) -> None:
    """A sweep whose runs have the ids aa00, aa01 …, as its ledger knows them."""
    with Ledger.open(folder / name / "ledger.db") as ledger:
        ledger.plan([FakeTrial(f"{name}{number}") for number in range(trials)])
        for number in range(trials):
            ledger.mark_run(f"{name}{number}", 0, f"{name}run{number}")
        ledger.set_meta("mlflow", {"tracking_uri": uri, "experiment_id": "7", "parent_run_id": f"parent{name}"})
    (folder / name / "plan.json").write_text("{}")
    os.utime(folder / name / "ledger.db", (when, when))


def _said(asked: Asked) -> list[str]:
    lines: list[str] = []
    ui.ui(asked, lines.append)
    return lines


def _query(address: str) -> dict[str, str]:
    return {name: value for name, (value,) in parse_qs(urlsplit(urlsplit(address).fragment).query).items()}


def test_of_a_server_the_addresses_are_said_and_it_is_not_asked(tmp_path: Path) -> None:
    _sweep(tmp_path, "a", uri=SERVER)
    curves, side, files = _said(Asked("a", tmp_path, tmp_path, SERVER))
    label, _, address = curves.partition(": ")
    assert label == "comparison of a" and address.startswith(f"{SERVER}/#/experiments/7/runs?")
    assert _query(address) == {
        "compareRunsMode": "CHART",
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": "true",
        "searchFilter": "tags.`mlflow.parentRunId` = 'parenta'",
    }
    compared = _query(side.partition(": ")[2])
    assert f"{SERVER}/#/compare-runs?" in side
    assert {name: json.loads(value) for name, value in compared.items()} == {
        "runs": ["arun0", "arun1"],
        "experiments": ["7"],
    }
    assert files == f"tables, figures, report: {SERVER}/#/experiments/7/runs/parenta/artifacts"


def test_without_a_sweep_all_are_listed_the_newest_first(tmp_path: Path) -> None:
    _sweep(tmp_path, "old", uri=SERVER, when=1_000)
    _sweep(tmp_path, "new", uri=SERVER, when=3_000)
    _sweep(tmp_path, "elsewhere", uri="sqlite:////x/mlflow.db", when=2_000)
    lines = _said(Asked(None, tmp_path, tmp_path, SERVER))
    assert [line.split(": ")[0] for line in lines] == ["new", "old"]
    assert all("compareRunsMode" in line for line in lines)


def test_a_long_list_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ui, "_MOST_LISTED", 1)
    _sweep(tmp_path, "old", uri=SERVER, when=1_000)
    _sweep(tmp_path, "new", uri=SERVER, when=3_000)
    lines = _said(Asked(None, tmp_path, tmp_path, SERVER))
    assert [line.split(": ")[0] for line in lines] == ["new", "1 older sweeps"]


def test_many_runs_are_only_drawn(tmp_path: Path) -> None:
    _sweep(tmp_path, "a", uri=SERVER, trials=MOST_SIDE_BY_SIDE + 1)
    assert [line.split(": ")[0] for line in _said(Asked("a", tmp_path, tmp_path, SERVER))] == [
        "comparison of a",
        "tables, figures, report",
    ]
    assert Tracked("a", "7", "p", ("r",) * MOST_SIDE_BY_SIDE).side_by_side is not None
    assert Tracked("a", "7", "p").side_by_side is None


def test_a_password_in_the_address_is_not_shown(tmp_path: Path) -> None:
    _sweep(tmp_path, "a", uri="https://host:5000/")
    lines = _said(Asked("a", tmp_path, tmp_path, "https://me:hush@host:5000/"))
    assert "https://host:5000/#/experiments" in lines[0] and "hush" not in " ".join(lines)


def test_a_lost_ledger_is_made_good_by_what_was_published(tmp_path: Path) -> None:
    _sweep(tmp_path, "a", uri=SERVER)
    (tmp_path / "a" / "ledger.db").unlink()
    content = {"tracking_uri": SERVER, "experiment_id": "7", "parent_run_id": "p", "runs": {"t": "r"}}
    (tmp_path / "a" / "mlflow.json").write_text(json.dumps(content))
    lines = _said(Asked("a", tmp_path, tmp_path, SERVER))
    assert "parentRunId%60%20%3D%20%27p%27" in lines[0] and "%22r%22" in lines[1]


def test_a_sweep_that_only_the_store_knows_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = default_tracking_uri(tmp_path)
    store = Store(uri, tmp_path)
    experiment = store.experiment("a")
    run = store.create(experiment, "a", {"role": "sweep"}, 1)
    assert ui._tracked(Asked("a", tmp_path, tmp_path, uri), uri) == [Tracked("a", experiment, run)]
    with pytest.raises(ValueError, match=r"the sweep 'b' has no runs in sqlite:.*; sweeps: none yet"):
        ui._tracked(Asked("b", tmp_path, tmp_path, uri), uri)
    with pytest.raises(ValueError, match=r"the sweep '\.\./a' has no runs"):
        ui._tracked(Asked("../a", tmp_path / "x", tmp_path / "x", uri), uri)


def test_a_store_that_moved_with_its_sweeps_is_known(tmp_path: Path) -> None:
    _sweep(tmp_path, "a", uri="sqlite:////before/mlflow.db")
    uri = default_tracking_uri(tmp_path)
    found = ui._tracked(Asked("a", tmp_path, tmp_path), uri)
    assert found == [Tracked("a", "7", "parenta", ("arun0", "arun1"))]


def test_a_server_that_does_not_answer_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the tracking store cannot be opened"):
        _said(Asked("unknown", tmp_path, tmp_path, SERVER))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_is_taken_is_said_or_passed_over(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"port {taken} is taken .* --port"):
        ui._port(taken)
    monkeypatch.setattr(ui, "FIRST_PORT", taken)
    found = ui._port(None)
    assert taken < found < taken + ui.PORTS
    monkeypatch.setattr(ui, "PORTS", 1)
    with pytest.raises(ValueError, match=f"ports {taken} to {taken} are taken"):
        ui._port(None)


def test_a_port_of_the_system_is_not_called_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def bind(self, _address: object) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(ui.socket, "socket", Refusing)
    with pytest.raises(ValueError, match="port 80 may not be used by you; choose one above 1023 with --port"):
        ui._port(80)


def test_a_hangup_that_nohup_has_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (tmp_path / "log").open("w+b") as log, ui._server([sys.executable, "-c", ""], {}, log):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) == ui._leave
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; print('cannot open sqlite://u:hush@h'); sys.exit(3)"
    monkeypatch.setattr(tracking, "prepare_store", lambda *_: None)
    monkeypatch.setattr(tracking, "ui_command", lambda *_: ([sys.executable, "-c", program], {}))
    with pytest.raises(ValueError, match=r"does not start \(exit code 3\): cannot open sqlite://h$"):
        _said(Asked(None, tmp_path, tmp_path))


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", flush=True)
time.sleep(600)
"""


def test_a_server_that_will_not_leave_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ui, "_LEAVE_S", 0.5)
    with (tmp_path / "log").open("w+b") as log:
        with ui._server([sys.executable, "-c", STUBBORN], {}, log) as server:
            while "up" not in ui._tail(log):
                time.sleep(0.02)
            group = os.getpgid(server.pid)
            assert group != os.getpgid(0)
        assert server.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while _lives(group):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_signal_ends_the_server_and_frees_its_port(number: int, code: int, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*ORCHESTRATE, "ui", "--storage", str(tmp_path), "--port", str(port)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `make test-slow &` ignores it
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"MLflow at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
            assert ui._is_healthy(port)
            process.send_signal(number)
            assert process.wait(30) == code
        finally:
            process.kill()
    deadline = time.monotonic() + 20
    while ui._is_healthy(port):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ui._port(port) == port


def test_routes_keep_what_a_name_may_hold() -> None:
    odd = Tracked("x", "1/2?#", "p")
    assert unquote(odd.artifacts) == "/#/experiments/1/2?#/runs/p/artifacts" and "?" not in odd.artifacts
