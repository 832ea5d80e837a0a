"""An object store as a place of whole objects by key: put, read, list and remove, with retries of what is transient."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from orchestrator.tracking_records import redact
from trainers.files import sync_folder

log = logging.getLogger(__name__)

DELAYS = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds before each further try of a request
_SILENT_TRIES = 1  # before a person is told that something is waited for
_CHUNK_BYTES = 8 * 2**20
_RENAMING = ("local", "hdfs")  # where an object that is being written can be seen, and a rename is atomic
_TEMPORARY = re.compile(r"^\..*\.partial$")

# What stands before :// in the URIs of file systems that pyarrow has.
_KINDS = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
_ALLOWED = "allowed: a folder, s3://BUCKET/PREFIX, gs://, abfs:// or hdfs://"

# Words of answers that no second try changes.
_FINAL = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_BUCKET|EXPIRED_TOKEN"
    r"|HTTP status (?:400|401|403)|PERMISSION_DENIED|UNAUTHENTICATED",
    re.I,
)

Value = TypeVar("Value")

_LISTINGS = 5  # tries to list folders that others change meanwhile


class StorageAway(OSError):
    """The store does not answer, or answers that it cannot now; it may come back."""


def is_remote(storage: str) -> bool:
    """Whether `storage` names an object store and no folder."""
    return "://" in storage


class Remote:
    """One place in an object store, or in any file system that pyarrow reaches by a URI.

    An object appears under its key when it is whole; a failure leaves the old one, or none where our own disk failed.
    Keys are relative and have slashes. Any thread may call.
    """

    def __init__(self, uri: str, delays: Sequence[float] = DELAYS) -> None:
        """Name the place; nothing is asked of it yet.

        Args:
            uri: as pyarrow.fs.FileSystem.from_uri takes it: s3://BUCKET/PREFIX, gs://, abfs://, hdfs://, file://.
            delays: seconds before each further try.

        Raises:
            ValueError: pyarrow knows no such file system, or the URI carries a secret.
        """
        self.uri = checked(uri)
        self._delays = tuple(delays)
        self._fs, self._base = _file_system(uri)

    def __str__(self) -> str:
        return redact(self.uri)

    def put(self, key: str, payload: bytes) -> None:
        """Write an object whole.

        Raises:
            OSError: the store does not take it; StorageAway after all tries where it may come back.
        """
        self._retried(key, lambda: self._write(key, iter([payload])))

    def push(self, local: Path, key: str) -> None:
        """Copy a local file to `key`.

        Raises:
            FileNotFoundError: there is no such local file.
            OSError: the store does not take it; StorageAway after all tries where it may come back.
        """

        def once() -> None:
            with local.open("rb") as file:
                self._write(key, _chunks(file))

        self._retried(key, once)

    def read(self, key: str) -> bytes:
        """The content of an object.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be had; StorageAway after all tries where it may come back.
        """

        def once() -> bytes:
            with self._fs.open_input_stream(self._path(key)) as stream:
                return bytes(stream.read())

        return self._retried(key, once)

    def pull(self, key: str, local: Path) -> None:
        """Copy an object to a local file, which appears when it is whole and on the disk.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: it cannot be had; StorageAway after all tries where it may come back.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        hidden = local.with_name(f".{local.name}.{os.getpid()}.partial")

        def once() -> None:
            with self._fs.open_input_stream(self._path(key)) as stream, hidden.open("wb") as file:
                while chunk := stream.read(_CHUNK_BYTES):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())

        try:
            self._retried(key, once)
            hidden.replace(local)
        finally:
            hidden.unlink(missing_ok=True)
        sync_folder(local.parent)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every object below `folder`, however deep, by key; nothing where there is no such folder."""
        found = self._listed(folder, recursive=True)
        return {key: info.size for key, info in found.items() if info.is_file}

    def folders(self, folder: str = "") -> list[str]:
        """Names right below `folder` that have objects below themselves."""
        found = self._listed(folder, recursive=False)
        return sorted(key.rpartition("/")[2] for key, info in found.items() if not info.is_file)

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""
        return bool(self._retried(key, lambda: self._fs.get_file_info(self._path(key))).is_file)

    def age(self, key: str, then: str) -> float:
        """Seconds by which `key` was written before `then`, both by the store's clock.

        Raises:
            FileNotFoundError: one of them is not there.
        """
        infos = self._retried(key, lambda: self._fs.get_file_info([self._path(key), self._path(then)]))
        if not all(info.is_file for info in infos):
            raise FileNotFoundError(f"storage {self}: {key} or {then} is not there")
        return float(infos[1].mtime_ns - infos[0].mtime_ns) / 1e9

    def remove(self, key: str) -> None:
        """Remove an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._retried(key, lambda: self._fs.delete_file(self._path(key)))

    def _path(self, key: str) -> str:
        if key.startswith("/") or ".." in key.split("/"):
            raise ValueError(f"{key} is no key; allowed: a relative path without ..")
        return "/".join(part for part in (self._base, key) if part)

    def _listed(self, folder: str, *, recursive: bool) -> dict[str, Any]:
        from pyarrow import fs

        base = self._path(folder)
        selector = fs.FileSelector(base, recursive=recursive, allow_not_found=True)
        for left in reversed(range(_LISTINGS)):
            try:
                infos = self._retried(folder, lambda: self._fs.get_file_info(selector))
                break
            except FileNotFoundError:  # a folder of the listing went while it was made
                if not left:
                    raise
        start = len(self._base) + 1 if self._base else 0
        return {info.path[start:]: info for info in infos if not _TEMPORARY.match(info.base_name)}

    def _write(self, key: str, chunks: Iterator[bytes]) -> None:
        path = self._path(key)
        if self._fs.type_name in _RENAMING:
            folder, _, name = path.rpartition("/")
            self._fs.create_dir(folder, recursive=True)
            hidden = f"{folder}/.{name}.{os.getpid()}.partial"
            self._stream(hidden, chunks)
            self._fs.move(hidden, path)
        else:
            self._stream(path, chunks)

    def _stream(self, path: str, chunks: Iterator[bytes]) -> None:
        """Write to `path`. Stores show an object once its stream is closed, which pyarrow also does on an error:
        what our own side could not deliver whole is removed again.
        """
        stream = self._fs.open_output_stream(path)
        try:
            for chunk in chunks:
                stream.write(chunk)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error says more
                stream.close()
                self._fs.delete_file(path)
            raise
        stream.close()

    def _retried(self, key: str, call: Callable[[], Value]) -> Value:
        for number, delay in enumerate((*self._delays, None)):
            try:
                return call()
            except OSError as error:
                if delay is None or is_final(error):
                    raise self._said(key, error) from error
                level = logging.INFO if number < _SILENT_TRIES else logging.WARNING
                log.log(level, "storage %s does not answer; tried again in %.1f s", self, delay)
                time.sleep(delay)
        raise AssertionError("the last try returns or raises")

    def _said(self, key: str, error: OSError) -> OSError:
        """The error with where it happened, and without secrets."""
        kind = OSError if is_final(error) else StorageAway
        if isinstance(error, FileNotFoundError | PermissionError):
            kind = type(error)
        return kind(f"storage {self}: {key or 'its list'}: {redact(str(error))}")


def checked(uri: str) -> str:
    """`uri`, if pyarrow knows its kind and it carries no secret; the store itself is not asked.

    Raises:
        ValueError: it is of another kind, or has a password or a parameter that is one.
    """
    kind = uri.partition("://")[0]
    if kind not in _KINDS:
        raise ValueError(f"storage {redact(uri)} cannot be used: {kind}:// is not known; {_ALLOWED}")
    password = urlsplit(uri).password
    if password is not None or redact(f"x:?{urlsplit(uri).query}") != f"x:?{urlsplit(uri).query}":
        raise ValueError(
            f"storage {redact(uri)} carries a secret, which would be seen in logs; credentials come from the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, …) or from the "
            "machine's role"
        )
    return uri


def is_final(error: OSError) -> bool:
    """Whether a further try would meet the same error."""
    return isinstance(error, FileNotFoundError | PermissionError) or _FINAL.search(str(error)) is not None


def _file_system(uri: str) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow import fs

    try:
        system, base = fs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"storage {redact(uri)} cannot be used: {redact(str(error))}; {_ALLOWED}") from error
    return system, base.rstrip("/")


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
