"""Trains one trial from a JSON file without an orchestrator: python -m trainers CONFIG DIRECTORY, or under torchrun."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from trainers.config import resolve

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

    try:
        settings = json.loads(asked.config.read_text())
        if not isinstance(settings, dict):
            raise ValueError(f"{asked.config}: holds {type(settings).__name__}; needed: an object of settings")
        result = train(resolve(settings), _print, asked.directory, cache=asked.cache)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return _STATUS.get(result.status, 130)


def _print(step: int, metrics: Mapping[str, float]) -> None:
    print(json.dumps({"step": step, **metrics}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
