"""report.html: one self-contained page with a sweep's question, answer, tables, curves, pictures and provenance."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import unicodedata
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from analysis import report_facts as facts
from analysis import report_views as views
from analysis.answer import baseline_text
from analysis.curves import curves
from analysis.discovery import is_curve
from analysis.elimination import FRACTION
from analysis.figures.style import Drawn
from analysis.group_tables import cost_table, measured_tables
from analysis.labels import axis_labels, method_text
from analysis.report_along import along
from analysis.report_grid import Names, clipped, pairs
from analysis.results import Results
from analysis.terminal import shown_metrics

_MOST_ROWS = 1_000  # of exploratory metrics; all of them stand in tables/ablation.parquet
_MOST_PROBLEMS = 50
_LONGEST = 300  # letters of a question or a problem
_KINDS = ("test", "tokens", None, "val", "train")  # the order of exploratory metrics; None are all others
_PX_PER_DOT = 0.72  # pictures have 160 dots per inch
_BROAD = 660  # px from which on a picture stands alone in its row
_SCRIPTS = ("report.js", "curves.js")
# What would turn the direction of the text around it, or cannot be shown.
_INVISIBLE = {"Cc", "Cs", "Cn"}
_TURNING = {*map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), "\u200e", "\u200f"}


def render(results: Results, drawn: Sequence[Drawn], problems: Sequence[str]) -> str:
    """The page as HTML; everything that comes from outside is escaped, and nothing is fetched from a network.

    Only the page's own script runs: its hash is the only one that the page's content security policy allows.

    Args:
        problems: what could not be read or drawn, one text each.
    """
    script = "\n".join(_template(name) for name in _SCRIPTS)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("report.html.j2").render(
        **_answered(results),
        **_scores(results),
        **_run(results),
        curves=_curves(results),
        groups=_grouped(drawn),
        problems=[clipped(problem, _LONGEST) for problem in problems[:_MOST_PROBLEMS]],
        problems_left_out=max(0, len(problems) - _MOST_PROBLEMS),
        css=Markup(_template("report.css")),
        script=Markup(script),
        script_hash=digest,
    )


def visible(value: Any) -> Any:
    """A text with characters that cannot be seen, or that turn the direction of what follows, as escapes."""
    if not isinstance(value, str) or isinstance(value, Markup) or (value.isascii() and value.isprintable()):
        return value
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character in _TURNING or (unicodedata.category(character) in _INVISIBLE and character not in "\n\t")
        else character
        for character in value
    )


def _template(name: str) -> str:
    return resources.files("analysis").joinpath("templates", name).read_text(encoding="utf-8")


def _answered(results: Results) -> dict[str, Any]:
    """What stands above everything else."""
    plan, runs = results.frames.plan, results.frames.runs.to_pylist()
    metrics = shown_metrics(plan, results.rows)
    summary, notes = views.compact(results, metrics)
    return {
        "sweep": clipped(plan.sweep, 80),
        "question": clipped(plan.question or plan.sweep, _LONGEST),
        "trained": facts.trained(runs),
        "said": results.said,
        "statuses": facts.statuses(runs),
        "total": len(runs),
        "has_primary": bool(plan.primary),
        "baseline": clipped(baseline_text(plan.baseline, axis_labels(plan.axes)), _LONGEST) if plan.baseline else "",
        "summary": summary,
        "notes": notes,
        "shows_outliers": FRACTION in metrics,
        "primary_left_out": max(0, len(plan.primary) - len(metrics)),
        "warnings": views.warnings(results, _in_full(results)),
    }


def _scores(results: Results) -> dict[str, Any]:
    """All tables of scores and measurements."""
    rows, names = results.rows, Names()
    metrics, primary = _in_full(results), bool(results.frames.plan.primary)
    numbers = range(len(results.cells))
    main = [
        (
            metric,
            views.statistics(
                results, names.new("metric"), views.heading(metric), ((cell, metric) for cell in numbers), primary
            ),
        )
        for metric in metrics
    ]
    # Points of curves are drawn, and would crowd out the rest; they stand in tables/ablation.parquet too.
    rest = sorted({row["metric"] for row in rows if row["metric"] not in metrics and not is_curve(row["metric"])})
    others = [(cell, metric) for metric in sorted(rest, key=_rank) for cell in numbers]
    return {
        "main": main,
        "along": along(results, names, metrics),
        "methods": sorted(
            {method_text(row["interval_method"]) for row in rows if row["primary"] and row["delta_low"] is not None}
        ),
        "others": views.statistics(
            results, "exploratory-table", "Exploratory metrics", others[:_MOST_ROWS], primary=False, several=True
        ),
        "others_left_out": max(0, len(others) - _MOST_ROWS),
        "measured": [
            (facts.measured(names.new("measured"), table), table.left_out) for table in measured_tables(results)
        ],
        "trials": views.trials(results, metrics),
    }


def _in_full(results: Results) -> list[str]:
    """The metrics that have a table of their own: all primary ones, else those that the first screen shows."""
    return list(results.frames.plan.primary) or shown_metrics(results.frames.plan, results.rows)


def _run(results: Results) -> dict[str, Any]:
    """How the sweep was run."""
    frames, runs = results.frames, results.frames.runs.to_pylist()
    common, differing = facts.settings(frames, runs)
    return {
        "key_settings": pairs("settings-table", "Main settings", facts.key_settings(runs)),
        "common": pairs("settings-shared", "Settings that all trials share", common),
        "differing": pairs("settings-differing", "Settings that differ without being an axis", differing),
        "cost": pairs("cost-table", "Cost of the accepted results", facts.cost(runs)),
        "cost_of_cells": facts.measured("cost-cells", cost_table(results.cells, runs, results.varying)),
        "provenance": pairs("provenance-table", "Provenance", facts.provenance(runs, frames.mlflow)),
        "mlflow": frames.mlflow,
        "server": facts.server(frames.mlflow),
        "reference": facts.references(results, runs),
    }


def _curves(results: Results) -> dict[str, Any]:
    """The curves as JSON that cannot end its element, and what was left out of them."""
    found = curves(results.frames, results.cells, results.varying)
    data = {**found.data, "cells": [visible(clipped(name, 100)) for name in found.data["cells"]]}
    data["metrics"] = [
        {**metric, "label": visible(clipped(metric["label"], 100)), "name": visible(clipped(metric["name"], 100))}
        for metric in found.data["metrics"]
    ]
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return {"json": Markup(text), "any": bool(data["metrics"]), "left_out": found.left_out}


def _rank(metric: str) -> tuple[int, str]:
    """Sorts exploratory metrics by what a reader asks for first."""
    kind = metric.split("/")[0]
    return _KINDS.index(kind if kind in _KINDS else None), metric


def _grouped(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Pictures under their headings: those of the first series and of all, then those of each other series."""
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for one in drawn:
        groups.setdefault(one.group, {}).setdefault(one.series, []).append(_picture(one))
    return [
        {"title": title, "pictures": series.pop("", []), "series": list(series.items())}
        for title, series in groups.items()
    ]


def _picture(drawn: Drawn) -> dict[str, Any]:
    """A picture with its bytes in the address, and the size in px at which its letters are as large as the page's."""
    width, height = struct.unpack(">II", drawn.png[16:24])  # of the PNG's header
    return {
        **vars(drawn),
        "uri": f"data:image/png;base64,{base64.b64encode(drawn.png).decode('ascii')}",
        "width": round(width * _PX_PER_DOT),
        "height": round(height * _PX_PER_DOT),
        "broad": width * _PX_PER_DOT > _BROAD,
    }
