"""A sweep in a notebook: typed frames, pivots, tables and figures that display themselves, comparisons.

DataFrames hold pyarrow's types (`pandas.ArrowDtype`), so that null stays null (`pandas.NA`), never 0 or NaN, and whole
numbers stay whole beside it; `frame.astype({"mean": float})` gives numpy's.
"""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, overload

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from analysis import pivots
from analysis.collect import Frames, collect
from analysis.compare import compare
from analysis.labels import axis_labels
from analysis.notebook import Changes, Picture, Table, to_pandas
from analysis.readable import default_metrics
from analysis.results import Results, evaluate
from analysis.schemas import canonical, setting_column

Values = Literal["mean", "std", "n", "delta", "delta_low", "delta_high", "p_value", "p_adjusted"]
Axes = str | Sequence[str] | None


class Sweep:
    """What a sweep has published, and what follows from it; everything is computed once, when it is asked for.

    Attributes:
        results: the same as the analysis's own tables (pyarrow) and plan.
    """

    def __init__(self, frames: Frames) -> None:
        self.results: Results = evaluate(frames)

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.results.frames.plan.sweep

    @property
    def question(self) -> str:
        """What the sweep asks, as its file has it."""
        return self.results.frames.plan.question

    @property
    def answer(self) -> str:
        """The answer with its uncertainty, which may be that the data cannot tell."""
        return self.results.answer

    @property
    def axes(self) -> dict[str, tuple[object, ...]]:
        """The values of each axis by its dotted name."""
        return dict(self.results.frames.plan.axes)

    @property
    def primary(self) -> tuple[str, ...]:
        """The metrics that were declared beforehand; all others are exploratory."""
        return self.results.frames.plan.primary

    @property
    def warnings(self) -> tuple[str, ...]:
        """What could not be read, in sentences; flags of cells stand in `ablation`."""
        return self.results.frames.problems

    @property
    def missing_figures(self) -> tuple[str, ...]:
        """Why some figures are not drawn, in sentences."""
        return self._pictures[1]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row a trial: status, cost, provenance, and every resolved setting under its dotted name."""
        return self.frame("runs")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row a trial, step and metric: trial_id, step, name, value."""
        return self.frame("metrics")

    @cached_property
    def token_norms(self) -> pd.DataFrame:
        """A row a trial, step, layer, kind of token, source and weights: statistics of norms, and their histogram."""
        return self.frame("token_norms")

    @cached_property
    def ablation(self) -> pd.DataFrame:
        """A row a cell and metric: mean, std, difference to the baseline with its interval, corrected p, flags."""
        return self.frame("ablation")

    def frame(self, name: str) -> pd.DataFrame:
        """Any published table, by the name of its parquet file.

        Raises:
            ValueError: there is no such table.
        """
        tables = self.results.tables()
        if name not in tables:
            raise ValueError(f"there is no table {name!r}; allowed: {', '.join(tables)}")
        return to_pandas(tables[name])

    def pivot(self, metric: str, rows: Axes = None, columns: Axes = None, values: Values = "mean") -> pd.DataFrame:
        """One number of each cell over rows × columns, null where there is no such cell or number.

        Args:
            metric: its name, such as "test/linear/top1".
            rows: axes by dotted name or its last part; by default all that are not in the columns.
            columns: by default the number of registers.
            values: which column of `ablation`.

        Raises:
            ValueError: there is no such metric, axis or column, or an axis in which cells differ stands nowhere or
                twice.
        """
        if values not in get_args(Values):
            raise ValueError(f"values is {values!r}; allowed: {', '.join(get_args(Values))}")
        found = self._pivot(metric, rows, columns)
        names = axis_labels(dict.fromkeys((*found.rows, *found.columns)))
        numbers = [
            [
                None if (entry := found.entries.get((row, column))) is None else entry.row[values]
                for column in range(len(found.column_keys))
            ]
            for row in range(len(found.row_keys))
        ]
        kind = pd.ArrowDtype(pa.int64() if values == "n" else pa.float64())
        return pd.DataFrame(
            numbers,
            index=_index(found.row_keys, [names[axis] for axis in found.rows]),
            columns=_index(found.column_keys, [names[axis] for axis in found.columns]),
        ).astype(kind)

    def table(
        self, metric: str | None = None, rows: Axes = None, columns: Axes = None, show: pivots.Show = "both"
    ) -> Table:
        """The same as `pivot` for readers, with `to_latex()`, `to_markdown()` and `to_csv()`.

        Args:
            metric: by default the first primary metric.
            show: mean ± std ("spread"), the difference with its interval ("difference"), or both.

        Raises:
            ValueError: as `pivot`, there is no such `show`, or no metric is known yet.
        """
        if show not in get_args(pivots.Show):
            raise ValueError(f"show is {show!r}; allowed: {', '.join(get_args(pivots.Show))}")
        if metric is None:
            metric = next(iter(default_metrics(self.results)), None)
            if metric is None:
                raise ValueError(f"{self.name} has no metric yet: no trial has finished, or none is planned")
        return Table((self._pivot(metric, rows, columns),), show)

    def curves(self, metric: str) -> pd.DataFrame:
        """A learning curve of every trial that has one, tidy: each axis, seed, trial_id, status, step, value.

        Raises:
            ValueError: no trial has reported such a metric.
        """
        frames = self.results.frames
        chosen = frames.metrics.filter(pc.field("name") == metric)
        if not chosen.num_rows:
            known = sorted(set(frames.metrics["name"].to_pylist()))
            raise ValueError(f"no trial has reported {metric!r}; allowed: {', '.join(known) or 'none yet'}")
        trials = {trial.trial_id: trial for trial in frames.plan.trials}
        statuses = dict(zip(frames.runs["trial_id"].to_pylist(), frames.runs["status"].to_pylist(), strict=True))
        ids = chosen["trial_id"].to_pylist()
        columns = {axis: setting_column([trials[one].cell.get(axis) for one in ids]) for axis in frames.plan.axes}
        columns |= {"seed": pa.array([trials[one].seed for one in ids], pa.int64()), "trial_id": chosen["trial_id"]}
        columns["status"] = pa.array([statuses[one] for one in ids], pa.string())
        return to_pandas(pa.table(columns | {"step": chosen["step"], "value": chosen["value"]}))

    def figures(self) -> tuple[str, ...]:
        """The names of all figures that the sweep allows; why others are missing is in `missing_figures`."""
        return tuple(self._pictures[0])

    def figure(self, name: str) -> Picture:
        """A figure of the report, as PNG and SVG.

        Raises:
            ValueError: there is no such figure.
        """
        if name not in self._pictures[0]:
            raise ValueError(f"there is no figure {name!r}; allowed: {', '.join(self.figures()) or 'none yet'}")
        return self._pictures[0][name]

    def compare(self, other: Sweep) -> Changes:
        """What changed from this sweep (A) to `other` (B), cell by cell, with intervals.

        Raises:
            ValueError: they have no cell in common.
        """
        return Changes(compare(self.results, other.results))

    def _pivot(self, metric: str, rows: Axes, columns: Axes) -> pivots.Pivot:
        return pivots.pivot(self.results, metric, _listed(rows), _listed(columns))

    @cached_property
    def _pictures(self) -> tuple[dict[str, Picture], tuple[str, ...]]:
        from analysis.pictures import draw  # matplotlib takes a second

        found = draw(self.results)
        return {one.name: Picture(one) for one in found.drawn}, tuple(found.problems)

    def __repr__(self) -> str:
        plan = self.results.frames.plan
        return f"<Sweep {plan.sweep}: {len(self.results.cells)} cells, {len(plan.trials)} trials>"

    def _repr_html_(self) -> str:
        metrics = default_metrics(self.results)
        tables = Table(tuple(self._pivot(metric, None, None) for metric in metrics))
        return f"<p>{html.escape(self.question)}</p><p><b>{html.escape(self.answer)}</b></p>{tables._repr_html_()}"


