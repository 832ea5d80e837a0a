"""Goal 1: a driver killed before or after each thing that it commits, and started again, ends as if undisturbed."""

import shutil
from pathlib import Path

import pytest

from tests.orchestrator.sweeps import Small
from tests.reliability import drivers, whole
from tests.reliability.drivers import Point

pytestmark = pytest.mark.slow

LEDGER, STORE = "orchestrator.ledger:Ledger", "orchestrator.tracking_store:Store"
LAYOUT, RUNS = "orchestrator.layout:TrialLayout", "orchestrator.tracking_runs:Runs"

TRAINING = [
    Point(f"{LEDGER}.plan", "before"),
    Point(f"{LEDGER}.plan", "after"),
    Point("orchestrator.sweep_run:write_whole", "after", 1),  # sweep.yaml without plan.json
    Point(f"{LAYOUT}.begin_attempt", "after"),  # a number is taken of which the ledger knows nothing
    Point(f"{LEDGER}.start_attempt", "before", 2),
    Point(f"{LEDGER}.start_attempt", "after", 1),
    Point(f"{LEDGER}.record", "before", 1),
    Point(f"{LEDGER}.record", "after", 1),
    Point(f"{LEDGER}.record", "after", 12),
    Point("trainers.checkpoint:write_whole", "after", 1),  # a checksum without its checkpoint
    Point("trainers.checkpoint:write_whole", "after", 2),
    Point("trainers.checkpoint:write_whole", "after", 4),  # a new checkpoint beside the one that it replaces
    Point(f"{LEDGER}.finish", "before", 1),
    Point(f"{LEDGER}.finish", "after", 1),
    Point(f"{LEDGER}.finish", "after", 2),
]
TRACKING = [
    Point(f"{STORE}.experiment", "after"),
    Point(f"{STORE}.create", "before", 1),
    Point(f"{STORE}.create", "after", 1),  # the sweep's own run, of which the ledger knows nothing
    Point(f"{STORE}.create", "after", 2),  # a trial's run, of which the ledger knows nothing
    Point(f"{LEDGER}.mark_run", "before"),
    Point(f"{LEDGER}.mark_run", "after"),
    Point(f"{STORE}.log_points", "before"),
    Point(f"{STORE}.log_points", "after"),  # there, but not marked as delivered
    Point(f"{LEDGER}.mark_delivered", "after"),
    Point(f"{STORE}.set_status", "before", 2),
    Point(f"{STORE}.set_status", "after", 2),
    Point(f"{RUNS}.end", "before"),
    Point(f"{RUNS}.end", "after"),
]
PUBLISHING = [
    Point("orchestrator.publish:records", "before"),
    *[Point("orchestrator.publish:write_whole", "after", call) for call in range(1, 16)],
    Point("orchestrator.publish:_settle_checkpoints", "before"),
    Point("orchestrator.publish:_settle_checkpoints", "after"),
    Point("orchestrator.publish:trial", "after"),
]
ADOPTING = [
    Point(f"{LAYOUT}.begin_attempt", "after"),
    Point(f"{LEDGER}.start_attempt", "after"),
    Point(f"{LEDGER}.record_many", "after"),
    Point("orchestrator.publish:copy_records", "after"),
    Point(f"{LEDGER}.finish", "before"),
    Point(f"{LEDGER}.finish", "after"),
    Point("orchestrator.publish:write_whole", "after", 3),
    Point("orchestrator.publish:trial", "before"),
    Point("orchestrator.publish:trial", "after"),
]
ANALYSIS = [
    *[Point("analysis.publish:publish", when, call) for call in (1, 3, 5, 7) for when in ("before", "after")],
    Point("analysis.publish:publish_bytes", "after", 2),  # figures of two analyses lie beside one another
    Point("analysis.report:render", "before"),
    Point("analysis.report:render", "after"),
    Point(f"{STORE}.log_artifacts", "before"),
    Point(f"{STORE}.log_artifacts", "after"),
]


def killed(small: Small, point: Point) -> None:
    code = drivers.drive(small, point)
    assert code == -9, f"the driver was not killed {point}: exit code {code}\n{drivers.output(small)}"


def finish(small: Small, undisturbed: Small) -> None:
    code = drivers.drive(small)
    assert code == 0, drivers.output(small)
    whole.check(small, undisturbed)


@pytest.mark.parametrize("point", [*TRAINING, *TRACKING], ids=str)
def test_a_driver_killed_while_trials_run(point: Point, template: Small, undisturbed: Small, tmp_path: Path) -> None:
    small = drivers.prepared(tmp_path, template)
    killed(small, point)
    finish(small, undisturbed)


def test_a_driver_killed_at_each_step_of_publishing(template: Small, undisturbed: Small, tmp_path: Path) -> None:
    small = drivers.prepared(tmp_path, template)
    killed(small, Point(f"{LEDGER}.finish", "after", 2))
    for point in PUBLISHING:
        killed(small, point)
        for folder in (small.root / "trials").iterdir():  # so that the next start publishes it again
            (folder / "result.json").unlink(missing_ok=True)
    finish(small, undisturbed)


@pytest.mark.parametrize("point", ADOPTING, ids=str)
def test_a_driver_killed_while_it_adopts_a_trial(
    point: Point, template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    small = drivers.prepared(tmp_path, template)
    shutil.copytree(undisturbed.root, small.storage / "other")
    killed(small, point)
    finish(small, undisturbed)


def test_a_driver_killed_at_each_step_of_the_analysis(template: Small, undisturbed: Small, tmp_path: Path) -> None:
    small = drivers.prepared(tmp_path, template)
    for point in ANALYSIS:
        killed(small, point)
    finish(small, undisturbed)


def test_a_driver_killed_at_every_commit_of_the_ledger(template: Small, undisturbed: Small, tmp_path: Path) -> None:
    """Before the n-th commit of a run, for n = 1, 2, …: what is on the disk then is what the one before has left."""
    small = drivers.prepared(tmp_path, template)
    for commit in range(1, 200):
        code = drivers.drive(small, Point("orchestrator.ledger_file:LedgerFile._change", "inside", commit))
        assert code in (-9, 0), drivers.output(small)
        if code == 0:
            break
    assert commit >= 15
    finish(small, undisturbed)
