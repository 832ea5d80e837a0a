"""Streaming of original sizes: what is decoded, what replaces unreadable images, and decoding ahead."""

from __future__ import annotations

import errno
import io
import tracemalloc
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from tests.trainers.streamed_images import (
    SIDE,
    damaged,
    jpeg,
    opened,
    photograph,
    reader,
    row_of,
    seed_of,
    streamed,
    write_folder,
    write_shards,
)
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import DataSet
from trainers.data import streamed as streaming_module
from trainers.data.encoded import of_the_machine
from trainers.data.pictures import Square, decode_whole
from trainers.data.streamed import UNREADABLE, Ahead, LazyTarget, Streamed, Unreadable, decode_original
from trainers.loader import Order, batches
from trainers.ragged import Ragged
from trainers.streams import Streams


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return opened(folder, tmp_path_factory.mktemp("cache"))


# --- decoding -----------------------------------------------------------------------------------------------------


def encoded(kind: str) -> bytes:
    picture, file = photograph(1), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = int(kind.removeprefix("exif ")) if kind.startswith("exif") else 1
    if kind.startswith("exif"):
        picture.save(file, "JPEG", exif=exif)
    elif kind in ("L", "CMYK"):
        picture.convert(kind).save(file, "JPEG")
    elif kind in ("progressive", "no subsampling", "RGB stored"):
        more = {
            "progressive": {"progressive": True},
            "no subsampling": {"subsampling": 0},
            "RGB stored": {"keep_rgb": True},
        }
        picture.save(file, "JPEG", **more[kind])
    elif kind == "MPO":
        picture.save(file, "MPO", save_all=True, append_images=[photograph(2)])
    elif kind == "RGBA":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(file, "PNG")
    elif kind == "I;16":
        Image.fromarray((np.asarray(picture)[..., 0].astype(np.uint16) << 8) + 3).save(file, "PNG")
    else:
        picture.convert("P").save(file, "GIF")
    return file.getvalue()


KINDS = ("exif 1", "exif 3", "exif 6", "L", "CMYK", "progressive", "no subsampling", "RGB stored", "MPO")


@pytest.mark.parametrize("kind", [*KINDS, "RGBA", "I;16", "GIF"])
def test_originals_are_what_pillow_decodes(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded(kind))
    wanted = decode_whole(tmp_path / "x")
    for source in (tmp_path / "x", io.BytesIO(encoded(kind))):
        found = decode_original(source)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, wanted)


def test_only_plain_jpegs_take_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.data.streamed.decode_whole", lambda _: "Pillow")
    slow = {
        kind for kind in (*KINDS, "RGBA", "I;16", "GIF") if isinstance(decode_original(io.BytesIO(encoded(kind))), str)
    }
    assert slow == {"exif 3", "exif 6", "CMYK", "MPO", "RGBA", "I;16", "GIF"}
    monkeypatch.setattr("trainers.data.streamed.MAX_PIXELS", 36 * 52 - 1)
    assert isinstance(decode_original(io.BytesIO(encoded("L"))), str)


@pytest.mark.parametrize("content", [b"", b"no image", jpeg(1)[:-200], jpeg(1)[:300]])
def test_damaged_files_are_refused(content: bytes) -> None:
    with pytest.raises(Exception, match=r"(?i)cannot identify|truncated|broken"):
        decode_original(io.BytesIO(content))


# --- the data set -------------------------------------------------------------------------------------------------


def test_nothing_of_training_is_decoded_ahead(folder: Path, data: DataSet, tmp_path: Path) -> None:
    images = streamed(data)
    assert len(images) == 12 and images.shape == (12, SIDE, SIDE, 3) and images.dtype == np.uint8
    assert data.validation.images.shape == data.test.images.shape == (8, SIDE, SIDE, 3)
    assert data.provides == ("classes",)
    for row in range(12):
        used, pixels = images.original(row)
        assert used == row
        np.testing.assert_array_equal(pixels, decode_whole(io.BytesIO(jpeg(seed_of(data, row)))))
        assert data.train.targets["classes"][row] == seed_of(data, row) % 2
    opened(folder, tmp_path)
    (cached,) = (path for path in tmp_path.iterdir() if path.is_dir())
    opened(folder, tmp_path, decode_size=SIDE)  # lies beside it
    assert not (cached / "train.images.npy").exists() and (cached / "test.images.npy").exists()


