"""Class numbers, depth and boxes as they are read from files; what cannot be right is refused or dropped by name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainers.data import IGNORED
from trainers.data.labels import boxes_within, known_depth, lines_of, read_class_numbers, read_depth, relative


def png(image: Image.Image, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file


NUMBERS = np.array([[0, 1, 2], [3, 4, 9]], np.uint8)


def with_palette(numbers: np.ndarray[Any, np.dtype[np.uint8]]) -> Image.Image:
    image = Image.frombytes("P", numbers.shape[::-1], numbers.tobytes())
    image.putpalette([255, 0, 0] * 256)  # all of one colour: only indices tell them apart
    return image


def test_numbers_are_those_that_the_file_stores() -> None:
    expected = [[0, 1, 2], [3, 4, IGNORED]]
    for file in (
        png(Image.fromarray(NUMBERS)),
        png(with_palette(NUMBERS)),
        png(with_palette(NUMBERS), transparency=bytes([0, 128, 255, 0, 0])),
        png(Image.fromarray(NUMBERS.astype(np.uint16))),
    ):
        found = read_class_numbers(file, 5, ignored=9)
        assert found.dtype == np.uint8
        assert found.tolist() == expected
    assert read_class_numbers(png(Image.fromarray(NUMBERS)), 9, first=1, ignored=0).tolist() == [
        [IGNORED, 0, 1],
        [2, 3, 8],
    ]


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (4, "2 of its pixels have other class numbers than 0 … 3 and 255: 4, 9"),
        (9, "1 of its pixels have other class numbers than 0 … 8 and 255: 9"),
    ],
)
def test_other_numbers_are_refused(count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_class_numbers(png(Image.fromarray(NUMBERS)), count)
    deep = NUMBERS.astype(np.uint16) + 256  # 256 is no 0, as it would be in 8 bits
    with pytest.raises(ValueError, match="6 of its pixels have other class numbers"):
        read_class_numbers(png(Image.fromarray(deep)), 10)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1"])
def test_colours_are_no_class_numbers(mode: str) -> None:
    with pytest.raises(ValueError, match=f"of mode {mode}; needed: grey or palette"):
        read_class_numbers(png(Image.new(mode, (3, 3))), 5)


def test_depth_is_read_in_metres() -> None:
    file = png(Image.fromarray(np.array([[0, 1, 2_500], [10_000, 65_535, 999]], np.uint16)))
    found = read_depth(file, per_meter=1000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0, 0.001, 2.5], [10, 65.535, 0.999]], rtol=1e-6)
    with pytest.raises(ValueError, match="its depth is of mode L; needed: 16 bits a pixel"):
        read_depth(png(Image.new("L", (3, 3))), 1000)


def test_distances_that_are_none_are_not_known() -> None:
    given = np.array([1.5, 0, -0.0, -2, np.nan, np.inf, -np.inf, 1e9])
    assert known_depth(given).tolist() == [1.5, 0, 0, 0, 0, 0, 0, 65504]
    assert np.isfinite(known_depth(given).astype(np.float16)).all()


def test_boxes_that_cannot_be_right_are_dropped_and_said() -> None:
    boxes = [
        [2, 3, 8, 9, 0],
        [-4, 3, 8, 99, 1],  # reaches out of the image
        [20, 0, 30, 5, 2],  # outside
        [0, -9, 5, -1, 2],  # outside
        [8, 3, 2, 9, 3],  # inverted
        [2, 9, 8, 3, 3],  # inverted
        [4, 4, 4, 9, 4],  # no width
        [4, 4, 9, 4, 4],  # no height
        [np.nan, 0, 5, 5, 5],
        [0, 0, np.inf, 5, 5],
        [0, 0, 20, 10, 6],  # the whole image
    ]
    found, remarks = boxes_within(np.array(boxes, np.float32), width=20, height=10)
    assert found.tolist() == [[2, 3, 8, 9, 0], [0, 3, 8, 10, 1], [0, 0, 20, 10, 6]]
    assert remarks == (
        "2 of 11 boxes not finite",
        "4 of 11 boxes without an area",
        "2 of 11 boxes outside of the image",
        "1 of 11 boxes clipped to the image",
    )
    assert boxes_within(np.zeros((0, 5), np.float32), 4, 4)[1] == ()
    found, remarks = boxes_within(np.array([[1, 1, 3, 3, np.nan], [1, 1, 3, 3, 2]], np.float32), 4, 4)
    assert found.tolist() == [[1, 1, 3, 3, 2]] and remarks == ("1 of 2 boxes of a class that is not listed",)


def test_lists_are_read_without_blanks(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes("\ufeff a \r\n\n b c\n".encode())
    assert lines_of(file) == ["a", "b c"]
    with pytest.raises(ValueError, match="has more than 3 bytes; it is no list of images"):
        lines_of(file, largest=3)
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        lines_of(tmp_path)


def test_paths_stay_within_their_folder() -> None:
    assert relative("/a/b..c.jpg", "list") == "a/b..c.jpg"
    for path in ("..", "a/../b", "/", "", "a\nb", "\udcff"):
        with pytest.raises(ValueError, match=r"list names .*, which is no path within a folder"):
            relative(path, "list")
