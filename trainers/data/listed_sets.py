"""The data sets `caltech101`, `cub200` and `places205`: published lists or folders that torchvision does not read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data.cache import Source
from trainers.data.labels import relative
from trainers.data.listing import SUFFIXES, Description, Listing, root_of, source, stamps
from trainers.data.splits import uniforms

# In the order of torchvision, whose own reader guesses the names of files from their number.
_CALTECH101 = (
    "Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai brain "
    "brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body "
    "cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar "
    "elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill "
    "headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus "
    "mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid "
    "revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish "
    "stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat "
    "windsor_chair wrench yin_yang"
)
CALTECH101 = tuple(_CALTECH101.split())
CALTECH101_TRAIN = 30  # images a class, as in CLIP (appendix A: 3,060 of 102 classes); all others are test
_BACKGROUND = "BACKGROUND_Google"  # no class
_STREAM = 16  # of random numbers; those of trainers.data.listing lie below

PLACES205_IMAGES = "data/vision/torralba/deeplearning/images256"
PLACES205_LISTS = {"train": "train_places205.csv", "test": "val_places205.csv"}  # labels of the test set are secret


def caltech101(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of Caltech-101: 30 images of each class for training, drawn by `data.seed`, all others for testing.

    There is no published split. BACKGROUND_Google is left out, as torchvision does.

    Raises:
        ValueError: the folders are not the 101 published ones, or one has too few images.
    """
    root, base = _base(config, execution, "101_ObjectCategories", ("caltech101", "caltech-101"))
    folders = sorted(entry.name for entry in os.scandir(base) if entry.is_dir() and not entry.name.startswith("."))
    unknown = [name for name in folders if name not in (*CALTECH101, _BACKGROUND)]
    if unknown:
        raise ValueError(f"{base / unknown[0]} is none of the 101 published classes")
    splits: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "test": ([], [])}
    for number, name in enumerate(CALTECH101):
        files = _images(base / name) if name in folders else []
        if len(files) < 2:
            raise ValueError(f"{base / name} has {len(files)} images; needed: one for training, one for testing")
        drawn = uniforms(config.seed, _STREAM + number, 0, len(files), 1)[:, 0].argsort()
        count = min(CALTECH101_TRAIN, len(files) - 1)
        for split, chosen in (("train", drawn[:count]), ("test", drawn[count:])):
            splits[split][0].extend(f"{base.relative_to(root)}/{name}/{files[i]}" for i in sorted(chosen))
            splits[split][1].extend([number] * len(chosen))
    listings = {split: _listing(*found) for split, found in splits.items()}
    digest = stamps(root, [path for listing in listings.values() for path in listing.paths])
    described = Description(CALTECH101, key={"train": CALTECH101_TRAIN})
    return source(config, execution, root, listings, described, digest, side)


