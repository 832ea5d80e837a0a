"""Data sets as read-only memory maps: what they hold, and how one is opened by its name in the configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig, TrialConfig
from trainers.dotted import load

if TYPE_CHECKING:
    from trainers.data.cache import Source

SPLITS = ("train", "validation", "test")
IGNORED = 255  # in "segmentation": pixels that count neither in training nor in testing

_PER_PIXEL = ("segmentation", "depth")

Progress = Callable[[str, int, int], None]  # what is done, how many are done, how many there are (0: not known)


class Whole(NamedTuple):
    """An image at its own size, uint8 [H, W, 3], and what belongs to it there.

    Targets are "segmentation" uint8 [H, W], "depth" float32 [H, W] in metres, 0 where it is not known, and "boxes"
    float32 [K, 5] in px.
    """

    pixels: npt.NDArray[np.uint8]
    targets: Mapping[str, npt.NDArray[Any]]


class Pixels(Protocol):
    """What an array of images is to those who read it: rows by numbers, a slice or an array, and the shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Split:
    """One split of n images of side S; arrays are read-only memory maps in an order in which any prefix is a sample.

    With `data.decode_size: original` training images are a trainers.data.streamed.Streamed instead, and what belongs
    to their pixels LazyTargets: rows are decoded when they are taken.

    Attributes:
        images: uint8 [n, S, S, 3], RGB.
        targets: by what `trainers.catalog.PROVISIONS` calls them. "classes": int64 [n]. "segmentation": uint8
            [n, S, S], numbers of the data set's `segmentation_names`, IGNORED for pixels that do not count. "depth":
            float16 [n, S, S], metres, 0 where it is not known. "boxes": float32
            [n, K, 5] as x0, y0, x1, y1 in px (x1 and y1 exclusive) and class, rows of NaN where an image has fewer
            than K objects, the largest object first. "captions": a sequence of n strings. Besides, where images are
            padded, "content": float32 [n, 4], x0, y0, x1, y1 in px (x1 and y1 exclusive) of what is no padding.
        paths: references of the files, relative to the root; None where there are none.
        open_whole: gives an image at its own size by its path; None where the squares are all there is.
    """

    images: Pixels
    targets: Mapping[str, Any]
    paths: Sequence[str] | None = None
    open_whole: Callable[[str], Whole] | None = None

    def whole(self, index: int) -> Whole:
        """Image `index` at its own size; the square where there is nothing else.

        Raises:
            Exception: what decoders raise, where the file has changed since it was cached.
        """
        if self.open_whole is not None and self.paths is not None:
            return self.open_whole(self.paths[index])
        targets = {name: np.asarray(self.targets[name][index]) for name in _PER_PIXEL if name in self.targets}
        if "depth" in targets:
            targets["depth"] = targets["depth"].astype(np.float32)
        if "boxes" in self.targets:
            boxes = np.asarray(self.targets["boxes"][index])
            targets["boxes"] = boxes[~np.isnan(boxes).any(axis=1)]
        return Whole(np.asarray(self.images[index]), targets)

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class DataSet:
    """Three disjoint splits under a logical name.

    Attributes:
        provides: the names of the targets that every split has.
        fingerprint: 16 hexadecimal digits of a SHA-256 over pixels and targets of all splits, not over names of files.
        unreadable: files that could not be decoded and were left out, relative to the root.
        segmentation_names: of the classes of "segmentation".
        templates: texts with {} for a class's name, by which images are compared with texts.
        max_depth: in metres, beyond which "depth" does not count; None without depth.
        protocol_splits: those on which object discovery is reported in the literature.
    """

    name: str
    class_names: tuple[str, ...]
    provides: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    unreadable: tuple[str, ...] = ()
    segmentation_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    max_depth: float | None = None
    protocol_splits: tuple[str, ...] = ("test",)


# What the catalog's `build`, or a user's own by dotted path, has to be: called as
# build(config, execution, side, cache), where `side` is the side in px of the decoded images and `cache` a folder on a
# local disk; it returns what to write, as trainers.data.cache.Source. It finds files but decodes nothing.
Builder = Callable[[DataConfig, ExecutionConfig, int, Path], "Source"]


