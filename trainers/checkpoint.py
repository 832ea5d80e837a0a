"""Checkpoints: written whole or not at all, with a checksum, newest whole one first when resuming."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainers.files import write_whole

log = logging.getLogger(__name__)

_NAME = re.compile(r"^step_(\d{9})\.pt$")
DAMAGED = ".damaged"


def save(directory: Path, step: int, state: Mapping[str, Any], keep: int = 1) -> Path:
    """Publish `state` as the checkpoint of `step` and remove all but the newest `keep`.

    The SHA-256 (of sha256sum's format) is in place before the checkpoint appears under its name, and both are on
    disk before that, so that a crash leaves either a whole checkpoint or none. `state` may hold tensors, numbers,
    strings and containers of them: it is read back with `weights_only=True`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step_{step:09d}.pt"
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getbuffer()
    write_whole(_checksum_path(path), f"{hashlib.sha256(payload).hexdigest()}  {path.name}\n".encode())
    write_whole(path, payload)
    for old in _by_step([directory])[keep:]:
        old.unlink()
        _checksum_path(old).unlink(missing_ok=True)
    return path


def load_newest(directories: Iterable[Path]) -> dict[str, Any] | None:
    """The newest whole checkpoint of all `directories`, or None; damaged ones are renamed aside with a warning."""
    for path in _by_step(dict.fromkeys(directories)):
        try:
            payload = path.read_bytes()
        except FileNotFoundError:  # whoever owns the folder has just written a newer one
            continue
        if _is_whole(path, payload):
            state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            return state
        log.warning("checkpoint %s is damaged; it is set aside and the one before is used", path)
        with contextlib.suppress(FileNotFoundError):
            path.rename(path.with_name(path.name + DAMAGED))
    return None


def _is_whole(path: Path, payload: bytes) -> bool:
    checksum = _checksum_path(path)
    if not checksum.is_file():
        return False
    expected, _, name = checksum.read_text(errors="replace").strip().partition("  ")
    return name == path.name and expected == hashlib.sha256(payload).hexdigest()


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _by_step(directories: Iterable[Path]) -> list[Path]:
    """Checkpoint files of all directories, newest step first."""
    found = [path for directory in directories if directory.is_dir() for path in directory.iterdir()]
    return sorted((path for path in found if _NAME.match(path.name)), key=lambda path: path.name, reverse=True)
