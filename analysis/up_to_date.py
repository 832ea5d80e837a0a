"""Whether what an analysis wrote is still that of the files, the plan and the code as they are now."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from analysis.collect import CACHE, read_plan
from analysis.publish import publish_bytes
from analysis.trial_files import FILES, stamps

# All files of a trial that the analysis reads anywhere, for tables or for figures.
_READ = (*FILES, "per_image.parquet", "location.npz", "neighbors.npz", "attention.npz", "norm_map.npz")
_PACKAGES = ("numpy", "scipy", "pyarrow", "matplotlib", "jinja2")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """What an analysis wrote, by name, and what it said, in JSON's types."""

    files: Mapping[str, Path]
    said: Mapping[str, Any]


def fingerprint(folder: Path) -> str:
    """What the analysis of `folder` depends on, as a digest: stamps of trials' files, plan, code.

    Take it before collecting: then a file that changes meanwhile makes the next one differ.

    Raises:
        ValueError: there is no readable plan.
    """
    plan = read_plan(folder)
    digest = hashlib.sha256(_code())
    for name in ("plan.json", "mlflow.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"\0")
    root = os.fspath(folder / "trials")
    found = [stamps(f"{root}/{trial.trial_id}", _READ) for trial in plan.trials]
    digest.update(np.array(found, np.uint64).tobytes())
    return digest.hexdigest()


def current(folder: Path, what: str, fingerprint: str) -> Made | None:
    """What `mark` remembered as `what`, where it is of this fingerprint and nobody has touched its files."""
    try:
        marked = json.loads((folder / CACHE / f"{what}.json").read_text(encoding="utf-8"))
        files = {str(name): folder / str(path) for name, (path, _) in marked["files"].items()}
        same = marked["fingerprint"] == fingerprint
        same = same and all(_stamp(files[name]) == stamp for name, (_, stamp) in marked["files"].items())
        return Made(files, dict(marked["said"])) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.debug("the %s of %s are made anew: %s", what, folder, error)
        return None


def mark(folder: Path, what: str, fingerprint: str, made: Made) -> None:
    """Remember what was made under this fingerprint; a folder that cannot be written to remembers nothing."""
    files = {name: [path.relative_to(folder).as_posix(), _stamp(path)] for name, path in made.files.items()}
    content = {"fingerprint": fingerprint, "files": files, "said": made.said}
    try:
        publish_bytes(folder / CACHE / f"{what}.json", json.dumps(content).encode())
    except OSError as error:
        logger.debug("the %s of %s are not remembered: %s", what, folder, error)


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns]


@cache
def _code() -> bytes:
    """A digest of this package and of the versions of those that compute its numbers and draw its pictures."""
    digest = hashlib.sha256(json.dumps([metadata.version(name) for name in _PACKAGES]).encode())
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.read_bytes())
    return digest.digest()
