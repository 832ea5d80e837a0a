"""The data sets `imagenet1k` and `imagenet22k`: folders of synsets, or the published archives, read where they lie."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import archives
from trainers.data.cache import Source
from trainers.data.encoded import member as reference
from trainers.data.image_folder import images_below
from trainers.data.listing import SUFFIXES, Description, Listing, root_of, source, stamps

TRAIN_ARCHIVE, VAL_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
FOLDERS_22K = ("", "train", "winter21_whole", "fall11_whole")
ARCHIVES_22K = ("fall11_whole.tar", "winter21_whole.tar")

_SYNSET = re.compile(r"n\d{8}")
_OF_SYNSET = re.compile(r"(n\d{8})_\w+")
_VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})")

Images = Iterable[tuple[str, str, str]]  # synset, file name, reference


@dataclass
class _Found:
    """Images of a split with their classes, and what is not what it should be, with the reason."""

    numbers: Mapping[str, int]
    paths: list[str] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def add(self, images: Images) -> _Found:
        """Adds images; one whose name begins with another synset than its folder's is left out and named."""
        for synset, name, path in images:
            said = _OF_SYNSET.match(name)
            if said is not None and said[1] != synset:
                self.faults.append((path, f"its name says class {said[1]}, its folder {synset}"))
                continue
            self.paths.append(path)
            self.classes.append(self.numbers[synset])
        return self

    def listing(self) -> Listing:
        return Listing(tuple(self.paths), {"classes": np.array(self.classes, np.int64)})


