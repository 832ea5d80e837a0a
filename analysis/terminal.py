"""The ablation table of a sweep for the terminal: a row a cell, a column a primary metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from analysis.answer import LEVEL, supported
from analysis.collect import SweepPlan
from analysis.discovery import is_curve
from analysis.labels import NONE, axis_labels, flag_text, metric_label, unit, value_text
from analysis.schemas import LOST, canonical
from analysis.statistics import CONFIDENCE

_MOST_METRICS = 4
QUIET_FLAGS = ("baseline", *LOST)  # tables say these elsewhere


def ablation_table(plan: SweepPlan, rows: Sequence[Mapping[str, Any]], varying: Sequence[str]) -> Table:
    """The primary metrics of the ablation table's `rows`, at most 120 columns wide with up to 3 metrics.

    Bold differences are those that `answer.supported` allows to claim. Flags stand in numbered notes below.
    """
    metrics = shown_metrics(plan, rows)
    names = axis_labels(plan.axes)
    axes = list(varying) or list(plan.axes)[:1]
    table = Table(title=plan.sweep, title_justify="left", header_style="bold", caption_justify="left")
    for axis in axes:
        table.add_column(Text(names[axis]), justify="right")
    table.add_column("n", justify="right")
    for metric in metrics:
        table.add_column(Text(_heading(metric)), justify="right")
    notes: dict[str, int] = {}
    for group in grouped(plan, rows):
        by_metric = {row["metric"]: row for row in group}
        chosen = [by_metric[metric] for metric in metrics]
        table.add_row(
            *(Text(value_text(group[0][axis])) for axis in axes),
            _counts(chosen),
            *(_number(row, notes) for row in chosen),
        )
    table.caption = Text(
        "\n".join([_legend(plan), *(f"{number}: {flag_text(flag)}" for flag, number in notes.items())])
    )
    return table


def shown_metrics(plan: SweepPlan, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The primary metrics that the terminal shows; where none is declared, the first test metrics there are."""
    present = list(dict.fromkeys(row["metric"] for row in rows if not is_curve(row["metric"])))
    fallback = [metric for metric in present if metric.startswith("test/")] or present
    return list(plan.primary or fallback)[:_MOST_METRICS]


def grouped(plan: SweepPlan, rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The rows of each cell together, in the order of `rows`."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(canonical([row[axis] for axis in plan.axes]), []).append(row)
    return list(groups.values())


def _heading(metric: str) -> str:
    symbol = unit(metric).symbol
    return f"{metric_label(metric)}\n{symbol + ', ' if symbol else ''}mean ± std\nΔ [95 %]"


def _counts(rows: Sequence[Mapping[str, Any]]) -> Text:
    """Scores of planned trials, red where one is missing: "3", or "2/3"."""
    planned = planned_trials(rows[0]) if rows else 0
    least = min((row["n"] for row in rows), default=0)
    return Text(f"{least}") if least == planned else Text(f"{least}/{planned}", style="red")


def _number(row: Mapping[str, Any], notes: dict[str, int]) -> Text:
    kind = unit(row["metric"])
    text = Text(kind.text(row["mean"]) + ("" if row["std"] is None else f" ± {kind.text(row['std'], signed=False)}"))
    if not row["n"]:
        text = Text(", ".join(lost_texts(row)) or NONE, style="red")
    for flag in row["flags"]:
        if flag not in QUIET_FLAGS:
            text.append(f" ({notes.setdefault(flag, len(notes) + 1)})", style="yellow")
    if row["delta"] is not None:
        difference = f"\n{kind.text(row['delta'], True)} {kind.interval(row['delta_low'], row['delta_high'])}".rstrip()
        text.append(difference, style="bold" if supported(row) else "dim")
    elif "baseline" in row["flags"]:
        text.append("\nbaseline", style="dim")
    return text


def planned_trials(row: Mapping[str, Any]) -> int:
    """How many trials of a row are planned, with a score or without."""
    return int(row["n"] + sum(row[f"n_{status}"] for status in LOST))


def lost_texts(row: Mapping[str, Any]) -> list[str]:
    """The trials of a row that have no score, in words: "2 failed"."""
    return [f"{row[f'n_{status}']} {status}" for status in LOST if row[f"n_{status}"]]


def _legend(plan: SweepPlan) -> str:
    left_out = plan.primary[_MOST_METRICS:]
    more = f" Primary too, but not shown: {', '.join(map(metric_label, left_out))}." if left_out else ""
    if plan.baseline is None:
        return f"n: finished trials with a score. No baseline is declared, so there are no differences.{more}"
    baseline = ", ".join(f"{axis} = {value_text(value)}" for axis, value in plan.baseline.items())
    return (
        f"n: finished trials with a score. Δ: difference to {baseline}, paired by seed and everything else, "
        f"with its {CONFIDENCE:.0%} interval; bold where the corrected p of a primary metric is below {LEVEL} and the "
        f"interval is without zero.{more}"
    )