def open_data(
    config: DataConfig, execution: ExecutionConfig, image_size: int, cache: Path, progress: Progress | None = None
) -> DataSet:
    """The data set `config.train`, decoded into `cache` by the first caller and memory-mapped by all others.

    Safe to call from several processes at once: one decodes, the others wait.

    Args:
        image_size: side in px that the model is trained on; decides the decoded size only where that is `auto`.
        cache: folder on a local disk; it is made where it is missing.
        progress: told while images are decoded, or that another process does so.

    Raises:
        ValueError: files are missing or damaged, or a setting is impossible; one line that says what to do.
    """
    from trainers.data.cache import open_source

    return open_source(source_of(config, execution, image_size, cache), cache, progress or _quiet)


def source_of(config: DataConfig, execution: ExecutionConfig, image_size: int, cache: Path) -> Source:
    """What `open_data` would decode: the files are found, nothing is decoded yet.

    Raises:
        ValueError: files are missing, or a setting is impossible; one line that says what to do.
    """
    from trainers.data.cache import Source

    own = config.train not in catalog.DATASETS
    build = load(config.train if own else catalog.DATASETS[config.train].build)
    try:
        source = build(config, execution, _side(config, image_size), cache)
    except TypeError as error:
        if own:  # most likely it is no builder at all
            raise ValueError(f"data.train {config.train!r} is not a builder of a data set: {error}") from error
        raise
    if not isinstance(source, Source):
        raise ValueError(
            f"data.train {config.train!r} gave {type(source).__name__}; needed: trainers.data.cache.Source"
        )
    native = None if own else catalog.DATASETS[config.train].decode_size
    if config.decode_size == "original" and native is None and source.streaming is None:
        raise ValueError(f"data.decode_size original: {config.train} gives decoded images only; set it in px")
    return source


def evaluation_configs(config: TrialConfig) -> dict[str, DataConfig]:
    """What the data sets are that only probes run on, by the names by which probes name them.

    Each has its own defaults; `data.seed`, `data.validation_fraction` and `data.max_unreadable` are the trial's.
    """
    sections = (getattr(config.evaluation, probe, None) for probe in config.evaluation.probes)
    names = dict.fromkeys(name for section in sections for name in getattr(section, "data", ()))
    shared = {field: getattr(config.data, field) for field in ("seed", "validation_fraction", "max_unreadable")}
    found = {}
    for name in names:
        entry, logical = catalog.evaluation_set(name)
        given = {"train": entry, "name": logical, **shared} | ({} if entry == "scenes" else {"scenes": None})
        found[name] = DataConfig.model_validate(given)
    return found


def open_evaluation_sets(config: TrialConfig, cache: Path, progress: Progress | None = None) -> dict[str, DataSet]:
    """The data sets that only probes run on, by the names by which probes name them.

    Raises:
        ValueError: as `open_data`.
    """
    return {
        name: open_data(data, config.execution, config.model.side, cache, progress)
        for name, data in evaluation_configs(config).items()
    }


def fingerprint_of(own: str, others: Mapping[str, str]) -> str:
    """The fingerprint of all data of a trial: its own data set's, with those that only probes run on."""
    if not others:
        return own
    return hashlib.sha256(json.dumps([own, sorted(others.items())]).encode()).hexdigest()[:16]


def facts_of(data: DataSet, use: str) -> dict[str, Any]:
    """What a record says of a data set, as JSON has it: `name`, `fingerprint`, `use` and `images` of each split."""
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    images = {name: len(split) for name, split in splits.items()}
    return {"name": data.name, "fingerprint": data.fingerprint, "use": use, "images": images}


def _quiet(*_: object) -> None:
    """Tells nobody."""


def _side(config: DataConfig, image_size: int) -> int:
    """Side in px of the decoded images, with `original` of those that evaluation sees.

    Where no number is left, as trainers.config.resolve decides `auto`.
    """
    if isinstance(config.decode_size, int):
        return config.decode_size
    native = catalog.DATASETS[config.train].decode_size if config.train in catalog.DATASETS else None
    if native is not None:
        return native
    return max(image_size * 8 // 7, 8)
