"""What belongs to the pixels of an image, read from files and checked: class numbers, depth, boxes.

A label that cannot be right is refused or dropped by name; none is changed into another one in silence.
Shapes: H × W px of an image, K objects in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainers.data import IGNORED
from trainers.data.pictures import upright

_LARGEST_DEPTH = float(np.finfo(np.float16).max)  # m; the cache keeps depth as float16


def read_class_numbers(source: Any, count: int, first: int = 0, ignored: int = IGNORED) -> npt.NDArray[np.uint8]:
    """A PNG of class numbers as uint8 [H, W] from 0, IGNORED where the file says so.

    The numbers are those that the file stores: of a palette image they are the indices, whatever the colours.

    Args:
        source: what Pillow opens.
        count: of the classes.
        first: the number in the file of class 0.
        ignored: the number in the file of pixels that do not count.

    Raises:
        ValueError: it has no class numbers (RGB, black and white, transparency), or other ones than allowed.
    """
    with upright(source) as (image, _):
        if image.mode not in ("P", "L") and not image.mode.startswith("I;16"):
            raise ValueError(f"its class numbers are of mode {image.mode}; needed: grey or palette (L, P, I;16)")
        numbers = np.asarray(image).astype(np.int64)
    known = (numbers >= first) & (numbers < first + count)
    unknown = numbers[~known & (numbers != ignored)]
    if unknown.size:
        raise ValueError(
            f"{unknown.size:,} of its pixels have other class numbers than {first} … {first + count - 1} and "
            f"{ignored}: {', '.join(str(number) for number in np.unique(unknown)[:3])}"
        )
    return np.where(known, numbers - first, IGNORED).astype(np.uint8)


def read_depth(source: Any, per_meter: float) -> npt.NDArray[np.float32]:
    """A 16-bit PNG of distances as float32 [H, W] in metres, 0 where it is not known.

    Args:
        source: what Pillow opens.
        per_meter: of the file's unit: 1,000 for millimetres.

    Raises:
        ValueError: it has another kind of pixels.
    """
    with upright(source) as (image, _):
        if image.mode != "I" and not image.mode.startswith("I;16"):
            raise ValueError(f"its depth is of mode {image.mode}; needed: 16 bits a pixel (I;16)")
        return known_depth(np.asarray(image).astype(np.float32) / np.float32(per_meter))


def known_depth(meters: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Distances as float32, 0 where they are not known: where they are 0, negative, NaN or infinite."""
    known = np.isfinite(meters) & (meters > 0)
    return np.where(known, np.minimum(meters, _LARGEST_DEPTH), 0).astype(np.float32)


def boxes_within(
    boxes: npt.NDArray[np.float32], width: int, height: int
) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
    """Boxes float32 [K, 5] clipped to an image, without those of which nothing is left, and what was changed.

    Dropped are boxes that are not finite, of a class that is not listed (NaN), without an area (x1 ≤ x0 or y1 ≤ y0:
    corners are not swapped, since nobody knows which of them is wrong), or outside of the image. An image may be left
    without boxes.
    """
    clipped = boxes.copy()
    clipped[:, :4] = boxes[:, :4].clip(0, np.array([width, height] * 2, np.float32))
    finite = np.isfinite(boxes).all(axis=1)
    unlisted = np.isfinite(boxes[:, :4]).all(axis=1) & np.isnan(boxes[:, 4])
    given, left = (
        finite & (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1]) for corners in (boxes, clipped)
    )
    changed = left & given & (clipped != boxes).any(axis=1)
    counted = (
        ("not finite", ~finite & ~unlisted),
        ("of a class that is not listed", unlisted),
        ("without an area", finite & ~given),
        ("outside of the image", given & ~left),
        ("clipped to the image", changed),
    )
    remarks = tuple(f"{int(which.sum())} of {len(boxes)} boxes {what}" for what, which in counted if which.any())
    return clipped[left], remarks


def lines_of(path: Path, largest: int = 2**26) -> list[str]:
    """The lines of a list, without blanks around them and without empty ones.

    Args:
        path: of the list.
        largest: size in bytes.

    Raises:
        ValueError: it cannot be read, is too large or no UTF-8.
    """
    try:
        if path.stat().st_size > largest:
            raise ValueError(f"{path} has more than {largest:,} bytes; it is no list of images")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list of images: byte {error.start} is no UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def relative(path: str, where: str) -> str:
    """A path that a list names, without slashes at its front.

    Args:
        path: as the list has it.
        where: the list and line, for the message.

    Raises:
        ValueError: it leads out of its folder.
    """
    inner = path.lstrip("/\\")
    if not inner or ".." in inner.split("/") or not inner.isprintable():
        raise ValueError(f"{where} names {path!a}, which is no path within a folder")
    return inner


def unique(names: Iterable[str], where: str) -> Iterator[str]:
    """Names as they come.

    Raises:
        ValueError: one comes twice.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{where} names {name} twice")
        seen.add(name)
        yield name
