"""The data set `ade20k`: the SceneParsing benchmark of ADE20K with 150 classes, ADEChallengeData2016."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data.cache import Source
from trainers.data.labels import lines_of, read_class_numbers
from trainers.data.listing import SUFFIXES, Description, Listing, root_of, source, stamps

COUNT = 150  # classes
FOLDER = "ADEChallengeData2016"
SPLITS = {"train": "training", "test": "validation"}  # masks of the test set are secret


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of ADE20k, ROOT/ADEChallengeData2016/{images,annotations}/{training,validation}/.

    Masks are PNGs of 1 … 150, which become 0 … 149; 0, all other things, does not count. The published validation set
    is the test split; validation is a fixed fraction of training. Names are those of objectInfo150.txt where it is
    there. Masks without an image, and images without a mask, are named and count as unreadable.

    Raises:
        ValueError: folders are missing, or the names are not those of 150 classes.
    """
    root = root_of(config, execution)
    base = next((base for base in (f"{FOLDER}/", "") if (root / base / "annotations").is_dir()), None)
    if base is None:
        raise ValueError(
            f"{root} has no {FOLDER} with images and annotations; {catalog.DATASETS[config.train].how_to_get}"
        )
    found, faults, files = {}, [], []
    for split, name in SPLITS.items():
        images, masks = (_files(root / base / kind / name) for kind in ("images", "annotations"))
        common = [stem for stem in images if stem in masks]
        paths = tuple(f"{base}images/{name}/{images[stem]}" for stem in common)
        maps = tuple(f"{base}annotations/{name}/{masks[stem]}" for stem in common)
        faults += [
            (f"{base}images/{name}/{images[stem]}", "is an image without a mask: missing file")
            for stem in images.keys() - masks.keys()
        ]
        faults += [
            (f"{base}annotations/{name}/{masks[stem]}", "is a mask that has no image")
            for stem in masks.keys() - images.keys()
        ]
        files += [*paths, *maps]
        found[split] = Listing(paths, maps={"segmentation": maps})
    described = Description(
        read={"segmentation": partial(read_class_numbers, count=COUNT, first=1, ignored=0)},
        facts={"segmentation_names": _names(root / base / "objectInfo150.txt")},
        faults=tuple(sorted(faults)),
    )
    return source(config, execution, root, found, described, stamps(root, tuple(files)), side)


def _files(folder: Path) -> dict[str, str]:
    """Names of images in a folder by what stands before the suffix, sorted."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    found: dict[str, str] = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if f".{suffix.lower()}" in SUFFIXES:
            if stem in found:
                raise ValueError(f"{folder} has both {found[stem]} and {name}; one of them has to go")
            found[stem] = name
    return found


def _names(path: Path) -> tuple[str, ...]:
    """Names of the classes in full: some of their first words are not unique."""
    if not path.exists():
        return tuple(f"class_{number}" for number in range(1, COUNT + 1))
    rows = [line.split("\t") for line in lines_of(path)[1:]]
    numbers = [row[0].strip() for row in rows]
    if numbers != [str(number) for number in range(1, COUNT + 1)] or any(len(row) < 2 for row in rows):
        raise ValueError(f"{path} does not name classes 1 … {COUNT}, one in each line, with tabs between its columns")
    return tuple(row[-1] for row in rows)
