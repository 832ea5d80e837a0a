"""Images and their labels as squares: numbers worked out by hand, and one geometry for pixels, maps and boxes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainers.data import IGNORED
from trainers.data.pictures import decode, decode_stored, decode_whole, square


def numbered(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Each pixel has its own number: row · width + column."""
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def colour(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.repeat(values[..., None], 3, axis=2).astype(np.uint8)


def moved(values: np.ndarray[Any, Any], side: int, fit: str, name: str = "segmentation") -> Any:
    height, width = values.shape
    return square(np.zeros((height, width, 3), np.uint8), {name: values}, side, fit).targets[name]


def test_a_crop_at_the_same_size_takes_the_middle() -> None:
    np.testing.assert_array_equal(moved(numbered(4, 8), 4, "crop"), numbered(4, 8)[:, 2:6])
    np.testing.assert_array_equal(moved(numbered(9, 3), 3, "crop"), numbered(9, 3)[3:6])


def test_half_and_double_size_take_the_pixel_under_the_centre() -> None:
    # Centre i + 0.5 of the square lies at 2 (i + 0.5) = 2 i + 1 of the image, in its pixel 2 i + 1.
    np.testing.assert_array_equal(moved(numbered(8, 8), 4, "crop"), numbered(8, 8)[1::2, 1::2])
    # (i + 0.5) / 2 lies in pixel i // 2.
    np.testing.assert_array_equal(moved(numbered(4, 4), 8, "crop"), numbered(4, 4).repeat(2, 0).repeat(2, 1))
    # 6 × 4 to 2 px: the middle starts at column 1, so centres lie at 1 + 1 and 1 + 3.
    np.testing.assert_array_equal(moved(numbered(4, 6), 2, "crop"), numbered(4, 6)[1::2, [2, 4]])
    # 5 × 4: the middle starts at column 0.5, so centres lie at 1, 2, 3, 4 − 0.5 + 0.5.
    np.testing.assert_array_equal(moved(numbered(4, 5), 4, "crop")[:, 0], numbered(4, 5)[:, 1])


def test_padding_is_ignored_and_unknown() -> None:
    found = moved(numbered(4, 8), 8, "pad")
    np.testing.assert_array_equal(found[2:6], numbered(4, 8))
    assert (found[[0, 1, 6, 7]] == IGNORED).all()
    depth = moved(np.full((8, 2), 1.5, np.float32), 4, "pad", "depth")
    np.testing.assert_array_equal(depth, [[0, 1.5, 0, 0]] * 4)  # 1 px wide, one margin left and two right
    assert depth.dtype == np.float16


def boxes_after(boxes: list[list[float]], size: tuple[int, int], side: int, fit: str) -> list[list[float]]:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    found = square(pixels, {"boxes": np.array(boxes, np.float32)}, side, fit).targets["boxes"]
    assert found.dtype == np.float32
    return [[float(value) for value in box] for box in found]


def test_boxes_move_with_the_crop_and_are_clipped_and_sorted() -> None:
    given = [
        [10, 4, 30, 20, 7],  # → (10 − 6) / 2, 4 / 2, (30 − 6) / 2, 20 / 2
        [0, 0, 48, 36, 1],  # the whole image → the whole square
        [0, 0, 6, 36, 2],  # ends where the square begins
        [0, 10, 8, 30, 3],  # 1 px is left
        [42, 0, 48, 36, 4],  # begins where the square ends
    ]
    assert boxes_after(given, (48, 36), 18, "crop") == [[0, 0, 18, 18, 1], [2, 2, 12, 10, 7], [0, 5, 1, 15, 3]]


def test_boxes_move_with_the_padding() -> None:
    # 40 × 20 in 20 px: half as large, 5 rows of margin above.
    assert boxes_after([[0, 0, 40, 20, 0], [8, 4, 16, 12, 9]], (40, 20), 20, "pad") == [
        [0, 5, 20, 15, 0],
        [4, 7, 8, 11, 9],
    ]
    # 20 × 40 in 80 px: twice as large, 20 columns of margin on the left.
    assert boxes_after([[1, 2, 5, 9, 3]], (20, 40), 80, "pad") == [[22, 4, 30, 18, 3]]


def test_an_image_may_have_no_boxes() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert square(pixels, {"boxes": np.zeros((0, 5), np.float32)}, 8).targets["boxes"].shape == (0, 5)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("side", [31, 64, 150])
@pytest.mark.parametrize("size", [(96, 64), (64, 96), (80, 80)])
def test_maps_boxes_and_pixels_share_one_geometry(size: tuple[int, int], side: int, fit: str) -> None:
    width, height = size
    board = (np.add.outer(np.arange(height) // 16, np.arange(width) // 16) % 2).astype(np.uint8)
    shown = square(colour(board * 255), {"segmentation": board, "depth": board + np.float32(1)}, side, fit)
    mask, bright = shown.targets["segmentation"], shown.pixels[..., 0] > 127
    x0, y0, x1, y1 = (int(value) for value in shown.content)
    mask, bright = mask[y0:y1, x0:x1], bright[y0:y1, x0:x1]
    assert (mask != IGNORED).all()
    np.testing.assert_array_equal(shown.targets["depth"][y0:y1, x0:x1], mask + 1)
    edges = np.zeros(mask.shape, bool)  # within one px of a change, where resizing blends
    for axis in (0, 1):
        change = np.diff(mask, axis=axis) != 0
        before, after = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        before[axis], after[axis] = (0, 1), (1, 0)
        edges |= np.pad(change, before) | np.pad(change, after)
    assert edges.mean() < 0.6
    np.testing.assert_array_equal(bright[~edges], mask[~edges] == 1)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("side", [24, 60, 90])
def test_a_box_frames_its_object_after_moving(side: int, fit: str) -> None:
    values = np.zeros((60, 90), np.uint8)
    values[12:48, 24:66] = 255
    box = np.array([[24, 12, 66, 48, 0]], np.float32)
    shown = square(colour(values), {"boxes": box, "segmentation": values // 255}, side, fit)
    x0, y0, x1, y1, _ = shown.targets["boxes"][0]
    for found in (shown.pixels[..., 0] > 127, shown.targets["segmentation"] == 1):
        rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
        edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(edges - [x0, y0, x1, y1]).max() <= 0.5


def test_a_square_of_the_whole_is_what_is_decoded_directly() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    for fit in ("crop", "pad"):
        direct = decode(file, 32, fit)
        through = square(decode_whole(file), {}, 32, fit)
        np.testing.assert_array_equal(direct.pixels, through.pixels)
        np.testing.assert_array_equal(direct.content, through.content)


@pytest.mark.parametrize(("orientation", "shape"), [(1, (8, 16)), (3, (8, 16)), (6, (16, 8)), (99, (8, 16))])
def test_how_a_file_stores_its_image_is_said(orientation: int, shape: tuple[int, int]) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.new("RGB", (16, 8), "red").save(file, "JPEG", exif=exif)
    pixels, stored = decode_stored(file)
    assert pixels.shape == (*shape, 3)
    assert stored == ((16, 8), orientation if orientation < 9 else 1)
