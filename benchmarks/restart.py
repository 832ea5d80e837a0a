"""How soon a sweep goes on that has finished 10,000 trials and one to run, against ten seconds."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import noop, simulated
from benchmarks.report import Comparison, Goal, Report, Settings
from orchestrator import publish
from orchestrator.attempt import Outcome
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import PlannedTrial

TRIALS = 10_002  # as six cells, all but one of them finished
MAX_SECONDS = 10.0
MAX_RUNS = 5

_GO_ON = """
import sys
from pathlib import Path
from orchestrator import driver
file, runs, name = sys.argv[1:]
options = driver.Options(
    file=Path(file), storage=Path(runs), state=Path(runs), in_process=True, quiet=True, train="benchmarks.noop:mark"
)
raise SystemExit(driver.sweep(options))
"""


def measure(settings: Settings) -> Report:
    """Seconds from the process's start to the beginning of the trial that is left."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        planned = simulated.plan(folder, "restart", TRIALS)
        finish(folder, planned[:-1])
        for _ in range(min(settings.pairs, MAX_RUNS)):
            seconds.append(_go_on(folder))  # its trial stays to be run, as its process is killed
    comparison = Comparison(
        "restart",
        (f"from the start of a process to its trial, after {TRIALS - 1} finished ones", "the goal"),
        seconds,
        [MAX_SECONDS] * len(seconds),
        "s",
        Goal(1.0),
    )
    return Report([comparison], {"finished_trials": TRIALS - 1})


def _layout(folder: Path) -> SweepLayout:
    return SweepLayout(folder / "runs", folder / "runs", "restart")


def finish(folder: Path, trials: tuple[PlannedTrial, ...]) -> None:
    """Ledger and published files of a sweep whose trials have finished; the disk's own sync is left out."""
    layout = _layout(folder)
    layout.ledger.parent.mkdir(parents=True)
    sync, os.fsync = os.fsync, lambda _descriptor: None
    try:
        with Ledger.open(layout.ledger) as ledger:
            ledger.plan(trials)
            for trial in trials:
                number = layout.trial(trial.trial_id).begin_attempt()
                ledger.start_attempt(trial.trial_id, number, "host", 1)
                ledger.record(trial.trial_id, number, 1, {"train/loss": 1.0, "test/linear/top1": 0.5})
                row = ledger.row(trial.trial_id)
                provenance = {"git_commit": None, "versions": {}}
                result = publish.result(row, number, Outcome("finished", steps=1), provenance, 0.0, 0.0)
                ledger.finish(trial.trial_id, number, "finished", result, None)
                publish.trial(ledger, layout.trial(trial.trial_id), trial.trial_id)
    finally:
        os.fsync = sync


def _go_on(folder: Path) -> float:
    """Run the sweep in a process of its own, which is ended once its trial has begun."""
    mark = folder / "began"
    mark.unlink(missing_ok=True)
    began = time.perf_counter()
    command = [sys.executable, "-c", _GO_ON, str(folder / "restart.yaml"), str(folder / "runs"), "restart"]
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(command, env={**os.environ, noop.MARK: str(mark), "PYTHONPATH": root})
    try:
        while not mark.exists():
            if process.poll() is not None:
                raise RuntimeError(f"the sweep ended with {process.returncode} before its trial began")
            time.sleep(0.01)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()
