"""Uncompressed tar archives: which members they have and where, read once from their headers and remembered."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainers.files import write_whole

FORMAT = 1  # of remembered indexes; part of their names


class Member(NamedTuple):
    """A file in an archive: its path there, and where its bytes are in the outermost archive."""

    name: str
    offset: int
    size: int


def members(archive: Path) -> Iterator[Member]:
    """The files of a tar archive in their order, those of tar archives within it as INNER.tar/NAME.

    Links, folders and devices are passed over. Only headers are read.

    Raises:
        ValueError: it is compressed, damaged or truncated; one line that names it.
    """
    try:
        with archive.open("rb") as file:
            yield from _members(file, "", 0)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{archive} is no whole uncompressed tar archive ({error}); get it again, or decompress it"
        ) from error
    except OSError as error:
        raise ValueError(f"{archive} cannot be read: {error.strerror}") from error


def _members(file: IO[bytes], prefix: str, start: int) -> Iterator[Member]:
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for entry in tar:
            tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
            if not entry.isreg() or entry.issparse():
                continue
            if entry.name.lower().endswith(".tar") and not prefix:
                inner = tar.extractfile(entry)
                assert inner is not None
                yield from _members(inner, f"{entry.name}/", start + entry.offset_data)
                continue
            yield Member(prefix + entry.name, start + entry.offset_data, entry.size)
        file.seek(tar.offset)  # tarfile takes a damaged header for the end
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"bad header at byte {start + tar.offset:,}")


def referable(root: Path, archive: Path) -> str:
    """The path of an archive relative to the root, as references to its members need it.

    Raises:
        ValueError: it has an @, which ends it there.
    """
    relative = archive.relative_to(root).as_posix()
    if "@" in relative:
        raise ValueError(f"{archive} has an @ in its name; rename it")
    return relative


def contents(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The contents of those files of a small tar archive, packed or not, whose path is wanted.

    Raises:
        ValueError: it is no tar archive, or damaged.
    """
    try:
        with tarfile.open(archive) as tar:
            found = {}
            for entry in tar:
                if entry.isreg() and wanted(entry.name):
                    content = tar.extractfile(entry)
                    assert content is not None
                    found[entry.name] = content.read()
            return found
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} is no whole tar archive ({error})") from error


def remembered(
    cache: Path, archive: Path, what: str, make: Callable[[], Mapping[str, npt.NDArray[Any]]]
) -> Mapping[str, npt.NDArray[Any]]:
    """The arrays that `make` finds in an archive, kept in `cache` for as long as the archive stays the same.

    Headers of 1.3 million images lie all over 138 GB; reading them takes minutes, every process needs them.

    Args:
        cache: folder on a local disk; it is made where it is missing.
        archive: by its path, size and time of change the index is found again.
        what: the kind of index.
        make: gives arrays of numbers.

    Raises:
        ValueError: what `make` raises, or there is no such archive.
    """
    try:
        status = archive.stat()
    except OSError as error:
        raise ValueError(f"{archive} cannot be read: {error.strerror}") from error
    identity = json.dumps([FORMAT, what, str(archive.resolve()), status.st_size, status.st_mtime_ns])
    path = cache / "indexes" / f"{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as known:
            return {name: known[name] for name in known.files}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # damaged: made again
        path.unlink(missing_ok=True)
    made = dict(make())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **made)
    write_whole(path, buffer.getbuffer())
    return made


def index(cache: Path, archive: Path) -> list[Member]:
    """All `members` of an archive, by way of the cache."""
    found = remembered(cache, archive, "members", lambda: _packed(members(archive)))
    places = zip(found["offsets"].tolist(), found["sizes"].tolist(), strict=True)
    return [Member(name, *place) for name, place in zip(texts(found["names"]), places, strict=True)]


def _packed(found: Iterator[Member]) -> dict[str, npt.NDArray[Any]]:
    listed = list(found)
    return {
        "names": packed_texts([member.name for member in listed]),
        "offsets": np.array([member.offset for member in listed], np.int64),
        "sizes": np.array([member.size for member in listed], np.int64),
    }


def packed_texts(strings: list[str]) -> npt.NDArray[np.uint8]:
    """Strings as one array of bytes; none of them may hold the character NUL."""
    joined = "".join(f"{string}\0" for string in strings)
    return np.frombuffer(joined.encode("utf-8", "surrogateescape"), np.uint8)


def texts(packed: npt.NDArray[np.uint8]) -> list[str]:
    """The strings that `packed_texts` packed."""
    return packed.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
