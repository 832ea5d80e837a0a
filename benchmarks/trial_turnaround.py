"""How soon one trial follows another when trials do nothing, against Ray Tune with a fresh process for each."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import one_at_a_time
from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.turns import Partner
from orchestrator import run
from orchestrator.plan import PlannedTrial

OURS_PER_TURN = 6  # trials for each fresh one; the turn's number is their median
WARM_UP = OURS_PER_TURN
_TRIAL: dict[str, Any] = {"preset": "short", "model": {"size": "nano"}}


def measure(settings: Settings) -> Report:
    """Seconds of a fresh process : seconds of ours, both between the ends of two trials, one trial at a time."""
    ours: list[float] = []
    fresh: list[float] = []
    total = WARM_UP + settings.pairs * OURS_PER_TURN
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name, run.cluster() as ray:
        address = ray.get_runtime_context().gcs_address
        with Partner(_fresh_processes, address, settings.pairs + 1, str(Path(name) / "fresh")) as partner:
            partner.turn()  # the first loads what Ray and the disk keep
            seen: list[float] = []

            def between(_trial: PlannedTrial, seconds: float) -> None:
                seen.append(seconds)
                if len(seen) > WARM_UP and (len(seen) - WARM_UP) % OURS_PER_TURN == 0:
                    ours.append(statistics.median(seen[-OURS_PER_TURN:]))
                    fresh.append(partner.turn())

            one_at_a_time.sweep(
                ray, Path(name), _TRIAL, range(total), between, train="benchmarks.noop:run", flush_every=OURS_PER_TURN
            )
    sides = (
        "Ray Tune, a process started for every trial (function trainable, reuse_actors=False)",
        f"the orchestrator: warm rank process, ledger, published files, MLflow; median of {OURS_PER_TURN} trials",
    )
    comparison = Comparison("trial turn-around", sides, fresh, ours, "s", Goal(50.0, at_most=False))
    return Report([comparison], {"our_trials": total, "fresh_trials": len(fresh) + 1})


def _fresh_processes(connection: Connection, address: str, trials: int, folder: str) -> None:
    """The other side's process: one Tune experiment that waits for its turn after each trial."""
    import ray
    from ray import tune

    ray.init(address=address, log_to_driver=False)
    _wait_for_turn(connection)
    tune.Tuner(
        tune.with_resources(_noop, {"cpu": one_at_a_time.CPUS}),
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=1, reuse_actors=False),
        run_config=tune.RunConfig(name="fresh", storage_path=folder, callbacks=[_wait(connection, trials)], verbose=0),
    ).fit()
    ray.shutdown()


def _wait_for_turn(connection: Connection) -> None:
    try:
        connection.recv()
    except EOFError:  # the measuring process needs no more
        sys.exit(0)


def _noop(config: dict[str, Any]) -> None:
    """The same work as benchmarks/noop.py."""
    import timm  # noqa: F401
    import torch  # noqa: F401
    from ray import tune

    tune.report({"x": 1.0})


def _wait(connection: Connection | None, trials: int) -> Any:
    """A Tune callback that sends the seconds of each trial and then waits; its pickled copies do nothing."""
    from ray import tune

    class Wait(tune.Callback):
        def __init__(self) -> None:
            self._since, self._left = time.perf_counter(), trials

        def __reduce__(self) -> tuple[Any, ...]:
            return _wait, (None, 0)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            if connection is None:
                return
            connection.send(time.perf_counter() - self._since)
            self._left -= 1
            if self._left:
                _wait_for_turn(connection)
            self._since = time.perf_counter()

    return Wait()
