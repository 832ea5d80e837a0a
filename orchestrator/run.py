"""Ray Tune: connects, fits requests to the cluster, runs jobs as thin trials; the only file that builds a Tuner."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.attempt import Job

log = logging.getLogger(__name__)

Handler = Callable[[str, Mapping[str, Any]], None]  # trial id, event
MAX_PROCESS_FAILURES = 5  # of the thin trial's own process; ranks are replaced inside it

# Read by Ray when it is imported or a Tuner is built.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they grow the driver by 300 KB a trial (ray#64231)
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the command line handles signals
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the ledger is the truth; Tune's own snapshots are never read
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


@dataclass(frozen=True)
class Request:
    """What one trial asks of the cluster."""

    cpus: float
    gpus: float


@contextlib.contextmanager
def cluster(address: str | None = None) -> Iterator[Any]:
    """The `ray` module, connected: to `address`, or to a cluster started here and ended on leaving.

    Raises:
        ValueError: nothing answers at `address`.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is not None and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # connecting, unlike starting, does not look for one
    import ray

    was_connected = ray.is_initialized()
    if not was_connected:
        try:
            _connect(ray, address)
        except ConnectionError as error:
            raise ValueError(
                f"no Ray cluster answers at {address!r}, or it refuses our token (RAY_AUTH_TOKEN or ~/.ray/auth_token, "
                f"RAY_AUTH_MODE={os.environ.get('RAY_AUTH_MODE', 'not set')}): {error}"
            ) from error
    try:
        yield ray
    finally:
        if not was_connected:
            ray.shutdown()


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return "RAY_AUTH_TOKEN" in os.environ or Path(named or Path.home() / ".ray" / "auth_token").is_file()


def _connect(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, **quiet)


def clip(request: Request, nodes: Sequence[Mapping[str, float]]) -> Request:
    """`request` cut to the largest node: of a request for GPUs the one with most GPUs, else with most CPUs."""

    def size(node: Mapping[str, float]) -> tuple[float, float]:
        return (node.get("GPU", 0.0) if request.gpus else 0.0, node.get("CPU", 0.0))

    largest = max(nodes, key=size, default={"CPU": 1.0})
    return Request(
        cpus=min(request.cpus, max(largest.get("CPU", 1.0), 0.1)), gpus=min(request.gpus, largest.get("GPU", 0.0))
    )


def nodes(ray: Any) -> list[Mapping[str, float]]:
    """Resources of every living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def run(
    ray: Any,
    jobs: Sequence[Job],
    requests: Mapping[str, Request],
    handle: Handler,
    should_stop: Callable[[], bool],
    max_concurrent: int | None = None,
) -> None:
    """Run all jobs through Ray Tune and hand every event of theirs to `handle`, in the driver.

    Args:
        requests: resources by trial id, already clipped to the cluster.
        handle: called with (trial id, event); it must not raise, since Tune would end the sweep.
        should_stop: asked at every result; once true no further trial starts.
    """
    from ray import tune

    from orchestrator.trial import HEAD_CPUS, ThinTrial
    from orchestrator.tune_callback import DriverStops, Events

    def resources(config: Mapping[str, Any]) -> Any:
        request = requests[config["trial"]]
        rank = {"CPU": max(request.cpus - HEAD_CPUS, HEAD_CPUS), "GPU": request.gpus}
        return tune.PlacementGroupFactory([{"CPU": HEAD_CPUS}, {name: n for name, n in rank.items() if n > 0}])

    table = {job.trial_id: job for job in jobs}
    trainable = tune.with_resources(tune.with_parameters(ThinTrial, jobs=table), resources)
    scratch = Path(tempfile.mkdtemp(prefix="orchestrate-tune-"))
    try:
        tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(table))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=max_concurrent),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=str(scratch),
                callbacks=[Events(handle)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=MAX_PROCESS_FAILURES),
                stop=DriverStops(should_stop),
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
