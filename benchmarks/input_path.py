"""Images per second from files to normalised views: streamed and memory-mapped, against torchvision's usual loader."""

from __future__ import annotations

import importlib.util
import os
import random
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.report import Comparison, Goal, Report, Settings
from benchmarks.turns import Side
from trainers import augment
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import open_data
from trainers.data.pictures import decode_whole
from trainers.data.streamed import decode_original
from trainers.loader import Order, Reader, Shares, batches
from trainers.method_settings import DeiT3Config
from trainers.ragged import Images
from trainers.streams import Streams

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg")
IMAGES = 256  # of a turn, all of them once: about a second on a core that others use too
BATCH = 64
IMAGE_SIZE = 224
DECODED = 64  # images that the decoders are compared on
SECONDS = 240.0  # after which there are no more pairs
CROPS = DeiT3Config(crop="resized", flip=True, three_augment=False, color_jitter=0.0)

_THEIRS = (
    "torchvision ImageFolder, RandomResizedCrop (bicubic), flip, ToTensor, Normalize in a DataLoader with {} workers"
)


def measure(settings: Settings) -> Report:
    """Our images/s over torchvision's, by where images come from; both with as many cores as `threads`."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-settings.threads :])
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        root = Path(name)
        size = write_photographs(root / "files")
        pack(root / "files", root / "shards")
        ours = {
            "JPEG files": lambda: _ours(root, "files", "original", settings.threads, _views),
            "tar of JPEGs": lambda: _ours(root, "shards", "original", settings.threads, _views),
            "JPEG files, cropped only": lambda: _ours(root, "files", "original", settings.threads, _crops),
            "memory map of 256 px": lambda: _ours(root, "files", 256, settings.threads, _views),
        }
        # Folders are listed and squares decoded before anything is timed.
        sides = [side() for side in ours.values()]
        seconds = _in_turns([_theirs(root / "files", settings.threads), *sides], settings.pairs)
        decoders = _decoders(root / "files", settings.pairs)
    theirs, *mine = ([IMAGES / s / settings.threads for s in side] for side in seconds)
    said = _THEIRS.format(settings.threads)
    comparisons = [
        Comparison(f"{source} to views", (_SIDES[source], said), rates, theirs, "images/s per core", _GOALS[source])
        for source, rates in zip(ours, mine, strict=True)
    ]
    return Report([*comparisons, decoders], {"images": IMAGES, "batch": BATCH, "mean_bytes": size})


_OURS = "trainers.loader: {}, decoded whole, random resized crop (bicubic), flip, normalised in batches"
_SIDES = {
    "JPEG files": _OURS.format("files"),
    "tar of JPEGs": _OURS.format("members of an uncompressed tar, read in place"),
    "JPEG files, cropped only": "trainers.loader: files, decoded whole, random resized crop (bicubic), not normalised",
    "memory map of 256 px": "trainers.loader: uint8 squares of 256 px, the same crop, flip and normalisation",
}
_GOALS = {
    "JPEG files": Goal(1.0, at_most=False),
    "tar of JPEGs": Goal(1.0, at_most=False),
    "JPEG files, cropped only": None,
    "memory map of 256 px": Goal(1.0, at_most=False),
}


def write_photographs(root: Path, images: int = IMAGES) -> float:
    """Photographs of 500 × 375 px or upright, quality 90, as an image folder; the mean of their bytes."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None
    data = Path(spec.origin).parent / "data"
    draw, sizes = random.Random(0), []
    opened = [Image.open(data / name).convert("RGB") for name in PHOTOGRAPHS]
    for split, count in (("train", images), ("validation", len(opened)), ("test", len(opened))):
        for index in range(count):
            photograph = opened[index % len(opened)]
            size = (500, 375) if draw.random() < 0.7 else (375, 500)
            largest = min(photograph.width / size[0], photograph.height / size[1])
            width, height = (int(length * largest * draw.uniform(0.7, 1.0)) for length in size)
            left, top = draw.randint(0, photograph.width - width), draw.randint(0, photograph.height - height)
            crop = photograph.resize(size, box=(left, top, left + width, top + height))
            file = root / split / PHOTOGRAPHS[index % len(opened)][:-4] / f"{index:04}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            crop.save(file, quality=90)
            sizes.append(file.stat().st_size)
    return float(np.mean(sizes))


