"""Runs trials for tests: whole ones with what they report, and the inside of one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainers import train
from trainers.config import resolve

Reports = dict[int, dict[str, float]]


def run(settings: Mapping[str, Any], directory: Path, cache: Path, **arguments: Any) -> tuple[train.Result, Reports]:
    """Train on one thread; how it ended, and what it reported by step."""
    reports: Reports = {}
    torch.set_num_threads(1)

    def report(step: int, metrics: Mapping[str, float]) -> None:
        reports.setdefault(step, {}).update(metrics)

    result = train.train(resolve(settings), report, directory, cache=cache, **arguments)
    return result, reports


def training(settings: Mapping[str, Any], directory: Path, cache: Path) -> Any:
    """A run that has not begun, to be looked into."""
    torch.set_num_threads(1)
    directory.mkdir(exist_ok=True)
    return train._Training(resolve(settings), directory, cache, torch.device("cpu"))
