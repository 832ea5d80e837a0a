"""How a sweep ends: which trials count as done, what is said of those that left early or reported too little."""

import signal
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator import driver
from orchestrator.ledger import Ledger
from orchestrator.spec import SpecError
from orchestrator.sweep_run import left_early
from tests.orchestrator.sweeps import Small
from tests.orchestrator.test_faults import begin, wait_for

HEAD = """
name: small
question: How does it end?
resources: {cpus: 1}
trial:
  command: [sh, SCRIPT, "{program.name}"]
  optim.steps: 20
"""

REPORTS = """echo "{\\"step\\": 1, \\"metrics\\": {\\"test/$1\\": 0.5}}" >> "$ORCHESTRATE_REPORT"
"""

# The first seed is the better one; the others are below it from the first step on.
DECLINES = """
for step in $(seq 20); do
  [ -e "$ORCHESTRATE_STOP" ] && exit 0
  echo "{\\"step\\": $step, \\"metrics\\": {\\"val/top1\\": 0.$((9 - ORCHESTRATE_SEED))}}" >> "$ORCHESTRATE_REPORT"
  sleep 0.1
done
"""


def sweep(folder: Path, script: str, rest: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output of a sweep of a shell script, run in this process."""
    (folder / "script").write_text(script)
    file = folder / "small.yaml"
    file.write_text(HEAD.replace("SCRIPT", str(folder / "script")) + rest)
    code = driver.sweep(driver.Options(file=file, storage=folder / "runs", state=folder / "runs", in_process=True))
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "code", "lacking"), [("top1", 0, None), ("Top1", 1, "1 of 1"), ("top1, x", 1, "1 of 2")]
)
def test_a_primary_metric_that_was_never_reported_is_said_and_no_success(
    names: str, code: int, lacking: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = f"axes: {{program.name: [{names}]}}\nseeds: [0]\nprimary: [test/top1]\n"
    found, said = sweep(tmp_path, REPORTS, rest, capsys)
    assert found == code, said
    assert ("finished trials never reported test/top1" in said) == (lacking is not None)
    assert lacking is None or f"{lacking} finished trials never reported test/top1" in said


def test_early_stopping_is_a_success_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rest = "axes: {program.name: [x]}\nseeds: [0, 1, 2]\nscheduler: {name: asha, metric: val/top1}\n"
    code, said = sweep(tmp_path, DECLINES, rest, capsys)
    with Ledger.open(tmp_path / "runs" / "small" / "ledger.db", writer=False) as ledger:
        rows = ledger.rows()
    assert [row.state for row in rows] == ["finished", "pruned", "pruned"], said
    assert code == 0
    assert "2 of 3 trials pruned by the rule of early stopping" in said
    assert left_early([replace(row, state="stopped") for row in rows]) == [
        "3 of 3 trials stopped on request; --rerun runs all again"
    ]


def test_a_sweep_to_learn_from_that_is_not_there_is_named_at_its_line_before_anything_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = "{program.x: {low: 0.0, high: 1.0}}"
    search = f"{{name: tpe, samples: 2, metric: val/top1, warm_start: [pilot], space: {space}}}"
    rest = f"axes: {{program.name: [x]}}\nseeds: [0]\nsearch: {search}\n"
    with pytest.raises(SpecError, match=r"small.yaml:10: search.warm_start names pilot"):
        sweep(tmp_path, REPORTS, rest, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_signal_while_the_cluster_starts_ends_as_any_other(tmp_path: Path) -> None:
    small = Small(tmp_path)
    small.write()
    begun = begin(small)
    process = psutil.Process(begun.pid)

    def started() -> list[psutil.Process]:
        return [child for child in process.children(recursive=True) if child.name() in ("gcs_server", "raylet")]

    wait_for(lambda: bool(started()))
    ray = started()
    begun.send_signal(signal.SIGTERM)
    output, _ = begun.communicate(timeout=60)
    assert begun.returncode == 143, output
    assert "interrupted; the same command goes on" in output
    assert "Traceback" not in output
    assert not psutil.wait_procs(ray, timeout=20)[1], "nothing of Ray is left"