def test_squares_are_those_that_are_decoded_ahead_otherwise(folder: Path, data: DataSet, tmp_path: Path) -> None:
    ahead = opened(folder, tmp_path, decode_size=SIDE)
    assert list(ahead.train.paths or ()) == list(data.train.paths or ())
    images = streamed(data)
    for index in (np.array([3, 0, 3]), slice(2, 9, 3), slice(None), np.arange(12) % 3 == 0, [1, 2], -1):
        np.testing.assert_array_equal(images[index], ahead.train.images[index])
    np.testing.assert_array_equal(data.test.images, ahead.test.images)
    assert images[:0].shape == (0, SIDE, SIDE, 3)
    np.testing.assert_array_equal(data.train.whole(4).pixels, ahead.train.whole(4).pixels)


def test_content_of_padded_images_is_read_when_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    padded, ahead = opened(folder, tmp_path, fit="pad"), opened(folder, tmp_path, fit="pad", decode_size=SIDE)
    content = padded.train.targets["content"]
    assert isinstance(content, LazyTarget) and content.shape == (12, 4)
    np.testing.assert_array_equal(content[:], ahead.train.targets["content"])
    np.testing.assert_array_equal(content[5], ahead.train.targets["content"][5])
    np.testing.assert_array_equal(padded.train.images[[7, 2]], ahead.train.images[[7, 2]])


def test_maps_and_boxes_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    from trainers.data.listing import Description, Listing, source

    seeds = range(10)
    boxes = [np.array([[1, 2, 20, 30, 0], [3, 3, 9, 9, 1]][: 1 + seed % 2], np.float32) for seed in seeds]
    for seed in seeds:
        (tmp_path / f"{seed:03}.jpg").write_bytes(jpeg(seed))
        Image.fromarray(np.asarray(photograph(seed))[..., 0] % 5).save(tmp_path / f"{seed}.png")
    names = tuple(f"{seed:03}.jpg" for seed in seeds)
    listing = Listing(names, {"boxes": boxes}, {"segmentation": tuple(f"{seed}.png" for seed in seeds)})
    described = Description(("a", "b"), {"segmentation": lambda file: np.asarray(Image.open(file))})
    found = {}
    for size in ("original", SIDE):
        config = DataConfig(train="image_folder", name="x", decode_size=size, validation_fraction=0.2)
        made = source(config, ExecutionConfig(threads=1), tmp_path, {"train": listing}, described, "", SIDE)
        from trainers.data.cache import open_source

        found[size] = open_source(made, tmp_path / "cache", lambda *_: None)
    streaming, ahead = found["original"].train, found[SIDE].train
    assert found["original"].provides == found[SIDE].provides == ("segmentation", "boxes")
    for name in ("segmentation", "boxes"):
        lazy = streaming.targets[name]
        assert lazy.shape == ahead.targets[name].shape and lazy.dtype == ahead.targets[name].dtype
        np.testing.assert_array_equal(lazy[np.array([2, 0])], ahead.targets[name][np.array([2, 0])])
        np.testing.assert_array_equal(lazy[1], ahead.targets[name][1])


def test_the_fingerprint_stands_for_names_sizes_and_classes(folder: Path, data: DataSet, tmp_path: Path) -> None:
    assert opened(folder, tmp_path / "again").fingerprint == data.fingerprint
    digits = {data.fingerprint, opened(folder, tmp_path / "0", decode_size=SIDE).fingerprint}
    for number, change in enumerate(("longer", "renamed", "class")):
        root = write_folder(tmp_path / change)
        file = root / "train" / "a" / "004.jpg"
        if change == "longer":
            file.write_bytes(file.read_bytes() + b"\0")
        elif change == "renamed":
            file.rename(file.with_name("004_.jpg"))  # which stands where it stood
        else:
            file.rename(root / "train" / "b" / "004.jpg")
        digits.add(opened(root, tmp_path / f"cache {number}").fingerprint)
    assert len(digits) == 5


# --- unreadable images --------------------------------------------------------------------------------------------


def test_an_unreadable_image_is_replaced_by_the_next_of_its_class(tmp_path: Path) -> None:
    data = opened(damaged(tmp_path / "root", 4), tmp_path / "cache", max_unreadable=0.1)
    row = row_of(data, 4)
    following = [other % 12 for other in range(row + 1, row + 12) if data.train.targets["classes"][other % 12] == 0]
    used, pixels = streamed(data).original(row)
    assert used == following[0]
    np.testing.assert_array_equal(pixels, decode_whole(io.BytesIO(jpeg(seed_of(data, used)))))
    np.testing.assert_array_equal(data.train.images[[row, 0]], data.train.images[[used, 0]])  # probes see it, too
    assert not np.array_equal(data.train.images[row], data.train.images[(row + 1) % 12]) or used == (row + 1) % 12
    (file,) = (tmp_path / "cache").glob(f"*/{UNREADABLE}")
    lines = file.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("train/a/004.jpg\tOSError: ")
    again = opened(tmp_path / "root", tmp_path / "cache", max_unreadable=0.1)
    assert streamed(again).original(row)[0] == used
    assert file.read_text().splitlines() == lines


