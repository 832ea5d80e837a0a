"""Goes through a data set as training would decode it, and says what is wrong, without writing a cache."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import IGNORED, SPLITS, Progress, source_of
from trainers.data.cache import Source, Writer, fingerprint
from trainers.data.rows import Array, RowHash

# Kinds of faults by what their reasons say; the first that fits.
_KINDS = {
    "is not a file": "missing file",
    "aption": "caption",
    "has no image": "no image",
    "no part of a pair": "no pair",
    "is no path": "no path",
    "is empty": "empty file",
    "truncated": "truncated file",
    "before its member": "truncated file",
    "its segmentation": "wrong map",
    "its depth": "wrong map",
    "box": "wrong box",
    "EXIF": "turned",
    "class": "wrong class",
}
_NAMED = 5  # duplicates and classes that a note names


class Fault(NamedTuple):
    """What is wrong with a file, or with what belongs to it."""

    kind: str
    file: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a data set has.

    Attributes:
        images: by split, those that can be read.
        classes: images by class and split; none without classes.
        faults: what has to be mended.
        notes: what is worth knowing.
        fingerprint: of the content, as training reports it with the same settings; None where a split is empty
            or training images are streamed, whose content training does not read as a whole.
    """

    name: str
    images: Mapping[str, int]
    classes: Mapping[str, Mapping[str, int]]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]
    fingerprint: str | None


def check(config: DataConfig, execution: ExecutionConfig, image_size: int, cache: Path, progress: Progress) -> Report:
    """Opens every image of a data set with all that belongs to it; memory is bounded but for names and hashes.

    Args:
        config, execution, image_size: as trainers.data.open_data takes them.
        cache: folder for what is remembered of archives.
        progress: told while images are decoded.

    Raises:
        ValueError: the files do not lie as they should.
    """
    source = source_of(config, execution, image_size, cache)
    seen = _Checker(source)
    source.write(seen, progress)
    faults = [Fault(_kind(reason), path, reason) for path, reason in seen.unreadable] + seen.faults
    try:
        seen.check()
        digest = None if source.streaming else fingerprint(seen.described())
    except ValueError as error:
        digest = None
        faults.append(Fault("empty split", source.name, str(error)))
    classes = seen.by_class()
    absent = [name for name, counts in classes.items() if not counts["train"]]
    faults += [Fault("class without images", name, "has no image in train") for name in absent]
    entry = catalog.DATASETS.get(config.train)
    doubled = [Fault("duplicate", file, f"is the same image as {other}") for file, other in seen.duplicates()]
    odd = doubled + [Fault(_kind(what), path, what) for path, what in seen.remarks]
    if entry is None or entry.needs_name:  # published sets stay as they are, and everyone's results are with them
        faults, odd = faults + odd, []
    notes = [*source.notes, *_notes(seen.images, classes, entry), *_published(odd)]
    return Report(source.name, dict(seen.images), classes, tuple(faults), tuple(notes), digest)


def _kind(reason: str) -> str:
    return next((kind for words, kind in _KINDS.items() if words in reason), "unreadable file")


