"""Published files of a trial: what an attempt recorded, its metrics from the ledger, its configuration and result."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.attempt import Outcome
from orchestrator.layout import TrialLayout
from orchestrator.ledger import Ledger, TrialRow
from trainers.files import sync_folder, write_whole

_RECORDS = ("token_norms.parquet", "probes.parquet", "per_image.parquet", "norm_map.npz")
_PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "pyarrow")


def provenance() -> dict[str, Any]:
    """Git commit of this code (null where it is installed outside a repository; "+" marks changes), and versions."""
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    return {"git_commit": _git_commit(), "versions": versions}


def _git_commit() -> str | None:
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def records(trial: TrialLayout, attempt: int) -> None:
    """Publish the parquet and picture files of the accepted attempt, each by rename."""
    _publish_files(trial.attempt(attempt), trial.root)


def copy_records(source: TrialLayout, target: TrialLayout) -> None:
    """Publish the records of one trial folder in another."""
    _publish_files(source.root, target.root)


def _publish_files(source: Path, target: Path) -> None:
    for path in [source / name for name in _RECORDS]:
        if path.is_file():
            hidden = target / f".{path.name}.{os.getpid()}.partial"
            shutil.copyfile(path, hidden)
            with hidden.open("rb") as file:
                os.fsync(file.fileno())
            hidden.replace(target / path.name)
    if (source / "attention").is_dir():
        shutil.copytree(source / "attention", target / "attention", dirs_exist_ok=True)
    sync_folder(target)


def result(row: TrialRow, attempt: int, outcome: Outcome, provenance: Mapping[str, Any], gpus: float) -> dict[str, Any]:
    """The content of result.json; `seconds` are those of the accepted attempt."""
    started = datetime.datetime.fromtimestamp((row.started_ms or 0) / 1000, tz=datetime.UTC)
    return {
        "trial_id": row.trial_id,
        "status": outcome.status,
        "attempts": attempt,
        "started": started.isoformat(timespec="seconds"),
        "seconds": outcome.seconds,
        "gpu_seconds": outcome.seconds * gpus,
        "images_per_second": outcome.images_per_second,
        "steps": outcome.steps,
        "device": outcome.device,
        "threads": outcome.threads,
        "git_commit": provenance["git_commit"],
        "versions": dict(provenance["versions"]),
        "data_fingerprint": outcome.data_fingerprint,
        "error": outcome.error,
    }


def trial(ledger: Ledger, layout: TrialLayout, trial_id: str) -> None:
    """Write configuration, metrics and, last, the result of a trial that is over, all from the ledger."""
    row = ledger.row(trial_id)
    write_whole(layout.config, _json(row.config))
    write_whole(layout.metrics, _metrics_parquet(ledger.metrics(trial_id)))
    write_whole(layout.result, _json(row.result))


def missing(ledger: Ledger, layouts: Mapping[str, TrialLayout]) -> list[str]:
    """Ids of trials that are over but whose result was not published, since the driver died in between."""
    over = [row.trial_id for row in ledger.rows() if row.result is not None]
    return [trial_id for trial_id in over if not layouts[trial_id].result.is_file()]


def _metrics_parquet(points: Sequence[tuple[int, str, float]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
    rows = [{"step": step, "name": name, "value": value} for step, name, value in points]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class Published:
    """A finished trial as another sweep published it."""

    result: dict[str, Any]
    metrics: list[tuple[int, Mapping[str, float]]]


def read_finished(layout: TrialLayout) -> Published | None:
    """What `layout` holds of a finished trial, or None where it is not finished or not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        result = json.loads(layout.result.read_text())
        points = pq.read_table(layout.metrics).to_pylist()
    except (OSError, ValueError, pa.ArrowException):
        return None
    if not isinstance(result, dict) or result.get("status") != "finished":
        return None
    return Published(result, [(point["step"], {point["name"]: point["value"]}) for point in points])
