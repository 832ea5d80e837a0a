"""The data cache: one folder for each data set, built once under a lock, fingerprinted and published by rename."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainers import catalog
from trainers.data import SPLITS, DataSet, Progress, Split, Whole
from trainers.data.rows import Array, RowHash, RowStream, Texts
from trainers.files import sync_folder

if TYPE_CHECKING:
    from trainers.data.streamed import Streamed

FORMAT = 1  # of the folders; part of their names
META = "meta.json"
UNREADABLE = "unreadable.txt"
ENCODED = "encoded"  # of images that stay so: how many bytes each has
REMARKS = "remarks.txt"  # only where there are some
_MORE_NAMED = 100  # unreadable files past the limit that are still looked for, so that a user can mend all at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Streaming:
    """How training images stay encoded and are decoded when they are asked for; see trainers.data.streamed.

    Attributes:
        index: writes what is known without decoding, by `Writer.index`, and all of the other splits.
        opened: gives the training images and those of their targets that need an image decoded, from the cache
            folder and the number of images that are unreadable already.
    """

    index: Callable[[Writer, Progress], None]
    opened: Callable[[Path, int], tuple[Streamed, Mapping[str, Any]]]


@dataclass(frozen=True)
class Source:
    """A data set before it is decoded.

    Attributes:
        name: logical name, which also begins the name of the cache folder.
        key: what decides the content, as JSON values; its hash ends the name of the cache folder.
        class_names: in the order of the class numbers.
        write: decodes everything into the writer, telling the progress.
        candidates: images that will be tried, where some may be unreadable.
        max_unreadable: fraction of the candidates that may be.
        whole: gives an image at its own size by split and path; None where the squares are all there is.
        segmentation_names, templates, max_depth, protocol_splits: as trainers.data.DataSet has them.
        notes: what a user should know of what was found, a sentence each.
        streaming: how training images are streamed instead of being decoded ahead; None where they are not.
    """

    name: str
    key: Mapping[str, object]
    class_names: tuple[str, ...]
    write: Callable[[Writer, Progress], None]
    candidates: int = 0
    max_unreadable: float = 0.0
    whole: Callable[[str, str], Whole] | None = None
    segmentation_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    max_depth: float | None = None
    protocol_splits: tuple[str, ...] = ("test",)
    notes: tuple[str, ...] = ()
    streaming: Streaming | None = None

    @property
    def folder_name(self) -> str:
        """Readable name and a hash of what decides the content."""
        canonical = json.dumps([FORMAT, self.name, self.key, self.class_names], sort_keys=True)
        readable = re.sub(r"[^A-Za-z0-9_-]+", "-", self.name)[:64]
        return f"{readable}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


class Writer:
    """Fills one cache folder; `Source.write` gets it. Rows are hashed and written as they come, in bounded memory."""

    def __init__(self, folder: Path, source: Source) -> None:
        self._folder, self._source = folder, source
        self._streams: dict[str, RowHash] = {}
        self.unreadable: list[tuple[str, str]] = []
        self.remarks: list[tuple[str, str]] = []

    def append(self, split: str, images: Array, targets: Mapping[str, Any], paths: Sequence[str] | None = None) -> None:
        """Adds n images (uint8 [n, S, S, 3]) with their targets (first axis n; strings for captions) to a split.

        The targets always have the same names, types and shapes; see trainers.data.Split.
        """
        texts = {"captions": targets["captions"]} if "captions" in targets else {}
        if paths is not None:
            texts["paths"] = paths
        self._rows(split, {"images": images} | {n: t for n, t in targets.items() if n != "captions"}, texts)

    def index(self, encoded: Array, targets: Mapping[str, Any], paths: Sequence[str]) -> None:
        """Adds n training images that stay encoded: how many bytes each has (int64 [n]), targets and references."""
        texts = {"paths": paths} | ({"captions": targets["captions"]} if "captions" in targets else {})
        self._rows("train", {ENCODED: encoded} | {n: t for n, t in targets.items() if n != "captions"}, texts)

    def _rows(self, split: str, arrays: Mapping[str, Any], texts: Mapping[str, Sequence[str]]) -> None:
        count = len(next(iter(arrays.values())))
        for name, rows in (*arrays.items(), *texts.items()):
            if len(rows) != count:
                raise ValueError(f"{len(rows)} {name} for {count} images")
        for name, rows in arrays.items():
            self._stream(f"{split}.{name}", np.asarray(rows))
        for name, strings in texts.items():
            self._append_texts(f"{split}.{name}", strings)

    def _append_texts(self, name: str, strings: Sequence[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        before = self._streams[f"{name}.utf8"].rows if f"{name}.utf8" in self._streams else 0
        self._stream(f"{name}.utf8", np.frombuffer(b"".join(encoded), np.uint8))
        self._stream(f"{name}.ends", before + np.cumsum([len(text) for text in encoded], dtype=np.int64))

    def _stream(self, name: str, rows: Array) -> None:
        if name not in self._streams:
            self._streams[name] = self._begun(name, rows)
        self._streams[name].append(rows)

    def _begun(self, name: str, first: Array) -> RowHash:
        return RowStream(self._folder / f"{name}.npy", first)

    def skip(self, path: str, reason: str) -> None:
        """Counts and names an unreadable file.

        Raises:
            TooManyUnreadable: so many more than the source tolerates that going on makes no sense.
        """
        self.unreadable.append((path, " ".join(reason.split())))
        if len(self.unreadable) > _limit(self._source) + _MORE_NAMED:
            raise TooManyUnreadable

    def remark(self, path: str, what: str) -> None:
        """Counts and names what was corrected, or may be wrong, of an image that stays."""
        self.remarks.append((path, " ".join(what.split())))

    def close(self) -> None:
        """Syncs all files and writes meta.json, without which a folder does not count, last."""
        self.check()
        described = {name: stream.close() for name, stream in sorted(self._streams.items())}
        _write_synced(self._folder / UNREADABLE, _listing(self.unreadable))
        if self.remarks:
            _write_synced(self._folder / REMARKS, _listing(self.remarks))
            logger.warning(
                "data set %r: %d remarks on its images, the first on %s: %s; all are in %s",
                *(self._source.name, len(self.remarks), _shown(self.remarks[0][0]), self.remarks[0][1]),
                f"{self._source.folder_name}/{REMARKS}",
            )
        meta = {
            "format": FORMAT,
            "key": dict(self._source.key),
            "fingerprint": fingerprint(described),
            "unreadable": [path for path, _ in self.unreadable],
            "remarks": len(self.remarks),
            "files": {path.name: path.stat().st_size for path in sorted(self._folder.iterdir())},
        }
        _write_synced(self._folder / META, json.dumps(meta, indent=1))

    def release(self) -> None:
        """Closes what a failed build left open."""
        for stream in self._streams.values():
            stream.release()

    def check(self) -> None:
        """The splits are complete and alike; what users' own builders get wrong is said here."""
        if len(self.unreadable) > _limit(self._source):
            raise TooManyUnreadable
        names = [{n.partition(".")[2] for n in self._streams if n.startswith(f"{split}.")} for split in SPLITS]
        if ENCODED in names[0]:  # some targets are only there once an image is decoded
            names[0] = names[1]
        for split, found in zip(SPLITS, names, strict=True):
            if "images" not in found:
                raise ValueError(f"data set {self._source.name!r} has no images left for its {split} split")
            if found != names[0]:
                raise ValueError(
                    f"data set {self._source.name!r}: {split} has {sorted(found)}, train {sorted(names[0])}"
                )