def pack(folder: Path, shards: Path) -> None:
    """The images of an image folder in one tar for each split, each with a caption."""
    for split in ("train", "validation", "test"):
        (shards / split).mkdir(parents=True)
        with tarfile.open(shards / split / "0.tar", "w") as tar:
            for index, file in enumerate(sorted((folder / split).rglob("*.jpg"))):
                caption = file.with_suffix(".txt")
                caption.write_text(f"{file.parent.name} {index}")
                for member in (file, caption):
                    tar.add(member, f"{index:05}{member.suffix}")
                caption.unlink()


def _ours(
    root: Path, folder: str, decode_size: object, threads: int, finish: Callable[[Images, Generator], Tensor]
) -> Side:
    family = {"files": "image_folder", "shards": "image_text"}[folder]
    config = DataConfig.model_validate({"train": family, "name": folder, "decode_size": decode_size, "scenes": None})
    data = open_data(config, ExecutionConfig(data_root=str(root), threads=threads), IMAGE_SIZE, root / "cache")
    steps, generator = IMAGES // BATCH, Streams(0).torch("augment")
    order, shares = Order(len(data.train), BATCH, Streams(0)), Shares(BATCH, BATCH)

    def turn() -> float:
        # A reader of its own, which decodes nothing beyond its last step in the turns of others.
        reader = Reader(data.train, order, shares, (), lambda _: {}, torch.device("cpu"), steps)
        started = time.perf_counter()
        for batch in batches(reader, 0, steps):
            finish(batch.images, generator)
        return time.perf_counter() - started

    return turn


def _views(images: Images, generator: Generator) -> Tensor:
    return augment.three_augment(images, IMAGE_SIZE, CROPS, generator)


def _crops(images: Images, generator: Generator) -> Tensor:
    boxes = augment.draw_resized_boxes(len(images), augment.sizes_of(images), generator)
    return augment.resized_crop(images, boxes, torch.zeros(len(images), dtype=torch.bool), IMAGE_SIZE)


def _theirs(root: Path, threads: int) -> Side:
    bicubic = transforms.InterpolationMode.BICUBIC
    changed = transforms.Compose(
        [
            transforms.RandomResizedCrop(IMAGE_SIZE, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD),
        ]
    )
    images = datasets.ImageFolder(str(root / "train"), changed)
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=threads, persistent_workers=True)

    def turn() -> float:
        started = time.perf_counter()
        for _views, _classes in loader:
            pass
        return time.perf_counter() - started

    return turn


def _decoders(root: Path, pairs: int) -> Comparison:
    """Why JPEGs go through torchvision's decoder: what it takes more or less than Pillow's, for the same pixels."""
    files = sorted((root / "train").rglob("*.jpg"))[:DECODED]
    ours, theirs = _in_turns([_each(files, decode_original), _each(files, decode_whole)], pairs)
    sides = ("trainers.data.streamed.decode_original: torchvision's", "trainers.data.pictures.decode_whole: Pillow's")
    rates = ([DECODED / s for s in side] for side in (ours, theirs))
    return Comparison("decoder of JPEG files", sides, *rates, "images/s per core", None)


def _each(files: list[Path], decode: Callable[[Path], object]) -> Side:
    def turn() -> float:
        started = time.perf_counter()
        for file in files:
            decode(file)
        return time.perf_counter() - started

    return turn


def _in_turns(sides: list[Side], pairs: int) -> list[list[float]]:
    """Seconds of every side, turn by turn; the first turns, in which workers start, do not count."""
    deadline = time.perf_counter() + SECONDS
    rows: Iterator[list[float]] = ([side() for side in sides] for _ in range(pairs + 1))
    next(rows)
    kept = [next(rows)]
    while len(kept) < pairs and time.perf_counter() < deadline:
        kept.append(next(rows))
    return [list(side) for side in zip(*kept, strict=True)]