def _numbered(names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Classes by number; those of equal names get their number as well."""
    counts = Counter(names)
    for number, name in enumerate(names):
        yield number, name if counts[name] == 1 else f"{name} ({number})"


def _notes(
    images: Mapping[str, int], classes: Mapping[str, Mapping[str, int]], entry: catalog.DataEntry | None
) -> Iterator[str]:
    for split in ("validation", "test"):
        absent = [name for name, counts in classes.items() if counts["train"] and not counts[split]]
        if absent:
            more = " …" if len(absent) > _NAMED else ""
            yield f"{len(absent)} classes have no image in {split}: {', '.join(absent[:_NAMED])}{more}"
    published = dict(entry.counts) if entry is not None else {}
    found = dict(images)
    if "validation" not in published:  # taken from training
        found["train"] = found.get("train", 0) + found.pop("validation", 0)
    found |= {"classes": len(classes), "images": sum(images.values())}
    for name, count in published.items():
        allowed = {count, entry.other_counts.get(name, count)} if entry is not None else {count}
        if found.get(name, 0) not in allowed:
            what = {"classes": "classes", "images": "images in all"}.get(name, f"images for {name}")
            counts = " or ".join(f"{number:,}" for number in sorted(allowed, reverse=True))
            yield f"{found.get(name, 0):,} {what}, published are {counts}"


def _published(odd: Sequence[Fault]) -> Iterator[str]:
    """What is odd in a published set, by kind."""
    for kind, count in Counter(fault.kind for fault in odd).items():
        some = [f"{fault.file} {fault.reason}" for fault in odd if fault.kind == kind][:_NAMED]
        yield f"{kind}: {count:,}: {'; '.join(some)}{' …' if count > _NAMED else ''}"


@dataclass
class _Hashes:
    """Hashes of the decoded images of a split, and their names where they have any."""

    hashes: list[npt.NDArray[np.uint64]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


class _Checker(Writer):
    """Takes what a cache would be made of, and keeps counts, hashes and faults."""

    def __init__(self, source: Source) -> None:
        super().__init__(Path(), replace(source, max_unreadable=1.0))
        self.images: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))
        self.classes: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self.faults: list[Fault] = []
        self._hashes = {split: _Hashes() for split in SPLITS}

    def _begun(self, name: str, first: Array) -> RowHash:
        return RowHash(first)

    def described(self) -> dict[str, str]:
        """What describes the content of each array."""
        return {name: stream.close() for name, stream in self._streams.items()}

    def append(self, split: str, images: Array, targets: Mapping[str, Any], paths: Sequence[str] | None = None) -> None:
        """Looks at n images and their targets; see Writer.append."""
        super().append(split, images, targets, paths)
        names = paths or [f"{split}[{self.images[split] + row}]" for row in range(len(images))]
        self.images[split] += len(images)
        hashes = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images]
        self._hashes[split].hashes.append(np.frombuffer(b"".join(hashes), np.uint64))
        self._hashes[split].paths += names
        if "classes" in targets:
            self._count(split, np.asarray(targets["classes"]), names)
        for row, name in enumerate(names):
            self.faults += [Fault(_kind(reason), name, reason) for reason in self._wrong(targets, row)]

    def _count(self, split: str, classes: npt.NDArray[np.int64], names: Sequence[str]) -> None:
        self.classes[split].update(classes.tolist())
        count = len(self._source.class_names)
        for row in np.flatnonzero((classes < 0) | (classes >= count)):
            reason = f"has class {classes[row]}; allowed: 0 to {count - 1}"
            self.faults.append(Fault("wrong class", names[int(row)], reason))

    def by_class(self) -> dict[str, dict[str, int]]:
        """Images by class and split; nothing where there are no classes."""
        if not any(self.classes.values()):
            return {}
        names = _numbered(self._source.class_names)
        return {name: {split: self.classes[split][number] for split in SPLITS} for number, name in names}

    def _wrong(self, targets: Mapping[str, Any], row: int) -> Iterator[str]:
        """What is wrong with an image's own targets."""
        if "segmentation" in targets:
            found = np.unique(targets["segmentation"][row])
            unknown = found[(found >= len(self._source.segmentation_names)) & (found != IGNORED)]
            if len(unknown):
                count = len(self._source.segmentation_names)
                yield f"its segmentation has {unknown[0]}; allowed: 0 to {count - 1} and {IGNORED}"
        if "depth" in targets:
            depth = np.asarray(targets["depth"][row])
            if not np.isfinite(depth).all() or (depth < 0).any():
                yield "its depth has values that are no distances; allowed: metres, 0 where it is not known"
        if "captions" in targets and not targets["captions"][row].strip():
            yield "caption is empty"

    def duplicates(self) -> Iterator[tuple[str, str]]:
        """Images of test and validation that an earlier split has too, by the decoded square, with the other's name."""
        for later, split in enumerate(SPLITS[1:], 1):
            own, names = self._all(split)
            for before in SPLITS[:later]:
                hashes, others = self._all(before)
                unique, first = np.unique(hashes, return_index=True)
                for row in np.flatnonzero(np.isin(own, unique)):
                    yield names[row], others[int(first[np.searchsorted(unique, own[row])])]

    def _all(self, split: str) -> tuple[npt.NDArray[np.uint64], list[str]]:
        found = self._hashes[split]
        return np.concatenate([np.zeros(0, np.uint64), *found.hashes]), found.paths