def imagenet1k(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of ILSVRC2012: the published validation set is the test split, the published test set has no labels.

    Training: train/SYNSET/ or ILSVRC2012_img_train.tar. Validation: val/SYNSET/, or val/ without folders or
    ILSVRC2012_img_val.tar, whose classes ILSVRC2012_devkit_t12 (a folder, or as .tar.gz) tells. Archives are not
    unpacked. Classes are the 1,000 synsets in their order; their names and templates are those of CLIP.

    Raises:
        ValueError: files are missing, damaged or of unknown synsets; one line that says what is expected.
    """
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    root = root_of(config, execution)
    numbers = {synset: number for number, synset in enumerate(_synsets("imagenet1k"))}
    train = _Found(numbers).add(_checked(_train_1k(config, root, cache), numbers, root))
    test = _Found(numbers).add(_checked(_val_1k(config, root, cache), numbers, root))
    listings = {"train": train.listing(), "test": test.listing()}
    digest = stamps(root, train.paths + test.paths)
    templates = tuple(dict.fromkeys(template("{}") for template in OPENAI_IMAGENET_TEMPLATES))
    described = Description(
        tuple(IMAGENET_CLASSNAMES), facts={"templates": templates}, faults=tuple(train.faults + test.faults)
    )
    return source(config, execution, root, listings, described, digest, side)


def imagenet22k(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of ImageNet-22k (fall11 or winter21): one folder or archive for each synset, or fall11_whole.tar.

    There are no published splits: test and validation are fixed fractions of all images. Classes are the synsets that
    are there, in their order.

    Memory: about 130 bytes an image for the references, 1.9 GB for 14.2 million, in every process that opens the data
    set. The one archive fall11_whole.tar takes more while it is listed: all of its members are held at once.

    Raises:
        ValueError: there is no synset, an unknown one, one twice, or a damaged archive.
    """
    from timm.data.imagenet_info import ImageNetInfo

    root = root_of(config, execution)
    known = {*_synsets("imagenet22k"), *_synsets("imagenet21k")}  # two more in the latter than in fall11
    by_synset = _by_synset(_checked(_all_22k(config, root, cache), known, root))
    synsets = list(by_synset)
    paths = tuple(chain.from_iterable(part.paths for part in by_synset.values()))
    counts = [len(part.paths) for part in by_synset.values()]
    classes = np.repeat(np.arange(len(synsets), dtype=np.int64), counts)
    faults = tuple(chain.from_iterable(part.faults for part in by_synset.values()))
    describe: Callable[[str], str] = ImageNetInfo("imagenet21k").label_name_to_description
    names = tuple(describe(synset) for synset in synsets)
    described = Description(names, key={"synsets": synsets}, faults=faults)
    listing = Listing(paths, {"classes": classes})
    return source(config, execution, root, {"train": listing}, described, stamps(root, paths), side)


def _by_synset(images: Images) -> dict[str, _Found]:
    """Images by synset, both in their order; those of one synset follow one another, and only they are sorted."""
    found: dict[str, _Found] = {}
    for synset, together in groupby(images, key=lambda image: image[0]):
        found.setdefault(synset, _Found({synset: 0})).add(sorted(together))
    return dict(sorted(found.items()))


def _synsets(subset: str) -> list[str]:
    """The synsets of what timm calls a subset of ImageNet, in the order of their classes."""
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo(subset)
    return list(info.label_names())


def _checked(images: Images, known: Iterable[str], root: Path) -> Iterator[tuple[str, str, str]]:
    allowed = frozenset(known)
    for synset, name, path in images:
        if synset not in allowed:
            raise ValueError(f"{root / path}: {synset} is none of the {len(allowed):,} published synsets")
        yield synset, name, path


def _missing(config: DataConfig, root: Path, what: str) -> ValueError:
    entry = catalog.DATASETS[config.train]
    return ValueError(f"{root} has no {what}; expected: {entry.layout}; {entry.how_to_get}")


def _train_1k(config: DataConfig, root: Path, cache: Path) -> Images:
    if (root / "train").is_dir():
        return _folders(root, root / "train")
    if (root / TRAIN_ARCHIVE).is_file():
        return _nested(root, root / TRAIN_ARCHIVE, cache)
    raise _missing(config, root, f"folder train and no {TRAIN_ARCHIVE}")


def _val_1k(config: DataConfig, root: Path, cache: Path) -> Images:
    folder, archive = root / "val", root / VAL_ARCHIVE
    if folder.is_dir() and any(_SYNSET.fullmatch(entry.name) for entry in folder.iterdir()):
        return _folders(root, folder)
    if folder.is_dir():
        flat = [(Path(path).name, path) for path, _ in images_below(str(folder), "val")]
    elif archive.is_file():
        name = archives.referable(root, archive)
        flat = [
            (Path(found.name).name, reference(name, found.offset, found.size, found.name))
            for found in archives.index(cache, archive)
        ]
    else:
        raise _missing(config, root, f"folder val and no {VAL_ARCHIVE}")
    return _told(flat, _truth(config, root), folder if folder.is_dir() else archive)


def _told(flat: list[tuple[str, str]], truth: list[str], where: Path) -> Images:
    """Validation images with the class that the ground truth has for their number."""
    for name, path in flat:
        found = _VALIDATION.match(name)
        if found is None or not 0 < int(found[1]) <= len(truth):
            raise ValueError(f"{where}: {name} is none of the {len(truth):,} validation images")
        yield truth[int(found[1]) - 1], name, path


def _truth(config: DataConfig, root: Path) -> list[str]:
    """The synset of each validation image, from the development kit."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    folder, archive = root / DEVKIT, root / f"{DEVKIT}.tar.gz"
    try:
        if folder.is_dir():
            kit = {name: (folder / name).read_bytes() for name in (TRUTH, META)}
        elif archive.is_file():
            found = archives.contents(archive, lambda name: name.endswith((TRUTH, META)))
            kit = {name: content for name in (TRUTH, META) for path, content in found.items() if path.endswith(name)}
        else:
            raise _missing(config, root, f"{DEVKIT}, which tells the classes of validation images")
        synsets = loadmat(io.BytesIO(kit[META]), squeeze_me=True)["synsets"]
        by_number = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        return [str(by_number[int(line)]) for line in kit[TRUTH].decode("ascii").split()]
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from error
    except (
        *(LookupError, TypeError, AttributeError, UnicodeDecodeError, NotImplementedError, EOFError),
        *(MatReadError, zlib.error),
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{root / DEVKIT} is damaged or not the published one: {reason}") from error


def _all_22k(config: DataConfig, root: Path, cache: Path) -> Iterator[tuple[str, str, str]]:
    archive = next((root / name for name in ARCHIVES_22K if (root / name).is_file()), None)
    if archive is not None:
        yield from _nested(root, archive, cache)
        return
    for folder in (root / name for name in FOLDERS_22K if (root / name).is_dir()):
        entries = sorted(entry for entry in folder.iterdir() if _SYNSET.fullmatch(entry.name.removesuffix(".tar")))
        twice = next((entry for entry in entries if entry.is_dir() and entry.with_suffix(".tar") in entries), None)
        if twice is not None:
            raise ValueError(f"{folder} has {twice.name} as a folder and as an archive; one of them is enough")
        if entries:
            for entry in entries:
                yield from _folder(root, entry) if entry.is_dir() else _archive(root, entry, cache)
            return
    raise _missing(config, root, "folders or archives of synsets")


def _folders(root: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            if not _SYNSET.fullmatch(entry.name):
                raise ValueError(f"{entry} is no synset; allowed are folders such as n01440764")
            yield from _folder(root, entry)


def _folder(root: Path, folder: Path) -> Iterator[tuple[str, str, str]]:
    for path, _ in images_below(str(folder), folder.relative_to(root).as_posix()):
        yield folder.name, PurePosixPath(path).name, path


def _archive(root: Path, archive: Path, cache: Path) -> Iterator[tuple[str, str, str]]:
    name = archives.referable(root, archive)
    for found in archives.index(cache, archive):
        if PurePosixPath(found.name).suffix.lower() in SUFFIXES:
            yield archive.stem, PurePosixPath(found.name).name, reference(name, found.offset, found.size, found.name)


def _nested(root: Path, archive: Path, cache: Path) -> Iterator[tuple[str, str, str]]:
    """The images of an archive of archives, one for each synset."""
    name = archives.referable(root, archive)
    for found in archives.index(cache, archive):
        inner, _, file = found.name.rpartition(".tar/")
        synset = PurePosixPath(inner).name
        if not _SYNSET.fullmatch(synset):
            raise ValueError(f"{archive} holds {found.name}; expected are archives such as n01440764.tar")
        yield synset, PurePosixPath(file).name, reference(name, found.offset, found.size, found.name)
