"""Ray Tune: connects, fits requests to the cluster, runs jobs as thin trials; the only file that builds a Tuner."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.control import Control
from orchestrator.queue import Handler, Source
from orchestrator.ray_token import ray_token, use_ray_token
from orchestrator.run_options import Interrupted
from orchestrator.run_request import Request

log = logging.getLogger(__name__)

_NODES_SECONDS = 10.0  # between two looks at what nodes a cluster has

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


@contextlib.contextmanager
def cluster(address: str | None = None) -> Iterator[Any]:
    """The `ray` module, connected: to `address`, or to a cluster started here and ended on leaving.

    Raises:
        ValueError: nothing answers at `address`.
        Interrupted: SIGTERM came while it connected, for which Ray has a handler of its own.
    """
    prepare_environment()
    import ray

    was_connected = ray.is_initialized()
    if not was_connected:
        if address is None:
            ray_token()
        else:
            use_ray_token()  # connecting, unlike starting, does not look for one
        try:
            _connect(ray, address)
        except SystemExit as error:
            ray.shutdown()
            raise Interrupted(signal.SIGTERM) from error
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


def prepare_environment() -> None:
    """Settings that Ray reads when it is imported; the user's own stay."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _connect(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, **quiet)


class Nodes:
    """Resources of every living node, asked for anew after a while."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._known: list[Mapping[str, float]] = []
        self._asked = -math.inf

    def __call__(self) -> list[Mapping[str, float]]:
        now = time.monotonic()
        if now - self._asked > _NODES_SECONDS:
            self._asked = now
            self._known = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return self._known


def run(ray: Any, source: Source, handle: Handler, control: Control, should_stop: Callable[[], bool]) -> None:
    """Run all jobs of `source` through Ray Tune and hand every event of theirs to `handle`, in the driver.

    Args:
        source: asked for the next job whenever the cluster may have room for one.
        handle: called with (trial id, event); it must not raise, since Tune would end the sweep.
        control: what trials are told.
        should_stop: asked all the time; once true everything ends.
    """
    from ray import tune
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestrator.mailbox import Mailbox
    from orchestrator.trial import ThinTrial
    from orchestrator.tune_callback import Draws, DriverStops, Events

    _hand_on_no_secrets()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # dies with us alone
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    draws = Draws(source, mailbox, should_stop)
    events = Events(handle, draws.over, _keep_signal())
    trainable = tune.with_resources(tune.with_parameters(ThinTrial, mailbox=mailbox), _resources)
    scratch = Path(tempfile.mkdtemp(prefix="orchestrate-tune-"))
    try:
        with control.heard_by(lambda trial_id, reason: mailbox.ask.remote(trial_id, reason)):
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(reuse_actors=True, search_alg=draws, num_samples=-1),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=str(scratch),
                    callbacks=[events],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=0),  # the queue gives out again what is lost
                    stop=DriverStops(lambda: should_stop() or (events.has_guards() and source.is_over())),
                    verbose=0,
                ),
            ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        ray.kill(mailbox)


def _hand_on_no_secrets() -> None:
    """Keep Tune from handing AWS credentials to trials in their runtime environment, which Ray writes into its logs.

    Processes have them from the environment of their node, as the object store's documentation says.
    """
    from ray.tune.execution import class_cache

    handed_on = getattr(class_cache, "ENV_VARS_TO_PROPAGATE", ())
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in handed_on if not name.startswith("AWS_")}


def _keep_signal() -> Callable[[], None]:
    """Puts the present handler of SIGUSR1 back, which Tune replaces by one of its own that just ends the experiment."""
    if threading.current_thread() is not threading.main_thread():  # then Tune leaves signals alone
        return lambda: None
    ours = signal.getsignal(signal.SIGUSR1)

    def put_back() -> None:
        signal.signal(signal.SIGUSR1, ours)

    return put_back


def _resources(config: Mapping[str, Any]) -> Any:
    """The placement group of a trial, whose request travels in Tune's configuration of it."""
    from ray import tune

    return tune.PlacementGroupFactory(Request(**config["request"]).bundles())
