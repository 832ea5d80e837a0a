"""Training images that stay encoded and are decoded when they are asked for, at their own size or as squares.

Nothing is decoded ahead: a data set as large as ImageNet need not be decoded before its first step, and random crops
see all of an image's detail. What is met on the way and cannot be read is counted, named in a file, and replaced by
the next readable image of the same class; which one is a function of the files alone, so that a resumed run does
the same.

Shapes: n images, S side of a square, H × W px of an image.
"""

from __future__ import annotations

import fcntl
import io
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.io import ImageReadMode  # and loads its decoders into torch.ops.image

from trainers.data import SPLITS, Progress
from trainers.data.cache import Source, Streaming, Writer
from trainers.data.encoded import encoded_size, of_the_machine, opened
from trainers.data.pictures import MAX_PIXELS, Square, decode_whole

if TYPE_CHECKING:
    from trainers.data.listing import Decoder, Listing

UNREADABLE = "unreadable_while_training.txt"  # in the cache folder of the data set
CONTENT = "content"  # target of padded images: what is no padding

_UPRIGHT = 1  # EXIF's orientation of images that need not be turned
_LAZY = {"segmentation": (np.uint8, 2), "depth": (np.float16, 2), "boxes": (np.float32, 1), CONTENT: (np.float32, 0)}
Row = TypeVar("Row")


def decode_original(source: Path | io.BytesIO) -> npt.NDArray[np.uint8]:
    """An image file at its own size, uint8 [H, W, 3]: exactly what `pictures.decode_whole` gives.

    Upright grey and RGB JPEGs go through torchvision, which takes 0.7 of Pillow's time; both use libjpeg-turbo. Its
    operator is called without torchvision.io.decode_jpeg around it, which version 0.29 announces to remove; where the
    operator is gone, Pillow decodes all.

    Raises:
        Exception: as `decode_whole`.
    """
    encoded = io.BytesIO(source.read_bytes()) if isinstance(source, Path) else source
    if hasattr(torch.ops.image, "decode_jpeg") and _is_plain_jpeg(encoded):
        try:
            content = torch.frombuffer(encoded.getbuffer(), dtype=torch.uint8)
            pixels = torch.ops.image.decode_jpeg(content, ImageReadMode.RGB.value, False)
            return np.asarray(pixels.permute(1, 2, 0).numpy())
        except RuntimeError:  # damaged: Pillow says how
            pass
    encoded.seek(0)
    return decode_whole(encoded)


def _is_plain_jpeg(encoded: io.BytesIO) -> bool:
    with Image.open(encoded) as file:
        if file.format != "JPEG" or file.mode not in ("RGB", "L") or file.width * file.height > MAX_PIXELS:
            return False
        tagged = any(name in file.info for name in ("exif", "xmp", "XML:com.adobe.xmp"))
        return not tagged or file.getexif().get(0x0112, _UPRIGHT) == _UPRIGHT


@dataclass
class Unreadable:
    """Counts images that cannot be read, and names them in a file.

    Attributes:
        file: where they are named, one line each with the reason; processes share it.
        limit: how many are tolerated.
        name: of the data set.
        setting: what the limit follows from, for the message.
    """

    file: Path
    limit: int
    name: str
    setting: str
    paths: set[str] = field(default_factory=set)
    count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, path: str, error: Exception) -> None:
        """Names one that this process has met, however often; those that others have named count as well.

        Raises:
            ValueError: there are more than are tolerated.
        """
        with self._lock:
            if path not in self.paths:
                self.paths.add(path)
                self.count = self._write(path, f"{type(error).__name__}: {' '.join(str(error).split())}")
        self.check()

    def check(self) -> None:
        """Raise a ValueError where more are named than are tolerated."""
        if self.count > self.limit:
            raise ValueError(
                f"data set {self.name!r}: {self.count} training images cannot be read, more than {self.setting} allows "
                f"({self.limit}); they are named in {self.file}"
            )

    def _write(self, path: str, reason: str) -> int:
        """Names the image unless it is named already; how many are, by all processes."""
        shown = path if path.isprintable() else ascii(path)[1:-1]
        with self.file.open("a+", encoding="utf-8", errors="backslashreplace") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            named = {line.partition("\t")[0] for line in file}
            if shown not in named:
                file.write(f"{shown}\t{reason}\n")
            return len(named | {shown})


