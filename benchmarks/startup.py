"""How soon the command line answers: `orchestrate --help` and `orchestrate plan`, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Comparison, Goal, Report, Settings

_COMMAND = [sys.executable, "-c", "from orchestrator.cli import main; main()"]
_SWEEP = Path(__file__).parent.parent / "sweeps" / "num_registers.yaml"
HELP_SECONDS, PLAN_SECONDS = 0.3, 1.0


def measure(settings: Settings) -> Report:
    """Wall seconds, as shares of what is allowed; a bare interpreter, taken in turns, is counted too."""
    times: dict[str, list[float]] = {"help": [], "plan": [], "bare": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as storage:
        commands = {
            "help": [*_COMMAND, "--help"],
            "plan": [*_COMMAND, "plan", str(_SWEEP), "--storage", storage],
            "bare": [sys.executable, "-c", "pass"],
        }
        for pair in range(settings.pairs + 1):
            for name, command in commands.items():
                seconds = _seconds(command)
                if pair:  # the first reads the files from the disk
                    times[name].append(seconds)
    allowed = {"help": HELP_SECONDS, "plan": PLAN_SECONDS}
    comparisons = [
        Comparison(
            f"orchestrate {name}",
            (f"orchestrate {'--help' if name == 'help' else f'plan {_SWEEP.name}'}, start to exit", "what is allowed"),
            times[name],
            [limit] * settings.pairs,
            "s",
            Goal(1.0),
        )
        for name, limit in allowed.items()
    ]
    bare = sorted(times["bare"])[len(times["bare"]) // 2]
    return Report(comparisons, {"runs": settings.pairs, "bare_interpreter_seconds": round(bare, 3)})


def _seconds(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started
