"""How far seeds scatter in earlier trials; no scipy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.cells import baseline_of
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.scored import until_scored

_MOST_TRIALS = 200  # whose metrics are read


@dataclass(frozen=True)
class Noise:
    """The standard deviation of paired differences of a metric, in its units, and what it was found from.

    Where no pairs were there it is that of single trials times √2, which pairing by seed can only make smaller as long
    as seeds have an effect that both trials of a pair share.
    """

    metric: str
    deviation: float
    degrees: int
    paired: bool

    @property
    def of_a_run(self) -> float:
        """The standard deviation of the noise that is drawn for every run anew, of which a difference has two."""
        return self.deviation / math.sqrt(2)


def noise(
    ledger: Ledger, metrics: Sequence[str], baseline: Mapping[str, Any] | None, like: Sequence[Mapping[str, Any]] = ()
) -> list[Noise]:
    """The noise of each of `metrics` in the finished trials of a ledger; metrics without two alike trials are left out.

    Args:
        baseline: of the sweep, by which differences are paired; None where the ledger is another sweep's.
        like: method, size and data of trials that are taken, as `kind` says them; all where it is empty.
    """
    rows = [row for row in ledger.newest_finished(_MOST_TRIALS) if not like or kind(row.config) in like]
    last = {row.trial_id: _last(ledger, row, metrics) for row in rows}
    found = []
    for metric in metrics:
        values = {row.trial_id: last[row.trial_id][metric] for row in rows if metric in last[row.trial_id]}
        pooled = _of_pairs(rows, values, baseline) if baseline else None
        whole = pooled or _of_trials(rows, values)
        if whole is not None and whole[0] > 0:
            paired = pooled is not None
            found.append(Noise(metric, math.sqrt(whole[0] * (1 if paired else 2)), whole[1], paired))
    return found


def kind(config: Mapping[str, Any]) -> dict[str, Any]:
    """What trials must share for their noise to be alike."""
    data, model = config.get("data") or {}, config.get("model") or {}
    return {"method": config.get("method"), "size": model.get("size"), "data": data.get("train")}


def _last(ledger: Ledger, row: TrialRow, metrics: Sequence[str]) -> dict[str, float]:
    points = until_scored(ledger.metrics(row.trial_id))  # steps rise
    values = {name: value for _, name, value in points if name in metrics}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _of_pairs(
    rows: Sequence[TrialRow], values: Mapping[str, float], baseline: Mapping[str, Any]
) -> tuple[float, int] | None:
    """The pooled variance of differences to the baseline cell, by seed, and its degrees of freedom."""
    cells: dict[str, dict[int, float]] = {}
    listed: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row.trial_id in values and row.in_plan and row.role == "cell":
            key = json.dumps(row.cell, sort_keys=True)
            listed[key] = row.cell
            cells.setdefault(key, {})[row.seed] = values[row.trial_id]
    groups = []
    for key, by_seed in cells.items():
        found = baseline_of(listed[key], list(listed.values()), baseline)
        theirs = {} if found is None or found == listed[key] else cells[json.dumps(found, sort_keys=True)]
        groups.append([by_seed[seed] - theirs[seed] for seed in by_seed.keys() & theirs.keys()])
    return _pooled(groups)


def _of_trials(rows: Sequence[TrialRow], values: Mapping[str, float]) -> tuple[float, int] | None:
    """The pooled variance of trials that differ in their seeds alone."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        if row.trial_id in values:
            settings = {name: value for name, value in row.config.items() if name not in ("seed", "execution")}
            groups.setdefault(json.dumps(settings, sort_keys=True), []).append(values[row.trial_id])
    return _pooled(groups.values())


def _pooled(groups: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    squares, degrees = 0.0, 0
    for group in groups:
        if len(group) > 1:
            mean = sum(group) / len(group)
            squares += sum((value - mean) ** 2 for value in group)
            degrees += len(group) - 1
    return (squares / degrees, degrees) if degrees else None
