"""Published files of a trial: what an attempt recorded, its metrics from the ledger, its configuration and result."""

from __future__ import annotations

import datetime
import io
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from orchestrator.attempt import Outcome
from orchestrator.layout import TrialLayout
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.system_metrics import is_system
from trainers.checkpoint_files import checksum_path, name_of
from trainers.files import write_whole

# Patterns of what a trial leaves, relative to its folder, besides checkpoints and logs.
RECORDS = (
    *("token_norms.parquet", "token_statistics.parquet", "probes.parquet", "per_image.parquet"),
    *("*.npz", "attention/*.png"),
)
_PACKAGES = ("torch", "torchvision", "timm", "ray", "numpy", "pyarrow")


def provenance() -> dict[str, Any]:
    """Git commit of this code (null where it is not in a repository; "+" marks changes), and package versions."""
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
    return {"git_commit": _git_commit(), "versions": versions}


def _git_commit() -> str | None:
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # else the repository is somebody else's
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
    for path in records_in(source):
        write_whole(target / path.relative_to(source), path.read_bytes())


def records_in(folder: Path) -> list[Path]:
    """The files in `folder` that are a trial's records."""
    return sorted(path for pattern in RECORDS for path in folder.glob(pattern) if path.is_file())


def result(
    row: TrialRow, attempt: int, outcome: Outcome, provenance: Mapping[str, Any], gpus: float, seconds_before: float
) -> dict[str, Any]:
    """The content of result.json; `seconds` are those of all attempts, `seconds_before` those before this one."""
    seconds = seconds_before + outcome.seconds
    started = datetime.datetime.fromtimestamp((row.started_ms or 0) / 1000, tz=datetime.UTC)
    return {
        "trial_id": row.trial_id,
        "status": outcome.status,
        "attempts": attempt,
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "gpu_seconds": seconds * gpus,
        "images_per_second": outcome.images_per_second,
        "steps": outcome.steps,
        "device": outcome.device,
        "threads": outcome.threads,
        "git_commit": provenance["git_commit"],
        "versions": dict(provenance["versions"]),
        "data_fingerprint": outcome.data_fingerprint,
        "data_sets": [dict(one) for one in outcome.data_sets],
        "error": outcome.error,
    }


def trial(ledger: Ledger, layout: TrialLayout, trial_id: str) -> None:
    """Write records, configuration, log, metrics and, last, the result of a trial that is over, and settle its
    checkpoints.

    Repeating it changes nothing, so a driver that died in between is made good by the next.
    """
    row = ledger.row(trial_id)
    records(layout, row.attempts)
    write_whole(layout.log_file, _logs(layout))
    _settle_checkpoints(layout, row.config["execution"].get("keep_steps", ()))
    write_whole(layout.config, _json(row.config))
    write_whole(layout.metrics, _metrics_parquet(ledger.metrics(trial_id)))
    write_whole(layout.result, _json(row.result))
    ledger.mark_published(trial_id, _stamps(layout))


def _logs(layout: TrialLayout) -> bytes:
    """The logs of all attempts, one after another."""
    return b"".join(layout.log(n).read_bytes() for n in layout.attempts() if layout.log(n).is_file())


def _settle_checkpoints(layout: TrialLayout, keep_steps: Collection[int]) -> None:
    """Keep the folder with the newest checkpoint of any attempt as the trial's, and free the others.

    The steps that are to be kept for ever go there from all attempts. A trial that was resumed after its last step has
    written none of its own; one that failed will be tried again.
    """
    folders = [folder for folder in layout.checkpoint_folders() if folder.is_dir()]
    newest = max(enumerate(folders), key=lambda numbered: _age(*numbered), default=(0, None))[1]
    if newest is not None:
        for folder in folders:
            _move_kept(folder, newest, keep_steps)
    if newest is not None and newest != layout.checkpoints:
        shutil.rmtree(layout.checkpoints, ignore_errors=True)
        newest.replace(layout.checkpoints)
    for folder in layout.checkpoint_folders():
        if folder != layout.checkpoints:
            shutil.rmtree(folder, ignore_errors=True)


def _age(position: int, folder: Path) -> tuple[str, bool, int]:
    """Rises with how new a folder's checkpoints are: by step or, where a program names them otherwise, by attempt."""
    newest = max((path.name for path in folder.glob("step_*.pt")), default="")
    return newest, any(folder.iterdir()), 0 if newest else position


def _move_kept(source: Path, target: Path, steps: Collection[int]) -> None:
    for path in [source / name_of(step) for step in steps]:
        checksum = checksum_path(path)
        if path.is_file() and checksum.is_file() and not (target / path.name).exists():
            checksum.replace(target / checksum.name)  # first: without it the checkpoint counts as damaged
            path.replace(target / path.name)


def forget(layout: TrialLayout) -> None:
    """Remove what a trial has published and every checkpoint, before it is run anew from its first step.

    The result goes first: without it, what is left counts as not published.
    """
    layout.result.unlink(missing_ok=True)
    for path in (layout.metrics, *records_in(layout.root)):
        path.unlink(missing_ok=True)
    for folder in layout.checkpoint_folders():
        shutil.rmtree(folder, ignore_errors=True)


def missing(ledger: Ledger, layouts: Callable[[str], TrialLayout]) -> list[str]:
    """Ids of trials that are over but whose result, metrics or configuration are not in their folder as the ledger has
    them: a driver died in between, or a file was damaged or removed since.

    Files that have kept size and time since they were published are taken for whole; `doctor` reads them all.
    """
    lacking = []
    for trial_id, stamps in ledger.published().items():
        layout = layouts(trial_id)
        if stamps is not None and stamps == _stamps(layout):
            continue
        if is_published(ledger, ledger.row(trial_id), layout):
            ledger.mark_published(trial_id, _stamps(layout))
        else:
            lacking.append(trial_id)
    return lacking


def _stamps(layout: TrialLayout) -> list[list[int]] | None:
    """Size and time of the files that say what the ledger says; None where one is missing."""
    try:
        found = [path.stat() for path in (layout.config, layout.metrics, layout.result)]
    except FileNotFoundError:
        return None
    return [[one.st_size, one.st_mtime_ns] for one in found]


def is_published(ledger: Ledger, row: TrialRow, layout: TrialLayout) -> bool:
    try:
        return (
            layout.result.read_bytes() == _json(row.result)
            and layout.metrics.read_bytes() == _metrics_parquet(ledger.metrics(row.trial_id))
            and layout.config.read_bytes() == _json(row.config)
        )
    except FileNotFoundError:
        return False


def _metrics_parquet(points: Sequence[tuple[int, str, float]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
    rows = [{"step": step, "name": name, "value": value} for step, name, value in points if not is_system(name)]
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
