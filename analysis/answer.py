"""One sentence that answers a sweep's question as far as its primary metrics and their intervals allow; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.collect import SweepPlan
from analysis.labels import axis_labels, cell_text, metric_label, unit, value_text

LEVEL = 0.05
_MOST_NAMED = 6  # cells named one by one in the sentence; more are counted

Row = Mapping[str, Any]


def answer(plan: SweepPlan, rows: Sequence[Row], varying: Sequence[str]) -> str:
    """The answer. A difference is claimed only where Holm's p is below 0.05 and the interval leaves out zero.

    Args:
        rows: rows of the ablation table.
        varying: the axes in which cells differ, which the sentence names.
    """
    primary = [row for row in rows if row["primary"]]
    if not any(row["n"] for row in rows):
        return f"No answer yet: none of {len(plan.trials)} trials has finished with a score."
    if not plan.primary:
        return "Cannot tell: the sweep declares no primary metric, so every difference here is exploratory."
    if plan.baseline is None:
        return "Cannot tell: the sweep declares no baseline, so there is nothing to compare with."
    names = axis_labels(plan.axes)
    clauses = [
        _clause(metric, [row for row in primary if row["metric"] == metric], varying, names, plan.baseline)
        for metric in plan.primary
    ]
    against = cell_text(plan.baseline, plan.baseline, names)
    sentence = f"Compared with {against}{_seeds(primary)}: {'; '.join(clauses)}."
    return sentence if any("cannot tell" not in clause for clause in clauses) else f"Cannot tell. {sentence}"


def supported(row: Row) -> bool:
    """Whether a row's difference may be claimed: corrected p below 0.05 and an interval without zero."""
    if row["p_adjusted"] is None or row["delta_low"] is None:
        return False
    return bool(row["p_adjusted"] < LEVEL and (row["delta_low"] > 0 or row["delta_high"] < 0))


def _seeds(rows: Sequence[Row]) -> str:
    pairs = sorted({row["n_paired"] for row in rows if row["n_paired"]})
    if not pairs:
        return ""
    count = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    return f", over {count} paired {'seed' if pairs == [1] else 'seeds'}"


def _clause(
    metric: str, rows: Sequence[Row], varying: Sequence[str], names: Mapping[str, str], baseline: Mapping[str, Any]
) -> str:
    compared = [row for row in rows if row["delta"] is not None]
    label = metric_label(metric)
    if not compared:
        return f"for {label} the data cannot tell (no cell has a finished pair)"
    claimed = [row for row in compared if supported(row)]
    parts = [
        _direction([row for row in claimed if (row["delta"] > 0) == rises], rises, metric, varying, names, baseline)
        for rises in (False, True)
    ]
    said = " and ".join(part for part in parts if part)
    rest = len(compared) - len(claimed)
    if said:
        return f"{label} is {said}" + (
            f", while {rest} other cell{'s' * (rest > 1)} cannot be told apart from the baseline" if rest else ""
        )
    return f"for {label} the data cannot tell ({_why_not(compared, metric)})"


def _direction(
    rows: Sequence[Row],
    rises: bool,
    metric: str,
    varying: Sequence[str],
    names: Mapping[str, str],
    baseline: Mapping[str, Any],
) -> str:
    if not rows:
        return ""
    kind = unit(metric)
    sizes = sorted(abs(row["delta"]) for row in rows)
    by = kind.text(sizes[0], signed=False)
    by = by if len(rows) == 1 else f"{by} to {kind.text(sizes[-1], signed=False)}"
    bounds = (min(row["delta_low"] for row in rows), max(row["delta_high"] for row in rows))
    word = "higher" if rises else "lower"
    certainty = "95 % interval" if len(rows) == 1 else "95 % intervals within"
    where = _where(rows, varying, names, baseline)
    return f"{word} {where} by {by}{kind.of_difference} ({certainty} {kind.interval(*bounds)})"


def _where(rows: Sequence[Row], varying: Sequence[str], names: Mapping[str, str], baseline: Mapping[str, Any]) -> str:
    if len(rows) > _MOST_NAMED:
        return f"in {len(rows)} cells"
    if len(varying) == 1 and varying[0] in baseline:
        return f"with {names[varying[0]]} = {', '.join(value_text(row[varying[0]]) for row in rows)}"
    return "with " + " and ".join(f"({cell_text(row, varying, names)})" for row in rows)


def _why_not(rows: Sequence[Row], metric: str) -> str:
    kind = unit(metric)
    bounded = [row for row in rows if row["delta_low"] is not None]
    if not bounded:
        return "one seed gives no interval"
    if all(row["delta"] == 0 and row["p_value"] is None for row in bounded):
        return "equal in every pair"
    if all(row["p_value"] is None for row in bounded):
        return "all pairs differ by the same amount, which says nothing about chance"
    span = kind.interval(min(row["delta_low"] for row in bounded), max(row["delta_high"] for row in bounded))
    return f"{'its 95 % interval is' if len(bounded) == 1 else '95 % intervals span'} {span}{kind.of_difference}"