def test_where_a_whole_class_is_unreadable_the_next_image_is_taken(tmp_path: Path) -> None:
    data = opened(damaged(tmp_path / "root", 0, 2, 4, 6, 8, 10), tmp_path / "cache", max_unreadable=0.5)
    row = row_of(data, 4)
    following = next(o % 12 for o in range(row + 1, row + 12) if data.train.targets["classes"][o % 12] == 1)
    assert streamed(data).original(row)[0] == following


def test_a_replaced_image_brings_its_own_targets(tmp_path: Path) -> None:
    root = damaged(tmp_path / "root", 1, 3, 5, 7, 9, 11)
    data = opened(root, tmp_path / "cache", max_unreadable=0.5)
    batch = reader(data, batch_size=12)(0)
    assert batch.targets["classes"].tolist() == [0] * 12  # of class b none can be read
    assert isinstance(batch.images, Ragged) and len(batch.images) == 12
    shards = write_shards(tmp_path / "shards")
    captioned = opened(shards, tmp_path / "cache", "image_text", max_unreadable=0.5)
    broken, seen = row_of(captioned, 7), []
    offset = int((captioned.train.paths or ())[broken].split("@")[1].split("+")[0])
    with (shards / "train" / "0.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"broken")
    read = reader(captioned, batch_size=24, needs=("captions",))
    object.__setattr__(read, "prepare", lambda upcoming: seen.extend(upcoming.captions) or {})
    images = list(read(0).images)
    assert "picture 7" not in seen
    for image, caption in zip(images, seen, strict=True):
        np.testing.assert_array_equal(image.numpy(), decode_whole(io.BytesIO(jpeg(int(caption.split()[1])))))


def test_too_many_unreadable_images_end_the_trial(tmp_path: Path) -> None:
    data = opened(damaged(tmp_path / "root", 1, 2, 3), tmp_path / "cache", max_unreadable=2 / 28)
    message = r"data set 'mine': 3 training images cannot be read, more than data\.max_unreadable .* allows \(2\); they"
    with pytest.raises(ValueError, match=message):
        reader(data, batch_size=12)(0)
    (file,) = (tmp_path / "cache").glob(f"*/{UNREADABLE}")
    assert len(file.read_text().splitlines()) == 3
    with pytest.raises(ValueError, match=message):  # nobody goes on by asking again
        streamed(data).original(row_of(data, 1))


def test_what_other_processes_have_named_counts_too(tmp_path: Path) -> None:
    data = opened(damaged(tmp_path / "root", 1, 2, 3), tmp_path / "cache", max_unreadable=2 / 28)
    (folder,) = (path.parent for path in (tmp_path / "cache").glob("*/meta.json"))
    (folder / UNREADABLE).write_text("one\tOSError: x\ntwo\tOSError: x\n")
    with pytest.raises(ValueError, match="3 training images cannot be read"):
        streamed(data).original(row_of(data, 1))


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "too many open files"), OSError(errno.EIO, "x")]
)
def test_what_the_machine_does_wrong_replaces_no_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    data = opened(folder, tmp_path / "cache")

    def fail(_source: object) -> None:
        raise error

    monkeypatch.setattr(streaming_module, "decode_original", fail)
    with pytest.raises(type(error)):
        streamed(data).original(0)
    assert not list((tmp_path / "cache").glob(f"*/{UNREADABLE}"))


def in_memory(
    bad_squares: Collection[int], bad_originals: Collection[int], classes: Any, file: Path, count: int = 0
) -> Streamed:
    """Images without files, of which some cannot be read as squares, and others at their own size."""
    length = count or len(classes)

    def square(row: int) -> Square:
        if row in bad_squares:
            raise ValueError("damaged")
        return Square(np.full((8, 8, 3), row % 200, np.uint8), np.zeros(4, np.float32))

    def source(row: int) -> io.BytesIO:
        return io.BytesIO(b"damaged" if row in bad_originals else jpeg(row % 200))

    unreadable = Unreadable(file, 5, "x", "y")
    return Streamed(Names(length), source, square, classes, 8, 1, unreadable)