def fingerprint(described: Mapping[str, str]) -> str:
    """16 digits that stand for the content of a data set, not for file names, from what its streams say of theirs.

    Images that stay encoded are never read as a whole: their names and sizes stand for them.
    """
    named = "train.paths." if f"train.{ENCODED}" in described else None
    content = [
        f"{name} {line}"
        for name, line in sorted(described.items())
        if ".paths." not in name or (named and name.startswith(named))
    ]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()[:16]


class TooManyUnreadable(Exception):
    """More files are unreadable than the source tolerates; users see it as a ValueError that names some."""


def open_source(source: Source, cache: Path, progress: Progress) -> DataSet:
    """The data set of `source` from its folder in `cache`, which is built first where it is missing or damaged.

    Raises:
        ValueError: what the source's `write` raises, too many unreadable files, or a cache that cannot be written.
    """
    folder = cache / source.folder_name
    try:
        data = _opened(source, folder)
        if data is None:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(cache / f".{folder.name}.lock", lambda: progress(f"waiting for {source.name}", 0, 0)):
                data = _opened(source, folder) or _built(source, folder, progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        raise ValueError(f"data set {source.name!r} cannot be cached in {cache}: {error.strerror}") from error
    tried = sum(len(split) for split in (data.train, data.validation, data.test)) + len(data.unreadable)
    if len(data.unreadable) > int(source.max_unreadable * tried):  # cached under a more tolerant setting
        raise _refusal(source, [(path, "") for path in data.unreadable], folder / UNREADABLE)
    return data


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, which stays; the system frees it when a holder dies."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _built(source: Source, folder: Path, progress: Progress) -> DataSet:
    """Builds in a hidden folder and renames it; the caller holds the lock, so whatever lies there is left over."""
    temporary = folder.with_name(f".{folder.name}.building")
    refused = folder.with_name(f"{folder.name}.{UNREADABLE}")
    for left_over in (temporary, folder):  # processes that have mapped a damaged folder keep their maps
        if left_over.exists():
            shutil.rmtree(left_over)
    temporary.mkdir()
    writer = Writer(temporary, source)
    try:
        write = source.write if source.streaming is None else source.streaming.index
        write(writer, progress)
        writer.close()
        sync_folder(temporary)
        temporary.rename(folder)
    except TooManyUnreadable as error:
        _write_synced(refused, _listing(writer.unreadable))
        raise _refusal(source, writer.unreadable, refused) from error
    finally:
        writer.release()
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder.parent)
    refused.unlink(missing_ok=True)
    data = _opened(source, folder)
    assert data is not None
    return data


