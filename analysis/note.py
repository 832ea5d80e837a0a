"""A sweep's question, answer and primary metrics as Markdown, for the description of its run in MLflow; pure."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from analysis.collect import SweepPlan
from analysis.labels import axis_labels, metric_label, unit, value_text
from analysis.terminal import grouped, shown_metrics

MOST_CHARACTERS = 5_000  # the least limit of a tag among MLflow's stores

# MLflow's UI sanitises what it renders; escaped here all the same, since other readers of a tracking store may not.
_MARKDOWN = re.compile(r"([\\`*_\[\]|~])")

Row = Mapping[str, Any]


def note(plan: SweepPlan, rows: Sequence[Row], varying: Sequence[str], answer: str) -> str:
    """The note, at most `MOST_CHARACTERS` long: rows of its table that do not fit are counted.

    Args:
        rows: rows of the ablation table.
        varying: the axes in which cells differ.
    """
    head = [escaped(plan.question), "", f"**Answer.** {escaped(answer)}", ""]
    metrics, names = shown_metrics(plan, rows), axis_labels(plan.axes)
    groups = grouped(plan, rows)
    if not metrics or not groups:
        return "\n".join(head).strip()[:MOST_CHARACTERS]
    axes = list(varying) or list(plan.axes)[:1]
    titles = [*(names[axis] for axis in axes), "n", *map(_title, metrics)]
    lines = [*head, _line(titles), "|" + " --- |" * len(titles)]
    return "\n".join([*lines, *_fitting([_row(group, axes, metrics) for group in groups], lines)])


def escaped(text: str) -> str:
    """`text` as Markdown that shows it as it is, in one line."""
    return _MARKDOWN.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _fitting(rows: Sequence[str], before: Sequence[str]) -> list[str]:
    """The first `rows` that fit behind the lines `before`, and how many were left out."""
    room = MOST_CHARACTERS - len("\n".join(before)) - 60
    kept: list[str] = []
    for row in rows:
        room -= len(row) + 1
        if room < 0:
            return [*kept, "", f"{len(rows) - len(kept)} more cells: artifact report.html"]
        kept.append(row)
    return kept


def _title(metric: str) -> str:
    symbol = unit(metric).symbol
    return f"{metric_label(metric)}{', ' + symbol if symbol else ''}"


def _row(group: Sequence[Row], axes: Sequence[str], metrics: Sequence[str]) -> str:
    by_metric = {row["metric"]: row for row in group}
    chosen = [by_metric[metric] for metric in metrics]
    least = min(row["n"] for row in chosen)
    return _line([*(value_text(group[0][axis]) for axis in axes), str(least), *map(_number, chosen)])


def _number(row: Row) -> str:
    kind = unit(row["metric"])
    spread = "" if row["std"] is None else f" ± {kind.text(row['std'], signed=False)}"
    if row["delta"] is None:
        return f"{kind.text(row['mean'])}{spread}"
    difference = f"Δ {kind.text(row['delta'], True)} {kind.interval(row['delta_low'], row['delta_high'])}".rstrip()
    return f"{kind.text(row['mean'])}{spread}; {difference}"


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, values))} |"
