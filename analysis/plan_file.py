"""Reads the plan of a sweep, as the orchestrator publishes it in plan.json and in MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis.frames import OUTLIER_LIMIT, PlannedTrial, SweepPlan, short

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def read_plan(folder: Path) -> SweepPlan:
    """The current plan in `folder`/plan.json.

    Raises:
        ValueError: the file is missing, is not such a plan, or names a trial that would leave the folder.
    """
    path = folder / "plan.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a sweep's folder: it has no plan.json")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} is not a readable plan: {short(error)}") from error
    return parse_plan(content, str(path))


def parse_plan(content: bytes, where: str) -> SweepPlan:
    """The plan that the bytes of a plan.json hold; `where` names it in messages.

    Raises:
        ValueError: it is not such a plan, or names a trial that would leave the sweep's folder.
    """
    try:
        raw = json.loads(content)
        trials = tuple(_trial(trial) for trial in raw["trials"])
        plan = SweepPlan(
            sweep=str(raw["sweep"]),
            question=str(raw.get("question") or ""),
            axes={str(axis): tuple(values) for axis, values in raw["axes"].items()},
            baseline=None if raw.get("baseline") is None else dict(raw["baseline"]),
            primary=tuple(str(name) for name in raw.get("primary") or ()),
            trials=trials,
            first_seeds=_first_seeds(raw),
            scheduler=None if raw.get("scheduler") is None else str(raw["scheduler"]["name"]),
            match=None if raw.get("match") is None else str(raw["match"]),
            score=None if raw.get("score") is None else dict(raw["score"]),
            outlier_limit=float(raw.get("outlier_limit") or OUTLIER_LIMIT),
            model_sizes={
                str(name): (int(size["width"]), int(size["depth"]))
                for name, size in (raw.get("model_sizes") or {}).items()
            },
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where} is not a readable plan: {short(error)}") from error
    for wrong in _wrong(plan, raw):
        raise ValueError(f"{where}: {wrong}")
    return plan


def _wrong(plan: SweepPlan, raw: Mapping[str, Any]) -> Iterator[str]:
    """What no sweep that was planned has, as texts."""
    ids = [trial.trial_id for trial in plan.trials]
    yield from (f"{one!r} is not a trial's id" for one in ids if not is_safe_id(one))
    if len(set(ids)) < len(ids):
        yield f"the trial {next(one for one in ids if ids.count(one) > 1)!r} is there twice"
    yield from (f"the baseline {axis!r} is not an axis" for axis in plan.baseline or {} if axis not in plan.axes)
    if not isinstance(raw.get("primary") or [], list):
        yield "primary is not a list"
    if not 0 < plan.outlier_limit < 1:
        yield f"outlier_limit is {plan.outlier_limit}; allowed: a fraction between 0 and 1"


def is_safe_id(text: str) -> bool:
    """Whether `text` can be a trial's id: the name of a folder that leads nowhere else."""
    return _SAFE_ID.fullmatch(text) is not None


def _trial(raw: Mapping[str, Any]) -> PlannedTrial:
    return PlannedTrial(
        trial_id=str(raw["trial_id"]),
        name=str(raw.get("name") or raw["trial_id"]),
        cell=dict(raw["cell"]),
        seed=int(raw["seed"]),
        training_flops=None if raw.get("training_flops") is None else float(raw["training_flops"]),
    )


def _first_seeds(raw: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The seeds that every cell has, where a plan says that some got more by the variance of those."""
    return None if raw.get("more_seeds") is None else tuple(int(seed) for seed in raw["seeds"])