def _opened(source: Source, folder: Path) -> DataSet | None:
    """The data set in `folder`, or None where there is none or a damaged one, which is then said."""
    try:
        meta = json.loads((folder / META).read_bytes())
        for name, size in meta["files"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} does not have its {size:,} bytes")
        fingerprint, unreadable = str(meta["fingerprint"]), tuple(meta["unreadable"])
        splits = {split: _opened_split(source, folder, split, meta["files"], len(unreadable)) for split in SPLITS}
    except FileNotFoundError as error:
        if folder.exists():
            logger.warning("%s is incomplete (%s) and is built again", folder, error)
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s) and is built again", folder, error)
        return None
    provides = tuple(name for name in catalog.PROVISIONS if name in splits["train"].targets)
    return DataSet(
        source.name,
        source.class_names,
        provides,
        splits["train"],
        splits["validation"],
        splits["test"],
        fingerprint,
        unreadable,
        segmentation_names=source.segmentation_names,
        templates=source.templates,
        max_depth=source.max_depth,
        protocol_splits=source.protocol_splits,
    )


def _opened_split(source: Source, folder: Path, split: str, files: Mapping[str, int], unreadable: int) -> Split:
    arrays: dict[str, Any] = {}
    for file in files:
        if file.startswith(f"{split}.") and file.endswith(".npy"):
            # asarray: a plain array over the map, whose slices cost less than those of np.memmap
            arrays[file[len(split) + 1 : -4]] = np.asarray(np.load(folder / file, mmap_mode="r", allow_pickle=False))
    for name in [name.removesuffix(".utf8") for name in arrays if name.endswith(".utf8")]:
        arrays[name] = Texts(arrays.pop(f"{name}.utf8"), arrays.pop(f"{name}.ends"))
    whole = None if source.whole is None else functools.partial(source.whole, split)
    if split == "train" and source.streaming is not None:
        del arrays[ENCODED]
        arrays["images"], decoded = source.streaming.opened(folder, unreadable)
        arrays |= decoded
    return Split(arrays.pop("images"), paths=arrays.pop("paths", None), targets=arrays, open_whole=whole)


def _limit(source: Source) -> int:
    return int(source.max_unreadable * source.candidates)


def _refusal(source: Source, unreadable: Sequence[tuple[str, str]], file: Path) -> ValueError:
    some = ", ".join(_shown(path) for path, _ in unreadable[:3])
    return ValueError(
        f"data set {source.name!r}: {len(unreadable)} of {source.candidates:,} images cannot be read, more than "
        f"data.max_unreadable {source.max_unreadable} allows ({_limit(source)}): {some}"
        f"{' …' if len(unreadable) > 3 else ''}; all that were found are named in {file}"
    )


def _listing(unreadable: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{_shown(path)}\t{reason}\n" for path, reason in unreadable)


def _shown(path: str) -> str:
    """A file's name on one line: what cannot be printed (line breaks, undecodable bytes) is escaped."""
    return path if path.isprintable() else ascii(path)[1:-1]


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
