"""Image files as pixels: decoded whole with what belongs to them, or as squares of one size for the cache.

Shapes: H × W px of an image, K objects in it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from trainers.data import IGNORED

MAX_PIXELS = 89_478_485  # Pillow's own limit, 256 MiB in RGB; larger ones count as unreadable


class Square(NamedTuple):
    """A decoded image: pixels uint8 [side, side, 3], and where they show it, float32 [4]: x0, y0, x1, y1 in px."""

    pixels: npt.NDArray[np.uint8]
    content: npt.NDArray[np.float32]  # x1 and y1 exclusive
    targets: Mapping[str, npt.NDArray[Any]] = {}  # as trainers.data.Split says, of one image


def decode(source: Path | io.BytesIO, side: int, fit: str = "crop") -> Square:
    """An image file as a square of `side` px: RGB, turned as EXIF says, resized bicubic, antialiased.

    Transparent parts become white; 16-bit greys keep their upper bits; of an animation the first frame is taken.

    Args:
        source: path or bytes of the file.
        side: in px.
        fit: "crop" shows the centre square, which is the same as resizing the shorter side and then cropping, but its
            memory is bounded for long strips too; "pad" shows all of the image, centred, between black margins.

    Raises:
        ValueError: more than MAX_PIXELS, or a kind of pixels that has no defined range.
        Exception: what Pillow raises on damaged files: OSError, SyntaxError, Image.DecompressionBombError and others.
    """
    # JPEG only: decodes at a fraction of a very large size, at least twice what is needed.
    return _squared(_read(source, draft=2 * side), {}, side, fit)


def decode_whole(source: Path | io.BytesIO) -> npt.NDArray[np.uint8]:
    """An image file at its own size, uint8 [H, W, 3], otherwise as `decode`."""
    return decode_stored(source)[0]


def decode_stored(source: Path | io.BytesIO) -> tuple[npt.NDArray[np.uint8], Stored]:
    """As `decode_whole`, with how the file stores the image."""
    with upright(source) as (image, stored):
        return np.asarray(_rgb(image)), stored


class Stored(NamedTuple):
    """How a file stores an image: width and height in px there, and EXIF's orientation, 1 where it is upright."""

    size: tuple[int, int]
    orientation: int


@contextmanager
def upright(source: Path | io.BytesIO, draft: int | None = None) -> Iterator[tuple[Image.Image, Stored]]:
    """An image file, its first frame turned as EXIF says, with the pixels that it stores.

    Args:
        source: path or bytes of the file.
        draft: side in px that is enough, for JPEG.

    Raises:
        ValueError: more than MAX_PIXELS.
        Exception: what Pillow raises on damaged files.
    """
    with Image.open(source) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width} × {file.height} px are more than {MAX_PIXELS:,}")
        size = file.size
        if draft is not None:
            file.draft(None, (draft, draft))
        file.load()
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
        ImageOps.exif_transpose(file, in_place=True)
        yield file, Stored(size, orientation if orientation in range(1, 9) else 1)


def square(
    pixels: npt.NDArray[np.uint8], targets: Mapping[str, npt.NDArray[Any]], side: int, fit: str = "crop"
) -> Square:
    """A whole image and its targets as a square: maps take the nearest pixel, boxes move along and are clipped.

    Padding is ignored in segmentation and unknown in depth. Boxes of which nothing is left are dropped.

    Args:
        pixels: uint8 [H, W, 3].
        targets: "segmentation" uint8 [H, W], "depth" float32 [H, W], "boxes" float32 [K, 5]; others stay.
    """
    return _squared(Image.fromarray(pixels), targets, side, fit)


def _read(source: Path | io.BytesIO, draft: int) -> Image.Image:
    with upright(source, draft) as (image, _):
        return _rgb(image)


def _squared(image: Image.Image, targets: Mapping[str, npt.NDArray[Any]], side: int, fit: str) -> Square:
    place = _padding(image.size, side) if fit == "pad" else _Place(_centre(image.size), (0, 0, side, side))
    left, top, right, bottom = place.onto
    pixels = np.zeros((side, side, 3), np.uint8)
    size = (right - left, bottom - top)
    pixels[top:bottom, left:right] = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=place.of))
    moved = {name: _moved(name, values, place, side) for name, values in targets.items()}
    return Square(pixels, np.array(place.onto, np.float32), moved)


class _Place(NamedTuple):
    """Which part of an image is shown, and where: x0, y0, x1, y1 in px of the image and of the square."""

    of: tuple[float, float, float, float]
    onto: tuple[int, int, int, int]


def _centre(size: tuple[int, int]) -> tuple[float, float, float, float]:
    shorter = min(size)
    left, top = (size[0] - shorter) / 2, (size[1] - shorter) / 2
    return left, top, left + shorter, top + shorter


def _padding(size: tuple[int, int], side: int) -> _Place:
    width, height = (max(1, round(length * side / max(size))) for length in size)
    left, top = (side - width) // 2, (side - height) // 2
    return _Place((0, 0, *size), (left, top, left + width, top + height))


def _moved(name: str, values: npt.NDArray[Any], place: _Place, side: int) -> npt.NDArray[Any]:
    if name == "boxes":
        return _moved_boxes(values, place)
    if name not in ("segmentation", "depth"):
        return values
    left, top, right, bottom = place.onto
    unknown = IGNORED if name == "segmentation" else 0
    canvas = np.full((side, side), unknown, values.dtype)
    size = (right - left, bottom - top)
    shown = Image.fromarray(values).resize(size, Image.Resampling.NEAREST, box=place.of)
    canvas[top:bottom, left:right] = np.asarray(shown)
    return canvas.astype(np.float16) if name == "depth" else canvas


def _moved_boxes(boxes: npt.NDArray[np.float32], place: _Place) -> npt.NDArray[np.float32]:
    """Largest first, as they are shown."""
    x0, y0, x1, y1 = place.of
    left, top, right, bottom = place.onto
    scale = np.array([(right - left) / (x1 - x0), (bottom - top) / (y1 - y0)] * 2)
    moved = boxes.astype(np.float64)
    moved[:, :4] = (moved[:, :4] - [x0, y0, x0, y0]) * scale + [left, top, left, top]
    moved[:, :4] = moved[:, :4].clip([left, top] * 2, [right, bottom] * 2)
    area = (moved[:, 2] - moved[:, 0]) * (moved[:, 3] - moved[:, 1])
    kept: npt.NDArray[np.float32] = moved[np.argsort(-area, kind="stable")][: int((area > 0).sum())].astype(np.float32)
    return kept


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no defined range; save the image with 8 bits a channel")
    if image.has_transparency_data:
        visible = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, visible).convert("RGB")
    return image.convert("RGB")
