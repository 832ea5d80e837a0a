"""Small real sweeps for tests: the file, the command, and what came of it."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

# Marks of tests in whose own process Ray runs: it leaves sockets and files to the garbage collector.
RAY_IN_THIS_PROCESS = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning", "FutureWarning", "DeprecationWarning")
]

TABLES = ("ablation", "metrics", "token_norms")


@dataclass(frozen=True)
class Small:
    """A sweep file in a folder, and its storage beside it."""

    folder: Path
    steps: int = 12
    registers: tuple[int, ...] = (0, 2)

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def root(self) -> Path:
        return self.storage / "small"

    def write(self, **changes: Any) -> Path:
        """The sweep file, made anew with top-level changes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "name": "small",
            "question": "Does it run?",
            "trial": {
                "preset": "short",
                "model": {"size": "nano", "patch_size": 8},
                "data": {
                    "decode_size": 16,
                    "scenes": {"num_train": 128, "num_validation": 32, "num_test": 32},
                },
                "optim": {"lr": 3.0e-3, "steps": self.steps, "batch_size": 16},
                "evaluation": {
                    "points": 2,
                    "train_images": 64,
                    "linear": {"steps": 20, "batch_size": 16},
                    "knn": {"k": [20]},
                },
                "tokens": {"probe_images": 16},
                "execution": {"threads": 1, "checkpoint_seconds": 0.0, "device": "cpu"},
            },
            "axes": {"model.num_registers": list(self.registers)},
            "seeds": [0, 1],
            "baseline": {"model.num_registers": 0},
            "primary": ["test/linear/top1", "tokens/last/outlier_fraction"],
            "resources": {"cpus": 1},
            **changes,
        }
        path = self.folder / "small.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def command(self, *arguments: str) -> list[str]:
        """The command line of a sweep of this file."""
        file = self.folder / "small.yaml"
        return [*ORCHESTRATE, "sweep", str(file), "--storage", str(self.storage), *arguments]

    def run(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run the sweep to its end."""
        return run(self.command(*arguments), timeout)

    def tables(self) -> Mapping[str, bytes]:
        """The tables that no clock or accident decides."""
        return {name: (self.root / "tables" / f"{name}.parquet").read_bytes() for name in TABLES}

    def attempts(self) -> dict[str, int]:
        """How many attempts each trial's folder has seen."""
        trials = self.root / "trials"
        return {folder.name: len(list((folder / "attempts").iterdir())) for folder in trials.iterdir()}

    def mlflow_runs(self) -> list[tuple[str, str]]:
        """(name, status) of all runs in the default MLflow store, parent included."""
        with sqlite3.connect(self.storage / "mlflow.db") as database:
            rows = database.execute("SELECT name, status FROM runs WHERE lifecycle_stage = 'active'").fetchall()
        database.close()
        return sorted((str(name), str(status)) for name, status in rows)


ORCHESTRATE = [sys.executable, "-c", "from orchestrator.cli import main; main()"]


def imported_by(arguments: Sequence[str], packages: Sequence[str]) -> str:
    """Which of `packages` the command line with these arguments imports, as Python writes a list."""
    code = (
        f"import sys; sys.argv = ['orchestrate', *{list(arguments)!r}]\n"
        "from orchestrator.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {list(packages)!r} if name in sys.modules])"
    )
    return run([ORCHESTRATE[0], "-c", code]).stdout.strip().splitlines()[-1]


def run(command: Sequence[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a command line of ours with output captured."""
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment())


def environment() -> dict[str, str]:
    """The environment of a user: nothing of the test run's own."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("ORCHESTRATE_", "PYTEST_"))}
