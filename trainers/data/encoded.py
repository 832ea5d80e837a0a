"""Where the bytes of an encoded image are: a file under the data set's root, or a part of an archive there.

A reference is a string: a path relative to the root, or, for a member of an uncompressed archive,
ARCHIVE@OFFSET+SIZE@NAME. So archives need not be unpacked, and any of their members is read without the others.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path, PurePosixPath

_MEMBER = re.compile(r"(?P<archive>[^@]+)@(?P<offset>\d+)\+(?P<size>\d+)@(?P<name>.*)", re.DOTALL)


def member(archive: str, offset: int, size: int, name: str) -> str:
    """The reference to `size` bytes at `offset` of an archive whose path has no @."""
    return f"{archive}@{offset}+{size}@{name}"


def _found(root: Path, reference: str) -> re.Match[str] | None:
    """The parts of a reference to a member; None of a path, also of one that looks like such a reference."""
    found = _MEMBER.fullmatch(reference)
    return None if found is None or (root / reference).is_file() else found


def file_of(root: Path, reference: str) -> str:
    """The path, relative to the root, of the file that holds what a reference stands for."""
    found = _found(root, reference)
    return reference if found is None else found["archive"]


def encoded_size(root: Path, reference: str) -> int:
    """How many bytes `opened` gives; -1 where there is no such file."""
    found = _found(root, reference)
    if found is not None:
        return int(found["size"])
    try:
        return (root / reference).stat().st_size
    except OSError:  # whoever opens it says so
        return -1


def opened(root: Path, reference: str) -> Path | io.BytesIO:
    """What Pillow and others open: the path of a file, or the bytes of a member.

    Raises:
        OSError: it leads out of the root, is no file (a pipe would block) or empty, or the archive ends before the
            member does.
    """
    found = _found(root, reference)
    inner = PurePosixPath(found["archive"] if found else reference)
    if inner.is_absolute() or ".." in inner.parts:  # lists and archives come from elsewhere
        raise OSError("leads out of the folder of the data set")
    path = root / inner
    if not path.is_file():
        raise OSError("is not a file")
    size = int(found["size"]) if found else path.stat().st_size
    if size == 0:
        raise OSError("is empty")
    if found is None:
        return path
    file = os.open(path, os.O_RDONLY)
    try:
        content = os.pread(file, size, int(found["offset"]))
    finally:
        os.close(file)
    if len(content) < size:
        raise OSError(f"ends {size - len(content)} bytes before its member {found['name']} does")
    return io.BytesIO(content)
