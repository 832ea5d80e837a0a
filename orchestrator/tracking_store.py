"""MLflow behind few calls with three kinds of error; the only file here that imports MLflow, and only when used."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from orchestrator import variables
from orchestrator.ledger_schema import Point
from orchestrator.tracking_records import DataInput, check_tracking_uri, entity_name, redact

MAX_METRICS = 1_000  # of one log_batch call (mlflow/utils/validation.py)
_MAX_PARAMS_OR_TAGS = 100
_PAGE = 500
# Without it MLflow's user interface guesses, and shows views for language models.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
_TRIES, _QUICK_S, _PAUSE_S = 4, 1.0, 0.05  # a call that failed within a second is made again at once, so many times

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """The tracking server did not do it, or did and its answer was lost: try again later."""


class Gone(Exception):
    """The run or experiment does not exist any more, or somebody deleted it."""


class Refused(Exception):
    """The tracking server will never accept these values."""


class Run(NamedTuple):
    """A run as found: `status` is MLflow's word, `start_ms` milliseconds since 1970."""

    run_id: str
    status: str
    start_ms: int
    tags: Mapping[str, str]


@contextmanager
def environment(timeout_s: float) -> Iterator[None]:
    """Settings that MLflow's client takes only from environment variables, put back at the end.

    Its own retries are off, as a retried create_run whose reply was lost makes a second run; one request lasts at
    most `timeout_s`.
    """
    ours = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, math.ceil(timeout_s))),
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_LOGGING_LEVEL": os.environ.get("MLFLOW_LOGGING_LEVEL", "WARNING"),
    }
    with variables.environment(ours):
        yield


