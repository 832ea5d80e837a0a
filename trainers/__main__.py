"""Trains one trial from a JSON file without an orchestrator: python -m trainers CONFIG DIRECTORY, or under torchrun."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.config import resolve

log = logging.getLogger(__name__)

_STATUS = {"finished": 0, "diverged": 1}  # else 130: interrupted, and the same command goes on


def main() -> int:
    """0 when training finished, 1 when it diverged, 2 when the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m trainers", description=__doc__)
    parser.add_argument("config", type=Path, help="settings as JSON, nested or dotted; a trial's config.json is one")
    parser.add_argument("directory", type=Path, help="receives the trial's files; an interrupted trial goes on there")
    parser.add_argument("--cache", type=Path, help="decoded data sets, on a local disk; default beside DIRECTORY")
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    from trainers.train import train  # torch: not for --help

    asked_to_stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: asked_to_stop.append(number))
    try:
        config = resolve(_read(asked.config))
        stop = lambda: "interrupted" if asked_to_stop else None  # noqa: E731
        result = train(config, _print, asked.directory, cache=asked.cache, should_stop=stop)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # torchrun's other ranks would say the same
            print(error, file=sys.stderr)
        return 2
    if result.status not in _STATUS:
        log.info("interrupted at step %d; the same command goes on from there", result.steps)
    return _STATUS.get(result.status, 130)


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds {type(settings).__name__}; needed: an object of settings")
    return settings


def _print(step: int, metrics: Mapping[str, float]) -> None:
    print(json.dumps({"step": step, **metrics}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
