"""The MLflow sink with a real PostgreSQL behind it, directly and by way of `mlflow server`; six processes at once."""

import http.client
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.tracking import prepare_store
from orchestrator.tracking_records import ui_command

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")]

PROCESSES, TRIALS, STEPS = 6, 3, 5
PASSWORD = "of-a-test"

SWEEP = """
import sys
from pathlib import Path
from orchestrator.ledger import Ledger
from orchestrator.tracking import Sink
from tests.orchestrator.test_ledger import FakeTrial

uri, name, folder, state, trials, steps = sys.argv[1:]
with Ledger.open(Path(folder) / name / "ledger.db") as ledger:
    ids = [f"{trial:016x}" for trial in range(int(trials))]
    ledger.plan([FakeTrial(trial_id, name=f"trial {trial_id}") for trial_id in ids])
    sink = Sink(ledger, uri, name, "storage", state=Path(state))
    sink.start()
    for trial_id in ids:
        ledger.start_attempt(trial_id, 1, "host", 1)
        for step in range(int(steps)):
            ledger.record(trial_id, 1, step, {"train/loss": step / 7})
            sink.notify()
        ledger.finish(trial_id, 1, "finished", {}, None)
    sys.exit(sink.close(90))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    """A program of PostgreSQL's, newest version first."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: -float(path.parts[4]))
    path = str(found[0]) if found else shutil.which(name)
    if path is None:
        pytest.skip(f"PostgreSQL's {name} is not installed (Debian: apt install postgresql)")
    return path


def as_owner() -> tuple[list[str], str]:
    """How to run a program as a user that is not root, which PostgreSQL refuses, and that user's name."""
    if os.geteuid() != 0:
        return [], pwd.getpwuid(os.geteuid()).pw_name
    names = {entry.pw_name for entry in pwd.getpwall()}
    owner = "postgres" if "postgres" in names else "nobody"
    if shutil.which("runuser") is None or owner not in names:
        pytest.skip("this is root, and there is no runuser or no other user to run PostgreSQL as")
    return ["runuser", "-u", owner, "--"], owner


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port on loopback of a PostgreSQL of the test's own."""
    pytest.importorskip("psycopg2", reason="the extra postgres is not installed")
    initdb, server = program("initdb"), program("postgres")
    prefix, owner = as_owner()
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    (folder / "password").write_text(PASSWORD)
    for path in (folder, folder / "password"):
        shutil.chown(path, owner)
    data, port = folder / "data", free_port()
    making = [initdb, "-D", str(data), "--username=me", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}"]
    subprocess.run([*prefix, *making, "--no-sync"], check=True, capture_output=True, cwd="/", timeout=120)
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
    command = [*prefix, server, "-D", str(data), "-p", str(port), *options]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
    try:
        wait_until_up(port, process, folder / "log")
        yield port
    finally:
        pid = int((data / "postmaster.pid").read_text().splitlines()[0])
        subprocess.run([*prefix, "kill", "-INT", str(pid)], check=True)  # PostgreSQL's fast shutdown
        process.wait(30)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="me", password=PASSWORD, dbname="postgres").close()
            return
        except psycopg2.OperationalError:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.1)


def database(port: int, name: str) -> str:
    """The URI of a fresh database."""
    import psycopg2

    connection = psycopg2.connect(host="127.0.0.1", port=port, user="me", password=PASSWORD, dbname="postgres")
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
    finally:
        connection.close()
    return f"postgresql+psycopg2://me:{PASSWORD}@127.0.0.1:{port}/{name}"


def sweeps_at_once(uri: str, folder: Path) -> list[str]:
    """Six sweeps, each a process of its own, that deliver their trials at the same time; what they said."""
    root = str(Path(__file__).parents[2])
    state = folder / "state"
    state.mkdir()

    def command(number: int) -> Sequence[str]:
        own = [uri, f"sweep{number}", str(folder), str(state), str(TRIALS), str(STEPS)]
        return [sys.executable, "-c", SWEEP, *own]

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), root])}
    processes = [
        subprocess.Popen(command(n), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for n in range(PROCESSES)
    ]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, said  # nothing left to deliver
    return said


def check(uri: str) -> None:
    """Exactly one run per trial and one per sweep, all finished, no point lost or doubled."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    for number in range(PROCESSES):
        experiment = client.get_experiment_by_name(f"sweep{number}")
        runs = client.search_runs([experiment.experiment_id])
        trials = [run for run in runs if run.data.tags["role"] == "trial"]
        assert (len(runs), len(trials)) == (TRIALS + 1, TRIALS)
        assert len({run.data.tags["trial_id"] for run in trials}) == TRIALS
        assert {run.info.status for run in trials} == {"FINISHED"}
        for run in trials:
            points = client.get_metric_history(run.info.run_id, "train/loss")
            assert sorted((point.step, point.value) for point in points) == [(s, s / 7) for s in range(STEPS)]


def test_a_fresh_database_and_six_processes_at_once(postgres: int, tmp_path: Path) -> None:
    uri = database(postgres, "direct")
    said = sweeps_at_once(uri, tmp_path)
    assert not any(PASSWORD in text for text in said)
    check(uri)


def test_a_server_on_postgresql_and_six_processes_at_once(postgres: int, tmp_path: Path) -> None:
    uri = database(postgres, "served")
    prepare_store(uri, tmp_path)
    port = free_port()
    argv, extra = ui_command(uri, port)
    assert PASSWORD not in " ".join(argv)  # which everyone on the machine can read
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen(argv, env={**os.environ, **extra}, cwd=tmp_path, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while (answer := ask(port)) != 200:
            assert time.monotonic() < deadline and server.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        assert answer == 200
        assert ask(port, host="evil.example") == 403
        sweeps_at_once(f"http://127.0.0.1:{port}", tmp_path)
        check(f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait(30)
        log.close()
    assert PASSWORD not in (tmp_path / "server.log").read_text()


def ask(port: int, host: str | None = None) -> int | None:
    """The status with which the server answers to a host's name, or None where nothing answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        path = "/health" if host is None else "/api/2.0/mlflow/experiments/get?experiment_id=0"
        connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()
