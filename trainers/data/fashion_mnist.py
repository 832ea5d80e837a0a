"""The data set `fashion_mnist`: 70,000 real photographs of clothes, from idx files that are there or downloaded."""

from __future__ import annotations

import gzip
import socket
import tempfile
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainers.config import DataConfig, ExecutionConfig
from trainers.data import Progress
from trainers.data.cache import Source, Writer, locked
from trainers.data.splits import held_out

# torchvision.datasets.FashionMNIST.classes without importing torchvision
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

_LARGEST_FILE = 2**28  # bytes, unpacked; the real ones have 47 MB
_DOWNLOAD_SECONDS = 20.0  # without an answer
_CHUNK = 1_000


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of Fashion-MNIST in RGB images of `side` px, resized (bicubic) where that is not its own 28.

    The files, packed or not, are looked for in `execution.data_root`, in the folder of Debian's package and in an
    earlier download; else torchvision downloads them into `data_root` or the cache. The published test set is the
    test split; validation is a fixed, stratified `validation_fraction` of the training set.

    Raises:
        ValueError: the files are nowhere and cannot be downloaded; says how to get them.
    """
    files = _found(config, execution, cache)

    def write(writer: Writer, progress: Progress) -> None:
        images, classes = _read(files[0], files[1])
        test_images, test_classes = _read(files[2], files[3])
        held = held_out(classes, config.validation_fraction, config.seed, stream=0)
        splits = {
            "train": (images[~held], classes[~held]),
            "validation": (images[held], classes[held]),
            "test": (test_images, test_classes),
        }
        done, total = 0, len(images) + len(test_images)
        for split, (grey, labels) in splits.items():
            for start in range(0, len(grey), _CHUNK):
                part = slice(start, start + _CHUNK)
                writer.append(split, _colour(grey[part], side), {"classes": labels[part]})
                done += len(grey[part])
                progress("decoding Fashion-MNIST", done, total)

    key = {
        "seed": config.seed,
        "side": side,
        "validation_fraction": config.validation_fraction,
        "files": [file.stat().st_size for file in files],
    }
    return Source(config.name or "fashion_mnist", key, CLASS_NAMES, write)


def _found(config: DataConfig, execution: ExecutionConfig, cache: Path) -> list[Path]:
    """The four idx files, downloaded where they are nowhere."""
    root = None if execution.data_root is None else Path(execution.data_root).expanduser()
    download = root or cache / "downloads"
    folders = [SYSTEM_FOLDER, download / "FashionMNIST" / "raw"]
    if root is not None:
        folders = [root, root / "fashion-mnist", root / "FashionMNIST" / "raw", SYSTEM_FOLDER]
    files = _files_in(folders)
    if files is None:
        try:
            download.mkdir(parents=True, exist_ok=True)
            with locked(download / ".fashion_mnist.lock", lambda: None):
                if _files_in(folders) is None:
                    _download(download)
        except (OSError, RuntimeError, HTTPException) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"data.train {config.train!r}: Fashion-MNIST is neither in {' nor in '.join(map(str, folders))}, and "
                f"cannot be downloaded into {download} ({reason[:200]}); apt-get install dataset-fashion-mnist, or "
                f"name a folder with its four idx files in execution.data_root"
            ) from error
        files = _files_in(folders)
    assert files is not None
    return files


def _files_in(folders: list[Path]) -> list[Path] | None:
    """The four files in the first folder that has them all, plain or packed."""
    for folder in folders:
        choices = [(folder / name, folder / f"{name}.gz") for name in FILES]
        files = [next((file for file in either if file.is_file()), None) for either in choices]
        if all(files):
            return [file for file in files if file is not None]
    return None


def _download(folder: Path) -> None:
    """Downloads with torchvision, which checks MD5 sums, and publishes by rename.

    Raises:
        OSError, RuntimeError: no network, no answer, a wrong sum, or a folder that cannot be written.
    """
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)  # torchvision's own downloads wait for ever
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
            FashionMNIST(temporary, download=True)
            (folder / "FashionMNIST").mkdir(exist_ok=True)
            (Path(temporary) / "FashionMNIST" / "raw").rename(folder / "FashionMNIST" / "raw")
    finally:
        socket.setdefaulttimeout(before)


def _read(images_file: Path, labels_file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images uint8 [n, 28, 28] and classes int64 [n].

    Raises:
        ValueError: a file is damaged or not what its name says.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    file = images_file
    try:
        images: npt.NDArray[np.uint8] = _unpacked(images_file, read_image_file)
        file = labels_file
        classes: npt.NDArray[np.int64] = _unpacked(labels_file, read_label_file)
        if images.shape[1:] != (28, 28) or len(images) != len(classes):
            raise ValueError(f"{len(classes)} labels for images of shape {images.shape}")
        if not 0 <= classes.min(initial=0) <= classes.max(initial=0) < len(CLASS_NAMES):
            raise ValueError(f"label {classes.max()} is not one of {len(CLASS_NAMES)} classes")
    # what gzip, torchvision's reader and tensors raise on files with other content
    except (OSError, EOFError, zlib.error, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is damaged or not a file of Fashion-MNIST: {reason[:200]}") from error
    return images, classes


def _unpacked(file: Path, read: Callable[[str], Any]) -> Any:
    """The array that torchvision's reader `read`, which reads only plain files, finds in a plain or packed one."""
    if file.suffix != ".gz":
        return read(str(file)).numpy()
    with gzip.open(file) as packed, tempfile.NamedTemporaryFile() as plain:
        content = packed.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"unpacks to more than {_LARGEST_FILE:,} bytes")
        plain.write(content)
        plain.flush()
        return read(plain.name).numpy()


def _colour(grey: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Grey images uint8 [n, 28, 28] as RGB [n, side, side, 3]."""
    if grey.shape[1] != side:
        images = (Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in grey)
        grey = np.stack([np.asarray(image) for image in images])
    return np.repeat(grey[..., None], 3, axis=3)
