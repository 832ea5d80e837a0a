"""What of a trial travels: numbers of attempts, checkpoints there and back, records, what a new generation voids."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator import remote_trial
from orchestrator.layout import TrialLayout
from orchestrator.remote import Remote
from orchestrator.remote_trial import Mirror, Uploader
from tests.orchestrator.object_store import Store, running_store

ID = "0123456789abcdef"


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as started:
        yield started


def machine(far: Path, near: Path) -> tuple[Mirror, TrialLayout]:
    """One machine's own folder, and the storage that it shares with others."""
    mirror = Mirror(Remote(far.as_uri(), delays=()), near)
    return mirror, TrialLayout(near / "sweep" / "trials" / ID)


@pytest.fixture
def one(tmp_path: Path) -> tuple[Mirror, TrialLayout]:
    return machine(tmp_path / "far", tmp_path / "one")


@pytest.fixture
def two(tmp_path: Path) -> tuple[Mirror, TrialLayout]:
    return machine(tmp_path / "far", tmp_path / "two")


def write_checkpoint(folder: Path, step: int, payload: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:09d}.pt"
    content = payload + str(step).encode()
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
    path.write_bytes(content)
    return path


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def test_numbers_of_attempts_are_never_given_twice(tmp_path: Path) -> None:
    def machines_claims(name: int) -> list[int]:
        mirror, trial = machine(tmp_path / "far", tmp_path / str(name))
        return [remote_trial.claim(mirror, trial, above=2) for _ in range(5)]

    with ThreadPoolExecutor(6) as pool:
        given = [number for claims in pool.map(machines_claims, range(6)) for number in claims]
    assert len(set(given)) == len(given) == 30
    assert min(given) >= 3  # some are skipped, where two saw each other


