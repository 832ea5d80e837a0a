"""Goal 4: MLflow down, hung, answering 500 or losing replies costs no trial anything, and gets everything later."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.orchestrator.sweeps import Small
from tests.reliability import drivers
from tests.reliability.mlflow_down import MODES, Found, failures
from tests.reliability.paced import query
from tests.reliability.unreliable_server import Proxy, server

pytestmark = pytest.mark.slow

SECONDS = 60.0  # `python -m tests.reliability.mlflow_down --minutes 10` is the whole of it


@pytest.fixture(scope="module")
def found(template: Small, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What came of a sweep for each way to fail, all measured at once."""
    return {one.mode: one for one in failures(tmp_path_factory.mktemp("mlflow"), template, SECONDS)}


@pytest.mark.parametrize("mode", MODES)
def test_no_trial_is_affected(mode: str, found: dict[str, Found]) -> None:
    one = found[mode]
    assert one.met >= 3 or mode == "down", "the sink has met the failing server"
    assert one.same_tables
    assert one.trial_seconds < 1.1 * one.seconds_undisturbed


@pytest.mark.parametrize("mode", MODES)
def test_the_drivers_loop_is_never_held(mode: str, found: dict[str, Found]) -> None:
    assert found[mode].longest_hold < 1.0


@pytest.mark.parametrize("mode", MODES)
def test_everything_is_delivered_soon_after_the_servers_return(mode: str, found: dict[str, Found]) -> None:
    one = found[mode]
    if mode != "lossy":
        assert one.points_waiting > 20
    assert one.delivered_after <= 60
    assert (one.points_missing, one.points_doubled) == (0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_there_is_exactly_one_run_for_each_trial(mode: str, found: dict[str, Found]) -> None:
    one = found[mode]
    assert len(one.runs) == 3
    assert list(one.runs.values()) == [["FINISHED"]] * 3
    if mode == "lossy":
        assert one.lost >= 3


def test_replies_lost_from_the_first_request_on_make_no_second_run(template: Small, tmp_path: Path) -> None:
    """The runs are made while three replies of ten are lost, the half of those to create_run among them."""
    state = tmp_path / "server"
    state.mkdir()
    with server(state) as port:
        proxy = Proxy(port, seed=3)
        proxy.become("lossy")
        small = drivers.prepared(tmp_path / "sweep", Small(template.folder, template.steps, (0, 1, 2, 4)))
        code = drivers.drive(small, tracking_uri=f"http://127.0.0.1:{proxy.port}")
        proxy.close()
    assert code == 0, drivers.output(small)
    assert any(path.endswith("runs/create") for path in proxy.lost)
    runs = query(state / "mlflow.db", "SELECT name, status FROM runs WHERE lifecycle_stage = 'active'")
    assert [status for _, status in runs] == ["FINISHED"] * 5
    assert len({name for name, _ in runs}) == 5


def test_a_server_that_is_still_down_at_the_end_gets_everything_at_the_next_start(
    template: Small, undisturbed: Small, tmp_path: Path
) -> None:
    state = tmp_path / "server"
    state.mkdir()
    small = drivers.prepared(tmp_path / "sweep", template)
    with server(state) as port:
        proxy = Proxy(port)
        proxy.become("down")
        uri = f"http://127.0.0.1:{proxy.port}"
        assert drivers.drive(small, tracking_uri=uri, quiet=False) == 0
        assert "MLflow still lacks" in drivers.output(small)
        assert small.tables() == undisturbed.tables()
        proxy.become("up")
        assert drivers.drive(small, tracking_uri=uri, quiet=False) == 0
        assert "MLflow still lacks" not in drivers.output(small)
        proxy.close()
