"""Reads the published files of a sweep into frames; what is missing or broken becomes nulls and a said problem."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from analysis import shards
from analysis.frames import (
    IMPORTED,
    OUTLIER_LIMIT,
    Frames,
    Mlflow,
    PlannedTrial,
    SweepPlan,
    flatten,
    redact,
    runs_table,
    short,
)
from analysis.plan_file import read_plan
from analysis.schemas import RUNS
from analysis.shards import Shard
from analysis.trial_files import TABLES, Stamps, read_trial, stamps

__all__ = [
    "IMPORTED",
    "OUTLIER_LIMIT",
    "Frames",
    "Mlflow",
    "PlannedTrial",
    "SweepPlan",
    "collect",
    "flatten",
    "read_plan",
]

CACHE = ".analysis"  # folder of a sweep that holds what was read of its trials; it can be deleted at any time
_CHUNK = 128  # trials that are read at a time by one thread, and kept in one shard
_MOST_THREADS = 8

_Place = tuple[Shard, int]  # of a trial in a shard

T = TypeVar("T")
R = TypeVar("R")


def collect(folder: Path, *, keep: bool = True) -> Frames:
    """Reads `folder`, the published folder of one sweep. Trials that are not in the current plan are left out.

    With `keep`, what was read of trials is kept in `folder`/.analysis, and only trials whose files have changed since
    are read again; the frames are the same with and without.

    Raises:
        ValueError: there is no readable plan, so it cannot be said what the sweep is.
    """
    plan = read_plan(folder)
    problems: list[str] = []
    mlflow = _read_mlflow(folder / "mlflow.json", problems)
    trials = sorted(plan.trials, key=lambda trial: trial.trial_id)
    places = _places(folder, trials, keep)
    parts = list(_neighbours(places))
    index = pa.concat_tables([shards.EMPTY, *(shard.index.slice(start, stop - start) for shard, start, stop in parts)])
    problems += [text for texts in index["problems"].to_pylist() for text in texts]
    run_ids = [mlflow.runs.get(trial.trial_id) if mlflow else None for trial in trials]
    return Frames(
        folder=folder,
        plan=plan,
        runs=runs_table(_with_place(index.select(RUNS.names), plan.sweep, run_ids), _settings(places, trials)),
        **{table.name: _whole(table.name, table.schema, places) for table in TABLES},
        mlflow=mlflow,
        problems=tuple(problems),
    )


def _places(folder: Path, trials: Sequence[PlannedTrial], keep: bool) -> list[_Place]:
    """Where each of `trials` stands: in a shard that was kept and is as the files are now, or in one read just now."""
    cache, root = folder / CACHE, os.fspath(folder / "trials")
    now = [stamps(f"{root}/{trial.trial_id}") for trial in trials]
    loaded: Iterator[Shard | None] = _in_threads(shards.load, shards.listed(cache) if keep else [])
    kept = _still_valid(loaded, trials, now)
    stale = [(trial, stamp) for trial, stamp in zip(trials, now, strict=True) if trial.trial_id not in kept]
    if stale and kept:  # an opportunity to give up shards of which little is left
        kept = _well_filled(kept)
        stale = [(trial, stamp) for trial, stamp in zip(trials, now, strict=True) if trial.trial_id not in kept]

    def read(chunk: Sequence[tuple[PlannedTrial, Stamps]]) -> Shard:
        records = [read_trial(f"{root}/{trial.trial_id}", trial) for trial, _ in chunk]
        shard = shards.pack(records, [stamp for _, stamp in chunk], [trial for trial, _ in chunk])
        return replace(shard, path=shards.save(cache, shard)) if keep else shard

    chunks = [stale[start : start + _CHUNK] for start in range(0, len(stale), _CHUNK)]
    for fresh in _in_threads(read, chunks):
        kept |= {trial_id: (fresh, row) for row, trial_id in enumerate(fresh.index["trial_id"].to_pylist())}
    places = [kept[trial.trial_id] for trial in trials]
    if keep:
        shards.clear(cache, {shard.path for shard, _ in places if shard.path is not None})
    return places


def _still_valid(
    found: Iterable[Shard | None], trials: Sequence[PlannedTrial], now: Sequence[Stamps]
) -> dict[str, _Place]:
    """Of the trials in the shards those whose files have the same stamps now."""
    wanted = {trial.trial_id: (stamp, trial) for trial, stamp in zip(trials, now, strict=True)}
    valid: dict[str, _Place] = {}
    for shard in found:
        if shard is None:
            continue
        columns = (shard.index[name].to_pylist() for name in ("trial_id", "stamps", "known"))
        for row, (trial_id, stamp, known) in enumerate(zip(*columns, strict=True)):
            if trial_id in wanted:
                current, trial = wanted[trial_id]
                if current == tuple(stamp) and (known is None or known == shards.known(trial)):
                    valid[trial_id] = shard, row
    return valid


def _well_filled(kept: Mapping[str, _Place]) -> dict[str, _Place]:
    """The trials whose shards hold at least half as many of them as a new one would."""
    live: dict[int, int] = {}
    for shard, _ in kept.values():
        live[id(shard)] = live.get(id(shard), 0) + 1
    return {trial_id: place for trial_id, place in kept.items() if live[id(place[0])] >= _CHUNK // 2}


def _in_threads(work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`work` of each item, in order; several at a time where there are several, as reading leaves Python mostly."""
    if len(items) < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(items))) as pool:
        yield from pool.map(work, items)


