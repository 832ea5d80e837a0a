"""Which step of a trial its scores are of: its last, or the one that a rule declared beforehand has chosen; pure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

METRIC = "score/step"  # as trainers report it where a rule chooses


def scoring_steps(metrics: pa.Table) -> dict[str, int]:
    """The scoring step of every trial that declares a rule, by trial id; other trials are scored at their last step.

    Args:
        metrics: the table `metrics` of the trials.
    """
    chosen = metrics.filter(pc.equal(metrics["name"], METRIC))
    steps = zip(chosen["trial_id"].to_pylist(), chosen["step"].to_pylist(), strict=True)
    return {trial_id: step for trial_id, step in steps if step is not None}


def until_scored(table: pa.Table, steps: Mapping[str, int]) -> pa.Table:
    """The rows of a table with `trial_id` and `step` up to each trial's scoring step; all rows of other trials."""
    if not steps:
        return table
    position = pc.index_in(table["trial_id"], pa.array(list(steps), pa.string()))
    last = pc.take(pa.array(list(steps.values()), pa.int64()), position)
    return table.filter(pc.less_equal(table["step"], pc.fill_null(last, int(np.iinfo(np.int64).max))))
