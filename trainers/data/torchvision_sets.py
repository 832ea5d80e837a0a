"""Data sets of which torchvision knows layout and index files: it lists their images, nothing is decoded here."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS
from trainers.data.cache import Source
from trainers.data.encoded import leads_out
from trainers.data.labels import relative
from trainers.data.listing import Description, Listing, root_of, source, stamps


@dataclass(frozen=True)
class _Family:
    """What torchvision calls a data set, where it expects it, its splits, and what is published of it.

    Attributes:
        dataset: a class of torchvision.datasets.
        base: the folder that it looks for under its root.
        splits: arguments for each published split; where there is none, it is taken from training.
        indexes: files below `base` that list images and classes.
        templates: CLIP's for zero-shot classification (openai/CLIP:data/prompts.md).
        checks_sums: whether it refuses index files by their MD5.
    """

    dataset: str
    base: str
    splits: Mapping[str, Mapping[str, Any]]
    indexes: tuple[str, ...]
    templates: tuple[str, ...]
    checks_sums: bool = False


_THREE: Mapping[str, Mapping[str, Any]] = {
    "train": {"split": "train"},
    "validation": {"split": "val"},
    "test": {"split": "test"},
}
_TWO: Mapping[str, Mapping[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}

_FAMILIES = {
    "fgvc_aircraft": _Family(
        "FGVCAircraft",
        "fgvc-aircraft-2013b",
        {split: {**arguments, "annotation_level": "variant"} for split, arguments in _THREE.items()},
        ("data/variants.txt", *(f"data/images_variant_{split}.txt" for split in ("train", "val", "test"))),
        ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    ),
    "stanford_cars": _Family(
        "StanfordCars",
        "stanford_cars",
        _TWO,
        ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
        (
            *("a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "i love my {}!"),
            *(f"a photo of my {kind} {{}}." for kind in ("dirty", "clean", "new", "old")),
        ),
    ),
    "dtd": _Family(
        "DTD",
        "dtd/dtd",
        {split: {**arguments, "partition": 1} for split, arguments in _THREE.items()},
        tuple(f"labels/{split}1.txt" for split in ("train", "val", "test")),
        tuple(
            f"a photo of {article} {{}} {noun}."
            for article in ("a", "the")
            for noun in ("texture", "pattern", "thing", "object")
        ),
    ),
    "flowers102": _Family(
        "Flowers102",
        "flowers-102",
        _THREE,
        ("imagelabels.mat", "setid.mat"),
        ("a photo of a {}, a type of flower.",),
        checks_sums=True,
    ),
    "food101": _Family(
        "Food101",
        "food-101",
        _TWO,
        ("meta/train.json", "meta/test.json"),
        ("a photo of {}, a type of food.",),
    ),
    "oxford_pets": _Family(
        "OxfordIIITPet",
        "oxford-iiit-pet",
        {"train": {"split": "trainval"}, "test": {"split": "test"}},
        ("annotations/trainval.txt", "annotations/test.txt"),
        ("a photo of a {}, a type of pet.",),
    ),
    "sun397": _Family(
        "SUN397",
        "SUN397",
        {"train": {}},
        ("ClassName.txt",),
        ("a photo of a {}.", "a photo of the {}."),
    ),
}
PARTITION = {"train": "Training_01.txt", "test": "Testing_01.txt"}  # of SUN397, from its Partitions.zip
WITHOUT_PARTITION = "Training_01.txt and Testing_01.txt are not there: the test split is not the published one"


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of the data set `config.train` in the layout of torchvision's download.

    FGVC-Aircraft has the classes "variant"; DTD is its partition 1; of SUN397 the first published partition divides
    training and test, and without its two lists the test split is a fixed `data.validation_fraction`, which the
    source's notes say. Published validation sets are validation; else it is a fixed fraction of training.

    Raises:
        ValueError: the files are not as torchvision expects them; one line that says where and what.
    """
    family = _FAMILIES[config.train]
    root = _root(config, execution, family)
    base = root / family.base
    missing = [name for name in family.indexes if not (base / name).is_file()]
    if missing:
        raise ValueError(f"{base / missing[0]} is missing; {_expected(config)}")
    listings, class_names = {}, None
    for split, arguments in family.splits.items():
        listing, names = _listed(config, family, root, arguments)
        if class_names is not None and names != class_names:
            odd = sorted(set(names) ^ set(class_names))
            raise ValueError(f"{base}: train and {split} have different classes: {', '.join(odd[:3]) or 'in order'}")
        listings[split], class_names = listing, names
    assert class_names is not None
    notes: tuple[str, ...] = ()
    if config.train == "sun397":
        listings, notes = _partition(base, listings["train"], class_names)
    digest = stamps(root, tuple(f"{family.base}/{name}" for name in family.indexes))
    digest += stamps(root, tuple(path for split in SPLITS if split in listings for path in listings[split].paths))
    described = Description(class_names, facts={"templates": family.templates, "notes": notes})
    return source(config, execution, root, listings, described, digest, side)


