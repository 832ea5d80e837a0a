"""Jobs: what is sent and what never is, the command that runs, and a real sweep on a real head."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from orchestrator import submit, working_tree
from orchestrator.ledger import Ledger
from orchestrator.submit import Submission
from tests.orchestrator.sweeps import ORCHESTRATE, Small, environment

FILES = ("sweeps/mine.yaml", "mine.py", "sub/notes.txt")
NEVER = (
    *("runs/a/ledger.db", ".git/config", ".venv/bin/python", "x.egg-info/PKG", ".mypy_cache/a", "a/__pycache__/b.pyc"),
    *(".env", "conf/.env.local", "keys/id_rsa", "server.pem", ".ray/auth_token", "credentials.json", "mlflow.db-wal"),
)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.mark.parametrize("repository", [False, True])
def test_sources_are_sent_and_results_caches_and_secrets_are_not(repository: bool, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    if repository:
        subprocess.run(["git", "init", "-q", str(tree)], check=True)
        write(tree, "ignored.bin")
        (tree / ".gitignore").write_text("ignored.bin\n")
    write(tree, *FILES, *(name for name in NEVER if not (repository and name.startswith(".git/"))))
    packed = working_tree.pack(tree, tmp_path / "tree.zip")
    expected = {*FILES, *([".gitignore"] if repository else [])}
    assert {path.as_posix() for path in packed} == expected
    with zipfile.ZipFile(tmp_path / "tree.zip") as archive:
        assert set(archive.namelist()) == expected
        assert archive.read("mine.py") == b"mine.py"


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "tree", *FILES)
    for name in ("a.zip", "b.zip"):
        working_tree.pack(tmp_path / "tree", tmp_path / name)
        os.utime(tmp_path / "tree" / FILES[0], (1e9, 1e9))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_tree_that_is_too_large_is_refused_naming_its_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_tree, "MAX_BYTES", 2**20)
    write(tmp_path / "tree", *FILES)
    (tmp_path / "tree" / "weights.pt").write_bytes(os.urandom(2 * 2**20))
    (tmp_path / "tree" / "x.bin").write_bytes(os.urandom(2**20))
    with pytest.raises(ValueError, match=r"more than the 1 MiB .*weights\.pt \(2 MiB\), x\.bin \(1 MiB\)"):
        working_tree.pack(tmp_path / "tree", tmp_path / "tree.zip")
    assert (tmp_path / "tree.zip").stat().st_size < 2.5 * 2**20, "what follows is not read any more"


def asked(folder: Path, **changes: Any) -> Submission:
    places = {"storage": "s3://bucket/x", "address": "http://127.0.0.1:8265", "state": "/tmp/orchestrate"}
    return Submission(**{"file": folder / "sweeps" / "mine.yaml", **places, **changes})


def test_the_job_runs_the_sweep_of_the_tree_on_its_own_cluster(tmp_path: Path) -> None:
    changes = {"overrides": ["optim.steps=2", "data.name=a b"], "tracking_uri": "http://tracking:5000", "name": "mine"}
    command = submit.entrypoint(asked(tmp_path, **changes), tmp_path)
    assert command == (
        "python -c 'from orchestrator.cli import main; main()' sweep sweeps/mine.yaml --address auto "
        "--storage s3://bucket/x --state /tmp/orchestrate --tracking-uri http://tracking:5000 --name mine "
        "--set optim.steps=2 --set 'data.name=a b'"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "runs"}, "absolute path that all machines"),
        ({"storage": "s3://a:hunter2@b/x"}, "from the environment"),
        ({"state": "runs"}, "relative"),
        ({"file": Path("/elsewhere/mine.yaml")}, "outside"),
        ({"tracking_uri": "postgresql://me:hunter2@db/mlflow"}, "ORCHESTRATE_TRACKING_URI"),
        ({"tracking_uri": "file:///x"}, "not supported"),
    ],
)
def test_what_cannot_go_to_a_cluster_is_refused_without_repeating_secrets(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        submit.entrypoint(asked(tmp_path, **changes), tmp_path)
    assert "hunter2" not in str(refused.value)


def test_only_allowed_variables_go_with_a_job() -> None:
    here = {
        "MLFLOW_TRACKING_USERNAME": "me",
        "MLFLOW_TRACKING_PASSWORD": "hunter2",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_REGION": "eu-north-1",
        "NCCL_DEBUG": "INFO",
        "SHELL": "/bin/sh",
    }
    given = submit.handed_over(["NCCL_DEBUG"], here)
    assert given == {
        "MLFLOW_TRACKING_USERNAME": "me",
        "AWS_REGION": "eu-north-1",
        "NCCL_DEBUG": "INFO",
        "RAY_JOB_STOP_WAIT_TIME_S": "40",
    }


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_secrets_are_not_handed_over_even_when_named(name: str) -> None:
    with pytest.raises(ValueError, match="logs") as refused:
        submit.handed_over([name], {name: "hunter2"})
    with pytest.raises(ValueError, match="holds a secret") as refused:
        submit.handed_over(["MY_STORE"], {"MY_STORE": "https://me:hunter2@host/x"})
    assert "hunter2" not in str(refused.value)


def test_a_variable_that_is_not_set_is_said() -> None:
    with pytest.raises(ValueError, match="not set here"):
        submit.handed_over(["NCCL_DEBUG"], {})


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", -15, 143), ("STOPPED", None, 143), ("FAILED", None, 1)],
)
def test_the_exit_code_is_the_jobs(status: str, code: int | None, expected: int) -> None:
    assert submit.exit_code(SimpleNamespace(driver_exit_code=code, status=SimpleNamespace(value=status))) == expected


class Server:
    """A job server that goes away while it is asked for the first time."""

    def __init__(self) -> None:
        self.asked = 0

    async def tail_job_logs(self, _job: str) -> AsyncIterator[str]:
        self.asked += 1
        yield "one\n"
        if self.asked == 1:
            raise aiohttp.ServerDisconnectedError
        yield "two\n"

    def get_job_info(self, _job: str) -> SimpleNamespace:
        status = SimpleNamespace(value="SUCCEEDED", is_terminal=lambda: True)
        return SimpleNamespace(status=status, driver_exit_code=0)


def test_a_connection_that_is_lost_is_made_again_and_nothing_is_told_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "_FOLLOW_AGAIN_SECONDS", 0.0)
    assert submit._follow(Server(), "job") == 0
    assert capsys.readouterr().out == "one\ntwo\n"


# On a real head


MINE = '''
"""A measurement of one's own, which lies in the working tree alone."""


