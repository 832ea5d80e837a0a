"""Reads the arrays that trials leave as NAME.npz; what cannot be read is a said problem, not an error."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from analysis.cells import Cell
from analysis.collect import Frames

Loaded = TypeVar("Loaded")
Arrays = dict[str, NDArray[Any]]
Read = Callable[[Arrays], Loaded]


class Records:
    """The arrays of a sweep's finished trials.

    Args:
        problems: to which it adds a text for every file that is unreadable.
    """

    def __init__(self, frames: Frames, problems: list[str]) -> None:
        statuses = zip(frames.runs["trial_id"].to_pylist(), frames.runs["status"].to_pylist(), strict=True)
        self._finished = {trial_id for trial_id, status in statuses if status == "finished"}
        self._folder, self._problems = frames.folder / "trials", problems

    def of_cell(self, cell: Cell, name: str, keys: Sequence[str], read: Read[Loaded]) -> Iterator[tuple[str, Loaded]]:
        """What `read` makes of the file of each finished trial that has one, by trial, in the order of seeds.

        `read` gets the arrays that `keys` names and raises ValueError for what it cannot use.
        """
        for trial in cell.trials:
            path = self._folder / trial.trial_id / f"{name}.npz"
            if trial.trial_id in self._finished and path.exists():
                try:
                    yield trial.trial_id, read(_load(path, keys))
                except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile, EOFError) as error:
                    self._problems.append(f"trial {trial.trial_id}: {name}.npz is unreadable: {error}")


def _load(path: Path, keys: Sequence[str]) -> Arrays:
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in keys}


def integers(array: NDArray[Any], dimensions: int) -> NDArray[np.int64]:
    """`array` as counts. Raises ValueError where it is something else."""
    if array.ndim != dimensions or not np.issubdtype(array.dtype, np.number) or not array.size or (array < 0).any():
        raise ValueError(f"counts have shape {array.shape} and type {array.dtype}")
    return array.astype(np.int64)
