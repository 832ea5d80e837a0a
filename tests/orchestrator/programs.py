"""A trial that is a program, run attempt by attempt in this process."""

import json
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator.attempt import Job, Outcome, run_attempt
from orchestrator.layout import TrialLayout
from trainers.config import resolve, trial_id

Reports = list[tuple[int, dict[str, float]]]


class Trial:
    """A trial of the program `body` in `folder`, run attempt by attempt in this process."""

    def __init__(self, folder: Path, body: str, *, shell: str = "sh", **settings: Any) -> None:
        self.script = folder / "script"
        self.script.write_text(textwrap.dedent(body))
        given = {"command": [shell, str(self.script)], "seed": 7, **settings}
        self.config = resolve(given)
        self.layout = TrialLayout(folder / "trial")
        self.reports: Reports = []

    def run(
        self,
        asked: Callable[[], str | None] = lambda: None,
        on_report: Callable[[int], None] = lambda _step: None,
        ranks: int = 1,
    ) -> Outcome:
        """One attempt, with the reason to leave that `asked` gives."""
        job = Job(
            trial_id=trial_id(self.config),
            name="script seed7",
            config=self.config.model_dump(mode="json"),
            folder=str(self.layout.root),
            cache="unused",
            threads=3,
            ranks=ranks,
            train="orchestrator.program:run",
        )
        self.number = self.layout.begin_attempt()

        def report(step: int, metrics: Mapping[str, float]) -> None:
            self.reports.append((step, dict(metrics)))
            on_report(step)

        return run_attempt(job, self.number, report, asked)

    @property
    def folder(self) -> Path:
        return self.layout.attempt(self.number)

    @property
    def log(self) -> str:
        return self.layout.log(self.number).read_text()


def line(step: object, **metrics: object) -> str:
    return json.dumps({"step": step, "metrics": {name.replace("__", "/"): value for name, value in metrics.items()}})


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
