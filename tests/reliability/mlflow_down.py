"""A sweep whose MLflow server fails for a while: down, hung, answering 500 or losing replies; also a program.

python -m tests.reliability.mlflow_down --minutes 10
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.orchestrator.sweeps import TABLES, Small
from tests.reliability import drivers
from tests.reliability.paced import PAUSE, query, reported, wait_for
from tests.reliability.unreliable_server import Mode, Proxy, server

MODES: tuple[Mode, ...] = ("down", "hung", "errors", "lossy")
STEPS = 24  # reports of each of the two trials


@dataclass(frozen=True)
class Found:
    """What came of a sweep whose server failed, beside one whose server was there."""

    mode: str
    same_tables: bool
    trial_seconds: float  # of all trials
    seconds_undisturbed: float
    longest_hold: float  # seconds of the driver's loop for one event
    points_waiting: int  # that MLflow lacked when its server came back
    delivered_after: float  # seconds after its return
    runs: dict[str, list[str]]  # statuses of all runs by their names
    points_missing: int
    points_doubled: int
    met: int  # requests that met a failing server
    lost: int  # replies


def measure_holds(folder: Path) -> None:
    """The longest time for which an event has held the driver's loop goes to a file."""
    from orchestrator.recorder import Recorder

    real, longest = Recorder.handle, [0.0]

    @functools.wraps(real)
    def timed(*arguments: Any) -> None:
        start = time.monotonic()
        real(*arguments)
        if time.monotonic() - start > longest[0]:
            longest[0] = time.monotonic() - start
            (folder / "hold").write_text(str(longest[0]))

    Recorder.handle = timed  # type: ignore[method-assign]


class Sweep:
    """One sweep and the proxy through which it reaches its server."""

    def __init__(self, name: str, folder: Path, template: Small, upstream: int, seconds: float) -> None:
        self.name, self.proxy = name, Proxy(upstream)
        self.small = drivers.prepared(folder, Small(template.folder, STEPS), name=name)
        self._seconds = seconds
        self._driver = drivers.begin(
            self.small,
            setup=f"{__name__}:measure_holds",
            environment={PAUSE: str(seconds * 1.25 / (2 * STEPS))},
            train="tests.reliability.paced:run",
            tracking_uri=f"http://127.0.0.1:{self.proxy.port}",
        )
        self.waiting, self.delivered_after, self.back = 0, -1.0, 0.0

    @property
    def root(self) -> Path:
        return self.small.storage / self.name

    def backlog(self) -> int:
        """Points that the ledger has and MLflow has not, as far as the ledger knows."""
        sql = "SELECT count(*) FROM metrics m JOIN trials t USING (trial_id) WHERE m.seq > t.delivered_seq"
        rows = query(self.root, sql)
        return int(rows[0][0] or 0) if rows else 0

    def has_begun(self) -> bool:
        return reported(self.root) >= 4 and self.backlog() < reported(self.root)

    def fail(self, mode: Mode) -> None:
        self.proxy.become(mode)

    def come_back(self) -> None:
        self.waiting, self.back = self.backlog(), time.monotonic()
        self._upto = int(query(self.root, "SELECT max(seq) FROM metrics")[0][0] or 0)
        self.proxy.become("up")

    def has_delivered(self) -> bool:
        """Whether all that waited when the server came back is there; keeps the time."""
        sql = f"""SELECT count(*) FROM metrics m JOIN trials t USING (trial_id)
            WHERE m.seq > t.delivered_seq AND m.seq <= {self._upto}"""
        if self.delivered_after < 0 and query(self.root, sql) == [(0,)]:
            self.delivered_after = time.monotonic() - self.back
        return self.delivered_after >= 0

    def end(self, seconds: float) -> None:
        self._driver.join(seconds)
        self.proxy.close()
        assert self._driver.exitcode == 0, f"{self.name}: {drivers.output(self.small)}"

    def tables(self) -> dict[str, bytes]:
        return {name: (self.root / "tables" / f"{name}.parquet").read_bytes() for name in TABLES}

    def seconds(self) -> float:
        results = [json.loads(path.read_text()) for path in self.root.glob("trials/*/result.json")]
        return sum(float(result["seconds"]) for result in results)

    def found(self, undisturbed: Sweep, state: Path) -> Found:
        runs, missing, doubled = self._in_mlflow(state)
        return Found(
            mode=self.name,
            same_tables=self.tables() == undisturbed.tables(),
            trial_seconds=self.seconds(),
            seconds_undisturbed=undisturbed.seconds(),
            longest_hold=float((self.small.folder / "hold").read_text()),
            points_waiting=self.waiting,
            delivered_after=self.delivered_after,
            runs=runs,
            points_missing=missing,
            points_doubled=doubled,
            met=self.proxy.met,
            lost=len(self.proxy.lost),
        )

    def _in_mlflow(self, state: Path) -> tuple[dict[str, list[str]], int, int]:
        """The server's runs of this sweep, and how many points they lack or have twice."""
        database = state / "mlflow.db"
        where = f"experiment_id = (SELECT experiment_id FROM experiments WHERE name = '{self.name}')"
        runs: dict[str, list[str]] = {}
        active = f"lifecycle_stage = 'active' AND {where}"
        for name, status in query(database, f"SELECT name, status FROM runs WHERE {active}"):
            runs.setdefault(str(name), []).append(str(status))
        sql = f"SELECT r.name, m.step, m.key, m.value FROM metrics m JOIN runs r USING (run_uuid) WHERE {active}"
        there = query(database, sql)
        known = query(
            self.root, "SELECT t.name, m.step, m.name, m.value FROM current_metrics m JOIN trials t USING (trial_id)"
        )
        return runs, len(set(known) - set(there)), len(there) - len(set(there))


def failures(folder: Path, template: Small, seconds: float, say: Callable[[str], object] = print) -> list[Found]:
    """Run a sweep for each way to fail, all at once, and one that is left alone; their servers fail for `seconds`."""
    state = folder / "server"
    state.mkdir(parents=True)
    with ExitStack() as stack:
        port = stack.enter_context(server(state))
        left_alone = Sweep("undisturbed", folder / "undisturbed", template, port, seconds)
        sweeps = {mode: Sweep(mode, folder / mode, template, port, seconds) for mode in MODES}
        everyone = [left_alone, *sweeps.values()]
        wait_for(lambda: all(sweep.has_begun() for sweep in everyone), 120)
        for mode, sweep in sweeps.items():
            sweep.fail(mode)
        say(f"all servers fail for {seconds:.0f} s")
        time.sleep(seconds)
        left_alone.come_back()
        for sweep in sweeps.values():
            sweep.come_back()
        wait_for(lambda: [sweep.has_delivered() for sweep in everyone].count(False) == 0, 120)  # each keeps its time
        for sweep in everyone:
            sweep.end(seconds + 120)
        return [sweep.found(left_alone, state) for sweep in everyone]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for which the servers fail")
    asked = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        template = drivers.template(Path(folder) / "template")
        for found in failures(Path(folder), template, asked.minutes * 60):
            print(found)


if __name__ == "__main__":
    main()
