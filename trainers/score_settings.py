"""Settings of the scoring step: which weights of a trial are evaluated on the test set, by a declared rule."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainers.explain import did_you_mean, shown
from trainers.section import Section

SCORE_STEP = "score/step"  # the metric that says which step was chosen

# Metrics of token norms that every evaluation has; none of them is better by agreement, so a mode has to be given.
TOKEN_METRICS = ("tokens/last/outlier_fraction", "tokens/last/outlier_fraction_150", "tokens/last/max_over_median")

_ERRORS = ("rmse", "abs_rel", "sq_rel", "rmse_log", "log_10", "silog")  # last parts of metrics of which less is better
_VALIDATION = re.compile(r"val(/[a-z0-9_]+){2,}")


def _reported(name: str) -> str:
    """`name` if a trial can report it while it trains."""
    if name.startswith("test/"):
        raise ValueError(f"is {shown(name)}; allowed: a metric that begins with val/, since choices never see the test")
    if _VALIDATION.fullmatch(name) or name in TOKEN_METRICS:
        return name
    guess = did_you_mean(name, TOKEN_METRICS)
    raise ValueError(
        f"is {shown(name)}{guess}; allowed: val/PROBE/METRIC, as in val/knn/top1, {', '.join(TOKEN_METRICS)}"
    )


class ScoreConfig(Section):
    """The rule by which the scoring step is chosen: exactly one of `best` and `step`; without either it is the last."""

    best: Annotated[str, AfterValidator(_reported)] | None = Field(
        None, description="the evaluated step at which this metric is best, the earliest of equals; never a test metric"
    )
    mode: Literal["auto", "max", "min"] | None = Field(
        "auto", description="whether more of `best` is better, or less; auto is min for errors of depth, max else"
    )
    step: int | None = Field(None, ge=1, le=100_000_000, description="this step, though training goes on")


def mode_of(metric: str) -> Literal["max", "min"]:
    """What `auto` means for a validation metric."""
    return "min" if metric.rpartition("/")[2] in _ERRORS else "max"
