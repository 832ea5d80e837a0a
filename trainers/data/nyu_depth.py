"""The data set `nyu_depth`: NYU Depth v2 from lists of images and 16-bit depth, or from the labelled .mat file."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data.cache import Source
from trainers.data.labels import known_depth, lines_of, read_depth, relative
from trainers.data.listing import Description, Listing, root_of, source, stamps
from trainers.data.splits import uniforms

MAX_DEPTH = 10.0  # m (facebookresearch/dinov2:dinov2/eval/depth, NYU's own configuration)
PER_METER = 1000.0  # of the 16-bit files (zhyever/Monocular-Depth-Estimation-Toolbox:depth/datasets/nyu.py)

# Lists of "IMAGE DEPTH FOCAL_LENGTH" lines as cleinc/bts and zhyever/Monocular-Depth-Estimation-Toolbox have them, and
# the folders to which their paths are relative.
LIST_FOLDERS = ("", "train_test_inputs/")
LISTS = {
    "train": ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
    "test": ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
}
FOLDERS = {"train": ("", "sync/", "official_splits/train/"), "test": ("", "official_splits/test/", "test/")}
LABELLED, PUBLISHED_SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"

_STREAM = 32  # of random numbers; those of other files lie below
_LOOKED_AT = 100  # entries of a list by which its folder is found


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of NYU Depth v2: lists where there are some, else the labelled file with its published split.

    Validation is made of whole scenes of training, about `data.validation_fraction` of its images: images of a scene
    are frames of one video, and look alike.

    Depth is what was measured, 0 where nothing was (`rawDepths` of the labelled file, as cleinc/bts writes it out).

    Raises:
        ValueError: files are missing, lists are damaged, or h5py is needed for the .mat file and not installed.
    """
    root = root_of(config, execution)
    lists = {split: _first(root, [at + name for at in LIST_FOLDERS for name in LISTS[split]]) for split in LISTS}
    if lists["train"] is not None and lists["test"] is not None:
        found, described, files = _from_lists(root, {split: str(name) for split, name in lists.items()})
    elif (root / LABELLED).is_file():
        found, described, files = _from_labelled(root)
    else:
        raise ValueError(
            f"{root} has neither lists ({LISTS['train'][0]} and {LISTS['test'][0]}) nor {LABELLED}; "
            f"{catalog.DATASETS[config.train].how_to_get}"
        )
    scenes = {split: part.scenes for split, part in found.items()}
    held = _held_scenes(scenes["train"], config.validation_fraction, config.seed)
    listings = {
        "train": found["train"].listing.where(~held),
        "validation": found["train"].listing.where(held),
        "test": found["test"].listing,
    }
    return source(config, execution, root, listings, described, stamps(root, tuple(files)), side)


class _Part(NamedTuple):
    """Images of a published split, and the scene that each is of."""

    listing: Listing
    scenes: Sequence[str]


def _first(root: Path, names: Sequence[str]) -> str | None:
    return next((name for name in names if (root / name).is_file()), None)


