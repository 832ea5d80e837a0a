"""Who may write a sweep's ledger: one process, until it ends, however that comes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from orchestrator.holder import SweepHeld
from orchestrator.ledger import Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "num registers?#%" / "ledger.db"  # characters that mean something in a URI


def test_a_second_hold_in_the_same_process_is_refused(path: Path) -> None:
    ledger = Ledger.open(path)
    with pytest.raises(SweepHeld, match=str(os.getpid())) as refused:
        Ledger.open(path)
    assert refused.value.holder["pid"] == os.getpid()
    ledger.close()
    Ledger.open(path).close()


def test_what_a_dead_holder_left_is_not_taken_for_the_new_one(path: Path) -> None:
    path.parent.mkdir()
    lock = path.with_suffix(".lock")
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename, "started": "long ago"}))
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the new holder, that has not yet written who it is
        new = json.dumps({"pid": os.getpid(), "host": os.uname().nodename, "started": "now"})
        writer = threading.Timer(0.2, lambda: lock.write_text(new))
        writer.start()
        with pytest.raises(SweepHeld, match=f"process {os.getpid()} .*since now"):
            Ledger.open(path)
        writer.join()
        lock.write_text("{")
        start = time.monotonic()
        with pytest.raises(SweepHeld, match="has not said who it is"):
            Ledger.open(path)
        assert time.monotonic() - start < 2


def _spawn(body: str, *arguments: str) -> subprocess.Popen[str]:
    code = "import sys, time, json, os\nfrom pathlib import Path\nfrom orchestrator.ledger import Ledger, SweepHeld\n"
    return subprocess.Popen(
        [sys.executable, "-c", code + textwrap.dedent(body), *arguments], stdout=subprocess.PIPE, text=True
    )


_HOLD = """
    start = time.monotonic()
    try:
        ledger = Ledger.open(Path(sys.argv[1]))
    except SweepHeld as held:
        print(json.dumps({"won": False, "seconds": time.monotonic() - start, "pid": os.getpid(), "text": str(held)}))
        sys.exit()
    print(json.dumps({"won": True, "pid": os.getpid()}), flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.mark.slow
def test_of_ten_processes_one_wins_and_the_others_name_it(path: Path) -> None:
    path.parent.mkdir()
    path.with_suffix(".lock").write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename, "started": "old"}))
    processes = [_spawn(_HOLD, str(path), "8") for _ in range(10)]
    try:
        said = []
        for process in processes:
            assert process.stdout is not None
            said.append(json.loads(process.stdout.readline()))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    (winner,) = [one for one in said if one["won"]]
    losers = [one for one in said if not one["won"]]
    assert len(losers) == 9
    for loser in losers:
        assert f"process {winner['pid']} on {os.uname().nodename}" in loser["text"]
        assert loser["seconds"] < 2


@pytest.mark.slow
def test_the_hold_of_a_killed_process_is_taken_over_with_all_it_committed(path: Path) -> None:
    body = """
    class Config:
        def model_dump(self, mode): return {}
    class Trial:
        trial_id = name = "a"; cell = {}; seed = 0; config = Config(); role = "cell"
    ledger = Ledger.open(Path(sys.argv[1]))
    ledger.plan([Trial()])
    ledger.start_attempt("a", 1, "host", os.getpid())
    step = 0
    while True:
        step += 1
        ledger.record("a", 1, step, {"x": float(step)})
        print(step, flush=True)
    """
    process = _spawn(body, str(path))
    assert process.stdout is not None
    for _ in range(50):
        last = int(process.stdout.readline())
    with pytest.raises(SweepHeld, match=f"process {process.pid} "):
        Ledger.open(path)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    committed = int(rest.split()[-1]) if rest.split() else last
    start = time.monotonic()
    with Ledger.open(path) as ledger:
        assert time.monotonic() - start < 2
        assert ledger.row("a").state == "running"
        assert ledger.release_running() == ["a"]
        steps = [step for step, _, _ in ledger.metrics("a")]
        assert steps in ([*range(1, committed + 1)], [*range(1, committed + 2)])  # a commit may outrun its print
