"""The data set `image_folder`: a user's own images under ROOT/SPLIT/CLASS/, decoded in parallel, damage named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS, Progress
from trainers.data.cache import Source, Writer
from trainers.data.splits import held_out, uniforms

FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"))
MAX_PIXELS = 89_478_485  # Pillow's own limit, 256 MiB in RGB; larger ones count as unreadable

_BATCH_BYTES = 2**26  # decoded images in flight
_ORDER = 3  # random streams: this and the split's index for the order, those after it for what is held out


@dataclass(frozen=True)
class _Listing:
    """The files of one split: paths relative to the root, and classes int64 [n]."""

    paths: tuple[str, ...]
    classes: npt.NDArray[np.int64]

    def where(self, chosen: npt.NDArray[np.generic]) -> _Listing:
        """The files that a mask or an order chooses."""
        indices = np.flatnonzero(chosen) if chosen.dtype == bool else chosen
        return _Listing(tuple(self.paths[int(i)] for i in indices), self.classes[indices])


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of the images under `execution.data_root`, ROOT/{train,validation or val,test}/CLASS/**/IMAGE.

    Classes are the folders of `train`, sorted; class folders of the other splits must be among them. A root without a
    validation folder gets a fixed, stratified `data.validation_fraction` of the training images; without a test
    folder, the same fraction of the training images as a test set, taken first. Each split is in a fixed random
    order. Names that begin with a dot and other suffixes than `SUFFIXES` are passed over. With `data.fit` pad images
    stand whole between black margins, and the target "content" says where.

    Raises:
        ValueError: the folders are not as described.
    """
    root = _root(config, execution)
    try:
        class_names, found, digest = _found(root)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
    splits = _divided(found, config)
    for split in SPLITS:
        order = uniforms(config.seed, _ORDER + SPLITS.index(split), 0, len(splits[split].paths), 1)[:, 0].argsort()
        splits[split] = splits[split].where(order)
    workers = execution.threads or len(os.sched_getaffinity(0))
    total = sum(len(listing.paths) for listing in splits.values())

    def write(writer: Writer, progress: Progress) -> None:
        done = 0
        with ThreadPoolExecutor(workers) as pool:  # Pillow decodes and resizes without the interpreter's lock
            for split in SPLITS:
                for batch in _batches(splits[split], side, workers):
                    _decode_batch(root, split, batch, side, config.fit, pool, writer)
                    done += len(batch.paths)
                    progress(f"decoding {config.name}", done, total)

    key: dict[str, object] = {
        "seed": config.seed,
        "side": side,
        "validation_fraction": config.validation_fraction,
        "files": digest,
    }
    if config.fit != "crop":  # caches from before there was a choice stay valid
        key["fit"] = config.fit
    return Source(config.name or "image_folder", key, class_names, write, total, config.max_unreadable)


def _root(config: DataConfig, execution: ExecutionConfig) -> Path:
    if execution.data_root is None:
        how = catalog.DATASETS["image_folder"].how_to_get
        raise ValueError(f"execution.data_root is missing: data.train {config.train!r} needs it; {how}")
    root = Path(execution.data_root).expanduser()
    if not root.is_dir():
        raise ValueError(f"execution.data_root: {root} is not a folder on this machine")
    return root


def _found(root: Path) -> tuple[tuple[str, ...], dict[str, _Listing], str]:
    """Class names, the files of the splits that have a folder, and a hash by which changed files are noticed."""
    digest = hashlib.sha256()
    found: dict[str, _Listing] = {}
    class_names: tuple[str, ...] = ()
    for split in SPLITS:
        folders = [root / name for name in FOLDERS[split] if (root / name).is_dir()]
        if len(folders) > 1:
            raise ValueError(
                f"{root} has both {folders[0].name} and {folders[1].name}; one of them is the {split} split"
            )
        if not folders and split == "train":
            raise ValueError(f"{root} has no folder train; {catalog.DATASETS['image_folder'].how_to_get}")
        if not folders:
            continue
        folder = folders[0]
        names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        if split == "train":
            class_names = tuple(names)
        unknown = [name for name in names if name not in class_names]
        if unknown:
            raise ValueError(f"{folder} has the class {unknown[0]!r}, which {root / 'train'} lacks")
        found[split] = _listing(folder, names, class_names, digest)
    return class_names, found, digest.hexdigest()


