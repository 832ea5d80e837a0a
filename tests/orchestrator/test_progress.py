"""Speed and time left, as the live line shows them."""

import pytest

from orchestrator.progress import seconds_left
from orchestrator.recorder import Live


def test_time_left_counts_what_is_running_and_what_is_planned() -> None:
    live = [Live("a", steps=100, batch_size=10, step=50), Live("b", steps=100, batch_size=10, step=0)]
    assert seconds_left(live, planned=2, speed=100.0) == pytest.approx((500 + 1000 + 2 * 1000) / 100)
    assert seconds_left([], planned=2, speed=100.0) is None


def test_speed_and_time_left_do_not_count_what_is_reported_again() -> None:
    live = Live("a", steps=100, batch_size=10, known=50)
    for step in (10, 30, 50):
        live.reached(step)
    assert live.first_step is None
    live.reached(60)
    assert live.first_step == 60
