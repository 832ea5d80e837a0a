"""Ranks of a trial: two compute what one does, lost and stopped ones are replaced, and each one's error is heard."""

import math
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.attempt import Job, Outcome, Report
from orchestrator.control import Ask
from orchestrator.layout import TrialLayout
from orchestrator.ledger import Ledger
from tests.orchestrator.sweeps import Small
from tests.orchestrator.test_faults import begin, ranks, reported, wait_for
from tests.reliability import drivers

pytestmark = pytest.mark.slow

# Images are mixed in groups, none across ranks. The name stays that of the file.
GROUPS = ("--set", "deit3.mix_group_size=8", "--name", "small")


def hangs(job: Job, layout: TrialLayout, number: int, report: Report, asked: Ask) -> Outcome:
    """A trial that makes no step."""
    time.sleep(600)
    return Outcome("finished")


def second_rank_fails(job: Job, layout: TrialLayout, number: int, report: Report, asked: Ask) -> Outcome:
    """The second rank raises while the first waits: for the second with registers, else for ever."""
    import torch
    import torch.distributed as dist

    from trainers.distributed import process_group

    with process_group(torch.device("cpu")):
        dist.barrier()
        if os.environ["RANK"] == "1":
            raise ValueError("the images of the second rank cannot be read")
        if job.config["model"]["num_registers"]:
            dist.barrier()
        time.sleep(600)
    return Outcome("finished")


def written(folder: Path, num_ranks: int, steps: int = 60, **changes: Any) -> Small:
    """A sweep of one trial of so many ranks."""
    small = Small(folder, steps=steps, registers=(2,))
    small.write(**{"seeds": [0], "baseline": None, "resources": {"cpus": num_ranks, "ranks": num_ranks}, **changes})
    return small


def ledger_metrics(small: Small) -> dict[tuple[int, str], float]:
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        (row,) = ledger.rows()
        return {(step, name): value for step, name, value in ledger.metrics(row.trial_id)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Small:
    small = written(tmp_path_factory.mktemp("two"), num_ranks=2)
    done = small.run(*GROUPS)
    assert done.returncode == 0, done.stdout + done.stderr
    return small


def test_two_ranks_give_the_table_of_one_up_to_rounding(two_ranks: Small, tmp_path: Path) -> None:
    small = written(tmp_path, num_ranks=1)
    done = small.run(*GROUPS)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = ledger_metrics(small), ledger_metrics(two_ranks)
    assert one.keys() == two.keys()
    losses = [(step, value, two[step, name]) for (step, name), value in one.items() if name == "train/loss"]
    assert len(losses) == 60
    for step, alone, together in losses:
        assert together == pytest.approx(alone, rel=1e-5 if step <= 2 else 1e-3), step
    for (step, name), value in one.items():
        if step == 60 and not name.startswith("train/"):
            one_image = 1 / 32 if "top" in name else 0.0
            assert math.isclose(two[step, name], value, rel_tol=0.02, abs_tol=max(one_image, 1e-3)), (name, value)


def test_each_of_two_ranks_is_killed_and_the_trial_goes_on_to_the_same_bits(two_ranks: Small, tmp_path: Path) -> None:
    small = written(tmp_path, num_ranks=2)
    driver = begin(small, *GROUPS)
    for which, metrics in ((0, 10), (1, 60)):
        wait_for(lambda metrics=metrics: reported(small) >= metrics and len(ranks(driver)) == 2)
        in_order(driver)[which].kill()
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    assert small.tables() == two_ranks.tables()
    assert list(small.attempts().values()) == [3]
    resumed = [log.read_text() for log in sorted(small.root.glob("trials/*/attempts/*/log.txt"))]
    assert len(resumed) == 3 and all("resumed at step" in text for text in resumed[1:])


def in_order(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The two rank processes by their rank, as their log files tell."""
    logs = {Path(file.path).name: process for process in ranks(driver) for file in process.open_files()}
    return [logs["log.txt"], logs["log.rank1.txt"]]


def test_a_stopped_rank_is_ended_and_its_trial_goes_on(tmp_path: Path) -> None:
    small = Small(tmp_path, steps=60, registers=(0,))
    small.write(seeds=[0])
    driver = begin(small, "--set", "execution.no_progress_seconds=8")
    wait_for(lambda: reported(small) >= 20 and bool(ranks(driver)))
    hung = ranks(driver)[0]
    os.kill(hung.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    output, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, output
    assert not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE, "the stopped process is left behind"
    assert time.monotonic() - stopped > 8
    assert list(small.attempts().values()) == [2]


def test_a_trial_that_hangs_twice_fails_as_hung(tmp_path: Path) -> None:
    small = written(tmp_path, num_ranks=1)
    train = f"{__name__}:hangs"
    code = drivers.drive(small, train=train, in_process=False, overrides=["execution.no_progress_seconds=2"])
    assert code == 1, drivers.output(small)
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        (row,) = ledger.rows()
    assert (row.state, row.attempts) == ("failed", 2)
    assert row.error is not None and row.error["type"] == "Hung"
    assert "made no progress and was ended, twice without getting further" in row.error["message"]
    assert "no step and no report for" in row.error["traceback"]


def test_what_the_second_rank_raised_is_what_the_user_reads(tmp_path: Path) -> None:
    small = written(tmp_path, num_ranks=2, axes={"model.num_registers": [0, 2]})
    code = drivers.drive(small, train=f"{__name__}:second_rank_fails", in_process=False, quiet=False)
    assert code == 1, drivers.output(small)
    with Ledger.open(small.root / "ledger.db", writer=False) as ledger:
        rows = ledger.rows()
    for row in rows:
        assert (row.state, row.attempts) == ("failed", 1), "a wrong value is not tried again"
        assert row.error is not None and row.error["type"] == "ValueError"
        assert row.error["message"] == "the images of the second rank cannot be read"
    assert len(rows) == 2
    said = " ".join(drivers.output(small).split())  # lines are broken where the terminal ends
    assert "2 of 2 trials failed: the images of the second rank cannot be read" in said


def test_a_program_that_hangs_twice_without_a_step_fails_and_says_so(tmp_path: Path) -> None:
    small = Small(tmp_path, registers=(0,))
    program = {"command": ["sh", "-c", "sleep 600"], "execution": {"no_progress_seconds": 2}}
    small.write(trial=program, axes={"program.lr": [0.1]}, baseline=None, primary=["val/top1"], seeds=[0])
    done = small.run("--in-process")
    assert done.returncode == 1
    assert "neither reported nor printed anything for 2 s" in done.stdout
    assert list(small.attempts().values()) == [2]
