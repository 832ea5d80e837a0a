"""Writes what the analysis makes so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq


def publish(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Lets `write` fill a hidden file beside `path`, which then replaces `path`; both file and folder are synced.

    If `write` raises, `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with hidden.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        hidden.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            hidden.unlink()
    sync_folder(path.parent)
    return path


def publish_bytes(path: Path, content: bytes) -> Path:
    """Publishes `content` as `path`."""
    return publish(path, lambda stream: stream.write(content))


def sync_folder(folder: Path) -> None:
    """Makes renames within `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tables(folder: Path, tables: Mapping[str, pa.Table]) -> dict[str, Path]:
    """Publishes each table as `folder`/NAME.parquet; equal tables give equal bytes. Returns the paths by name."""

    def writer(table: pa.Table) -> Callable[[IO[bytes]], object]:
        return lambda stream: pq.write_table(table.replace_schema_metadata(None), stream, compression="zstd")

    return {name: publish(folder / f"{name}.parquet", writer(table)) for name, table in tables.items()}
