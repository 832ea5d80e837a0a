"""Files that appear under their name only when they are whole and on the disk."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, payload: bytes | memoryview) -> None:
    """Publish `payload` at `path`: hidden temporary name, sync, rename, sync of the folder.

    A reader sees the old file or the new one; a failure leaves the old one and no temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with hidden.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
