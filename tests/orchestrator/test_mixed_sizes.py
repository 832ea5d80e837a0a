"""Trials of a quarter of a GPU up to four of them on simulated nodes: all run, and no GPU is given out twice."""

from pathlib import Path

import pytest

from benchmarks import mixed_sizes
from tests.orchestrator.sweeps import RAY_IN_THIS_PROCESS

pytestmark = [pytest.mark.slow, *RAY_IN_THIS_PROCESS]

SECONDS = 4.0
NODES, GPUS = 2, 4
COUNTS = (4, 4, 3, 2, 2)  # 16 GPUs together, and 8 are there


def test_all_sizes_run_at_once_and_no_gpu_is_given_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RAY_AUTH_MODE", "token"), ("PYTHONPATH", str(Path(__file__).resolve().parents[2]))):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BENCHMARK_SECONDS", str(SECONDS))  # it sets these itself, and nobody would take them back
    use = mixed_sizes.run(NODES, cpus=16, gpus=GPUS, counts=COUNTS, seconds=SECONDS)
    assert use.most_of_one_gpu == 1.0
    assert len(use.held) == 4 + 4 + 3 + 2 * 2 + 4 * 2
    assert {(held.share, len(held.gpus)) for held in use.held} == {(0.25, 1), (0.5, 1), (1.0, 1)}
    assert len({(held.node, *held.gpus) for held in use.held}) == NODES * GPUS, "no GPU is left out"
    # Processes take longer to start than these trials last, so that little more than their start is seen here.
    assert use.taken > 0.6 * NODES * GPUS
    assert use.seconds < 120, "nothing waits for what is never free"


def test_the_most_of_a_gpu_at_one_moment() -> None:
    def held(share: float, begun: float, ended: float) -> mixed_sizes.Held:
        return mixed_sizes.Held("node", ["0"], share, begun, ended)

    assert mixed_sizes.most([held(1.0, 0, 2), held(1.0, 2, 3)]) == 1.0  # one after another
    assert mixed_sizes.most([held(0.5, 0, 2), held(0.5, 1, 3), held(0.25, 1.5, 4)]) == 1.25
