"""Files of checkpoints by their names and checksums, without loading what is in them; needs no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

_NAME = re.compile(r"^step_(\d{9})\.pt$")
CHECKSUM = ".sha256"  # ends the name of the file that has one's SHA-256
DAMAGED = ".damaged"  # ends the name of one that was set aside


def name_of(step: int) -> str:
    """File name of the checkpoint of a step."""
    return f"step_{step:09d}.pt"


def is_name(name: str) -> bool:
    """Whether a file of this name is a checkpoint."""
    return _NAME.match(name) is not None


def step_of(path: Path) -> int:
    """The step of a checkpoint by its file name."""
    return int(path.stem.removeprefix("step_"))


def checksum_path(path: Path) -> Path:
    """Where the SHA-256 of a checkpoint stands, in sha256sum's format."""
    return path.with_name(path.name + CHECKSUM)


def is_whole(path: Path, payload: bytes) -> bool:
    """Whether `payload`, the content of the checkpoint at `path`, has its checksum."""
    return _expected(path) == hashlib.sha256(payload).hexdigest()


def is_whole_file(path: Path) -> bool:
    """`is_whole` of what is on the disk, read in bounded memory.

    Raises:
        OSError: it cannot be read, or has gone meanwhile.
    """
    with path.open("rb") as file:
        return _expected(path) == hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint so that nothing reads it any more.

    Raises:
        FileNotFoundError: it is gone already.
    """
    path.rename(path.with_name(path.name + DAMAGED))


def by_step(directories: Iterable[Path]) -> list[Path]:
    """Checkpoint files, damaged ones too, of all directories, newest step first."""
    found = [path for directory in directories if directory.is_dir() for path in directory.iterdir()]
    return sorted((path for path in found if is_name(path.name)), key=lambda path: path.name, reverse=True)


def _expected(path: Path) -> str | None:
    """The digest that the checkpoint must have; None where that is not known."""
    checksum = checksum_path(path)
    if not checksum.is_file():
        return None
    digest, _, name = checksum.read_text(errors="replace").strip().partition("  ")
    return digest if name == path.name else None