class Names(Sequence[str]):
    """Names of many images that take no memory."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        return f"{row}.jpg"


def test_what_only_a_square_lacks_replaces_no_original(tmp_path: Path) -> None:
    """Its map may be damaged: the original is the same, whether a probe has met it before or not."""
    images = in_memory([1], [2], np.zeros(4, np.int64), tmp_path / "x.txt")
    assert images.square(1).pixels[0, 0, 0] == 2
    assert images.original(1)[0] == 1
    assert images.original(2)[0] == 3
    assert images.square(2).pixels[0, 0, 0] == 2


def test_looking_for_a_replacement_takes_no_memory(tmp_path: Path) -> None:
    classes = np.arange(1_000_000) % 2
    classes[5] = 7  # alone in its class
    images = in_memory([], [5], classes, tmp_path / "x.txt")
    tracemalloc.start()
    assert images.original(5)[0] == 6
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_reasons_of_any_characters_are_written(tmp_path: Path) -> None:
    Unreadable(tmp_path / "x.txt", 5, "x", "y").add("a.jpg", OSError("member \udce9 ends"))
    assert (tmp_path / "x.txt").read_text() == "a.jpg\tOSError: member \\udce9 ends\n"


def test_the_machine_is_told_from_the_file_whoever_says_so(tmp_path: Path) -> None:
    named = ValueError("its depth x.png: too many open files")
    named.__cause__ = OSError(errno.EMFILE, "too many open files")
    assert [of_the_machine(error) for error in (named, OSError(errno.ESTALE, "x"), MemoryError())] == [True] * 3
    of_files = [OSError("truncated"), UnidentifiedImageError("x"), ValueError("x"), FileNotFoundError(2, "x")]
    assert not any(map(of_the_machine, [*of_files, OSError(errno.EISDIR, "x"), OSError(errno.ENAMETOOLONG, "x")]))


def test_those_that_decoding_ahead_has_met_count_too(tmp_path: Path) -> None:
    root = damaged(tmp_path / "root", 1)
    (root / "test" / "a" / "200.jpg").write_bytes(b"broken")
    data = opened(root, tmp_path / "cache", max_unreadable=1 / 28)
    assert data.unreadable == ("test/a/200.jpg",)
    with pytest.raises(ValueError, match=r"1 training images cannot be read, more than .* allows \(0\)"):
        streamed(data).original(row_of(data, 1))


def test_without_a_readable_image_it_ends(tmp_path: Path) -> None:
    data = opened(damaged(tmp_path / "root", *range(12)), tmp_path / "cache", max_unreadable=1.0)
    with pytest.raises(ValueError, match="data set 'mine': not one training image can be read"):
        streamed(data).original(0)


def test_names_that_cannot_be_printed_are_escaped_and_named_once(tmp_path: Path) -> None:
    for _ in range(2):  # two processes
        unreadable = Unreadable(tmp_path / "x.txt", 5, "x", "y")
        for path in ("a\nb.jpg", "c.jpg", "a\nb.jpg"):
            unreadable.add(path, OSError("two\nlines"))
        assert len(unreadable.paths) == 2
    assert (tmp_path / "x.txt").read_text() == "a\\nb.jpg\tOSError: two lines\nc.jpg\tOSError: two lines\n"


# --- reading ahead ------------------------------------------------------------------------------------------------


def test_a_step_has_the_images_of_its_order_whatever_came_before(data: DataSet) -> None:
    wanted = [Order(12, 4, Streams(1))(step) for step in range(7)]
    for start in (0, 3, 6):
        read = reader(data, steps=7)
        for step in range(start, 7):
            batch = read(step)
            assert isinstance(batch.images, Ragged)
            assert batch.targets["classes"].tolist() == [seed_of(data, row) % 2 for row in wanted[step]]
            for image, row in zip(batch.images, wanted[step], strict=True):
                np.testing.assert_array_equal(image.numpy(), decode_whole(io.BytesIO(jpeg(seed_of(data, row)))))
        read.close()


def test_so_many_steps_are_decoded_ahead_and_none_past_the_end(data: DataSet) -> None:
    asked: list[int] = []

    def rows(step: int) -> np.ndarray:
        asked.append(step)
        return np.arange(4)

    ahead = Ahead(streamed(data), rows, steps=8, most_images=12)
    ahead(0)
    assert asked == [0, 1, 2, 3]  # three steps of four images wait
    ahead(1)
    assert asked == [0, 1, 2, 3, 4]
    for step in range(2, 8):
        ahead(step)
    assert asked == list(range(8))
    ahead.close()
    few = Ahead(streamed(data), rows, most_images=1)
    asked.clear()
    few(5)
    assert asked == [5, 6, 7]  # two steps in any case
    few.close()


def test_decoding_ends_with_the_reader(data: DataSet) -> None:
    read = reader(data)
    for _ in batches(read, 0, 4):
        break
    assert read._ahead is not None
    with pytest.raises(RuntimeError, match="shutdown"):
        read._ahead._pool.submit(int)


# --- trials -------------------------------------------------------------------------------------------------------
