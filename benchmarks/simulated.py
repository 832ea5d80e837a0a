"""A Ray cluster of simulated nodes on this machine, with fake GPUs, and sweeps of many small trials on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from orchestrator import publish, run, spec
from orchestrator.control import Control
from orchestrator.delivery import Delivery
from orchestrator.dispatch import Dispatch
from orchestrator.jobs import job_of
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import PlannedTrial, build_plan
from orchestrator.queue import Handler, Queue
from orchestrator.recorder import Recorder
from orchestrator.run_request import Request
from orchestrator.tracking import Sink, default_tracking_uri

_SEEDS = 2_000  # in one sweep file at most, which may hold 5,000 values


@contextmanager
def cluster(nodes: int, cpus: int, gpus: int = 0) -> Iterator[Any]:
    """The `ray` module, connected to a head without resources and `nodes` nodes of so many CPUs and (fake) GPUs."""
    run.prepare_environment()
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # of nodes and driver alike, else actors are cancelled silently
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])  # nodes do not know where we come from
    import ray
    from ray.cluster_utils import Cluster

    simulated = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            simulated.add_node(num_cpus=cpus, num_gpus=gpus)
        with run.cluster(simulated.address) as connected:
            yield connected
    finally:
        ray.shutdown()
        simulated.shutdown()


def plan(folder: Path, name: str, trials: int) -> tuple[PlannedTrial, ...]:
    """A sweep of so many trials that report nothing: one cell, or as many as keep its list of seeds short.

    Raises:
        ValueError: that many trials are no rectangle of cells and seeds.
    """
    cells = -(-trials // _SEEDS)
    if trials % cells:
        raise ValueError(f"{trials} trials are not {cells} cells of equally many seeds")
    content = {
        "name": name,
        "question": "What does a sweep cost?",
        "trial": {"preset": "short", "model": {"size": "nano"}},
        "axes": {"model.num_registers": list(range(cells))},
        "seeds": list(range(trials // cells)),
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return build_plan(spec.read_sweep(file)).trials


def sweep(
    ray: Any,
    folder: Path,
    name: str,
    planned: tuple[PlannedTrial, ...],
    train: str,
    request: Request | Callable[[PlannedTrial], Request],
    seen: Handler,
) -> float:
    """All trials through Ray Tune, ledger, published files and MLflow sink, as the driver runs them.

    `request` is that of every trial, or says it for each. `seen` is told every event once it is recorded.

    Returns:
        Seconds that MLflow took after the last trial until it had everything.

    Raises:
        RuntimeError: a trial did not finish, or MLflow lacks something after ten minutes.
    """
    layout = SweepLayout(folder / "runs", folder / "runs", name)
    layout.ledger.parent.mkdir(parents=True, exist_ok=True)
    requests = {trial.trial_id: request if isinstance(request, Request) else request(trial) for trial in planned}
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger.open(layout.ledger))
        ledger.plan(planned)
        sink = Sink(ledger, default_tracking_uri(layout.state), name, name, state=layout.state)
        sink.start()
        stack.callback(sink.close, 1.0)
        delivery = stack.enter_context(Delivery(layout, ledger))
        recorder = Recorder(
            ledger, layout, publish.provenance(), lambda trial_id: requests[trial_id].gpus, delivery.begin, sink.notify
        )

        def handle(trial_id: str, event: Mapping[str, Any]) -> None:
            recorder.handle(trial_id, event)
            seen(trial_id, event)

        queue = Queue()
        queue.add(planned)
        dispatch = Dispatch(ledger, queue, [], lambda _trial: None, lambda: False)
        dispatch.make_job = lambda trial: (
            job_of(trial, ledger.row(trial.trial_id), layout, requests[trial.trial_id], train=train),
            requests[trial.trial_id],
        )
        run.run(ray, dispatch, handle, Control(), lambda: False)
        delivery.complete()
        counts = ledger.counts()
        if counts["finished"] != len(planned):
            error = next((row.error for row in ledger.rows() if row.error is not None), None)
            raise RuntimeError(f"not all trials finished: {counts}; {error}")
        since = time.perf_counter()
        if lacking := sink.flush(600.0):
            raise RuntimeError(f"MLflow lacks {lacking} records ten minutes after the last trial")
        return time.perf_counter() - since


def bare(
    ray: Any, folder: Path, name: str, planned: tuple[PlannedTrial, ...], train: str, request: Request, clock: Clock
) -> None:
    """The same thin trials in bare Ray Tune: its own grid, reused actors, loggers off, nobody listening but `clock`."""
    from ray import tune

    from orchestrator.mailbox import Mailbox
    from orchestrator.trial import ThinTrial

    layout = SweepLayout(folder / "bare", folder / "bare", name)
    mailbox = ray.remote(Mailbox).options(num_cpus=0).remote()
    with Ledger.open(layout.ledger) as ledger:  # what it knows of each trial is all the same: nothing
        ledger.plan(planned)
        jobs = [
            job_of(trial, row, layout, request, train=train) for trial, row in zip(planned, ledger.rows(), strict=True)
        ]
    for job in jobs:
        mailbox.put.remote(job.trial_id, asdict(job))
    bundles = request.bundles()
    tune.Tuner(
        tune.with_resources(
            tune.with_parameters(ThinTrial, mailbox=mailbox), lambda _config: tune.PlacementGroupFactory(bundles)
        ),
        param_space={"trial": tune.grid_search([trial.trial_id for trial in planned])},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(folder / "tune"),
            callbacks=[clock.callback()],
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
        ),
    ).fit()
    ray.kill(mailbox)


class Clock:
    """When trials ended; nothing of an experiment counts until `warm` of them have, since processes start meanwhile."""

    def __init__(self, warm: int) -> None:
        self._warm = warm
        self._ends: list[float] = []

    def ended(self) -> None:
        """A trial has ended."""
        self._ends.append(time.perf_counter())

    @property
    def seconds_per_trial(self) -> float:
        """From the last warm trial's end to the last one's, for each trial in between."""
        counted = self._ends[self._warm - 1 :]
        return (counted[-1] - counted[0]) / (len(counted) - 1)

    def callback(self) -> Any:
        """A Tune callback that tells this clock; its pickled copies do nothing."""
        from ray import tune

        clock = self

        class Ends(tune.Callback):
            def __reduce__(self) -> tuple[Any, ...]:
                return tune.Callback, ()

            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                clock.ended()

        return Ends()
