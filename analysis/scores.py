"""The score of every finished trial and metric, also of metrics that are derived from others; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from analysis import discovery, thresholds
from analysis.collect import Frames
from analysis.scoring import scoring_steps, until_scored


@dataclass(frozen=True)
class Score:
    """What a finished trial reached: its value at its last step with that metric, or where a rule says it is scored.

    NaN where it is not finite, or where a derived metric cannot be: then `missing` is the flag that says why.
    """

    step: int
    value: float
    missing: str | None = None


Scores = Mapping[str, Mapping[str, Score]]  # metric to trial_id to score


def last_scores(frames: Frames) -> Scores:
    """The scores of all finished trials, of every metric and of those that are derived from others here.

    Of a trial with a declared rule (`scoring`) they are the last ones up to its scoring step, so that nothing that came
    after is looked at, whatever the metric. A value that is null or not finite is kept as NaN.
    """
    statuses = frames.runs["status"].to_pylist()
    finished = {
        t for t, status in zip(frames.runs["trial_id"].to_pylist(), statuses, strict=True) if status == "finished"
    }
    # The table is sorted by trial and step, so the last row of a group is that of its last step.
    metrics = until_scored(frames.metrics, scoring_steps(frames.metrics))
    last = metrics.group_by(["trial_id", "name"], use_threads=False).aggregate([("step", "last"), ("value", "last")])
    found: dict[str, dict[str, Score]] = {}
    columns = (last[name].to_pylist() for name in ("trial_id", "name", "step_last", "value_last"))
    for trial_id, name, step, value in zip(*columns, strict=True):
        if trial_id in finished:
            finite = value is not None and math.isfinite(value)
            found.setdefault(name, {})[trial_id] = Score(step, value if finite else math.nan)
    if fractions := thresholds.frozen(frames).fractions:
        found[thresholds.METRIC] = {
            trial_id: Score(step, math.nan, thresholds.FLAG) if fraction is None else Score(step, fraction)
            for trial_id, (step, fraction) in fractions.items()
        }
    return found | discovery.common(frames, found)
