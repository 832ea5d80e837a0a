"""Every file and folder name of a sweep, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrialLayout:
    """Files of one trial. A process writes only into its own attempt; the driver publishes from there."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.parquet"

    @property
    def stop_request(self) -> Path:
        """Its existence asks the running attempt to end the trial as `stopped`."""
        return self.root / "stop"

    def attempt(self, number: int) -> Path:
        return self.root / "attempts" / str(number)

    def attempts(self) -> list[int]:
        """Numbers of all attempts that were ever begun, rising."""
        folder = self.root / "attempts"
        if not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())

    @property
    def log_file(self) -> Path:
        """The logs of all attempts, once the trial is over."""
        return self.root / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def begin_attempt(self, above: int = 0) -> int:
        """Claim the next attempt number; making its folder is atomic, so no two processes get the same one.

        Numbers stay above `above`, the newest that the ledger knows, even where the folders are gone.
        """
        number = max([above, *self.attempts()])
        while True:
            number += 1
            with contextlib.suppress(FileExistsError):
                self.attempt(number).mkdir(parents=True)
                return number

    def log(self, number: int, rank: int = 0) -> Path:
        return self.attempt(number) / ("log.txt" if rank == 0 else f"log.rank{rank}.txt")

    def checkpoint_folders(self) -> list[Path]:
        """Where a resumable checkpoint may lie."""
        return [self.checkpoints, *(self.attempt(n) / "checkpoints" for n in self.attempts())]


@dataclass(frozen=True)
class SweepLayout:
    """Files of one sweep; storage and state are the same folder where storage is local."""

    storage: Path
    state: Path
    name: str

    @property
    def root(self) -> Path:
        return self.storage / self.name

    @property
    def ledger(self) -> Path:
        return self.state / self.name / "ledger.db"

    @property
    def lock(self) -> Path:
        """Held by whoever runs the sweep, or mends its ledger."""
        return self.ledger.with_suffix(".lock")

    @property
    def settings(self) -> Path:
        """What `orchestrate set` asks of a running sweep."""
        return self.state / self.name / "settings.json"

    @property
    def sweep_file(self) -> Path:
        return self.root / "sweep.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def mlflow_map(self) -> Path:
        return self.root / "mlflow.json"

    @property
    def tables(self) -> Path:
        return self.root / "tables"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def cache(self) -> Path:
        return self.state / "cache"

    def trial(self, trial_id: str) -> TrialLayout:
        return TrialLayout(self.root / "trials" / trial_id)

    def published(self, trial_id: str) -> Iterator[TrialLayout]:
        """Where the trial has a result under this storage: in this sweep (its ledger may be lost), then in others."""
        others = sorted(folder for folder in self.storage.iterdir() if folder != self.root)
        for folder in (self.root, *others):
            candidate = TrialLayout(folder / "trials" / trial_id)
            if candidate.result.is_file():
                yield candidate
