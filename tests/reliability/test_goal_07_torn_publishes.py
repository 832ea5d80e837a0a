"""Goal 7: however a publication ends, a reader sees the old file or the new one, and nothing of what is unfinished."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from analysis import publish
from tests.reliability.drivers import Point, die, die_at
from tests.reliability.paced import wait_for
from trainers import files

pytestmark = pytest.mark.slow

FORKS = multiprocessing.get_context("forkserver")
SYNC_FILE, RENAME, SYNC_FOLDER = "os:fsync", "pathlib:Path.replace", "os:fsync"

# Where a publication is killed, and whether the new file must be there afterwards. Before the rename it must not be.
STEPS = [
    (Point("pathlib:Path.open", "after"), False),  # the temporary file is there and empty
    (Point(SYNC_FILE, "before"), False),
    (Point(SYNC_FILE, "after"), False),
    (Point(RENAME, "before"), False),
    (Point(RENAME, "after"), True),
    (Point(SYNC_FOLDER, "before", 2), True),
    (Point(SYNC_FOLDER, "after", 2), True),
]


def table(version: int) -> pa.Table:
    return pa.table({"version": [version] * 1000, "value": [float(i * version) for i in range(1000)]})


def parquet(version: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table(version).replace_schema_metadata(None), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_whole(folder: Path, version: int) -> None:
    files.write_whole(folder / "table.parquet", parquet(version))


def write_bytes(folder: Path, version: int) -> None:
    publish.publish_bytes(folder / "table.parquet", parquet(version))


def write_table(folder: Path, version: int) -> None:
    publish.write_tables(folder, {"table": table(version)})


WRITERS = (write_whole, write_bytes, write_table)


class Seen(NamedTuple):
    """What a reader came across."""

    reads: int
    strange: int  # contents that were neither the old nor the new one
    versions: frozenset[int]


def _read(folder: Path, allowed: dict[str, int], pipe: Connection, count: Any) -> None:
    """Read the table, and all tables of the folder, until told to stop; then say what was seen."""
    reads, strange, versions = 0, 0, set[int]()
    while not pipe.poll():
        digest = hashlib.sha256((folder / "table.parquet").read_bytes()).hexdigest()
        strange += digest not in allowed
        versions |= {allowed[digest]} if digest in allowed else set()
        if reads % 20 == 0:  # as readers of whole folders do: what is hidden is none of their business
            found = pyarrow.dataset.dataset(folder, format="parquet").to_table()
            strange += found.num_rows != 1000 or len(set(found["version"].to_pylist())) != 1
            strange += [path.name for path in folder.glob("*.parquet")] != ["table.parquet"]
        reads += 1
        count.value = reads
    pipe.send(Seen(reads, strange, frozenset(versions)))


class Reader:
    """A process that reads a folder all the time while the block runs."""

    def __init__(self, folder: Path) -> None:
        allowed = {hashlib.sha256(parquet(version)).hexdigest(): version for version in (1, 2)}
        self._pipe, other = FORKS.Pipe()
        self._count = FORKS.Value("L", 0)
        self._process = FORKS.Process(target=_read, args=(folder, allowed, other, self._count))

    def __enter__(self) -> Reader:
        self._process.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._pipe.send("stop")
        self._process.join(60)

    def wait(self, reads: int = 2) -> None:
        """Until so many reads have been made from now on."""
        since = self._count.value
        wait_for(lambda: self._count.value >= since + reads, 60)

    def seen(self) -> Seen:
        """Stop reading; what was seen."""
        self._pipe.send("stop")
        assert self._pipe.poll(60), "the reader has died"
        seen = self._pipe.recv()
        assert isinstance(seen, Seen)
        return seen


def _write_and_die(write: Callable[[Path, int], None], folder: Path, point: Point) -> None:
    die_at(point)
    write(folder, 2)


def run_to_its_death(target: Callable[..., Any], *arguments: Any) -> None:
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -9


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_writer_killed_between_any_two_steps_leaves_the_old_file_or_the_new_one(
    write: Callable[[Path, int], None], tmp_path: Path
) -> None:
    folder = tmp_path / "tables"
    write(folder, 1)
    with Reader(folder) as reader:
        for point, is_new in STEPS:
            write(folder, 1)
            run_to_its_death(_write_and_die, write, folder, point)
            assert pq.read_table(folder / "table.parquet").equals(table(2 if is_new else 1)), point
            reader.wait()
        seen = reader.seen()
    assert (seen.strange, seen.versions) == (0, {1, 2})
    assert seen.reads > len(STEPS)
    left = {path.name for path in folder.iterdir()} - {"table.parquet"}
    assert left and all(name.startswith(".") for name in left), "killed writers leave hidden files only"


def _write_half(folder: Path) -> None:
    def half(stream: IO[bytes]) -> None:
        stream.write(parquet(2)[:100])
        stream.flush()
        die()

    publish.publish(folder / "table.parquet", half)


def test_a_writer_killed_half_way_through_the_content_leaves_the_old_file(tmp_path: Path) -> None:
    write_table(tmp_path, 1)
    run_to_its_death(_write_half, tmp_path)
    (partial,) = (path for path in tmp_path.iterdir() if path.name != "table.parquet")
    assert partial.stat().st_size == 100
    assert pyarrow.dataset.dataset(tmp_path, format="parquet").to_table().equals(table(1))


def _write_for_ever(write: Callable[[Path, int], None], folder: Path) -> None:
    version = 1
    while True:
        version = 3 - version
        write(folder, version)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_writers_killed_at_random_moments_leave_one_of_both(write: Callable[[Path, int], None], tmp_path: Path) -> None:
    draw = random.Random(7)
    write(tmp_path, 1)
    with Reader(tmp_path) as reader:
        for _ in range(15):
            writer = FORKS.Process(target=_write_for_ever, args=(write, tmp_path))
            before = (tmp_path / "table.parquet").stat().st_ino
            writer.start()
            wait_for(lambda before=before: (tmp_path / "table.parquet").stat().st_ino != before, 60)  # type: ignore[misc]
            reader.wait(20 + draw.randrange(40))
            time.sleep(0.05 * draw.random())
            writer.kill()
            writer.join()
            assert pq.read_table(tmp_path / "table.parquet") in (table(1), table(2))
        seen = reader.seen()
    assert (seen.strange, seen.versions) == (0, {1, 2})


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(
    failing: str, write: Callable[[Path, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    owner: Any = os if failing == "fsync" else Path
    monkeypatch.setattr(owner, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]
    assert pq.read_table(tmp_path / "table.parquet").equals(table(1))
