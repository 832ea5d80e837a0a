"""The data sets `cifar10` and `cifar100`, from the published pickles, of which only arrays and texts are read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import Progress
from trainers.data.cache import Source, Writer
from trainers.data.listing import root_of
from trainers.data.splits import held_out

SIDE = 32  # px
_CHUNK = 1_000


class _Published(NamedTuple):
    folder: str
    train: tuple[str, ...]
    test: str
    names: tuple[str, str]  # file and key
    labels: str


_SETS = {
    "cifar10": _Published(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        ("batches.meta", "label_names"),
        "labels",
    ),
    "cifar100": _Published("cifar-100-python", ("train",), "test", ("meta", "fine_label_names"), "fine_labels"),
}


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2: by _codecs.encode, of which nothing else is allowed."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding}, which is not allowed")
    return text.encode("latin1")


# What numpy's arrays are pickled as, under the names of numpy 1 and 2.
_ALLOWED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    """Refuses everything but arrays and built-in types, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of `config.train` in RGB images of `side` px, resized (bicubic) where that is not its own 32.

    The published test set is the test split; validation is a fixed, stratified `validation_fraction` of training.

    Raises:
        ValueError: files are missing or damaged; one line that names them.
    """
    published = _SETS[config.train]
    root = root_of(config, execution)
    folder = next((path for path in (root / published.folder, root) if (path / published.test).is_file()), None)
    if folder is None:
        entry = catalog.DATASETS[config.train]
        raise ValueError(
            f"{root} has no {published.folder}/{published.test}; expected: {entry.layout}; {entry.how_to_get}"
        )
    class_names = _names(folder, published)
    files = [folder / name for name in (*published.train, published.test)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing")

    def write(writer: Writer, progress: Progress) -> None:
        parts = [_read(file, published.labels, len(class_names)) for file in files[:-1]]
        images, classes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        test_images, test_classes = _read(files[-1], published.labels, len(class_names))
        held = held_out(classes, config.validation_fraction, config.seed, stream=0)
        done, total = 0, len(images) + len(test_images)
        splits = {
            "train": (images[~held], classes[~held]),
            "validation": (images[held], classes[held]),
            "test": (test_images, test_classes),
        }
        for split, (pixels, labels) in splits.items():
            for start in range(0, len(pixels), _CHUNK):
                part = slice(start, start + _CHUNK)
                writer.append(split, _resized(pixels[part], side), {"classes": labels[part]})
                done += len(labels[part])
                progress(f"decoding {config.train}", done, total)

    key = {
        "seed": config.seed,
        "side": side,
        "validation_fraction": config.validation_fraction,
        "files": [[file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    return Source(config.name or config.train, key, class_names, write)


def _names(folder: Path, published: _Published) -> tuple[str, ...]:
    file, key = folder / published.names[0], published.names[1]
    names = _unpickled(file).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} has no list {key}")
    return tuple(names)


def _read(file: Path, labels: str, num_classes: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images uint8 [n, 32, 32, 3] and classes int64 [n]."""
    content = _unpickled(file)
    pixels, numbers = content.get("data"), content.get(labels)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * SIDE * SIDE,):
        raise ValueError(f"{file}: data is no uint8 array [n, {3 * SIDE * SIDE}]")
    if not isinstance(numbers, list) or len(numbers) != len(pixels):
        raise ValueError(f"{file}: {labels} is no list of {len(pixels)} numbers")
    if wrong := [number for number in numbers if type(number) is not int or not 0 <= number < num_classes]:
        raise ValueError(f"{file}: {labels} has {str(wrong[0])[:40]!r}; allowed: 0 to {num_classes - 1}")
    return pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), np.array(numbers, np.int64)


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = _Unpickler(opened, encoding="latin1").load()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    # What unpickling raises on other content.
    except (
        *(pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError),
        *(ImportError, OverflowError, MemoryError, RecursionError),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is damaged or not the published file: {reason[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no dictionary")
    return content


def _resized(images: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    if side == SIDE:
        return np.ascontiguousarray(images)
    resized = (Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images)
    return np.stack([np.asarray(image) for image in resized])