class Sweeps(Sequence[Sweep]):
    """Several sweeps, in the given order; tables of all have a first column `sweep`."""

    def __init__(self, sweeps: Sequence[Sweep]) -> None:
        self._sweeps = tuple(sweeps)

    @overload
    def __getitem__(self, index: int) -> Sweep: ...
    @overload
    def __getitem__(self, index: slice) -> Sweeps: ...
    def __getitem__(self, index: int | slice) -> Sweep | Sweeps:
        return Sweeps(self._sweeps[index]) if isinstance(index, slice) else self._sweeps[index]

    def __len__(self) -> int:
        return len(self._sweeps)

    @property
    def runs(self) -> pd.DataFrame:
        """As `Sweep.runs`; a setting that a sweep's trials lack is null there."""
        return self.frame("runs")

    @property
    def metrics(self) -> pd.DataFrame:
        """As `Sweep.metrics`."""
        return self.frame("metrics")

    @property
    def token_norms(self) -> pd.DataFrame:
        """As `Sweep.token_norms`."""
        return self.frame("token_norms")

    @property
    def ablation(self) -> pd.DataFrame:
        """As `Sweep.ablation`; an axis that a sweep lacks is null there."""
        return self.frame("ablation")

    def frame(self, name: str) -> pd.DataFrame:
        """A table of all sweeps below each other, by its name.

        Raises:
            ValueError: there is no such table, or a setting is a text in one sweep and a number in another.
        """
        return pd.concat([_named(sweep.frame(name), sweep.name) for sweep in self._sweeps], ignore_index=True)

    def __repr__(self) -> str:
        return f"<Sweeps {', '.join(sweep.name for sweep in self._sweeps)}>"

    def _repr_html_(self) -> str:
        return "".join(f"<h3>{html.escape(sweep.name)}</h3>{sweep._repr_html_()}" for sweep in self._sweeps)


