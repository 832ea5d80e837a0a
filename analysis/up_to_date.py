"""Writes a sweep's tables unless they are those of the files, the plan and the code as they are now."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np

from analysis.collect import CACHE, collect, read_plan
from analysis.publish import publish_bytes, write_tables
from analysis.results import evaluate
from analysis.trial_files import FILES, stamps

_MARK = "tables.json"
# All files of a trial that the analysis reads anywhere, for tables or for figures.
_READ = (*FILES, "per_image.parquet", "location.npz", "neighbors.npz", "attention.npz", "norm_map.npz")
_PACKAGES = ("numpy", "scipy", "pyarrow")

logger = logging.getLogger(__name__)


def tables(folder: Path) -> dict[str, Path]:
    """The tables of the sweep in `folder`, written where they are not up to date; their files by name.

    Raises:
        ValueError: `folder` is not a sweep's folder.
    """
    now = fingerprint(folder)
    written = current(folder, now)
    if written is not None:
        return written
    frames = collect(folder)
    published = {
        "runs": frames.runs,
        "metrics": frames.metrics,
        "token_norms": frames.token_norms,
        "token_statistics": frames.token_statistics,
    }
    with ThreadPoolExecutor(1) as pool:  # compresses on one core while statistics are computed on another
        writing = pool.submit(write_tables, folder / "tables", published)
        results = evaluate(frames).tables()
        written = writing.result()
    written |= write_tables(folder / "tables", {name: t for name, t in results.items() if name not in written})
    mark(folder, now, written)
    return written


def fingerprint(folder: Path, *options: str) -> str:
    """What the analysis of `folder` depends on, as a digest: stamps of trials' files, plan, code, `options`.

    Take it before collecting: then a file that changes meanwhile makes the next one differ.

    Raises:
        ValueError: there is no readable plan.
    """
    plan = read_plan(folder)
    digest = hashlib.sha256(json.dumps(options).encode())
    digest.update(_code())
    for name in ("plan.json", "mlflow.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"\0")
    root = os.fspath(folder / "trials")
    found = [stamps(f"{root}/{trial.trial_id}", _READ) for trial in plan.trials]
    digest.update(np.array(found, np.uint64).tobytes())
    return digest.hexdigest()


def current(folder: Path, fingerprint: str) -> dict[str, Path] | None:
    """The tables' files by name, where `mark` said that they are of this fingerprint and nobody has touched them."""
    try:
        marked = json.loads((folder / CACHE / _MARK).read_text(encoding="utf-8"))
        files = {str(name): [int(number) for number in stamp] for name, stamp in marked["tables"].items()}
        paths = {name: folder / "tables" / f"{name}.parquet" for name in files}
        same = marked["fingerprint"] == fingerprint and all(_stamp(paths[name]) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.debug("the tables of %s are written anew: %s", folder, error)
        return None
    return paths if same else None


def mark(folder: Path, fingerprint: str, written: Mapping[str, Path]) -> None:
    """Remember that the tables `written` are of this fingerprint."""
    content = {"fingerprint": fingerprint, "tables": {name: _stamp(path) for name, path in written.items()}}
    try:
        publish_bytes(folder / CACHE / _MARK, json.dumps(content).encode())
    except OSError as error:
        logger.debug("the tables of %s are not marked: %s", folder, error)


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


@cache
def _code() -> bytes:
    """A digest of this package and of the versions of those that compute its numbers."""
    digest = hashlib.sha256(json.dumps([metadata.version(name) for name in _PACKAGES]).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()
