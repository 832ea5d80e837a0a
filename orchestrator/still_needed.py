"""What trials that are not over still need: checkpoints of other trials that they start from, decoded data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator import inspect
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import TrialRow
from trainers import released

_OPEN = ("planned", "running", "failed")  # a trial that failed is tried again


def checkpoints(storage: Path, state: Path) -> frozenset[str]:
    """Ids of trials whose checkpoints others start from or measure, in any sweep under `state`.

    Raises:
        LedgerError: a ledger cannot be read, so that nobody can tell.
    """
    return frozenset(key for row in _open_trials(storage, state) for key in _started_from(row.config))


def unused_caches(storage: Path, state: Path) -> list[Path]:
    """Folders of decoded data sets that no trial names that is still to run, in any sweep under `state`.

    Raises:
        LedgerError: a ledger cannot be read, so that nobody can tell.
    """
    folder = SweepLayout(storage.resolve(), state.resolve(), "any").cache
    named = {_readable(text) for row in _open_trials(storage, state) for text in _data_texts(row.config)} - {""}
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        entry
        for entry in entries
        if entry.is_dir()
        and not entry.name.startswith(".")
        and not any(_may_be_of(entry.name.rpartition("-")[0], name) for name in named)
    ]


def _open_trials(storage: Path, state: Path) -> Iterator[TrialRow]:
    for layout in inspect.sweeps(storage, state):
        with Ledger.open(layout.ledger, writer=False) as ledger:
            yield from (row for row in ledger.rows() if row.state in _OPEN)


def _started_from(config: Mapping[str, Any]) -> Iterator[str]:
    model = config.get("model") or {}
    start, weights = model.get("init_from") or {}, model.get("weights")
    if start.get("trial"):
        yield str(start["trial"])
    source = None if weights is None else released.source(weights)
    if source is not None and source.trial is not None:
        yield source.trial


def _data_texts(config: Mapping[str, Any]) -> Iterator[str]:
    """Every text in the settings that may name data sets."""
    return _texts([config.get("data"), config.get("evaluation")])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _readable(text: str) -> str:
    """A data set's name as folders of the cache have it."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text)[:64]


def _may_be_of(folder: str, name: str) -> bool:
    """Whether a cache folder may be of a data set: one name begins with the other, as those of its parts do."""
    return folder.startswith(name) or name.startswith(folder)
