"""Where the bytes of an encoded image are: a file under the data set's root, or a part of an archive there.

A reference is a string: a path relative to the root, or, for a member of an uncompressed archive,
ARCHIVE@OFFSET+SIZE@NAME, where ARCHIVE ends with .tar. So archives need not be unpacked, and any of their members is
read without the others. What a reference is follows from its text alone: files may have an @ in their names, and
those few that would look like members are refused where folders are listed.
"""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path, PurePosixPath

_MEMBER = re.compile(r"(?P<archive>[^@]+\.tar)@(?P<offset>\d+)\+(?P<size>\d+)@(?P<name>.*)", re.DOTALL)

# Errors of the system that a file has on every machine and for ever; those of Pillow have no number.
_OF_FILES = (None, errno.ENOENT, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def member(archive: str, offset: int, size: int, name: str) -> str:
    """The reference to `size` bytes at `offset` of an archive whose path has no @ and ends with .tar."""
    return f"{archive}@{offset}+{size}@{name}"


def file_of(reference: str) -> str:
    """The path, relative to the root, of the file that holds what a reference stands for."""
    found = _MEMBER.fullmatch(reference)
    return reference if found is None else found["archive"]


def leads_out(path: str) -> bool:
    """Whether a path relative to a folder may lead out of it: paths in lists and archives come from elsewhere."""
    inner = PurePosixPath(path)
    return inner.is_absolute() or ".." in inner.parts


def encoded_size(root: Path, reference: str) -> int:
    """How many bytes `opened` gives; -1 where there is no such file."""
    found = _MEMBER.fullmatch(reference)
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
    found = _MEMBER.fullmatch(reference)
    inner = found["archive"] if found else reference
    if leads_out(inner):
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


def of_the_machine(error: BaseException | None) -> bool:
    """Whether the machine is at fault and not the file: memory, open files, a network disk that is away."""
    while error is not None:  # maps are read by who says which file it was
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in _OF_FILES):
            return True
        error = error.__cause__
    return False
