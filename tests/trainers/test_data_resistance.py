"""Real files that are damaged, odd or hostile: each is read as it is meant, or named and left out."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS, DataSet, source_of
from trainers.data.cache import open_source
from trainers.data.pictures import decode, decode_whole

SIDE = 16


def noise(height: int = 40, width: int = 48) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def folder(root: Path) -> Path:
    """An image folder of two classes, 6 + 2 + 2 images each."""
    for split, count in (("train", 6), ("validation", 2), ("test", 2)):
        for c, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 12), (100 * c, i, 50)).save(root / split / name / f"{i}.png")
    return root


def opened(root: Path, before: Callable[[], object] = lambda: None, limit: float = 0.5) -> DataSet:
    """The data set; `before` is called when its files are found and none is decoded."""
    config = DataConfig(train="image_folder", name="insects", decode_size=SIDE, scenes=None, max_unreadable=limit)
    source = source_of(config, ExecutionConfig(data_root=str(root), threads=1), 32, root / "cache")
    before()
    return open_source(source, root / "cache", lambda *_: None)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise()).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_files_that_end_early_are_named(tmp_path: Path, kind: str) -> None:
    root, content = folder(tmp_path), encoded(kind)
    place = root / "train" / "bee"
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    for name, size in {"none": 0, "header": 20, "half": len(content) // 2, "whole": len(content)}.items():
        (place / f"{name}.{suffix}").write_bytes(content[:size])
    data = opened(root)
    assert set(data.unreadable) == {f"train/bee/{name}.{suffix}" for name in ("none", "header", "half")}
    assert f"train/bee/whole.{suffix}" in set(data.train.paths or ())
    assert len(data.train) == 13


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
def test_two_bytes_less_lose_no_pixel_or_the_file_is_named(tmp_path: Path, kind: str) -> None:
    content = encoded(kind)
    whole = decode_whole(io.BytesIO(content))
    try:
        found = decode_whole(io.BytesIO(content[:-2]))
    except (OSError, SyntaxError, ValueError):
        return  # named and left out by the listing, as files that end earlier
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("marked", [True, False])
def test_inks_become_rgb_with_and_without_the_marker_that_they_are_inverted(marked: bool) -> None:
    file = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(file, "JPEG", quality=95)  # Pillow inverts, as Adobe does
    content = file.getvalue()
    start = content.index(b"\xff\xee")
    (length,) = struct.unpack(">H", content[start + 2 : start + 4])
    assert content[start + 4 : start + 9] == b"Adobe"
    if not marked:  # browsers take inks as inverted in any case
        content = content[:start] + content[start + 2 + length :]
    assert np.abs(decode(io.BytesIO(content), 8).pixels.astype(int) - (255, 0, 0)).max() <= 3


def deep_rgb(values: npt.NDArray[np.uint16]) -> io.BytesIO:
    """A PNG with 16 bits a channel, which Pillow cannot write: uint16 [H, W, 3]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts)


def test_of_16_bits_the_upper_ones_are_kept() -> None:
    values = np.array([[[0x0000, 0x7F80, 0xFFFF], [0x0100, 0x80FF, 0x0001]]], np.uint16)
    assert decode_whole(deep_rgb(values)).tolist() == [[[0, 0x7F, 0xFF], [1, 0x80, 0]]]
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0x7F80, 0xFFFF]], np.uint16)).save(file, "PNG")
    assert decode_whole(file)[0, :, 0].tolist() == [0, 0x7F, 0xFF]


def test_transparent_palettes_stand_on_white() -> None:
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes([0, 255, 255]))
    assert decode_whole(file)[0].tolist() == [[255, 255, 255], [0, 255, 0], [0, 0, 255]]


