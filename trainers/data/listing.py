"""From lists of a user's files to a data set: what every family of data sets shares once it has found its files.

A family finds files and what belongs to them (a `Listing` for each split that has one) and hands them to `source`,
which takes missing splits from training, shuffles, decodes in parallel, and names what is damaged.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import IGNORED, SPLITS, Progress, Whole
from trainers.data.cache import Source, Writer
from trainers.data.encoded import file_of, of_the_machine, opened
from trainers.data.labels import boxes_within, known_depth
from trainers.data.pictures import Square, Stored, decode, decode_stored, square
from trainers.data.splits import held_out, uniforms

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"))

# A file that has a value for every pixel: from its path or bytes and the image's height and width in px to an array
# [H, W], "segmentation" as uint8 with trainers.data.IGNORED, "depth" as float32 in metres, 0 where it is not known.
ReadMap = Callable[[Any], npt.NDArray[Any]]

_BATCH_BYTES = 2**26  # decoded images in flight
_ORDER = 3  # random streams: this and the split's index for the order, those after it for what is held out


@dataclass(frozen=True)
class Listing:
    """The n images of one split.

    Attributes:
        paths: references relative to the root; see trainers.data.encoded. No two are equal.
        targets: what is known without opening a file: "classes" int64 [n], "captions" n strings, "boxes" n arrays
            float32 [K, 5] in px of the image at its own size, x1 and y1 exclusive, and the class.
        maps: references of files that have a value for every pixel, "segmentation" or "depth", n each.
    """

    paths: tuple[str, ...]
    targets: Mapping[str, Any] = field(default_factory=dict)
    maps: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, chosen: npt.NDArray[np.generic]) -> Listing:
        """The images that a mask or an order chooses."""
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return Listing(
            _at(self.paths, indices),
            {
                name: values[indices] if isinstance(values, np.ndarray) else _at(values, indices)
                for name, values in self.targets.items()
            },
            {name: _at(paths, indices) for name, paths in self.maps.items()},
        )


def _at(values: Any, indices: npt.NDArray[Any]) -> tuple[Any, ...]:
    return tuple(values[int(i)] for i in indices)


@dataclass(frozen=True)
class Description:
    """What a family knows of its data set besides the files.

    Attributes:
        class_names: of "classes", in the order of their numbers; none where there are no classes.
        read: how files of maps are read, by target.
        facts: fields of trainers.data.cache.Source that describe the data set: segmentation_names and the like.
        key: what decides the content besides files, seed, size and fit.
        faults: what was found and is no image with all that belongs to it, by name and with the reason; counts as
            unreadable.
        sizes: width and height in px that annotations state, by the image's reference; other images are refused.
        open: from the root and a reference to what Pillow opens; other than `encoded.opened` where images are neither
            files nor members of archives.
    """

    class_names: tuple[str, ...] = ()
    read: Mapping[str, ReadMap] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    key: Mapping[str, object] = field(default_factory=dict)
    faults: tuple[tuple[str, str], ...] = ()
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    open: Callable[[Path, str], Any] = opened


def root_of(config: DataConfig, execution: ExecutionConfig) -> Path:
    """The folder of a data set's files: `execution.data_root`/NAME where there is such a folder, else `data_root`.

    Raises:
        ValueError: it is not given or not there.
    """
    if execution.data_root is None:
        how = catalog.DATASETS[config.train].how_to_get
        raise ValueError(f"execution.data_root is missing: data.train {config.train!r} needs it; {how}")
    root = Path(execution.data_root).expanduser()
    if not root.is_dir():
        raise ValueError(f"execution.data_root: {root} is not a folder on this machine")
    own = root / (config.name or config.train)
    return own if own.is_dir() else root


def stamps(root: Path, paths: Iterable[str]) -> str:
    """A hash of names, sizes and times of change by which other content under the same names is noticed."""
    digest = hashlib.sha256()
    archive, stamp = None, ""
    for path in paths:
        file = file_of(path) if "@" in path else path
        if file == path or file != archive:  # members of an archive follow one another
            stamp, archive = _stamp(root / file), None if file == path else file
        digest.update(f"{path}\0{stamp}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:  # decoding will name it as unreadable
        return f"error {error.errno}"
    return f"{status.st_size} {status.st_mtime_ns}"


def source(
    config: DataConfig,
    execution: ExecutionConfig,
    root: Path,
    found: Mapping[str, Listing],
    described: Description,
    digest: str,
    side: int,
) -> Source:
    """The source of a data set whose files were found.

    Args:
        config, execution: of the trial.
        root: to which references are relative.
        found: by split; a missing validation or test split becomes a fixed, stratified `data.validation_fraction` of
            training, test first.
        described: what else is known.
        digest: by which changed files are noticed; see `stamps`.
        side: of the cached squares in px.

    Raises:
        ValueError: a split would be empty.
    """
    name = config.name or config.train
    splits = divided(found, config, name)
    for split in SPLITS:
        order = uniforms(config.seed, _ORDER + SPLITS.index(split), 0, len(splits[split]), 1)[:, 0].argsort()
        splits[split] = splits[split].where(order)
    total = sum(len(listing) for listing in splits.values()) + len(described.faults)
    workers = execution.threads or len(os.sched_getaffinity(0))
    decoder = Decoder(root, described, side, config.fit, _most_boxes(splits))

    def write(writer: Writer, progress: Progress, of: Collection[str] = SPLITS) -> None:
        for path, reason in described.faults:
            writer.skip(path, reason)
        done = len(described.faults)
        with ThreadPoolExecutor(workers) as pool:  # Pillow decodes and resizes without the interpreter's lock
            for split in of:
                for batch in _batches(splits[split], side, workers):
                    decoder.write(split, batch, pool, writer)
                    done += len(batch)
                    progress(f"decoding {name}", done, total)

    key: dict[str, object] = {
        "seed": config.seed,
        "side": side,
        "validation_fraction": config.validation_fraction,
        "files": digest,
        **described.key,
    }
    if config.fit != "crop":  # caches from before there was a choice stay valid
        key["fit"] = config.fit
    made = Source(name, key, described.class_names, write, total, config.max_unreadable, **described.facts)
    made = replace(made, whole=_Wholes(root, described, splits))
    if config.decode_size == "original":
        from trainers.data.streamed import streaming  # PyTorch: not for those who only look for files

        return replace(made, **streaming(made, splits["train"], decoder, write, workers))
    return made


def divided(found: Mapping[str, Listing], config: DataConfig, name: str) -> dict[str, Listing]:
    """All three splits: those that were not found are taken from training.

    Raises:
        ValueError: one would be empty.
    """
    splits = dict(found)
    for split in ("test", "validation"):
        if split not in found:
            train = splits["train"]
            stream = _ORDER + len(SPLITS) + SPLITS.index(split)
            classes = train.targets.get("classes", np.zeros(len(train), np.int64))
            held = held_out(classes, config.validation_fraction, config.seed, stream)
            splits[split], splits["train"] = train.where(held), train.where(~held)
    for split in SPLITS:
        if not len(splits[split]):
            raise ValueError(
                f"data set {name!r}: {sum(map(len, splits.values()))} images are too few for a {split} split by "
                f"data.validation_fraction {config.validation_fraction}"
            )
    return splits


def _most_boxes(splits: Mapping[str, Listing]) -> int:
    return (
        max((len(boxes) for listing in splits.values() for boxes in listing.targets.get("boxes", ())), default=1) or 1
    )


def _batches(listing: Listing, side: int, workers: int) -> Iterator[Listing]:
    size = max(workers, min(512, _BATCH_BYTES // (side * side * 3)))
    for start in range(0, len(listing), size):
        yield listing.where(np.arange(start, min(start + size, len(listing))))


@dataclass(frozen=True)
class Decoder:
    """Decodes batches of a listing into a cache."""

    root: Path
    described: Description
    side: int
    fit: str
    most_boxes: int

    def write(self, split: str, batch: Listing, pool: ThreadPoolExecutor, writer: Writer) -> None:
        """Appends what can be decoded and names the rest."""
        decoded = list(pool.map(lambda row: self._attempt(batch, row), range(len(batch))))
        for path, result in zip(batch.paths, decoded, strict=True):
            if isinstance(result, str):
                writer.skip(path, result)
            else:
                for remark in result[1]:
                    writer.remark(path, remark)
        images = [result[0] for result in decoded if not isinstance(result, str)]
        if not images:
            return
        kept = batch.where(np.array([not isinstance(result, str) for result in decoded]))
        targets: dict[str, Any] = {name: values for name, values in kept.targets.items() if name != "boxes"}
        for name in images[0].targets:
            values = [image.targets[name] for image in images]
            targets[name] = self._padded(values) if name == "boxes" else np.stack(values)
        if self.fit == "pad":
            targets["content"] = np.stack([image.content for image in images])
        writer.append(split, np.stack([image.pixels for image in images]), targets, kept.paths)

    def _padded(self, boxes: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        padded = np.full((len(boxes), self.most_boxes, 5), np.nan, np.float32)
        for row, of_image in zip(padded, boxes, strict=True):
            row[: len(of_image)] = of_image
        return padded

    def decoded(self, batch: Listing, row: int) -> tuple[Square, tuple[str, ...]]:
        """The image as a square, with what is to be said of it.

        Raises:
            Exception: as `read_whole`.
        """
        if not batch.maps and "boxes" not in batch.targets:
            return decode(self.described.open(self.root, batch.paths[row]), self.side, self.fit), ()
        whole, remarks = _checked(self.root, batch, row, self.described)
        return square(whole.pixels, whole.targets, self.side, self.fit), remarks

    def _attempt(self, batch: Listing, row: int) -> tuple[Square, tuple[str, ...]] | str:
        """The decoded image with what is to be said of it, or why there is none."""
        try:
            return self.decoded(batch, row)
        except Exception as error:  # decoders raise nearly anything on damaged files; all are named
            if of_the_machine(error):  # else a moment's shortage would leave images out of the cache for ever
                raise
            reason = str(error)
            return reason if isinstance(error, OSError) and reason == "is not a file" else f"{_kind(error)}: {error}"


def _kind(error: Exception) -> str:
    return type(error).__name__


def read_whole(root: Path, listing: Listing, row: int, described: Description) -> Whole:
    """One image at its own size with what belongs to it: depth is known or 0, boxes lie within the image.

    Raises:
        ValueError: a map has another size than the image, or annotations state another.
        Exception: what decoders raise on damaged files.
    """
    return _checked(root, listing, row, described)[0]


def _checked(root: Path, listing: Listing, row: int, described: Description) -> tuple[Whole, tuple[str, ...]]:
    """As `read_whole`, with what was corrected or may be wrong."""
    path = listing.paths[row]
    pixels, stored = decode_stored(described.open(root, path))
    height, width = pixels.shape[:2]
    targets: dict[str, npt.NDArray[Any]] = {}
    remarks: list[str] = []
    if path in described.sizes:
        _require_size("annotation", described.sizes[path], (width, height), stored)
    for name, paths in listing.maps.items():
        values = _read_map(root, name, paths[row], described)
        _require_size(name, (values.shape[1], values.shape[0]), (width, height), stored)
        targets[name] = known_depth(values) if name == "depth" else values
        if (targets[name] == (0 if name == "depth" else IGNORED)).all():
            remarks.append(f"its {name} is known nowhere")
    if "boxes" in listing.targets:
        boxes = np.asarray(listing.targets["boxes"][row], np.float32).reshape(-1, 5)
        targets["boxes"], changed = boxes_within(boxes, width, height)
        remarks += changed
    if stored.orientation != 1:
        remarks.append(f"EXIF turns it (orientation {stored.orientation}): what belongs to it has to be upright")
    return Whole(pixels, targets), tuple(remarks)


def _read_map(root: Path, name: str, path: str, described: Description) -> npt.NDArray[Any]:
    """A map, so that whoever fails says which file it was: the image's name alone would mislead."""
    try:
        return described.read[name](described.open(root, path))
    except Exception as error:
        raise ValueError(f"its {name} {path}: {error}") from error


def _require_size(what: str, given: tuple[int, int], size: tuple[int, int], stored: Stored) -> None:
    if given != size:
        turned = " turned as EXIF says" if stored.size == given else ""
        raise ValueError(f"its {what} has {given[0]} × {given[1]} px, the image{turned} {size[0]} × {size[1]}")


class _Wholes:
    """Images at their own size, by split and path."""

    def __init__(self, root: Path, described: Description, splits: Mapping[str, Listing]) -> None:
        self._root, self._described, self._splits = root, described, splits
        self._rows: dict[str, dict[str, int]] = {}

    def __call__(self, split: str, path: str) -> Whole:
        listing = self._splits[split]
        if split not in self._rows:
            self._rows[split] = {known: row for row, known in enumerate(listing.paths)}
        return read_whole(self._root, listing, self._rows[split][path], self._described)
