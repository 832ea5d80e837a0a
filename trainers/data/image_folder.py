"""The data set `image_folder`: finds a user's own images under ROOT/SPLIT/CLASS/."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS
from trainers.data.cache import Source
from trainers.data.encoded import file_of
from trainers.data.listing import SUFFIXES, Description, Listing, root_of, source

FOLDERS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


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
    root = root_of(config, execution)
    try:
        class_names, found, digest = _found(root)
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
    return source(config, execution, root, found, Description(class_names), digest, side)


def _found(root: Path) -> tuple[tuple[str, ...], dict[str, Listing], str]:
    """Class names, the files of the splits that have a folder, and a hash by which changed files are noticed."""
    digest = hashlib.sha256()
    found: dict[str, Listing] = {}
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
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        if split == "train":
            class_names = tuple(names)
        unknown = [name for name in names if name not in class_names]
        if unknown:
            raise ValueError(f"{folder} has the class {unknown[0]!r}, which {root / 'train'} lacks")
        found[split] = _listing(folder, names, class_names, digest)
    return class_names, found, digest.hexdigest()


def _listing(folder: Path, names: list[str], class_names: tuple[str, ...], digest: hashlib._Hash) -> Listing:
    """The files in the class folders `names` of a split's folder; adds names, sizes and times of change to `digest`."""
    paths: list[str] = []
    classes: list[int] = []
    above = {folder.resolve(), *folder.resolve().parents}
    for name in names:
        if (folder / name).resolve() in above:  # a link: its images would be those of all classes
            raise ValueError(f"{folder / name} is a link to a folder that it is in; it is no class")
        before = len(paths)
        for path, stamp in images_below(str(folder / name), f"{folder.name}/{name}"):
            paths.append(path)
            digest.update(f"{path}\0{stamp}\n".encode("utf-8", "surrogateescape"))
        if len(paths) == before:
            raise ValueError(f"{folder / name} has no images; known suffixes: {' '.join(sorted(SUFFIXES))}")
        classes += [class_names.index(name)] * (len(paths) - before)
    if not paths:
        raise ValueError(f"{folder} has no class folders with images; {catalog.DATASETS['image_folder'].how_to_get}")
    return Listing(tuple(paths), {"classes": np.array(classes, np.int64)})


def images_below(folder: str, relative: str) -> Iterator[tuple[str, str]]:
    """Files that by their names are images, in and below a folder, in a fixed order, with size and time of change.

    Raises:
        ValueError: a path reads like that of an archive's member; see trainers.data.encoded.
    """
    with os.scandir(folder) as entries:  # millions of files: Path costs four times as much
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from images_below(entry.path, f"{relative}/{entry.name}")
        elif f".{entry.name.rpartition('.')[2].lower()}" in SUFFIXES:
            path = f"{relative}/{entry.name}"
            if "@" in path and file_of(path) != path:
                raise ValueError(f"{entry.path}: its name reads like that of a member of an archive; rename it")
            yield path, _stamp(entry)


def _stamp(entry: os.DirEntry[str]) -> str:
    try:
        status = entry.stat()
    except OSError as error:  # a dangling link: decoding will name it as unreadable
        return f"error {error.errno}"
    return f"{status.st_size} {status.st_mtime_ns}"