def test_of_an_animation_the_first_frame_is_taken() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert (decode_whole(file) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000), (1, 20_000)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_very_small_and_very_long_images_are_squares_too(size: tuple[int, int], fit: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", size, (9, 200, 30)).save(file, "PNG")
    found = decode(file, SIDE, fit)
    x0, y0, x1, y1 = (int(value) for value in found.content)
    assert x1 > x0 and y1 > y0
    assert (found.pixels[y0:y1, x0:x1] == (9, 200, 30)).all()


def test_other_content_behind_the_suffix_of_an_image_is_named_or_read_as_what_it_is(tmp_path: Path) -> None:
    root = folder(tmp_path)
    place = root / "train" / "ant"
    (place / "page.jpg").write_text("<html>404</html>")
    (place / "program.jpg").write_bytes(b"\x7fELF" + bytes(range(256)))
    (place / "archive.png").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    (place / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (place / "png.jpg").write_bytes(encoded("PNG"))
    data = opened(root)
    names = ("page.jpg", "program.jpg", "archive.png", "drawing.png")
    assert set(data.unreadable) == {f"train/ant/{name}" for name in names}
    assert "train/ant/png.jpg" in set(data.train.paths or ())


def test_files_that_vanish_or_change_before_they_are_decoded_are_named(tmp_path: Path) -> None:
    root = folder(tmp_path)
    place = root / "train" / "ant"

    def change() -> None:
        (place / "0.png").unlink()
        (place / "1.png").write_bytes(b"")
        (place / "2.png").unlink()
        (place / "2.png").mkdir()

    data = opened(root, change)
    assert set(data.unreadable) == {f"train/ant/{i}.png" for i in range(3)}
    assert len(data.train) == 9
    classes = data.train.targets["classes"].tolist()
    assert [path.split("/")[1] for path in data.train.paths or ()] == [("ant", "bee")[c] for c in classes]


def test_names_that_are_no_utf8_are_kept(tmp_path: Path) -> None:
    root = folder(tmp_path)
    good, bad = (os.fsencode(root / "train" / "bee") + b"/" + name for name in (b"caf\xe9.png", b"br\xff\nken.png"))
    with open(good, "wb") as file:  # noqa: PTH123  (bytes are no Path)
        file.write(encoded("PNG"))
    with open(bad, "wb") as file:  # noqa: PTH123
        file.write(b"x")
    for _ in range(2):  # decoded, then from the cache
        data = opened(root)
        assert [os.fsencode(path) for path in data.unreadable] == [b"train/bee/br\xff\nken.png"]
        row = [os.fsencode(path) for path in data.train.paths or ()].index(b"train/bee/caf\xe9.png")
        assert data.train.targets["classes"][row] == 1
    with pytest.raises(ValueError, match=r"train/bee/br\\udcff\\nken\.png") as raised:
        opened(root, limit=0.0)
    assert "\n" not in str(raised.value)


def test_links_that_lead_in_circles_are_passed_over_or_said(tmp_path: Path) -> None:
    root = folder(tmp_path / "root")
    (root / "train" / "ant" / "again").symlink_to(root / "train", target_is_directory=True)
    (root / "train" / "ant" / "self.png").symlink_to("self.png")
    data = opened(root)
    assert len(data.train) == 12
    assert data.unreadable == ("train/ant/self.png",)
    for target in ("..", ".", str(root)):
        link = root / "train" / "cat"
        link.symlink_to(target, target_is_directory=True)
        with pytest.raises(ValueError, match="cat is a link to a folder that it is in; it is no class"):
            opened(root)
        link.unlink()
    (root / "train" / "cat").symlink_to("cat")  # to itself
    with pytest.raises(ValueError, match="cannot be read: Too many levels of symbolic links"):
        opened(root)


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that claims many pixels, all of them zero and well packed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(9_500, 9_500), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_named_before_they_are_unpacked(tmp_path: Path, size: tuple[int, int]) -> None:
    root = folder(tmp_path)
    (root / "test" / "ant" / "bomb.png").write_bytes(bomb(*size))
    data = opened(root)
    assert data.unreadable == ("test/ant/bomb.png",)
    (file,) = (root / "cache").glob("*/unreadable.txt")
    assert (
        "px are more than" in file.read_text() or "DecompressionBomb" in file.read_text() or "IHDR" in file.read_text()
    )


def test_a_class_folder_without_images_is_said(tmp_path: Path) -> None:
    root = folder(tmp_path)
    for split in SPLITS:
        empty = root / split / "cat"
        empty.mkdir()
        if split == "train":
            with pytest.raises(ValueError, match="cat has no images; known suffixes"):
                opened(root)
            Image.new("RGB", (9, 9)).save(empty / "0.png")
    with pytest.raises(ValueError, match="validation/cat has no images"):
        opened(root)
