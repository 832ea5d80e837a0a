"""Samples of a machine beside a trial's metrics: when, under which names, and that they stand in no table."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import publish, system_metrics
from orchestrator.attempt import Job, Outcome, run_attempt
from orchestrator.layout import TrialLayout
from orchestrator.ledger import Ledger
from orchestrator.system_metrics import PREFIX, check_available, is_system, with_samples
from tests.orchestrator.test_ledger import FakeConfig, FakeTrial

psutil = pytest.importorskip("psutil", reason="psutil is not installed")


class Reported(list[tuple[int, dict[str, float]]]):
    """What was reported, and a clock that the test sets."""

    now = 0.0

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.append((step, dict(metrics)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 42.5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(used=2_500_000_000, total=10_000_000_000))
    monkeypatch.delitem(sys.modules, "torch", raising=False)


SAMPLE = {
    "system/cpu_utilization_percentage": 42.5,
    "system/system_memory_usage_megabytes": 2500.0,
    "system/system_memory_usage_percentage": 25.0,
}


@pytest.mark.usefixtures("machine")
def test_a_report_ten_seconds_after_the_last_sample_carries_one() -> None:
    seen = Reported()
    report = with_samples(seen, lambda: seen.now)
    for step, seen.now in enumerate([0.0, 9.9, 10.0, 12.0, 19.9, 35.0]):
        report(step, {"train/loss": 1.0})
    assert [step for step, metrics in seen if len(metrics) > 1] == [2, 5]
    assert seen[2] == (2, {"train/loss": 1.0, **SAMPLE})
    assert seen[3] == (3, {"train/loss": 1.0})


@pytest.mark.usefixtures("machine")
def test_gpus_of_the_trial_are_read_where_it_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda index: (3_000_000_000 * (index + 1), 12_000_000_000),
        utilization=lambda index: 90 + index,
        power_draw=lambda index: 250_000,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(system_metrics, "find_spec", lambda name: object())
    found = system_metrics._sample()
    assert found["system/gpu_0_memory_usage_megabytes"] == 9_000.0
    assert found["system/gpu_0_memory_usage_percentage"] == 75.0
    assert found["system/gpu_1_memory_usage_percentage"] == 50.0
    assert found["system/gpu_1_utilization_percentage"] == 91.0
    assert found["system/gpu_1_power_usage_watts"] == 250.0
    monkeypatch.setattr(system_metrics, "find_spec", lambda name: None)  # without nvidia-ml-py
    assert "system/gpu_0_utilization_percentage" not in system_metrics._sample()
    cuda.is_initialized = lambda: False  # reading a GPU that the trial does not use would occupy it
    assert system_metrics._sample() == SAMPLE


@pytest.mark.usefixtures("machine")
def test_a_machine_that_cannot_be_read_costs_no_trial(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Reported()
    report = with_samples(seen, lambda: seen.now)
    calls: list[int] = []

    def broken() -> Any:
        calls.append(1)
        raise OSError("no /proc")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    with caplog.at_level(logging.WARNING):
        for step, seen.now in enumerate([11.0, 22.0, 33.0]):
            report(step, {"train/loss": 1.0})
        assert with_samples(seen) is seen
    assert seen == [(step, {"train/loss": 1.0}) for step in range(3)]
    assert len(calls) == 2 and caplog.text.count("no /proc") == 2  # once for each trial


def test_the_names_are_those_that_mlflow_shows_as_system_metrics() -> None:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    monitor = CPUMonitor()
    monitor.collect_metrics()
    ours = {name.removeprefix(PREFIX) for name in system_metrics._sample() if "gpu" not in name}
    assert ours == set(monitor.metrics)


def test_a_missing_package_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_available()
    monkeypatch.setattr(system_metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--system-metrics needs psutil"):
        check_available()


def reporting(job: Job, layout: TrialLayout, number: int, report: Any, asked: Any) -> Outcome:
    for step in range(3):
        report(step, {"train/loss": 1.0})
    return Outcome("finished", steps=3)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("asked", [False, True])
def test_only_a_job_that_asks_for_it_is_sampled(asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_metrics, "INTERVAL_SECONDS", 0.0)
    layout = TrialLayout(tmp_path / "trial")
    layout.attempt(1).mkdir(parents=True)
    seen = Reported()
    job = Job("id", "name", {}, str(layout.root), "", 1, train=f"{__name__}:reporting", system_metrics=asked)
    assert run_attempt(job, 1, seen, lambda: None).status == "finished"
    assert all(set(metrics) == {"train/loss", *(SAMPLE if asked else {})} for _, metrics in seen)


def test_what_a_clock_decides_is_not_published(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from analysis.collect_mlflow import metrics_table

    layout = TrialLayout(tmp_path / "trials" / "aaaa")
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.plan([FakeTrial("aaaa", config=FakeConfig({"execution": {}}))])
        ledger.start_attempt("aaaa", 1, "host", 1)
        ledger.record_many("aaaa", 1, [(1, {"train/loss": 0.5, "system/cpu_utilization_percentage": 93.0})])
        ledger.finish("aaaa", 1, "finished", {"status": "finished"}, None)
        publish.trial(ledger, layout, "aaaa")
        assert publish.is_published(ledger, ledger.row("aaaa"), layout)
        assert publish.missing(ledger, lambda _: layout) == []
    assert pq.read_table(layout.metrics).to_pylist() == [{"step": 1, "name": "train/loss", "value": 0.5}]
    columns = [["run"] * 2, ["train/loss", "system/cpu_utilization_percentage"], [1, 1], [5, 5], [0.5, 93.0]]
    histories = pa.table(dict(zip(("run_id", "name", "step", "time_ms", "value"), columns, strict=True)))
    assert metrics_table(histories, {"run": "aaaa"}).column("name").to_pylist() == ["train/loss"]
    assert is_system("system/cpu_utilization_percentage") and not is_system("systematic/error")