def measure(subject, settings):
    """Nothing, found where it is looked for."""
    yield from ()
'''


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """The job server's address of a head with a token, and the environment of a user who has it."""
    port, dashboard = free_port(), free_port()
    scratch = tempfile.mkdtemp(prefix="ray-")
    user = {
        **environment(),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    start = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    start += ["--include-dashboard=true", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    start += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    start += ["--disable-usage-stats", f"--temp-dir={scratch}"]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=user)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "block until terminated" in line or "will now block" in line:
                break
        yield f"http://127.0.0.1:{dashboard}", user
    finally:
        process.terminate()
        process.communicate(timeout=60)
        shutil.rmtree(scratch, ignore_errors=True)


def tree(folder: Path, **changes: Any) -> Small:
    """A working tree with a sweep that needs a module of its own."""
    small = Small(folder / "tree", registers=(0,))
    path = small.write()
    text = path.read_text().replace("tokens:\n", "tokens:\n    measurements: ['mine:measure']\n")
    assert "mine:measure" in text
    path.write_text(text.replace("seeds:\n- 0\n- 1\n", "seeds: [0]\n"))
    (small.folder / "mine.py").write_text(MINE)
    return small


def command(small: Small, address: str, storage: Path, *arguments: str) -> list[str]:
    own = ["--storage", str(storage), "--state", str(storage.with_name("state")), "--address", address]
    own += ["--name", "small"]
    return [*ORCHESTRATE, "submit", "small.yaml", *own, *arguments]


@pytest.mark.slow
def test_a_sweep_runs_as_a_job_from_its_file_to_its_table(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, user = head
    small = tree(tmp_path)
    run = command(small, address, tmp_path / "shared", "--set", "optim.steps=8")
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=user, cwd=small.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job raysubmit_" in done.stderr and "ray job stop" in done.stderr
    assert "num_registers" in done.stdout  # the table, from the job's log
    assert (tmp_path / "shared" / "small" / "tables" / "ablation.parquet").is_file()
    assert (tmp_path / "state" / "small" / "ledger.db").is_file()
    assert not (small.folder / "runs").exists()


@pytest.mark.slow
def test_the_jobs_exit_code_comes_back(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, user = head
    small = tree(tmp_path)
    (small.folder / "mine.py").write_text(
        "def measure(subject, settings):\n    raise ValueError('broken on purpose')\n"
    )
    run = command(small, address, tmp_path / "shared")
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=user, cwd=small.folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "broken on purpose" in done.stdout


@pytest.mark.slow
def test_following_can_be_left_and_the_job_be_stopped_resumably(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, user = head
    small = tree(tmp_path)
    run = command(small, address, tmp_path / "shared", "--set", "optim.steps=100000")
    following = subprocess.Popen(
        run,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=user,
        cwd=small.folder,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's `make test-slow &` ignores it
    )
    deadline = time.monotonic() + 120
    checkpoints = tmp_path / "shared" / "small" / "trials"
    while not list(checkpoints.glob("*/attempts/*/checkpoints/*.pt")):
        assert time.monotonic() < deadline and following.poll() is None, following.communicate()
        time.sleep(0.2)
    following.send_signal(signal.SIGINT)
    _, said = following.communicate(timeout=30)
    assert following.returncode == 130, said
    found = re.search(r"ray job stop (\S+) --address (\S+)$", said, re.M)
    assert found is not None and "the job goes on" in said
    stop = [str(Path(sys.executable).parent / "ray"), "job", "stop", found[1], "--address", found[2]]
    stopped = subprocess.run(stop, capture_output=True, text=True, timeout=90, env=user)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    ledger = tmp_path / "state" / "small" / "ledger.db"

    def states() -> list[str]:
        with Ledger.open(ledger, writer=False) as opened:
            return [row.state for row in opened.rows()]

    deadline = time.monotonic() + 60
    while states() != ["planned"]:  # it left in order, where a killed one would stay running
        assert time.monotonic() < deadline, states()
        time.sleep(0.2)


@pytest.mark.slow
def test_nobody_is_let_in_without_the_token(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    address, user = head
    small = tree(tmp_path)
    run = command(small, address, tmp_path / "shared")
    stranger = {**user, "RAY_AUTH_TOKEN": "f" * 64}
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, env=stranger, cwd=small.folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "f" * 64 not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_server_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    small = tree(tmp_path)
    run = command(small, f"http://127.0.0.1:{free_port()}", tmp_path / "shared")
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, env=environment(), cwd=small.folder)
    assert done.returncode == 2
    assert "no Ray job server at http://127.0.0.1" in done.stderr and "Traceback" not in done.stderr
