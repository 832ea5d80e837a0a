"""Reads runs and whole metric histories of an MLflow store in few queries; the only file here that imports MLflow.

A database is asked directly and only read: opening it as MLflow does would make what is not there. A server is asked by
MLflow's client, and for histories by `get-history-bulk`, which MLflow's own UI uses (mlflow/server/handlers.py: at most
100 runs and 25,000 points of one metric a request, the rest being cut off in silence).
"""

from __future__ import annotations

import math
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa

from analysis.frames import redact

HISTORIES = pa.schema(
    [
        ("run_id", pa.string()),
        ("name", pa.string()),
        ("step", pa.int64()),
        ("time_ms", pa.int64()),
        ("value", pa.float64()),
    ]
)

_RUNS_AT_ONCE = 100  # of get-history-bulk, and of one query to a database
_MOST_POINTS = 25_000  # of an answer of get-history-bulk
_PAGE = 1_000
_ROWS_AT_ONCE = 50_000
_BULK = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
_FILTER_VALUE = re.compile(r"[\w./ -]+")  # of tags in filter strings, which MLflow does not escape
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
# A server that does not answer is said to be away after seconds; MLflow's own settings try for minutes.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@dataclass(frozen=True)
class Run:
    """A run as MLflow has it: `start_ms` in milliseconds since 1970, params and tags as text, names of its metrics."""

    run_id: str
    experiment_id: str
    name: str
    start_ms: int
    artifacts: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: frozenset[str]


class RunStore(Protocol):
    """What the analysis asks of an MLflow store. Everything raises ValueError where the store does not do it."""

    def find(self, experiment: str, tag: str, value: str) -> list[Run]:
        """Runs that have the tag and are not deleted, of all experiments of that name, by start and id."""

    def histories(self, runs: Sequence[Run]) -> pa.Table:
        """Every finite point of every metric of `runs`, in the columns HISTORIES; none is left out or sampled."""

    def artifact(self, run: Run, path: str) -> bytes:
        """The content of an artifact of a run."""


def connect(tracking_uri: str) -> RunStore:
    """The store at `tracking_uri`: an http(s) server, or a database as SQLAlchemy addresses it.

    Raises:
        ValueError: it is neither, or a SQLite file that is not there or not MLflow's.
    """
    scheme = tracking_uri.split(":", 1)[0].split("+")[0].lower() if "://" in tracking_uri else ""
    if scheme in ("http", "https"):
        return _Server(tracking_uri)
    if scheme not in _DATABASES:
        raise ValueError(
            f"tracking URI {redact(tracking_uri)!r} is not supported; allowed: http://HOST:PORT, https://…, "
            "sqlite:///FILE, or a postgresql, mysql or mssql database"
        )
    if scheme == "sqlite":
        _check_sqlite(tracking_uri)
    return _Database(tracking_uri)


@contextmanager
def _said(uri: str) -> Iterator[None]:
    """Whatever MLflow, its database or the network raise, as one ValueError that holds no secrets."""
    before = {name: os.environ.get(name) for name in _PATIENCE}
    os.environ.update({name: value for name, value in _PATIENCE.items() if before[name] is None})
    try:
        yield
    except Exception as error:  # noqa: BLE001 # each database and network library has errors of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"MLflow at {redact(uri)} does not answer as it should: {redact(lines[0])[:300]}") from None
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _check_sqlite(uri: str) -> None:
    path = Path(urlsplit(uri).path.removeprefix("/"))
    if not path.is_file():
        raise ValueError(f"there is no MLflow store at {path}")
    try:
        with closing(sqlite3.connect(path)) as database:
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        raise ValueError(f"{path} is not readable as a database: {error}") from None
    if not {"experiments", "runs", "metrics"} <= tables:
        raise ValueError(f"{path} is a database, but not MLflow's")


def _download(run: Run, path: str, uri: str) -> bytes:
    from mlflow.artifacts import download_artifacts

    with _said(uri), tempfile.TemporaryDirectory() as folder:
        if uri.startswith("http"):
            found = download_artifacts(run_id=run.run_id, artifact_path=path, dst_path=folder, tracking_uri=uri)
        else:
            found = download_artifacts(artifact_uri=_beneath(run.artifacts, path), dst_path=folder)
        return Path(found).read_bytes()


def _beneath(uri: str, path: str) -> str:
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}"))