class Streamed:
    """n encoded images: an array uint8 [n, S, S, 3] whose rows are decoded when they are taken, and the originals.

    Args:
        paths: references of the images; see trainers.data.encoded.
        source: gives what is to be decoded of an image by its row.
        square: gives an image by its row as a square, with what belongs to its pixels.
        classes: int64 [n]; None where there are none.
        side: S in px.
        workers: threads that decode.
        unreadable: counts what cannot be read.
    """

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        paths: Sequence[str],
        source: Callable[[int], Path | io.BytesIO],
        square: Callable[[int], Square],
        classes: npt.NDArray[np.int64] | None,
        side: int,
        workers: int,
        unreadable: Unreadable,
    ) -> None:
        self.shape = (len(paths), side, side, 3)
        self.workers, self.unreadable = workers, unreadable
        self._paths, self._source, self._square, self._classes = paths, source, square, classes
        # Rows that cannot be read, and those that stand for them: apart for squares, for which maps are read as well.
        self._replaced: dict[str, dict[int, int]] = {"square": {}, "original": {}}

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> npt.NDArray[np.uint8]:
        """Rows as of an array; an image that cannot be read is replaced."""
        rows = np.arange(len(self))[index]
        if rows.ndim == 0:
            return np.asarray(self.square(int(rows)).pixels)
        taken = np.empty((len(rows), *self.shape[1:]), np.uint8)
        for place, square in zip(taken, self.squares(rows), strict=True):
            place[:] = square.pixels
        return taken

    def squares(self, rows: npt.NDArray[np.int64]) -> Iterator[Square]:
        """Some images with their targets, decoded in parallel."""
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(self.square, rows.tolist())

    def square(self, row: int) -> Square:
        """An image, or the one that replaces it, as a square."""
        return self._readable("square", row, self._square)[1]

    def original(self, row: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """An image at its own size, uint8 [H, W, 3], and its row: another one where it is replaced.

        Raises:
            ValueError: more images cannot be read than are tolerated, or none can.
        """
        return self._readable("original", row, lambda candidate: decode_original(self._source(candidate)))

    def _readable(self, kind: str, row: int, read: Callable[[int], Row]) -> tuple[int, Row]:
        replaced = self._replaced[kind]
        if row in replaced:
            self.unreadable.check()
        for candidate in self._candidates(replaced.get(row, row)):
            try:
                result = read(candidate)
                if candidate != row:
                    replaced[row] = candidate
                return candidate, result
            except Exception as error:
                if of_the_machine(error):  # another image now would be another run than its twin's
                    raise
                met = error
            self.unreadable.add(self._paths[candidate], met)
        raise ValueError(f"data set {self.unreadable.name!r}: not one training image can be read")

    def _candidates(self, row: int) -> Iterator[int]:
        """The image itself, then those after it, first of its class, then of all, around the end."""
        yield row
        following = range(row + 1, row + len(self))  # as few are looked at as it takes: there may be millions
        if self._classes is None:
            yield from (other % len(self) for other in following)
            return
        for alike in (True, False):
            for other in (number % len(self) for number in following):
                if (self._classes[other] == self._classes[row]) == alike:
                    yield other


class LazyTarget:
    """What belongs to the squares of a Streamed, an array whose rows are read when they are taken.

    Args:
        images: whose targets they are.
        name: segmentation, depth, boxes or content; see trainers.data.Split.
        most_boxes: K.
    """

    def __init__(self, images: Streamed, name: str, most_boxes: int) -> None:
        kind, pixel_axes = _LAZY[name]
        inner: tuple[int, ...] = (images.shape[1],) * 2
        if pixel_axes == 1:
            inner = (most_boxes, 5)
        elif pixel_axes == 0:
            inner = (4,)
        self.shape, self.dtype = (len(images), *inner), np.dtype(kind)
        self._images, self._name = images, name

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> npt.NDArray[Any]:
        rows = np.arange(len(self))[index]
        if rows.ndim == 0:
            return self._of(self._images.square(int(rows)))
        taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for place, square in zip(taken, self._images.squares(rows), strict=True):
            place[:] = self._of(square)
        return taken

    def _of(self, square: Square) -> npt.NDArray[Any]:
        if self._name == CONTENT:
            return square.content
        values = square.targets[self._name]
        if self._name != "boxes":
            return values
        padded = np.full(self.shape[1:], np.nan, np.float32)
        padded[: len(values)] = values
        return padded


class Ahead:
    """Decodes the images of the coming steps, at their own sizes, in threads that stay.

    Pillow and torchvision decode without the interpreter's lock. What a step gets depends on its rows alone, not on
    the threads.

    Args:
        images: which are decoded.
        rows: gives the rows of a step.
        steps: no step from this one on is decoded; None where that is not known.
        most_images: decoded ones that wait, unless two steps have more.
    """

    def __init__(
        self,
        images: Streamed,
        rows: Callable[[int], npt.NDArray[np.int64]],
        steps: int | None = None,
        most_images: int = 1_024,
    ) -> None:
        self._images, self._rows, self._steps, self._most = images, rows, steps, most_images
        self._pool = ThreadPoolExecutor(images.workers, thread_name_prefix="decoder")
        self._waiting: dict[int, list[Future[tuple[int, npt.NDArray[np.uint8]]]]] = {}

    def __call__(self, step: int) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.uint8]]]:
        """The rows of a step as they were read, int64 [B], and their images, uint8 [H, W, 3] each.

        Raises:
            ValueError: as `Streamed.original`.
        """
        self._submit(step)
        own = self._waiting.pop(step)
        following = step + 1
        while self._has_room(following, len(own)):
            self._submit(following)
            following += 1
        found = [future.result() for future in own]
        return np.array([row for row, _ in found], np.int64), [pixels for _, pixels in found]

    def close(self) -> None:
        """Cancels what waits; images that are being decoded are the last."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _has_room(self, step: int, images: int) -> bool:
        if self._steps is not None and step >= self._steps:
            return False
        others = [number for number in self._waiting if number < step]
        return step in self._waiting or len(others) < max(2, self._most // max(images, 1))

    def _submit(self, step: int) -> None:
        if step not in self._waiting:
            rows: Iterable[int] = self._rows(step).tolist()
            self._waiting[step] = [self._pool.submit(self._images.original, row) for row in rows]


def streaming(
    made: Source,
    train: Listing,
    decoder: Decoder,
    write: Callable[[Writer, Progress, Collection[str]], None],
    workers: int,
) -> dict[str, Any]:
    """What a source has otherwise where its training images stay encoded: fields of trainers.data.cache.Source.

    Args:
        made: the source that decodes all.
        train: the training images in their order.
        decoder: gives squares.
        write: decodes some splits into a cache.
        workers: threads that decode.
    """
    root, described = decoder.root, decoder.described
    known = {name: values for name, values in train.targets.items() if name != "boxes"}
    lazy = [*train.maps, *(["boxes"] if "boxes" in train.targets else []), *([CONTENT] if decoder.fit == "pad" else [])]

    def index(writer: Writer, progress: Progress) -> None:
        sizes = [encoded_size(root, path) if described.open is opened else -1 for path in train.paths]
        writer.index(np.array(sizes, np.int64), known, train.paths)
        write(writer, progress, SPLITS[1:])

    def images_of(folder: Path, unreadable: int) -> tuple[Streamed, Mapping[str, LazyTarget]]:
        limit = int(made.max_unreadable * made.candidates) - unreadable
        images = Streamed(
            train.paths,
            lambda row: described.open(root, train.paths[row]),
            lambda row: decoder.decoded(train, row)[0],
            known.get("classes"),
            decoder.side,
            workers,
            Unreadable(folder / UNREADABLE, limit, made.name, f"data.max_unreadable {made.max_unreadable}"),
        )
        return images, {name: LazyTarget(images, name, decoder.most_boxes) for name in lazy}

    return {"key": {**made.key, "decode": "original"}, "streaming": Streaming(index, images_of)}
