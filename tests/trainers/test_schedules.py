"""Schedules at points worked out by hand."""

from __future__ import annotations

import pytest

from trainers.schedules import cosine, linear_then_constant


def test_linear_then_constant() -> None:
    assert [linear_then_constant(step, 0.04, 0.07, 4) for step in range(6)] == pytest.approx(
        [0.04, 0.05, 0.06, 0.07, 0.07, 0.07], rel=1e-12
    )
    assert linear_then_constant(0, 0.04, 0.07, 0) == 0.07  # no warm-up
    assert [linear_then_constant(step, 0.04, 0.07, 1) for step in range(2)] == [0.04, 0.07]  # as numpy.linspace


def test_cosine() -> None:
    # Two frozen steps, three of warm-up, four of cosine at angles 0, 45, 90 and 135 degrees.
    values = [cosine(step, base=1.0, final=0.2, total=9, warmup=3, start=0.1, freeze=2) for step in range(11)]
    half = 0.4 * 2**-0.5
    expected = [0.0, 0.0, 0.1, 0.55, 1.0, 1.0, 0.6 + half, 0.6, 0.6 - half, 0.2, 0.2]
    assert values == pytest.approx(expected, abs=1e-12)


def test_a_constant_stays_to_the_bit() -> None:
    assert {cosine(step, base=0.3, final=0.3, total=7) for step in range(9)} == {0.3}


def test_a_schedule_that_is_all_warm_up() -> None:
    assert [cosine(step, base=1.0, final=0.5, total=3, warmup=3) for step in range(4)] == [0.0, 0.5, 1.0, 0.5]
