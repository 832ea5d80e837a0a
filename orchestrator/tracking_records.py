"""What of a trial MLflow is told, as plain values: names, params, tags and statuses that MLflow accepts; no secrets."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from orchestrator.ledger_schema import TrialRow
from trainers.config import flatten

MAX_VALUE_LENGTH = 6_000  # MLflow cuts params there in silence (mlflow/utils/validation.py)
_MAX_TAG_LENGTH = 5_000  # the least limit among MLflow's stores; ours is 8,000
_MAX_KEY_LENGTH = 250
_MAX_NONFINITE_NAMED = 50
_MAX_DATA_NAME, _MAX_DIGEST = 500, 36  # mlflow/utils/validation.py

# MLflow knows five statuses; the tag `status` keeps which of ours it was.
STATUSES: Mapping[str, str] = {
    "running": "RUNNING",
    "interrupted": "KILLED",
    "finished": "FINISHED",
    "diverged": "FAILED",
    "pruned": "KILLED",
    "stopped": "KILLED",
    "failed": "FAILED",
}

# What of result.json becomes a tag. A list of what is allowed: patterns of secrets miss some, and hit num_tokens.
_RESULT_TAGS = (
    *("seconds", "gpu_seconds", "images_per_second", "steps", "device", "threads"),
    *("git_commit", "versions", "data_fingerprint"),
)

_USER_INFO = re.compile(r"(?<=://)[^/\s'\"@]*(?:@[^/\s'\"@]*)*@")
_SECRET_QUERY = re.compile(
    r"([?&;][^=&\s'\"]*(?:password|passwd|token|secret|signature|credential|key|sig)=)[^&\s'\"]+", re.I
)


def redact(text: str) -> str:
    """`text` without user:password in front of hosts and without values of query parameters that carry secrets."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub("", text))


def check_tracking_uri(uri: str) -> str:
    """`uri`, if MLflow can keep runs there.

    Raises:
        ValueError: it is none of the kinds that this project feeds; MLflow's file store is gone since 3.13.
    """
    scheme = uri.split(":", 1)[0].split("+")[0].lower() if "://" in uri else ""
    if scheme not in ("sqlite", "postgresql", "mysql", "mssql", "http", "https"):
        raise ValueError(
            f"tracking URI {redact(uri)!r} is not supported; allowed: http://HOST:PORT, https://…, sqlite:///FILE, "
            "or a postgresql, mysql or mssql database"
        )
    return uri


def filter_key(*parts: str) -> str:
    """32 hexadecimal digits that stand for `parts` in filters: MLflow's filter strings can be injected, hex cannot."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def entity_name(name: str) -> str:
    """`name` as MLflow accepts it for metrics, params and tags: [\\w./ :-], a relative path, at most 250 characters."""
    parts = re.sub(r"[^\w./ :-]", "_", name).split("/")
    clean = "/".join("_" if part in (".", "..") else part for part in parts if part)
    return clean[:_MAX_KEY_LENGTH].rstrip("/") or "_"


def params(config: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """All resolved settings under their dotted names as text (JSON but for strings), and the names that were cut."""
    texts = {
        entity_name(name): redact(value if isinstance(value, str) else json.dumps(value))
        for name, value in flatten(config).items()
    }
    cut = [name for name, text in texts.items() if len(text) > MAX_VALUE_LENGTH]
    return {name: text[:MAX_VALUE_LENGTH] for name, text in texts.items()}, cut


def trial_tags(row: TrialRow, keys: Mapping[str, str], parent_run_id: str, cut: Sequence[str]) -> dict[str, str]:
    """Tags that say which trial a run is; `keys` are the hexadecimal ones that runs are found by."""
    tags = {
        **keys,
        "role": "trial",
        "trial_id": row.trial_id,
        "generation": str(row.generation),
        "seed": str(row.seed),
        "cell": json.dumps(row.cell, sort_keys=True),
        "mlflow.parentRunId": parent_run_id,
    }
    if cut:
        tags["cut_params"] = ", ".join(cut)
    return tag_values(tags)


def status_tags(row: TrialRow, status: str, metrics: Sequence[tuple[int, str, float]]) -> dict[str, str]:
    """Tags that go with a status: which, provenance, what went wrong, and the values that MLflow cannot hold."""
    tags = {"status": status, "attempts": str(row.attempts)}
    result = row.result or {}
    for name in _RESULT_TAGS:
        if result.get(name) is not None:
            tags[name] = result[name] if isinstance(result[name], str) else json.dumps(result[name], sort_keys=True)
    if "git_commit" in tags:
        tags["mlflow.source.git.commit"] = tags["git_commit"]
    if row.error:
        tags["error"] = f"{row.error.get('type', 'error')}: {row.error.get('message', '')}"
    nonfinite = [f"{name} = {value} at step {step}" for step, name, value in metrics if not math.isfinite(value)]
    if nonfinite:
        more = len(nonfinite) - _MAX_NONFINITE_NAMED
        named = "; ".join(nonfinite[:_MAX_NONFINITE_NAMED])
        tags["nonfinite_metrics"] = f"{named}; {more} more" if more > 0 else named
    return tag_values(tags)


class DataInput(NamedTuple):
    """A data set that a run has used, as MLflow shows it; `digest` is its fingerprint, `images` those of each split."""

    name: str
    digest: str
    context: str
    images: Mapping[str, int]


def data_inputs(row: TrialRow) -> list[DataInput]:
    """The data sets that a trial has used under their logical names: where they lie is nobody's business.

    A result that does not list them (of an earlier version, or from another tool) has one fingerprint of all data.
    """
    return [one for one in _data_inputs(row) if one.name and one.digest]


def _data_inputs(row: TrialRow) -> Iterator[DataInput]:
    result, data = row.result or {}, row.config.get("data") or {}
    for found in result.get("data_sets") or ():
        yield _data_input(found.get("name"), found.get("fingerprint"), found.get("use"), found.get("images") or {})
    if not result.get("data_sets"):
        yield _data_input(data.get("name") or data.get("train"), result.get("data_fingerprint"), "training", {})


def _data_input(name: Any, digest: Any, use: Any, images: Mapping[str, int]) -> DataInput:
    return DataInput(redact(str(name or ""))[:_MAX_DATA_NAME], str(digest or "")[:_MAX_DIGEST], str(use), images)


def tag_values(tags: Mapping[str, str]) -> dict[str, str]:
    """`tags` without secrets, cut to MLflow's limit."""
    return {name: redact(text)[:_MAX_TAG_LENGTH] for name, text in tags.items()}


def ui_command(tracking_uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The command line of MLflow's UI on a local database, for 127.0.0.1 only, and what to add to its environment.

    The database's URI goes through the environment, where other users of the machine cannot read a password in it.

    Raises:
        ValueError: the tracking URI is that of a server, which has its UI already.
    """
    if check_tracking_uri(tracking_uri).startswith("http"):
        raise ValueError(f"{redact(tracking_uri)} is a server: open it in a browser")
    hosts = ",".join(f"{host}:{port}" for host in ("127.0.0.1", "localhost"))
    listen = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--allowed-hosts", hosts]
    listen += ["--uvicorn-opts", "--log-level=warning"]  # else a line for every request
    environment = {
        "MLFLOW_BACKEND_STORE_URI": tracking_uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    return [sys.executable, "-m", "mlflow", "server", *listen], environment
