"""Which tables of a sweep are written for reading, in which form, and under which safe names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import pyarrow as pa

from analysis.pivots import Pivot, Show, pivot, tidy
from analysis.publish import publish_bytes, write_tables
from analysis.results import Results
from analysis.terminal import shown_metrics
from analysis.terminal_tables import rendered, terminal_table
from analysis.text_tables import csv_text, latex, markdown, of_pivot

Form = Literal["terminal", "markdown", "latex", "csv", "parquet"]
_LONGEST = 80  # letters of a file's name
_FORMS: dict[str, Form] = {"md": "markdown", "tex": "latex", "csv": "csv", "parquet": "parquet"}  # by a file's ending


def form_of(form: str | None, output: Path | None) -> Form:
    """The form that is asked for, by its name or by the ending of a file; for the terminal where nothing is.

    Raises:
        ValueError: nothing is written under such an ending, or a text is asked for under that of parquet.
    """
    by_ending = None if output is None else _FORMS.get(output.suffix[1:])
    if by_ending == "parquet" and form not in (None, by_ending):
        raise ValueError(f"{output} would be no parquet file: --format is {form}; leave it out, or name another ending")
    if form is not None:
        return cast(Form, form)
    if output is None:
        return "terminal"
    if by_ending is None:
        raise ValueError(f"{output} has no ending of a table; allowed: {', '.join(f'.{kind}' for kind in _FORMS)}")
    return by_ending


def text(pivots: Sequence[Pivot], form: Form, show: Show = "both") -> str:
    """Pivots below each other, one table a metric; as CSV one table with the numbers of all.

    Raises:
        ValueError: the form is no text.
    """
    if form == "parquet":
        raise ValueError("parquet is no text; name a file with --output")
    if form == "csv":
        return csv_text(numbers(pivots))
    if form == "terminal":
        return rendered([terminal_table(of_pivot(one, show)) for one in pivots])
    write_one = {"markdown": markdown, "latex": latex}[form]
    return "\n".join(write_one(of_pivot(one, show)) for one in pivots)


def write(path: Path, pivots: Sequence[Pivot], form: Form, show: Show = "both") -> Path:
    """Publishes `pivots` as `path`."""
    if form == "parquet":
        return write_tables(path.parent, {path.stem: numbers(pivots)})[path.stem]
    return publish_bytes(path, text(pivots, form, show).encode("utf-8"))


def numbers(pivots: Sequence[Pivot]) -> pa.Table:
    """All numbers of `pivots`, an axis that one lacks being null there."""
    return pa.concat_tables([tidy(one) for one in pivots], promote_options="permissive")


def write_readable(folder: Path, results: Results) -> tuple[Path, ...]:
    """Publishes `folder`/ablation.csv and the default pivots as `folder`/pivots/METRIC.parquet, .csv, .md and .tex.

    Pivots of an earlier analysis that are no longer written are removed. Returns the paths.
    """
    written = [publish_bytes(folder / "ablation.csv", csv_text(results.ablation).encode("utf-8"))]
    metrics = default_metrics(results)
    place = folder / "pivots"
    for metric, name in zip(metrics, safe_names(metrics), strict=True):
        one = pivot(results, metric)
        written += [write(place / f"{name}.{kind}", [one], form) for kind, form in _FORMS.items()]
    if place.is_dir():
        for stale in {path for kind in _FORMS for path in place.glob(f"*.{kind}")} - set(written):
            stale.unlink()
    return tuple(written)


def default_metrics(results: Results) -> list[str]:
    """The metrics that have a pivot unless others are asked for; none where the sweep has no cell."""
    return shown_metrics(results.frames.plan, results.rows) if results.cells else []


def safe_names(names: Sequence[str]) -> list[str]:
    """A name of letters, digits and `_` for each of `names`; those that would be equal are numbered."""
    safe: list[str] = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:_LONGEST] or "metric"
        number, candidate = 1, stem
        while candidate.lower() in [other.lower() for other in safe]:
            number += 1
            candidate = f"{stem}_{number}"
        safe.append(candidate)
    return safe
