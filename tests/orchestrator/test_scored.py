"""Which values of a trial count where a sweep chooses by them: those up to the step that the trial is scored at."""

from pathlib import Path

import pytest

from orchestrator import seeds
from orchestrator.ledger import Ledger
from orchestrator.scored import Value, until_scored
from orchestrator.search_cell import last_values
from orchestrator.seed_noise import noise
from tests.orchestrator.test_ledger import FakeTrial

METRIC = "val/knn/top1"


def _points(best: float, last: float, *, chosen: bool) -> list[Value]:
    """Of a trial that is best at step 10 of 20."""
    rule = [(10, "score/step", 10.0)] if chosen else []
    return [(5, METRIC, 0.0), *rule, (10, METRIC, best), (20, METRIC, last), (20, "train/loss", 1.0)]


@pytest.mark.parametrize(("chosen", "expected"), [(True, (0.75, 10)), (False, (0.5, 20))])
def test_what_came_after_the_scoring_step_does_not_count(chosen: bool, expected: tuple[float, int]) -> None:
    points = _points(0.75, 0.5, chosen=chosen)
    assert max(step for step, _, _ in until_scored(points)) == expected[1]
    assert last_values(points, [METRIC]) == ((expected[0],), expected[1])  # as a search is told


@pytest.mark.parametrize(("chosen", "values", "variance"), [(True, [1.0, 3.0], 2.0), (False, [0.5, 4.5], 8.0)])
def test_seeds_are_judged_by_the_values_that_tables_show(
    chosen: bool, values: list[float], variance: float, tmp_path: Path
) -> None:
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.plan([FakeTrial("a"), FakeTrial("b")])
        for trial, best, last in (("a", 1.0, 0.5), ("b", 3.0, 4.5)):
            ledger.start_attempt(trial, 1, "host", 1)
            for step, name, value in _points(best, last, chosen=chosen):
                ledger.record(trial, 1, step, {name: value})
            ledger.finish(trial, 1, "finished", {}, None)
        assert [seeds._last(ledger, ledger.row(trial), METRIC) for trial in ("a", "b")] == values
        (found,) = noise(ledger, [METRIC], baseline=None)
        assert found.of_a_run**2 == pytest.approx(variance)