def _held_scenes(scenes: Sequence[str], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which images are held out: those of scenes drawn until they are `fraction` of all, but never of all scenes."""
    names, number = np.unique(np.array(scenes, object).astype(str), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"nyu_depth: training has images of {len(names)} scenes; needed: 2, one for validation")
    order = uniforms(seed, _STREAM, 0, len(names), 1)[:, 0].argsort()
    total = np.bincount(number, minlength=len(names))[order].cumsum()
    count = 1 + int(np.searchsorted(total, fraction * len(scenes)))
    return np.isin(number, order[: min(count, len(names) - 1)])


def _from_lists(root: Path, lists: Mapping[str, str]) -> tuple[dict[str, _Part], Description, list[str]]:
    found, faults, files = {}, [], list(lists.values())
    for split, name in lists.items():
        pairs = []
        for image, depth in _pairs(root / name):
            if depth is None:
                faults.append((image, f"{name} has no depth for it"))
            else:
                pairs.append((image, depth))
        prefix = _folder(root, [image for image, _ in pairs], split, name)
        images = tuple(prefix + image for image, _ in pairs)
        depths = tuple(prefix + depth for _, depth in pairs)
        files += [*images, *depths]
        recordings = [_recording(str(Path(image).parent)) for image, _ in pairs]
        found[split] = _Part(Listing(images, maps={"depth": depths}), recordings)
    common = set(found["train"].listing.paths) & set(found["test"].listing.paths)
    if common:
        raise ValueError(f"{root}: {min(common)} is in the lists of train and of test")
    read = {"depth": partial(read_depth, per_meter=PER_METER)}
    return found, Description(read=read, facts={"max_depth": MAX_DEPTH}, faults=tuple(faults)), files


def _recording(scene: str) -> str:
    """The recording that a scene is of: its name without the letter of a part, as kitchen_0028a and kitchen_0028b."""
    return re.sub(r"(?<=\d)[a-z]$", "", scene)


def _pairs(path: Path) -> Iterator[tuple[str, str | None]]:
    """Image and depth of each line; None where the list says that there is no depth."""
    seen: set[str] = set()
    for number, line in enumerate(lines_of(path), 1):
        fields = line.split()
        if len(fields) not in (2, 3):
            raise ValueError(f"{path}: entry {number} is {line[:100]!a}; needed: IMAGE DEPTH and perhaps FOCAL_LENGTH")
        image = relative(fields[0], f"{path}: entry {number}")
        if image in seen:
            raise ValueError(f"{path}: entry {number} names {image} again")
        seen.add(image)
        yield image, None if fields[1] == "None" else relative(fields[1], f"{path}: entry {number}")


def _folder(root: Path, images: Sequence[str], split: str, name: str) -> str:
    """The folder to which a list's paths are relative."""
    for folder in FOLDERS[split]:
        if any((root / (folder + image)).is_file() for image in images[:_LOOKED_AT]):
            return folder
    raise ValueError(f"{root / name} names no image that is in {root} or in {', '.join(FOLDERS[split][1:])} there")


def _from_labelled(root: Path) -> tuple[dict[str, _Part], Description, list[str]]:
    """The labelled file's images as LABELLED@NUMBER, from 0; nothing of it but names of scenes is read."""
    splits = _published_splits(root / PUBLISHED_SPLITS)
    labelled = _Labelled(root / LABELLED)
    scenes = labelled.scenes()
    found = {}
    for split, numbers in splits.items():
        if numbers.size == 0 or numbers.min() < 0 or numbers.max() >= len(scenes):
            raise ValueError(f"{root / PUBLISHED_SPLITS} names other images than the {len(scenes)} of {LABELLED}")
        listing = Listing(
            tuple(f"{LABELLED}@image/{number}" for number in numbers.tolist()),
            maps={"depth": tuple(f"{LABELLED}@depth/{number}" for number in numbers.tolist())},
        )
        found[split] = _Part(listing, [_recording(scenes[number]) for number in numbers])
    described = Description(read={"depth": known_depth}, facts={"max_depth": MAX_DEPTH}, open=labelled.open)
    return found, described, [LABELLED, PUBLISHED_SPLITS]


def _published_splits(path: Path) -> dict[str, npt.NDArray[np.int64]]:
    """Numbers of images, from 0."""
    from scipy.io import loadmat

    if not path.is_file():
        raise ValueError(f"{path} is missing: it says which images of {LABELLED} are for training")
    try:
        stored = loadmat(path, variable_names=("trainNdxs", "testNdxs"))
        splits = {s: np.asarray(stored[f"{s}Ndxs"], np.int64).reshape(-1) - 1 for s in ("train", "test")}
    except Exception as error:
        raise ValueError(f"{path} has no trainNdxs and testNdxs: {error}") from error
    numbers = np.concatenate(list(splits.values()))
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError(f"{path} names an image twice")
    return splits


class _Labelled:
    """The labelled file, opened by each process that reads it; HDF5 lets one thread at a time."""

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise ValueError(
                f"{path} is an HDF5 file: install h5py (pip install 'register-ablations[nyu]'), or use lists"
            ) from error
        self._h5py, self._path, self._lock = h5py, path, threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return _Labelled, (self._path,)  # a lock cannot go to other processes

    def scenes(self) -> list[str]:
        """The scene of each image."""
        with self._file() as file:
            return ["".join(map(chr, np.asarray(file[item]).reshape(-1))) for item in file["scenes"][0]]

    def open(self, root: Path, reference: str) -> Any:
        """An image as the bytes of a PPM file, or its depth float32 [H, W] in metres; MATLAB's axes are turned."""
        kind, _, number = reference.partition("@")[2].partition("/")
        with self._lock, self._file() as file:
            stored = np.asarray(file["images" if kind == "image" else "rawDepths"][int(number)])
        if kind == "depth":
            return stored.T.astype(np.float32)
        height, width, _ = (pixels := np.ascontiguousarray(stored.T)).shape
        return io.BytesIO(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes())

    def _file(self) -> Any:
        try:
            return self._h5py.File(self._path, "r")
        except OSError as error:
            raise ValueError(f"{self._path} is no HDF5 file, or a damaged one: {error}") from error