def _listing(folder: Path, names: list[str], class_names: tuple[str, ...], digest: hashlib._Hash) -> _Listing:
    """The files in the class folders `names` of a split's folder; adds names, sizes and times of change to `digest`."""
    paths: list[str] = []
    classes: list[int] = []
    for name in names:
        before = len(paths)
        for path, stamp in _images(str(folder / name), f"{folder.name}/{name}"):
            paths.append(path)
            digest.update(f"{path}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        if len(paths) == before:
            raise ValueError(f"{folder / name} has no images; known suffixes: {' '.join(sorted(SUFFIXES))}")
        classes += [class_names.index(name)] * (len(paths) - before)
    if not paths:
        raise ValueError(f"{folder} has no class folders with images; {catalog.DATASETS['image_folder'].how_to_get}")
    return _Listing(tuple(paths), np.array(classes, np.int64))


def _images(folder: str, relative: str) -> Iterator[tuple[str, str]]:
    """Files that by their names are images, in and below a folder, in a fixed order, with size and time of change."""
    with os.scandir(folder) as entries:  # millions of files: Path costs four times as much
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _images(entry.path, f"{relative}/{entry.name}")
        elif f".{entry.name.rpartition('.')[2].lower()}" in SUFFIXES:
            yield f"{relative}/{entry.name}", _stamp(entry)


def _stamp(entry: os.DirEntry[str]) -> str:
    try:
        status = entry.stat()
    except OSError as error:  # a dangling link: decoding will name it as unreadable
        return f"error {error.errno}"
    return f"{status.st_size} {status.st_mtime_ns}"


def _divided(found: dict[str, _Listing], config: DataConfig) -> dict[str, _Listing]:
    """All three splits: those without a folder are taken from training."""
    splits = dict(found)
    for split in ("test", "validation"):
        if split not in found:
            train = splits["train"]
            stream = _ORDER + len(SPLITS) + SPLITS.index(split)
            held = held_out(train.classes, config.validation_fraction, config.seed, stream)
            splits[split], splits["train"] = train.where(held), train.where(~held)
    for split in SPLITS:
        if not splits[split].paths:
            raise ValueError(
                f"data set {config.name!r}: {sum(len(s.paths) for s in splits.values())} images are too few for a "
                f"{split} split by data.validation_fraction {config.validation_fraction}"
            )
    return splits


def _batches(listing: _Listing, side: int, workers: int) -> Iterator[_Listing]:
    size = max(workers, min(512, _BATCH_BYTES // (side * side * 3)))
    for start in range(0, len(listing.paths), size):
        yield listing.where(np.arange(start, min(start + size, len(listing.paths))))


def _decode_batch(
    root: Path, split: str, batch: _Listing, side: int, fit: str, pool: ThreadPoolExecutor, writer: Writer
) -> None:
    decoded = list(pool.map(lambda path: _attempt(root / path, side, fit), batch.paths))
    for path, result in zip(batch.paths, decoded, strict=True):
        if isinstance(result, str):
            writer.skip(path, result)
    images = [result for result in decoded if not isinstance(result, str)]
    if images:
        kept = batch.where(np.array([not isinstance(result, str) for result in decoded]))
        targets = {"classes": kept.classes}
        if fit == "pad":
            targets["content"] = np.stack([image.content for image in images])
        writer.append(split, np.stack([image.pixels for image in images]), targets, kept.paths)


def _attempt(path: Path, side: int, fit: str) -> Square | str:
    """The decoded image, or why there is none."""
    try:
        if not path.is_file():  # a pipe would block
            return "is not a file"
        return decode(path, side, fit)
    except Exception as error:  # noqa: BLE001  (decoders raise nearly anything on damaged files; all are named)
        return f"{type(error).__name__}: {error}"


class Square(NamedTuple):
    """A decoded image: pixels uint8 [side, side, 3], and where they show it, float32 [4]: x0, y0, x1, y1 in px."""

    pixels: npt.NDArray[np.uint8]
    content: npt.NDArray[np.float32]  # x1 and y1 exclusive


def decode(path: Path, side: int, fit: str = "crop") -> Square:
    """An image file as a square of `side` px: RGB, turned as EXIF says, resized bicubic, antialiased.

    Transparent parts become white; 16-bit greys keep their upper bits; of an animation the first frame is taken.

    Args:
        path: of the file.
        side: in px.
        fit: "crop" shows the centre square, which is the same as resizing the shorter side and then cropping, but its
            memory is bounded for long strips too; "pad" shows all of the image, centred, between black margins.

    Raises:
        ValueError: more than MAX_PIXELS, or a kind of pixels that has no defined range.
        Exception: what Pillow raises on damaged files: OSError, SyntaxError, Image.DecompressionBombError and others.
    """
    with Image.open(path) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} × {file.height} px are more than {MAX_PIXELS:,}")
        # JPEG only: decodes at a fraction of a very large size, at least twice what is needed.
        file.draft(None, (2 * side, 2 * side))
        file.load()
        ImageOps.exif_transpose(file, in_place=True)
        image = _rgb(file)
    return _padded(image, side) if fit == "pad" else _cropped(image, side)


def _cropped(image: Image.Image, side: int) -> Square:
    width, height = image.size
    shorter = min(width, height)
    left, top = (width - shorter) / 2, (height - shorter) / 2
    square = (left, top, left + shorter, top + shorter)
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=square))
    return Square(pixels, np.array([0, 0, side, side], np.float32))


def _padded(image: Image.Image, side: int) -> Square:
    longer = max(image.size)
    width, height = (max(1, round(length * side / longer)) for length in image.size)
    left, top = (side - width) // 2, (side - height) // 2
    pixels = np.zeros((side, side, 3), np.uint8)
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    pixels[top : top + height, left : left + width] = whole
    return Square(pixels, np.array([left, top, left + width, top + height], np.float32))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no defined range; save the image with 8 bits a channel")
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, visible).convert("RGB")
    return image.convert("RGB")