def test_alone_numbers_follow_each_other_and_what_is_known(one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    assert [remote_trial.claim(mirror, trial, above) for above in (0, 0, 7)] == [1, 2, 8]
    assert trial.attempts() == [1, 2, 8]


def test_another_machine_goes_on_from_the_newest_checkpoint(
    one: tuple[Mirror, TrialLayout], two: tuple[Mirror, TrialLayout]
) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        write_checkpoint(trial.attempt(1) / "checkpoints", 5)
    with remote_trial.attempt(mirror, trial, 2):
        write_checkpoint(trial.attempt(2) / "checkpoints", 9)
    elsewhere = two[1]
    found = remote_trial.pull_checkpoint(*two)
    assert found == elsewhere.attempt(2) / "checkpoints" / "step_000000009.pt"
    assert found.read_bytes() == b"weights9"
    assert not (elsewhere.attempt(1) / "checkpoints").exists()  # only the newest is needed


def test_nothing_is_pulled_that_is_here(one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        write_checkpoint(trial.attempt(1) / "checkpoints", 5)
    (trial.attempt(1) / "checkpoints").replace(trial.checkpoints)  # as a driver on this machine settles it
    assert remote_trial.pull_checkpoint(mirror, trial) == trial.checkpoints / "step_000000005.pt"
    assert not (trial.attempt(1) / "checkpoints").exists()


@pytest.mark.parametrize("harm", ["flip", "truncate", "no checksum"])
def test_a_damaged_remote_checkpoint_gives_way_to_the_one_before(
    harm: str, one: tuple[Mirror, TrialLayout], two: tuple[Mirror, TrialLayout]
) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        write_checkpoint(trial.attempt(1) / "checkpoints", 5)
        newest = write_checkpoint(trial.attempt(1) / "checkpoints", 9)
    key = mirror.key(newest)
    if harm == "no checksum":
        mirror.remote.remove(key + ".sha256")
    else:
        mirror.remote.put(key, b"weightz9" if harm == "flip" else b"weights")
    found = remote_trial.pull_checkpoint(*two)
    assert found is not None and found.read_bytes() == b"weights5"
    left = sorted(path.name for path in found.parent.iterdir())
    assert left == ["step_000000005.pt", "step_000000005.pt.sha256"]


def test_without_any_checkpoint_an_attempt_begins_anew(one: tuple[Mirror, TrialLayout]) -> None:
    assert remote_trial.pull_checkpoint(*one) is None


def test_checkpoints_follow_as_they_come_and_replaced_ones_go(one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    folder = trial.attempt(1) / "checkpoints"
    seen: list[str] = []

    def there() -> set[str]:
        seen[:] = sorted(key.rpartition("/")[2] for key in mirror.remote.sizes(mirror.key(folder)))
        return set(seen)

    trial.attempt(1).mkdir(parents=True)
    with Uploader(mirror, trial, 1, look_seconds=0.01):
        old = write_checkpoint(folder, 5)
        wait_for(lambda: there() == {"step_000000005.pt", "step_000000005.pt.sha256"})
        write_checkpoint(folder, 9)
        old.unlink()
        old.with_name(old.name + ".sha256").unlink()
        wait_for(lambda: there() == {"step_000000009.pt", "step_000000009.pt.sha256"})


def test_the_newest_stays_there_until_a_newer_one_is(one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        path = write_checkpoint(trial.attempt(1) / "checkpoints", 5)
        wait_for(lambda: len(mirror.remote.sizes()) == 2)
        for file in (path, path.with_name(path.name + ".sha256")):
            file.unlink()
    assert len(mirror.remote.sizes()) == 2


def test_a_checksum_is_there_before_its_checkpoint(
    one: tuple[Mirror, TrialLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    push = Remote.push

    def noted(remote: Remote, local: Path, key: str) -> None:
        pushed.append(key.rpartition("/")[2])
        push(remote, local, key)

    monkeypatch.setattr(Remote, "push", noted)
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        write_checkpoint(trial.attempt(1) / "checkpoints", 5)
    assert pushed == ["step_000000005.pt.sha256", "step_000000005.pt"]


def test_an_attempt_waits_for_a_store_that_is_away_until_it_has_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_trial, "LOOK_SECONDS", 0.2)
    mirror, trial = machine(tmp_path / "far", tmp_path / "one")
    (tmp_path / "far").write_text("a file where a folder should be")
    begun = time.monotonic()
    assert remote_trial.begin_attempt(trial, mirror.remote.uri, 0, leaving=lambda: True) is None
    assert time.monotonic() - begun >= 0.2, "who is given out again at once does not go round without a pause"
    threading.Timer(0.3, (tmp_path / "far").unlink).start()
    assert remote_trial.begin_attempt(trial, mirror.remote.uri, 0) == 1


def test_a_checkpoint_without_its_checksum_is_not_pushed(one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        path = write_checkpoint(trial.attempt(1) / "checkpoints", 5)
        path.with_name(path.name + ".sha256").unlink()
    assert mirror.remote.sizes() == {}


def test_a_store_that_fails_meanwhile_gets_all_at_the_end_or_the_attempt_fails(tmp_path: Path) -> None:
    mirror, trial = machine(tmp_path / "far", tmp_path / "one")
    blocked = tmp_path / "far" / "sweep"
    with remote_trial.attempt(mirror, trial, 1):
        (tmp_path / "far").mkdir()
        blocked.write_text("a file where a folder should be")
        write_checkpoint(trial.attempt(1) / "checkpoints", 5)
        time.sleep(remote_trial.LOOK_SECONDS * 1.5)
        blocked.unlink()
    assert len(mirror.remote.sizes()) == 2
    with pytest.raises(OSError, match="storage"), remote_trial.attempt(mirror, trial, 2):
        write_checkpoint(trial.attempt(2) / "checkpoints", 6)
        (tmp_path / "far" / "sweep" / "trials" / ID / "attempts" / "2").write_text("in the way")


def test_the_driver_gets_records_and_all_logs_but_no_checkpoints(
    one: tuple[Mirror, TrialLayout], two: tuple[Mirror, TrialLayout]
) -> None:
    mirror, trial = one
    for number in (1, 2):
        with remote_trial.attempt(mirror, trial, number):
            trial.log(number).write_text(f"log {number}\n")
            (trial.attempt(number) / "probes.parquet").write_bytes(b"rows")
            (trial.attempt(number) / "attention").mkdir()
            (trial.attempt(number) / "attention" / "a.png").write_bytes(b"png")
            write_checkpoint(trial.attempt(number) / "checkpoints", number)
    with remote_trial.attempt(mirror, trial, 2, rank=1):
        trial.log(2, 1).write_text("of rank 1\n")
    remote_trial.pull_attempts(*two, number=2)
    got = sorted(path.relative_to(two[1].root).as_posix() for path in two[1].root.rglob("*") if path.is_file())
    assert got == [
        *("attempts/1/log.txt", "attempts/2/attention/a.png", "attempts/2/log.rank1.txt", "attempts/2/log.txt"),
        "attempts/2/probes.parquet",
    ]


def test_settling_keeps_one_newest_and_each_kept_step(one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    for number, steps in ((1, (5, 10)), (2, (10, 15, 20)), (3, (20,))):
        with remote_trial.attempt(mirror, trial, number):
            for step in steps:
                write_checkpoint(trial.attempt(number) / "checkpoints", step)
    remote_trial.settle(mirror, trial, keep_steps=[10])
    left = [key.rpartition("/")[2] for key in mirror.remote.sizes()]
    assert sorted(left) == sorted(
        name + end for name in ("step_000000010.pt", "step_000000020.pt") for end in ("", ".sha256")
    )


def test_a_trial_that_is_forgotten_leaves_nothing_to_resume_from_on_any_machine(
    one: tuple[Mirror, TrialLayout], two: tuple[Mirror, TrialLayout]
) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        write_checkpoint(trial.attempt(1) / "checkpoints", 5)
    assert remote_trial.pull_checkpoint(*two) is not None
    remote_trial.forget(mirror, trial)
    assert remote_trial.pull_checkpoint(*two) is None
    assert remote_trial.pull_checkpoint(mirror, trial) is None
    for folder in (*trial.checkpoint_folders(), *two[1].checkpoint_folders()):
        assert not folder.exists()
    with remote_trial.attempt(mirror, trial, 2):
        write_checkpoint(trial.attempt(2) / "checkpoints", 1)
    found = remote_trial.pull_checkpoint(*two)
    assert found is not None and found.read_bytes() == b"weights1"


def test_what_was_computed_while_the_store_was_away_is_kept_on_its_machine(one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        write_checkpoint(trial.attempt(1) / "checkpoints", 5)
    newer = write_checkpoint(trial.attempt(1) / "checkpoints", 9)  # its process died before it could be pushed
    remote_trial.pull_checkpoint(mirror, trial)
    assert newer.is_file()


def test_a_step_of_another_sweeps_trial_is_found(tmp_path: Path, one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        for step in (5, 9):
            write_checkpoint(trial.attempt(1) / "checkpoints", step)
    far = Mirror(mirror.remote, tmp_path / "two")
    step = remote_trial.pull_step(far, ID, 5)
    newest = remote_trial.pull_step(far, ID)
    assert step is not None and step.read_bytes() == b"weights5"
    assert newest is not None and newest.read_bytes() == b"weights9"
    assert remote_trial.pull_step(far, ID, 7) is None
    assert remote_trial.pull_step(far, "f" * 16) is None


ATTEMPT = """
import sys, time
from pathlib import Path
from orchestrator import remote_trial
from orchestrator.layout import TrialLayout
from orchestrator.remote import Remote
from trainers import checkpoint
trial = TrialLayout(Path(sys.argv[2]))
remote = Remote(sys.argv[1])
mirror = remote_trial.Mirror.of_trial(remote, trial)
number = remote_trial.claim(mirror, trial, 0)
with remote_trial.attempt(mirror, trial, number):
    resumed = checkpoint.load_newest(trial.checkpoint_folders())
    first = 0 if resumed is None else resumed["step"]
    print(first, flush=True)
    for step in range(first + 1, int(sys.argv[3]) + 1):
        checkpoint.save(trial.attempt(number) / "checkpoints", step, {"step": step})
        time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_killed_machine_costs_what_was_not_pushed_yet(store: Store, tmp_path: Path) -> None:
    uri = store.uri("killed")
    command = [sys.executable, "-c", ATTEMPT, uri]
    folder = f"sweep/trials/{ID}"
    first = subprocess.Popen([*command, str(tmp_path / "one" / folder), "1000"], env=dict(os.environ))
    remote = Remote(uri)

    def pushed() -> int:
        return max((int(key[-12:-3]) for key in remote.sizes() if key.endswith(".pt")), default=0)

    wait_for(lambda: pushed() > 0)
    whole = pushed()
    wait_for(lambda: pushed() > whole)  # one at a time: the one before has arrived
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    last = pushed()
    second = [*command, str(tmp_path / "two" / folder), str(last + 3)]
    done = subprocess.run(second, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert whole <= int(done.stdout) <= last, done.stderr  # at most one look and one upload behind
    left = {key for key in remote.sizes() if key.endswith(".pt")}
    assert f"{folder}/attempts/2/checkpoints/step_{last + 3:09d}.pt" in left


def test_ranks_of_one_machine_pull_once(one: tuple[Mirror, TrialLayout], two: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    with remote_trial.attempt(mirror, trial, 1):
        write_checkpoint(trial.attempt(1) / "checkpoints", 5, b"x" * 2**22)
    found: list[tuple[Path, int]] = []

    def rank() -> None:
        path = remote_trial.pull_checkpoint(*two)
        assert path is not None
        found.append((path, path.stat().st_ino))

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1  # one file, written once


def test_published_files_go_up_with_the_result_last(one: tuple[Mirror, TrialLayout]) -> None:
    mirror, trial = one
    trial.root.mkdir(parents=True)
    trial.result.write_text(json.dumps({"status": "finished"}))
    trial.metrics.write_bytes(b"points")
    trial.log_file.write_text("log")
    (trial.root / "secret.txt").write_text("of nobody's business")
    remote_trial.push_published(mirror, trial)
    names = sorted(key.rpartition("/")[2] for key in mirror.remote.sizes())
    assert names == ["log.txt", "metrics.parquet", "result.json"]