def load(folders: Sequence[str | os.PathLike[str]]) -> Sweep | Sweeps:
    """One sweep for one folder, else all of them.

    Raises:
        ValueError: a folder is not a sweep's, or none is given.
    """
    if not folders:
        raise ValueError("no folder is given; a sweep's is that with its plan.json, such as runs/num_registers")
    found = [Sweep(_collected(Path(folder))) for folder in folders]
    return found[0] if len(found) == 1 else Sweeps(found)


def load_mlflow(uri: str, name: str, storage: str | None = None) -> Sweep:
    """As `analysis.load_mlflow`."""
    from analysis.collect_mlflow import collect_mlflow

    return Sweep(collect_mlflow(uri, name, storage))


def _collected(folder: Path) -> Frames:
    """The frames of a sweep's folder. Raises ValueError, which names the sweeps in it where it is a storage."""
    inside = sorted(path.parent.name for path in folder.glob("*/plan.json")) if folder.is_dir() else []
    if inside and not (folder / "plan.json").is_file():
        raise ValueError(f"{folder} is not a sweep's folder; those of sweeps in it: {', '.join(inside)}")
    return collect(folder)


def _named(frame: pd.DataFrame, sweep: str) -> pd.DataFrame:
    """`frame` with the sweep's name as its first column."""
    others = frame.drop(columns="sweep", errors="ignore")
    others.insert(0, "sweep", pd.Series([sweep] * len(frame), dtype=pd.ArrowDtype(pa.string())))
    return others


def _listed(axes: Axes) -> Sequence[str] | None:
    return [axes] if isinstance(axes, str) else axes


def _index(keys: Sequence[pivots.Key], names: Sequence[str]) -> pd.Index[Any]:
    """Labels of rows or columns: plain for one axis, hierarchical for several, one label for none."""
    labels = [tuple(canonical(value) if isinstance(value, list | dict) else value for value in key) for key in keys]
    if not names:
        return pd.Index(["all"] * len(labels))
    if len(names) == 1:
        return pd.Index(pd.Series([label[0] for label in labels]), name=names[0])
    return pd.MultiIndex.from_tuples(labels, names=list(names))