def _expected(config: DataConfig) -> str:
    entry = catalog.DATASETS[config.train]
    return f"expected: {entry.layout}; {entry.how_to_get}"


def _root(config: DataConfig, execution: ExecutionConfig, family: _Family) -> Path:
    """What torchvision calls root, the folder that `base` lies in, whether that or `base` itself was named."""
    named = root_of(config, execution).absolute()
    given = Path(str(execution.data_root)).expanduser().absolute()
    for folder in (named, given, *given.parents[: family.base.count("/") + 1]):
        base = folder / family.base
        if base.is_dir() and (folder in (named, given) or base == given or base.parent == given):
            return folder
    raise ValueError(f"{given} has no folder {family.base}; {_expected(config)}")


def _listed(
    config: DataConfig, family: _Family, root: Path, arguments: Mapping[str, Any]
) -> tuple[Listing, tuple[str, ...]]:
    """The images of a published split, and the names of all classes."""
    import torchvision.datasets
    from scipy.io.matlab import MatReadError

    kind = getattr(torchvision.datasets, family.dataset)
    if family.checks_sums:  # MD5 of the index files, which `orchestrate data check` does better: by the images
        kind = type(kind.__name__, (kind,), {"_check_integrity": lambda self: self._images_folder.is_dir()})
    try:
        opened = kind(str(root), download=False, **arguments)
        files, classes = _samples(opened)
        names = tuple(str(name) for name in opened.classes)
    # What torchvision's readers raise on index files with other content: lookups, splits, JSON, scipy's formats.
    except (
        *(RuntimeError, OSError, LookupError, ValueError, TypeError, AttributeError, EOFError),
        *(MatReadError, zlib.error),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"{reason} is no known class"
        place = ", ".join(f"{key} {value}" for key, value in arguments.items())
        raise ValueError(
            f"{root / family.base} ({place}): the lists are not as expected: {reason[:300]}; {_expected(config)}"
        ) from error
    wrong = [file for file, number in zip(files, classes, strict=True) if not 0 <= number < len(names)]
    if wrong:
        raise ValueError(f"{wrong[0]}: its class is none of the {len(names)} of {root / family.base}")
    paths = tuple(os.path.relpath(file, root) for file in files)
    outside = [path for path in paths if leads_out(path)]
    if outside:
        raise ValueError(f"{root / family.base} lists {outside[0]!a}, which leads out of {root}")
    doubled = len(paths) - len(set(paths))
    if doubled:
        raise ValueError(f"{root / family.base} lists {doubled} images twice")
    return Listing(paths, {"classes": np.array(classes, np.int64)}), names


def _samples(opened: Any) -> tuple[Sequence[str], Sequence[int]]:
    """Files and classes of a data set of torchvision, sorted by file where it walks folders in the system's order."""
    if hasattr(opened, "_samples"):
        return [file for file, _ in opened._samples], [int(number) for _, number in opened._samples]
    files = [str(file) for file in (opened._images if hasattr(opened, "_images") else opened._image_files)]
    together = sorted(zip(files, opened._labels, strict=True))
    return [file for file, _ in together], [int(number) for _, number in together]


def _partition(base: Path, found: Listing, names: tuple[str, ...]) -> tuple[dict[str, Listing], tuple[str, ...]]:
    """SUN397's first published partition, 50 + 50 images of each class; all images where it is not there."""
    files = {}
    for split, name in PARTITION.items():
        places = [folder / name for folder in (base, base.parent, base / "Partitions", base.parent / "Partitions")]
        file = next((place for place in places if place.is_file()), None)
        if file is not None:
            files[split] = file
    if len(files) < len(PARTITION):
        return {"train": found}, (WITHOUT_PARTITION,)
    numbers = {name: number for number, name in enumerate(names)}
    listings = {}
    for split, file in files.items():
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        listed = [relative(line, f"{file}: entry {number}") for number, line in enumerate(lines, 1)]
        unknown = [path for path in listed if path.rpartition("/")[0].partition("/")[2] not in numbers]
        if unknown:
            raise ValueError(f"{file} names {unknown[0]}, whose folder is no class of {base / 'ClassName.txt'}")
        classes = [numbers[path.rpartition("/")[0].partition("/")[2]] for path in listed]
        paths = tuple(f"{base.name}/{path}" for path in listed)
        listings[split] = Listing(paths, {"classes": np.array(classes, np.int64)})
    return listings, ()
