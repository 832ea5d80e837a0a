"""The command line: every benchmark in a process of its own, one JSON line each on the standard output."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import cast

from benchmarks import report
from benchmarks.catalog import BENCHMARKS


def main() -> int:
    """0 when all ran, whether their goals are met or not; 1 when one of them broke."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(BENCHMARKS)}")
    parser.add_argument(
        "--threads", type=int, default=1, help="and cores of a training loop; the sweeps that ship use 1"
    )
    parser.add_argument("--pairs", type=int, default=10, help="measured in turns; fewer than 6 have no interval")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(BENCHMARKS):
        parser.error(f"{', '.join(sorted(unknown))} does not exist; allowed: {', '.join(BENCHMARKS)}")
    if not 1 <= asked.threads <= cores or asked.pairs < 1:
        parser.error(f"allowed: --threads from 1 to {cores}, --pairs from 1")
    if len(asked.names) == 1:
        return _run(asked.names[0], report.Settings(asked.threads, asked.pairs))
    command = [sys.executable, "-m", "benchmarks", "--threads", str(asked.threads), "--pairs", str(asked.pairs)]
    return max(subprocess.run([*command, name]).returncode for name in asked.names or BENCHMARKS)


def _run(name: str, settings: report.Settings) -> int:
    module, _, function = BENCHMARKS[name].partition(":")
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that temporary folders go
    started = time.monotonic()
    facts = report.machine(settings.threads)
    with _stdout_to_stderr():
        measure = cast(Callable[[report.Settings], report.Report], getattr(importlib.import_module(module), function))
        measured = measure(settings)
    print(report.line(name, measured, facts, time.monotonic() - started), flush=True)
    return 0


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What libraries and child processes print goes to the error output: the other one is for JSON alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


if __name__ == "__main__":
    sys.exit(main())