@contextmanager
def _translated() -> Iterator[None]:
    """Whatever MLflow, its database or the network raise, as one of our three errors, without secrets."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = redact(str(error))
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" or "must be in the 'active' state" in text:
            raise Gone(text) from error
        if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"):
            raise Refused(text) from error
        raise Unavailable(text) from error
    except Exception as error:
        raise Unavailable(redact(f"{type(error).__name__}: {error}")) from error


class Store:
    """One tracking store. Never MLflow's global state, and one thread at a time. All calls raise the errors above."""

    def __init__(self, tracking_uri: str, state: Path) -> None:
        """Connect; on a fresh database make the schema first, under a file lock, as parallel attempts fail.

        Artifacts of databases go to `state`/mlartifacts; a server decides for itself.
        """
        self._uri = check_tracking_uri(tracking_uri)
        self._artifacts = None if tracking_uri.startswith("http") else state / "mlartifacts"
        with _translated(), _schema_lock(self._uri, state):
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def _call(self, call: Callable[[], T], tries: int = _TRIES) -> T:
        """The result of `call`, which may be made several times: what it does twice must be as if done once."""
        while True:
            start = time.monotonic()
            try:
                with _translated():
                    return call()
            except Unavailable:
                tries -= 1
                if tries <= 0 or time.monotonic() - start > _QUICK_S:
                    raise
                time.sleep(_PAUSE_S)

    def experiment(self, name: str) -> str:
        """The id of the experiment, made or undeleted where needed."""

        def call() -> str:
            found = self._client.get_experiment_by_name(name)
            if found is None:
                folder = None if self._artifacts is None else (self._artifacts / entity_name(name)).absolute().as_uri()
                return str(self._client.create_experiment(name, artifact_location=folder, tags=_KIND))
            if found.lifecycle_stage == "deleted":
                self._client.restore_experiment(found.experiment_id)
            for key in set(_KIND) - set(found.tags):
                self._client.set_experiment_tag(found.experiment_id, key, _KIND[key])
            return str(found.experiment_id)

        return self._call(call)

    def find(self, experiment_id: str, tag: str, key: str) -> list[Run]:
        """All runs that are not deleted and whose `tag` is `key`, the earliest first.

        Raises:
            ValueError: `key` is not hexadecimal, so it could say something else in MLflow's filter language.
        """
        if not key or set(key) - set("0123456789abcdef"):
            raise ValueError(f"not a hexadecimal key: {key!r}")
        runs: list[Run] = []
        token: str | None = None
        while True:
            search = partial(self._client.search_runs, [experiment_id], f"tags.{tag} = '{key}'", max_results=_PAGE)
            page = self._call(partial(search, page_token=token))
            runs += [Run(r.info.run_id, r.info.status, r.info.start_time, dict(r.data.tags)) for r in page]
            token = page.token
            if not token:
                return sorted(runs, key=lambda run: (run.start_ms, run.run_id))

    def sweeps(self, name: str) -> list[tuple[str, str]]:
        """Ids of the experiment and of the sweep's own run, for each sweep of that name, the newest first."""
        found = self._call(lambda: self._client.get_experiment_by_name(name))
        if found is None or found.lifecycle_stage == "deleted":
            return []
        search = partial(self._client.search_runs, [found.experiment_id], "tags.role = 'sweep'", max_results=_PAGE)
        runs = sorted(self._call(search), key=lambda run: (-run.info.start_time, run.info.run_id))
        return [(str(found.experiment_id), str(run.info.run_id)) for run in runs]

    def tags(self, run_id: str) -> Mapping[str, str]:
        """The tags of a run; none where it does not exist."""
        try:
            return dict(self._call(lambda: self._client.get_run(run_id)).data.tags)
        except Gone:
            return {}

    def create(self, experiment_id: str, name: str, tags: Mapping[str, str], start_ms: int) -> str:
        """A new run's id. After Unavailable there may be one all the same: `find` before calling again."""
        create = partial(self._client.create_run, start_time=start_ms, tags=dict(tags), run_name=name[:250])
        return str(self._call(lambda: create(experiment_id), tries=1).info.run_id)

    def delete(self, run_id: str) -> None:
        """Mark a run as deleted (`mlflow gc` removes it); one that is gone already is fine."""
        try:
            self._call(lambda: self._client.delete_run(run_id))
        except Gone:
            return

    def set_status(self, run_id: str, status: str, end_ms: int | None) -> None:
        """Set one of MLflow's statuses; a run that is over ends at `end_ms`."""
        if status == "RUNNING":
            self._call(lambda: self._client.update_run(run_id, status=status))
        else:
            self._call(lambda: self._client.set_terminated(run_id, status=status, end_time=end_ms))

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Log the finite values of at most 1,000 points; sent twice, they are there once.

        MLflow turns infinities into the largest double and cannot plot NaN, so neither is sent.
        """
        from mlflow.entities import Metric

        metrics = [Metric(entity_name(p.name), p.value, p.time_ms, p.step) for p in points if math.isfinite(p.value)]
        self._batch(run_id, "metrics", metrics)

    def log_texts(self, run_id: str, *, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Log params and tags in as few calls as MLflow allows; params never change once they are there."""
        from mlflow.entities import Param, RunTag

        for kind, entities in (
            ("params", [Param(key, value) for key, value in params.items()]),
            ("tags", [RunTag(key, value) for key, value in tags.items()]),
        ):
            for start in range(0, len(entities), _MAX_PARAMS_OR_TAGS):
                self._batch(run_id, kind, entities[start : start + _MAX_PARAMS_OR_TAGS])

    def log_inputs(self, run_id: str, inputs: Sequence[DataInput]) -> None:
        """Log the data sets that a run has used; sent twice, each is there once.

        One that MLflow will never accept is left out and said: no reason to hold back the run's status.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        def entity(one: DataInput) -> Any:
            source = json.dumps({"uri": one.name})  # a logical name: paths say much of a machine and nothing of data
            profile = json.dumps({"num_rows": sum(one.images.values()), **one.images}) if one.images else None
            dataset = Dataset(one.name, one.digest, "local", source, profile=profile)
            return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", one.context)])

        if not inputs:
            return
        try:
            self._call(lambda: self._client.log_inputs(run_id, datasets=[entity(one) for one in inputs]))
        except Refused as error:
            logger.warning("MLflow refuses the data sets of run %s: %s", run_id, error)

    def _batch(self, run_id: str, kind: str, entities: Sequence[Any]) -> None:
        """One log_batch call; where values are refused, halve until the refused ones are alone, and leave those out."""
        if not entities:
            return
        try:
            self._call(lambda: self._client.log_batch(run_id, **{kind: entities}, synchronous=True))
        except Refused as error:
            if len(entities) == 1:
                logger.warning("MLflow refuses %s %r of run %s: %s", kind, entities[0].key, run_id, error)
                return
            half = len(entities) // 2
            self._batch(run_id, kind, entities[:half])
            self._batch(run_id, kind, entities[half:])

    def log_artifacts(self, run_id: str, path: Path) -> None:
        """Upload a file, or a folder under its own name but for what is hidden in it; what was there is replaced.

        Plain files only: nothing here is ever loaded as a model.
        """
        if not path.is_dir():
            self._call(lambda: self._client.log_artifact(run_id, str(path)))
            return
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path.parent)
            if file.is_file() and not any(part.startswith(".") for part in inside.parts[1:]):
                self._call(partial(self._client.log_artifact, run_id, str(file), inside.parent.as_posix()))


@contextmanager
def _schema_lock(uri: str, state: Path) -> Iterator[None]:
    """Held while a database is opened for the first time by this process; servers mind their own."""
    if uri.startswith("http"):
        yield
        return
    database = Path(uri.split(":///", 1)[1]) if uri.startswith("sqlite:///") else state / "mlflow"
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