class _Database:
    """The database of an MLflow store, asked through the tables that MLflow declares (mlflow 3.17)."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        with _said(uri):
            import sqlalchemy
            from mlflow.store.tracking.dbmodels import models

            self._sql, self._models = sqlalchemy, models
            self._engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)

    def find(self, experiment: str, tag: str, value: str) -> list[Run]:
        models = self._models
        run, of = models.SqlRun, models.SqlExperiment
        runs = (
            self._sql.select(run.run_uuid, run.experiment_id, run.name, run.start_time, run.artifact_uri)
            .join(of, of.experiment_id == run.experiment_id)
            .join(models.SqlTag, models.SqlTag.run_uuid == run.run_uuid)
            .where(of.name == experiment, of.lifecycle_stage == "active", run.lifecycle_stage == "active")
            .where(models.SqlTag.key == tag, models.SqlTag.value == value)
            .order_by(run.start_time, run.run_uuid)
        )
        with _said(self._uri), self._engine.connect() as database:
            rows = database.execute(runs).all()
            ids = [row[0] for row in rows]
            tags = self._texts(database, models.SqlTag, ids)
            params = self._texts(database, models.SqlParam, ids)
            metrics = self._texts(database, models.SqlLatestMetric, ids)
        return [
            Run(i, str(experiment), name or "", start or 0, uri or "", tags[i], params[i], frozenset(metrics[i]))
            for i, experiment, name, start, uri in rows
        ]

    def _texts(self, database: Any, table: Any, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {run_id: {} for run_id in ids}
        for some in _groups(ids):
            for run_id, key, value in database.execute(
                self._sql.select(table.run_uuid, table.key, table.value).where(table.run_uuid.in_(some))
            ):
                found[run_id][key] = value
        return found

    def histories(self, runs: Sequence[Run]) -> pa.Table:
        points = self._models.SqlMetric
        columns = points.run_uuid, points.key, points.step, points.timestamp, points.value
        parts = [HISTORIES.empty_table()]
        with _said(self._uri), self._engine.connect() as database:
            for some in _groups([run.run_id for run in runs]):
                query: Any = self._sql.select(*columns).where(points.run_uuid.in_(some), points.is_nan.is_(False))
                for rows in database.execute(query).partitions(_ROWS_AT_ONCE):
                    parts.append(_points(zip(*rows, strict=True)))
        return pa.concat_tables(parts)

    def artifact(self, run: Run, path: str) -> bytes:
        return _download(run, path, self._uri)


class _Server:
    """An MLflow server, asked over http(s) with whatever credentials MLflow's environment variables name."""

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        with _said(uri):
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def find(self, experiment: str, tag: str, value: str) -> list[Run]:
        if not _FILTER_VALUE.fullmatch(value):
            raise ValueError(f"{value!r} cannot be asked for: MLflow's filters know letters, digits and ./- only")
        found: list[Any] = []
        with _said(self._uri):
            known = self._client.get_experiment_by_name(experiment)
            if known is None or known.lifecycle_stage != "active":
                return []
            search, token = [known.experiment_id], None
            while True:
                page = self._client.search_runs(
                    search, f"tags.`{tag}` = '{value}'", max_results=_PAGE, page_token=token
                )
                found += page
                token = page.token
                if not token:
                    break
        runs = [
            Run(
                run.info.run_id,
                str(run.info.experiment_id),
                run.info.run_name or "",
                run.info.start_time or 0,
                run.info.artifact_uri or "",
                dict(run.data.tags),
                dict(run.data.params),
                frozenset(run.data.metrics),
            )
            for run in found
        ]
        return sorted(runs, key=lambda run: (run.start_ms, run.run_id))

    def histories(self, runs: Sequence[Run]) -> pa.Table:
        parts = [HISTORIES.empty_table()]
        for name in sorted({name for run in runs for name in run.metrics}):
            having = [run.run_id for run in runs if name in run.metrics]
            for some in _groups(having):
                parts += self._bulk(name, some)
        return pa.concat_tables(parts)

    def _bulk(self, name: str, run_ids: Sequence[str]) -> list[pa.Table]:
        """The histories of a metric. An answer that may have been cut off is asked for again, for half of the runs."""
        if len(run_ids) == 1:
            return [self._single(name, run_ids[0])]
        from mlflow.utils import credentials, rest_utils

        request: Any = rest_utils.http_request  # untyped
        identity: Any = credentials.get_default_host_creds
        with _said(self._uri):
            asked = {"run_id": list(run_ids), "metric_key": name, "max_results": _MOST_POINTS}
            answer = request(identity(self._uri), _BULK, "GET", params=asked)
            # 404: a server that has the API, but not what its UI uses.
            found = answer.status_code != 404
            points = rest_utils.verify_rest_response(answer, _BULK).json()["metrics"] if found else []
        if not found:
            return [self._single(name, run_id) for run_id in run_ids]
        if len(points) >= _MOST_POINTS:
            half = len(run_ids) // 2
            return self._bulk(name, run_ids[:half]) + self._bulk(name, run_ids[half:])
        with _said(self._uri):
            keys = ("run_id", "key", "step", "timestamp", "value")
            return [_points([point[key] for point in points] for key in keys)]

    def _single(self, name: str, run_id: str) -> pa.Table:
        """The history of one run by the API that has pages, however long it is."""
        with _said(self._uri):
            history = self._client.get_metric_history(run_id, name)
        columns = ([run_id] * len(history), [name] * len(history))
        return _points([*columns, *([getattr(p, key) for p in history] for key in ("step", "timestamp", "value"))])

    def artifact(self, run: Run, path: str) -> bytes:
        return _download(run, path, self._uri)


def _groups(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _RUNS_AT_ONCE):
        yield ids[start : start + _RUNS_AT_ONCE]


def _points(columns: Any) -> pa.Table:
    """Columns in the order of HISTORIES as a table, without points that are not finite."""
    listed = [list(column) for column in columns]
    values = [float(value) for value in listed[-1]]
    table = pa.table([pa.array(c, f.type) for c, f in zip([*listed[:-1], values], HISTORIES, strict=True)], HISTORIES)
    return table if all(map(math.isfinite, values)) else table.filter(pa.array(map(math.isfinite, values)))