def _neighbours(places: Sequence[_Place]) -> Iterator[tuple[Shard, int, int]]:
    """`places` as stretches of rows of one shard each: shard, first row, row after the last."""
    start = 0
    for end in range(1, len(places) + 1):
        shard, row = places[start]
        if end == len(places) or places[end][0] is not shard or places[end][1] != row + end - start:
            yield shard, row, row + end - start
            start = end


def _whole(name: str, schema: pa.Schema, places: Sequence[_Place]) -> pa.Table:
    """A table of all trials. Its chunks are those of a fixed number of trials, whatever the shards are, so that equal
    tables make equal files; where shards are full nothing is copied.
    """
    chunks = []
    for start in range(0, len(places), _CHUNK):
        parts = [shard.slices(name, *rows) for shard, *rows in _neighbours(places[start : start + _CHUNK])]
        whole = parts[0] if len(parts) == 1 else pa.concat_tables(parts).combine_chunks()
        if whole.num_rows:
            chunks.append(whole)
    return pa.concat_tables(chunks or [schema.empty_table()])


def _with_place(rows: pa.Table, sweep: str, run_ids: Sequence[str | None]) -> pa.Table:
    """`rows` of RUNS with the sweep that they belong to, and the trials' runs in MLflow."""
    for name, values in (("sweep", [sweep] * rows.num_rows), ("mlflow_run_id", run_ids)):
        rows = rows.set_column(RUNS.names.index(name), name, pa.array(values, pa.string()))
    return rows


def _settings(places: Sequence[_Place], trials: Sequence[PlannedTrial]) -> list[Mapping[str, Any]]:
    """The settings of each trial; where it has published none, what the plan knows of them."""
    published = [shard.settings[row] for shard, row in places]
    return [
        {**trial.cell, "seed": trial.seed} if settings is None else settings
        for trial, settings in zip(trials, published, strict=True)
    ]


def _read_mlflow(path: Path, problems: list[str]) -> Mlflow | None:
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it is not a JSON object")
        runs = {str(trial): str(run) for trial, run in dict(raw.get("runs") or {}).items()}
        return Mlflow(redact(str(raw.get("tracking_uri", ""))), str(raw.get("experiment_id", "")), runs)
    except (OSError, ValueError, TypeError) as error:
        problems.append(f"mlflow.json is unreadable: {short(error)}")
        return None
