"""What doctor says of a machine: versions, disk, file systems, and processes that a dead driver left."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from orchestrator import doctor_machine, doctor_processes
from orchestrator.finding import shortened
from orchestrator.ledger import Ledger
from orchestrator.plan import build_plan
from orchestrator.spec import read_sweep
from tests.orchestrator.sweeps import Small

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/me/local xfs rw 0 0
bucket /mnt/a\\040bucket fuse.s3fs rw 0 0
//server/share /mnt/früh cifs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/runs", "ext4"),
        ("/home/me/runs", "nfs4"),
        ("/home/me/local/runs", "xfs"),
        ("/home/me/localized", "nfs4"),
        ("/mnt/a bucket/runs", "fuse.s3fs"),
        ("/mnt/früh/runs", "cifs"),
    ],
)
def test_the_innermost_mount_says_the_kind_of_file_system(path: str, kind: str) -> None:
    assert doctor_machine.file_system(Path(path), MOUNTS) == kind


def test_state_on_a_network_file_system_is_said(tmp_path: Path) -> None:
    local = f"/dev/vda / ext4 rw 0 0\n/dev/vda {tmp_path} xfs rw 0 0\n"
    assert list(doctor_machine.check_file_system(tmp_path / "runs", local)) == []
    for kind in ("nfs", "cifs", "fuse.sshfs"):
        (finding,) = doctor_machine.check_file_system(tmp_path / "runs", f"{local}x {tmp_path} {kind} rw 0 0\n")
        assert f"network file system ({kind})" in finding.what and finding.mend is None


def test_versions_that_are_too_old_or_missing_are_named() -> None:
    have = metadata.version("torch")
    asked = [f"torch>={have}", "torch>=1000", "no-such-package>=1", 'no-such-either>=1; extra == "more"']
    found = list(doctor_machine.check_versions(asked))
    assert [finding.where for finding in found] == ["torch", "no-such-package"]
    assert f"torch>=1000; {have} is installed" in found[0].what
    assert "it is not installed" in found[1].what


def test_the_project_asks_for_what_pyproject_says() -> None:
    assert any(line.startswith("torch>=") for line in doctor_machine.requirements())
    assert list(doctor_machine.check_versions(doctor_machine.requirements())) == []


def test_disk_that_does_not_suffice_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: float
        free: float

    for share, total, needed, said in [
        (0.5, 100e9, 49e9, None),
        (0.5, 100e9, 51e9, "50.0 GB of 100.0 GB are free; the sweep needs 51.0 GB"),
        (0.04, 100e9, 0, "4.0 GB of 100.0 GB are free"),
        (0.5, 3e9, 0, "1.5 GB of 3.0 GB are free"),
    ]:
        usage = Usage(total, share * total)
        monkeypatch.setattr("shutil.disk_usage", lambda _place, usage=usage: usage)
        found = [finding.what for finding in doctor_machine.check_disk(tmp_path / "new" / "runs", needed, "the sweep")]
        assert found == ([] if said is None else [said])


def test_long_lists_are_shortened() -> None:
    assert shortened(["a", "b", "c"]) == "a, b, c"
    assert shortened(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process that the system knows by a given name, as Ray's workers are known."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, raylet: int | None = None, **environment: str) -> subprocess.Popen[bytes]:
        environment |= {} if raylet is None else {"RAY_RAYLET_PID": str(raylet), "RAY_JOB_ID": "ffffffff"}
        process = subprocess.Popen([name, "60"], executable="/bin/sleep", env={**os.environ, **environment})
        started.append(process)
        while doctor_processes.read_process(process.pid) is None:  # it has not yet become what it is to be
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def ledger_with_attempts(folder: Path, *attempts: tuple[int, str, float]) -> Ledger:
    """A ledger of attempts by process id, host and seconds since 1970 when they began."""
    now = 0.0
    ledger = Ledger.open(folder / "ledger.db", clock=lambda: round(now * 1000))
    trials = build_plan(read_sweep(Small(folder).write())).trials
    ledger.plan(trials)
    for trial, (pid, host, started) in zip(trials, attempts, strict=False):
        now = started
        ledger.start_attempt(trial.trial_id, 1, host, pid)
    return ledger


def test_a_process_that_an_attempt_wrote_down_is_ended(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    left = start("ray::ResourceTrainable.train", os.getpid())
    other = start("ray::ResourceTrainable.train", os.getpid())
    here, now = socket.gethostname(), time.time() + 2
    with ledger_with_attempts(tmp_path, (left.pid, here, now), (other.pid, "elsewhere", now)) as ledger:
        (finding,) = doctor_processes.check_processes(ledger)
        assert finding.where == f"process {left.pid}" and finding.mend is not None
        finding.mend()
        assert left.wait(5) != 0
        assert other.poll() is None, "of the same node, and by nothing proved to be this sweep's"
        assert list(doctor_processes.check_processes(ledger)) == []


def test_a_process_that_got_the_number_later_or_is_no_actor_of_ours_stays(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    later, foreign = start("ray::ThinTrial"), start("ray::Other")
    here, now = socket.gethostname(), time.time()
    with ledger_with_attempts(tmp_path, (later.pid, here, now - 60), (foreign.pid, here, now + 2)) as ledger:
        assert list(doctor_processes.check_processes(ledger)) == []


def test_another_process_that_got_the_number_meanwhile_is_not_ended(
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    running = start("ray::ThinTrial")
    process = doctor_processes.read_process(running.pid)
    assert process is not None
    doctor_processes.end([dataclasses.replace(process, started=process.started - 60)], 0.1)
    assert running.poll() is None


def test_training_processes_without_their_node_are_only_named(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    gone, fine = start("ray::Rank.run", 2**22 + 1), start("ray::Rank.run", os.getpid())
    named = {finding.where: finding for finding in doctor_processes.check_orphans()}
    assert named[f"process {gone.pid}"].mend is None
    assert f"process {fine.pid}" not in named


def test_what_is_left_of_a_program_is_ended(tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    attempt = {"ORCHESTRATE_DIRECTORY": str(tmp_path / "sweep" / "trials" / "aaaa" / "attempts" / "1")}
    left, others = [start("sleep", **attempt), start("a child", **attempt)], [start("sleep")]
    others.append(start("sleep", ORCHESTRATE_DIRECTORY=str(tmp_path / "sweep2" / "trials" / "aaaa")))
    (finding,) = doctor_processes.check_programs(tmp_path / "sweep")
    assert f"2 processes of programs of a dead driver of this sweep still run ({left[0].pid} sleep 60" in finding.what
    assert finding.mend is not None
    finding.mend()
    assert all(process.wait(5) != 0 for process in left) and all(process.poll() is None for process in others)
    assert list(doctor_processes.check_programs(tmp_path / "sweep")) == []


def test_doctor_does_not_end_itself_where_a_program_calls_it(tmp_path: Path) -> None:
    code = f"from orchestrator import doctor_processes as d; print(d.of_programs(d.Path({str(tmp_path)!r})))"
    within = {**os.environ, "ORCHESTRATE_DIRECTORY": str(tmp_path / "trials")}
    command = ["sh", "-c", '"$@"; exit 0', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, env=within, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
