"""Checkpoints: written whole or not at all, with a checksum, newest whole one first when resuming."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainers.checkpoint_files import by_step, checksum_path, is_whole, name_of, set_aside, step_of
from trainers.files import write_whole

__all__ = ["first_whole", "folders_of", "load_newest", "name_of", "read", "save", "step_of", "steps"]

log = logging.getLogger(__name__)


def save(directory: Path, step: int, state: Mapping[str, Any], keep: int = 1, keep_steps: Collection[int] = ()) -> Path:
    """Publish `state` as the checkpoint of `step` and remove all but the newest `keep` and those of `keep_steps`.

    The SHA-256 (of sha256sum's format) is in place before the checkpoint appears under its name, and both are on
    disk before that, so that a crash leaves either a whole checkpoint or none. `state` may hold tensors, numbers,
    strings and containers of them: it is read back with `weights_only=True`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name_of(step)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getbuffer()
    write_whole(checksum_path(path), f"{hashlib.sha256(payload).hexdigest()}  {path.name}\n".encode())
    write_whole(path, payload)
    for old in by_step([directory])[keep:]:
        if step_of(old) not in keep_steps:
            old.unlink()
            checksum_path(old).unlink(missing_ok=True)
    return path


def load_newest(directories: Iterable[Path]) -> dict[str, Any] | None:
    """The newest whole checkpoint of all `directories`, or None; damaged ones are renamed aside with a warning."""
    for path in by_step(dict.fromkeys(directories)):
        try:
            payload = path.read_bytes()
        except FileNotFoundError:  # whoever owns the folder has just written a newer one
            continue
        if is_whole(path, payload):
            return _loaded(payload)
        log.warning("checkpoint %s is damaged; it is set aside and the one before is used", path)
        with contextlib.suppress(FileNotFoundError):
            set_aside(path)
    return None


def read(path: Path) -> dict[str, Any]:
    """The whole checkpoint at `path`, which stays as it is even when damaged.

    Raises:
        ValueError: the file is damaged or not there, or its checksum is.
    """
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    if not is_whole(path, payload):
        raise ValueError(f"checkpoint {path} is damaged: it does not have the checksum in {checksum_path(path).name}")
    return _loaded(payload)


def first_whole(paths: Sequence[Path]) -> dict[str, Any]:
    """The first whole checkpoint of `paths`, which stay as they are.

    Raises:
        ValueError: none is whole.
    """
    for path in paths[:-1]:
        try:
            return read(path)
        except ValueError as error:
            log.warning("%s", error)
    return read(paths[-1])


def steps(directories: Iterable[Path]) -> dict[int, list[Path]]:
    """Checkpoint files, damaged ones too, of all `directories` by step, newest step first."""
    found: dict[int, list[Path]] = {}
    for path in by_step(dict.fromkeys(directories)):
        found.setdefault(step_of(path), []).append(path)
    return found


def folders_of(trial: Path) -> list[Path]:
    """Folders of a trial's folder in which checkpoints lie: published ones, then those of its attempts."""
    folders = [trial / "checkpoints", *sorted(trial.glob("attempts/*/checkpoints"))]
    return [folder for folder in folders if folder.is_dir()]


def _loaded(payload: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state