def cub200(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of CUB-200-2011 by its images.txt, image_class_labels.txt, classes.txt and train_test_split.txt.

    Raises:
        ValueError: a list is missing or damaged, or does not name every image; one line that names it.
    """
    root, base = _base(config, execution, "images.txt", ("CUB_200_2011",))
    listed = base / "images.txt"
    files = {number: relative(path, f"{listed}: image {number}") for number, path in _numbered(listed).items()}
    named = _numbered(base / "classes.txt")
    class_names = tuple(name.partition(".")[2].replace("_", " ") for name in named.values())
    if list(named) != [str(number) for number in range(1, len(named) + 1)]:
        raise ValueError(f"{base / 'classes.txt'} does not number its classes from 1")
    classes = _complete(base / "image_class_labels.txt", files, tuple(named))
    training = _complete(base / "train_test_split.txt", files, ("0", "1"))
    prefix = (base / "images").relative_to(root).as_posix()
    listings = {}
    for split, mark in (("train", "1"), ("test", "0")):
        chosen = [image for image in files if training[image] == mark]
        for image in chosen:
            if files[image].partition("/")[0] != named[classes[image]]:
                raise ValueError(
                    f"{base / 'images' / files[image]}: image_class_labels.txt says class {classes[image]}, which is "
                    f"{named[classes[image]]}"
                )
        listings[split] = _listing([f"{prefix}/{files[i]}" for i in chosen], [int(classes[i]) - 1 for i in chosen])
    lists = ["images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt"]
    digest = stamps(root, [(base / name).relative_to(root).as_posix() for name in lists])
    digest += stamps(root, [path for listing in listings.values() for path in listing.paths])
    described = Description(class_names, facts={"templates": ("a photo of a {}, a type of bird.",)})
    return source(config, execution, root, listings, described, digest, side)


def places205(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of Places205 by the lists of trainvalsplit_places205; the published validation set is the test split.

    A line is PATH NUMBER, and the folder of a path is its class: a/abbey/ is "abbey".

    Raises:
        ValueError: a list is missing or damaged, or gives a folder two numbers; one line that names it.
    """
    root, base = _base(config, execution, "trainvalsplit_places205", ("Places205", "places205"))
    folders: dict[int, str] = {}
    listings = {}
    for split, name in PLACES205_LISTS.items():
        file = base / name
        paths: list[str] = []
        classes: list[int] = []
        for line, text in enumerate(_lines(file), 1):
            path, _, number = text.rpartition(" ")
            if not path or not number.isdecimal():
                raise ValueError(f"{file} line {line}: {text[:80]!r} is not PATH NUMBER")
            path = relative(path, f"{file} line {line}")
            folder = path.rpartition("/")[0]
            if folders.setdefault(int(number), folder) != folder:
                raise ValueError(f"{file} line {line}: {path} has class {number}, which is {folders[int(number)]}")
            paths.append(f"{PLACES205_IMAGES}/{path}")
            classes.append(int(number))
        listings[split] = _listing(paths, classes)
    numbers = sorted(folders)
    if numbers != list(range(len(numbers))) or len(set(folders.values())) != len(folders):
        raise ValueError(f"{base}: its lists do not number their {len(set(folders.values()))} folders from 0")
    class_names = tuple(folders[number].partition("/")[2] or folders[number] for number in numbers)
    digest = stamps(root, [(base / name).relative_to(root).as_posix() for name in PLACES205_LISTS.values()])
    digest += stamps(root, [path for listing in listings.values() for path in listing.paths])
    return source(config, execution, root, listings, Description(class_names), digest, side)


def _base(config: DataConfig, execution: ExecutionConfig, mark: str, names: Sequence[str]) -> tuple[Path, Path]:
    """The root of references, and the folder that `mark` is or lies in, below the root or its folders `names`."""
    root = root_of(config, execution)
    for folder in (root, *(root / name for name in names)):
        marked = folder / mark
        if marked.is_file():
            return folder, folder
        if marked.is_dir():
            return folder, marked
    entry = catalog.DATASETS[config.train]
    raise ValueError(f"{root} has no {mark}; expected: {entry.layout}; {entry.how_to_get}")


def _images(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES and entry.name[0] != ".")


def _listing(paths: Sequence[str], classes: Sequence[int]) -> Listing:
    return Listing(tuple(paths), {"classes": np.array(classes, np.int64)})


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text("utf-8", "surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def _numbered(file: Path) -> dict[str, str]:
    """What a list of lines NUMBER VALUE says, in its order."""
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(file), 1):
        key, _, value = line.strip().partition(" ")
        if not key.isdecimal() or not value or key in found:
            raise ValueError(f"{file} line {number}: {line[:80]!r} is not NUMBER VALUE with a new number")
        found[key] = value
    return found


def _complete(file: Path, images: dict[str, str], allowed: Sequence[str]) -> dict[str, str]:
    """A list that has an allowed value for every image."""
    values = _numbered(file)
    for image, path in images.items():
        if values.get(image) not in allowed:
            given = f"has {values[image]!r}" if image in values else "has nothing"
            raise ValueError(f"{file} {given} for image {image}, {path}; allowed: {allowed[0]} to {allowed[-1]}")
    return values
