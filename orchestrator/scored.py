"""What a trial's values are where a sweep chooses by them: up to the step that the trial is scored at; pure."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.score_settings import SCORE_STEP

Value = tuple[int, str, float]  # step, name of the metric, value


def until_scored(points: Sequence[Value]) -> Sequence[Value]:
    """`points` up to the step that a rule has chosen; all of them where there is no rule, so the last step counts."""
    chosen = next((step for step, name, _ in points if name == SCORE_STEP), None)
    return points if chosen is None else [point for point in points if point[0] <= chosen]
