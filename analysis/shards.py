"""What has been read of a sweep's trials, kept beside them so that the next analysis reads only what has changed.

A shard holds some trials: what their files say, and the files' stamps. Its file is named by its checksum and is never
changed, only replaced, so that several analyses may read, write and remove shards at the same time. Nothing depends on
a shard: one that is damaged, foreign or of other code is read anew from the trials' files.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from analysis import frames, schemas, trial_files
from analysis.frames import PlannedTrial
from analysis.schemas import RUNS, canonical
from analysis.trial_files import TABLES, Record, Stamps

_SUFFIX = ".trials"
_ABANDONED_S = 3600.0  # after which a file that was never finished is removed

_INDEX = pa.schema(
    [
        *RUNS,
        ("stamps", pa.list_(pa.int64())),
        ("known", pa.string()),  # what the plan knew, where the settings are null
        ("settings", pa.string()),  # JSON
        ("problems", pa.list_(pa.string())),
        *((f"rows_{table.name}", pa.int64()) for table in TABLES),
    ]
)

EMPTY = _INDEX.empty_table()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Some trials, in rising order: a row of `index` each, and the rows of their tables in the same order."""

    index: pa.Table
    tables: Mapping[str, pa.Table]
    settings: tuple[Mapping[str, Any] | None, ...]
    path: Path | None = None
    first: Mapping[str, tuple[int, ...]] = field(init=False)  # row of each trial in each table, and their number

    def __post_init__(self) -> None:
        found = {}
        for name in self.tables:
            counts = self.index[f"rows_{name}"].to_pylist()
            starts = [0]
            for count in counts:
                starts.append(starts[-1] + count)
            found[name] = tuple(starts)
        object.__setattr__(self, "first", found)

    def slices(self, name: str, start: int, stop: int) -> pa.Table:
        """The rows in table `name` of the trials from `start` to before `stop`."""
        rows = self.first[name]
        return self.tables[name].slice(rows[start], rows[stop] - rows[start])


def pack(records: Sequence[Record], stamps: Sequence[Stamps], trials: Sequence[PlannedTrial]) -> Shard:
    """A shard of what was read of `trials`, which are in rising order, when their files had these stamps."""
    rows = [record.row for record in records]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in RUNS.names}
    # What may be readable the next time has stamps that no file has.
    columns["stamps"] = [s if r.lasting else () for r, s in zip(records, stamps, strict=True)]
    columns["known"] = [known(t) if r.settings is None else None for r, t in zip(records, trials, strict=True)]
    columns["settings"] = [None if record.settings is None else json.dumps(record.settings) for record in records]
    columns["problems"] = [record.problems for record in records]
    tables = {}
    for table in TABLES:
        parts = [record.tables.get(table.name) for record in records]
        counts = columns[f"rows_{table.name}"] = [0 if part is None else part.num_rows for part in parts]
        whole = pa.concat_tables([table.body.empty_table(), *(part for part in parts if part is not None)])
        ids = pa.array(columns["trial_id"], pa.string()).take(np.repeat(np.arange(len(rows)), counts))
        whole = whole.add_column(table.schema.get_field_index("trial_id"), "trial_id", ids).combine_chunks()
        tables[table.name] = trial_files.sort(whole, table.keys)
    index = pa.table([pa.array(columns[name], _INDEX.field(name).type) for name in _INDEX.names], schema=_INDEX)
    return Shard(index, tables, tuple(record.settings for record in records))


def known(trial: PlannedTrial) -> str:
    """What the plan knows of a trial's settings, as text."""
    return canonical([dict(trial.cell), trial.seed])


def save(folder: Path, shard: Shard) -> Path | None:
    """Publish a shard in `folder`; None where that cannot be, as in a folder that is not ours to write in."""
    content = _to_bytes(shard)
    path = folder / f"{zlib.crc32(content):08x}-{len(content)}{_SUFFIX}"
    hidden = folder / f".{path.name}.{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        hidden.write_bytes(content)
        hidden.replace(path)
    except OSError as error:
        logger.debug("what was read of the trials is not kept: %s", error)
        return None
    return path


def listed(folder: Path) -> list[Path]:
    """The files of all shards in `folder`, by name."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIX) and path.name[0] != ".")
    except OSError:
        return []


def load(path: Path) -> Shard | None:
    """The shard in a file; None where it is not whole or not of this code."""
    try:
        content = path.read_bytes()
        if path.name != f"{zlib.crc32(content):08x}-{len(content)}{_SUFFIX}":
            raise ValueError("it does not have its checksum")
        return _from_bytes(content, path)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        logger.debug("%s is not used: %s", path, error)
        return None


def clear(folder: Path, used: set[Path]) -> None:
    """Remove what no longer serves: shards besides `used`, and files that were never finished."""
    try:
        for path in folder.iterdir():
            if path.name.startswith("."):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()
            elif path.name.endswith(_SUFFIX) and path not in used:
                path.unlink()
    except OSError as error:  # another analysis has removed it, or it is not ours to remove
        logger.debug("%s is not cleared: %s", folder, error)


def _to_bytes(shard: Shard) -> bytes:
    """The index and the tables as Arrow streams, one after the other."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    index = shard.index.replace_schema_metadata({b"version": _version()})
    for table in (index, *(shard.tables[table.name] for table in TABLES)):
        with pa.ipc.new_stream(sink, table.schema, options=options) as stream:
            stream.write_table(table)
    return sink.getvalue()


def _from_bytes(content: bytes, path: Path) -> Shard:
    source = pa.BufferReader(content)
    index = pa.ipc.open_stream(source).read_all()
    if (index.schema.metadata or {}).get(b"version") != _version():
        raise ValueError("it is of other code")
    if not index.schema.equals(_INDEX):
        raise ValueError("its columns are others")
    tables = {}
    for table in TABLES:
        found = pa.ipc.open_stream(source).read_all()
        if not found.schema.equals(table.schema) or found.num_rows != sum(index[f"rows_{table.name}"].to_pylist()):
            raise ValueError(f"its {table.name} are others")
        tables[table.name] = found
    settings = tuple(None if text is None else json.loads(text) for text in index["settings"].to_pylist())
    return Shard(index.replace_schema_metadata(None), tables, settings, path)


@cache
def _version() -> bytes:
    """A digest of the code that reads trials: what other code has read is not trusted."""
    digest = hashlib.sha256(pa.__version__.encode())
    for module in (trial_files, schemas, frames):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest().encode()
