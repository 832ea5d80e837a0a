"""Image folders: layout, splits, decoding, damaged and hostile files, and what makes a cache stale."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.trainers.runs import run
from trainers.config import DataConfig, ExecutionConfig, identity, resolve
from trainers.data import SPLITS, DataSet, open_data
from trainers.data.image_folder import build, images_below
from trainers.data.pictures import decode
from trainers.tokens import table as token_table

SIDE = 8


def colour(class_number: int, index: int) -> tuple[int, int, int]:
    return (20 * class_number, index, 100)


def place(root: Path, **counts: int) -> Path:
    """Folders with `counts` images for each of the classes ant, bee and cat; the colour says class and index."""
    for split, count in counts.items():
        for c, name in enumerate(("ant", "bee", "cat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 10), colour(c, i)).save(folder / f"{i:03}.png")
    return root


def opened(root: Path | None, cache: Path, progress: Any = None, **settings: Any) -> DataSet:
    values = {"train": "image_folder", "name": "insects", "decode_size": SIDE, "scenes": None, **settings}
    execution = ExecutionConfig(data_root=None if root is None else str(root), threads=2)
    return open_data(DataConfig(**values), execution, 224, cache, progress)


def test_images_classes_and_paths_belong_together(tmp_path: Path) -> None:
    root = place(tmp_path / "root", train=6, validation=2, test=3)
    data = opened(root, tmp_path / "cache")
    assert data.name == "insects"
    assert data.class_names == ("ant", "bee", "cat")
    for name, count in zip(SPLITS, (18, 6, 9), strict=True):
        split = getattr(data, name)
        assert split.images.shape == (count, SIDE, SIDE, 3)
        assert len(set(split.paths)) == count
        for image, c, path in zip(split.images, split.targets["classes"], split.paths, strict=True):
            folder, class_name, file = Path(path).parts
            assert (folder, class_name) == (name, data.class_names[c])
            assert (image == colour(int(c), int(file[:3]))).all()
        assert split.targets["classes"].tolist() != sorted(split.targets["classes"].tolist())  # a prefix is a sample


def test_missing_splits_are_taken_from_training(tmp_path: Path) -> None:
    root = place(tmp_path / "root", train=10)
    data = opened(root, tmp_path / "cache", validation_fraction=0.2)
    counts = [np.bincount(getattr(data, split).targets["classes"], minlength=3).tolist() for split in SPLITS]
    # 30 images: 6 for the test, then 0.2 × 24 = 4.8, rounded to 5, for validation
    assert [sum(count) for count in counts] == [19, 5, 6]
    assert counts[2] == [2, 2, 2]
    assert all(max(count) - min(count) <= 1 for count in counts)
    paths = [path for split in SPLITS for path in getattr(data, split).paths]
    assert len(set(paths)) == 30
    again = opened(root, tmp_path / "other", validation_fraction=0.2)
    assert list(again.test.paths) == list(data.test.paths)
    assert again.fingerprint == data.fingerprint
    assert list(opened(root, tmp_path / "cache", validation_fraction=0.2, seed=1).test.paths) != list(data.test.paths)


def test_val_is_another_name_of_validation(tmp_path: Path) -> None:
    root = place(tmp_path / "root", train=4, val=2, test=1)
    assert len(opened(root, tmp_path / "cache").validation) == 6
    place(root, validation=1)
    with pytest.raises(ValueError, match="has both validation and val"):
        opened(root, tmp_path / "cache")


def test_names_that_are_no_images_are_passed_over_and_folders_below_are_not(tmp_path: Path) -> None:
    root = place(tmp_path / "root", train=3, validation=1, test=1)
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("x")
    (root / "train" / "ant" / "._000.png").write_text("x")
    (root / "train" / "ant" / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(root / "train" / "ant" / "deep" / "er" / "X.JPEG")
    data = opened(root, tmp_path / "cache")
    assert len(data.train) == 10
    assert "train/ant/deep/er/X.JPEG" in data.train.paths
    assert data.unreadable == ()


def wrong(root: Path, change: Callable[[Path], object]) -> Path:
    change(root)
    return root


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train").rename(root / "elsewhere"), "has no folder train; put images under ROOT"),
        (
            lambda root: (root / "test" / "bee").rename(root / "test" / "wasp"),
            "has the class 'wasp', which .*train lacks",
        ),
        (lambda root: (root / "train" / "dog").mkdir(), "dog has no images; known suffixes"),
        (lambda root: [(root / "test" / c).rename(root / c) for c in ("ant", "bee", "cat")], "has no class folders"),
        (lambda root: root.rename(root.with_name("moved")), "is not a folder on this machine"),
    ],
)
def test_wrong_layouts_are_said_in_one_line(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    root = wrong(place(tmp_path / "root", train=2, validation=1, test=1), change)
    with pytest.raises(ValueError, match=message) as raised:
        opened(root, tmp_path / "cache")
    assert "\n" not in str(raised.value)


def test_a_missing_root_and_too_few_images_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"execution\.data_root is missing"):
        opened(None, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"3 images are too few for a (test|validation) split"):
        opened(place(tmp_path / "root", train=1), tmp_path / "cache")


def bomb(path: Path) -> None:
    """A PNG of 60 bytes that claims 20,000 × 20,000 px."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b""))


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])


DAMAGE = {
    "bomb.png": bomb,
    "truncated.jpg": truncated,
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("<html>404</html>"),
    "dangling.png": lambda path: path.symlink_to("nowhere"),
    "pipe.png": os.mkfifo,
    "device.png": lambda path: path.symlink_to("/dev/null"),
    "float.tiff": lambda path: Image.new("F", (9, 9), 0.5).save(path),
}


def test_unreadable_images_are_counted_named_and_skipped(tmp_path: Path) -> None:
    root = place(tmp_path / "root", train=6, validation=2, test=2)
    for name, damage in DAMAGE.items():
        damage(root / "train" / "bee" / name)
    data = opened(root, tmp_path / "cache", max_unreadable=0.25)  # of 38
    assert sorted(data.unreadable) == sorted(f"train/bee/{name}" for name in DAMAGE)
    assert len(data.train) == 18
    assert not set(data.unreadable) & set(data.train.paths)
    assert opened(root, tmp_path / "cache", max_unreadable=0.25).unreadable == data.unreadable
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("."))
    lines = dict(line.split("\t") for line in (folder / "unreadable.txt").read_text().splitlines())
    assert set(lines) == set(data.unreadable)
    assert "truncated" in lines["train/bee/truncated.jpg"]
    assert "DecompressionBomb" in lines["train/bee/bomb.png"]


def test_one_of_n_is_too_many_by_default(tmp_path: Path) -> None:
    root = place(tmp_path / "root", train=6, validation=2, test=2)
    truncated(root / "val.jpg")
    (root / "val.jpg").rename(root / "validation" / "cat" / "broken.jpg")
    with pytest.raises(
        ValueError, match=r"1 of 31 images .* more than data.max_unreadable 0.001 allows \(0\)"
    ) as raised:
        opened(root, tmp_path / "cache")
    message = str(raised.value)
    assert "validation/cat/broken.jpg" in message
    assert "\n" not in message
    assert "validation/cat/broken.jpg\t" in Path(message.rpartition("named in ")[2]).read_text()
    (root / "validation" / "cat" / "broken.jpg").unlink()
    assert opened(root, tmp_path / "cache").unreadable == ()


def test_changed_files_are_noticed_and_the_fingerprint_is_of_content(tmp_path: Path) -> None:
    root, cache = place(tmp_path / "root", train=3, validation=1, test=1), tmp_path / "cache"
    decoded: list[int] = []

    def fingerprint() -> str:
        return opened(root, cache, lambda _, done, __: decoded.append(done)).fingerprint

    first = fingerprint()
    assert decoded[-1] == 15
    decoded.clear()
    assert fingerprint() == first
    assert decoded == []
    file = root / "train" / "ant" / "001.png"
    os.utime(file, ns=(0, 0))
    assert fingerprint() == first  # decoded again, with the same content
    assert decoded
    Image.new("RGB", (12, 10), "white").save(file)
    changed = fingerprint()
    assert changed != first
    file.unlink()
    assert fingerprint() not in (first, changed)
    moved = place(tmp_path / "moved", train=3, validation=1, test=1)
    assert opened(moved, cache).fingerprint == first


def test_decoding_is_resize_and_centre_crop(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    reference = Image.fromarray(noise).resize((40, 24), Image.Resampling.BICUBIC).crop((8, 0, 32, 24))
    np.testing.assert_array_equal(decode(tmp_path / "a.png", 24).pixels, np.asarray(reference))
    tall = noise.transpose(1, 0, 2).copy()
    Image.fromarray(tall).save(tmp_path / "b.png")
    enlarged = Image.fromarray(tall).resize((96, 160), Image.Resampling.BICUBIC).crop((0, 32, 96, 128))
    np.testing.assert_array_equal(decode(tmp_path / "b.png", 96).pixels, np.asarray(enlarged))


@pytest.mark.parametrize(
    ("size", "content"),
    [
        ((12, 6), (0, 4, 16, 12)),  # enlarged by 16 / 12
        ((64, 128), (4, 0, 12, 16)),
        ((30, 30), (0, 0, 16, 16)),
        ((80, 70), (0, 1, 16, 15)),
        ((64, 36), (0, 3, 16, 12)),  # 9 rows: 3 margins above, 4 below
        ((60_000, 1), (0, 7, 16, 8)),
    ],
)
def test_padding_shows_all_of_the_picture(
    tmp_path: Path, size: tuple[int, int], content: tuple[int, int, int, int]
) -> None:
    width, height = size
    noise = np.random.default_rng(0).integers(50, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    pixels, found, _ = decode(tmp_path / "a.png", 16, "pad")
    assert (found.dtype, tuple(found)) == (np.float32, content)
    x0, y0, x1, y1 = content
    reference = Image.fromarray(noise).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels[y0:y1, x0:x1], np.asarray(reference))
    margins = np.ones((16, 16), bool)
    margins[y0:y1, x0:x1] = False
    assert (pixels[margins] == 0).all()


def test_padding_sees_the_picture_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # stored lying: 8 × 16 is shown 16 high
    Image.new("RGB", (16, 8), "red").save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg", 16, "pad").content.tolist() == [4, 0, 12, 16]


def test_a_padded_data_set_says_what_is_content_and_provides_no_more(tmp_path: Path) -> None:
    root, cache = place(tmp_path / "root", train=6, validation=2, test=2), tmp_path / "cache"
    truncated(root / "train" / "bee" / "broken.jpg")
    cropped = opened(root, cache, max_unreadable=0.1)
    padded = opened(root, cache, max_unreadable=0.1, fit="pad")
    for split in SPLITS:
        part = getattr(padded, split)
        # 12 × 10 at 8 px: 7 rows of 6.67; one margin, below
        assert part.targets["content"].dtype == np.float32
        assert (part.targets["content"] == [0, 0, 8, 7]).all()
        assert len(part.targets["content"]) == len(part)
        assert part.images[:, 7].max() == 0
        assert [tuple(image[0, 0]) for image in part.images] == [tuple(i[0, 0]) for i in getattr(cropped, split).images]
        assert list(part.paths) == list(getattr(cropped, split).paths)
        assert "content" not in getattr(cropped, split).targets
    assert padded.provides == cropped.provides == ("classes",)
    assert padded.unreadable == cropped.unreadable == ("train/bee/broken.jpg",)
    assert padded.fingerprint != cropped.fingerprint


def test_padding_does_not_touch_caches_and_identities_of_before(tmp_path: Path) -> None:
    root = place(tmp_path / "root", train=2, validation=1, test=1)
    execution = ExecutionConfig(data_root=str(root))
    values = {"train": "image_folder", "name": "insects", "scenes": None}
    keys = {fit: build(DataConfig(fit=fit, **values), execution, SIDE, tmp_path).key for fit in ("crop", "pad")}
    assert set(keys["crop"]) == {"seed", "side", "validation_fraction", "files"}
    assert keys["pad"] == {**keys["crop"], "fit": "pad"}
    folder = {"data.train": "image_folder", "data.name": "insects"}
    assert "data.fit" not in identity(resolve(folder))
    assert identity(resolve({**folder, "data.fit": "pad"}))["data.fit"] == "pad"
    for name in ("scenes", "fashion_mnist"):  # where it has no effect
        assert resolve({"data.train": name, "data.fit": "pad"}) == resolve({"data.train": name})
    assert resolve({"data.train": "own.birds:build", "data.fit": "pad"}).data.fit == "pad"  # whose code is given it


def test_a_trial_leaves_padding_out_of_its_norms(tmp_path: Path, tiny: dict[str, Any]) -> None:
    place(tmp_path / "root", train=8, validation=6, test=4)
    folder = {"data.train": "image_folder", "data.name": "insects", "execution.data_root": str(tmp_path / "root")}
    measured = {"tokens.measurements": ["location"], "evaluation.points": 1, "optim.steps": 1, "data.decode_size": 32}
    settings = {**tiny, **folder, **measured, "data.fit": "pad", "model.patch_size": 2}
    (tmp_path / "trial").mkdir()
    _, reports = run(settings, tmp_path / "trial", tmp_path / "cache")
    # 12 × 10 at 32 px: 27 rows of 26.67, from 2 to 29: of 16 rows of patches the first and the last are padding.
    assert reports[1]["tokens/padding_fraction"] == 2 / 16
    rows = token_table.read(tmp_path / "trial" / "token_norms.parquet")
    counts = {row.statistics.count for row in rows if row.source == "probe" and row.token == "patch"}
    assert counts == {16 * 16 * 14}


def test_a_long_strip_needs_little_memory(tmp_path: Path) -> None:
    Image.new("RGB", (60_000, 1), "teal").save(tmp_path / "strip.png")
    assert (
        decode(tmp_path / "strip.png", 256).pixels == (0, 128, 128)
    ).all()  # 60,000 · 256 · 256 · 3 B would be 12 GB


def test_large_jpegs_decode_at_a_fraction_with_little_difference(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:600, :800] / 100.0
    smooth = (127 + 100 * np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], 2)).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").convert("RGB").save(tmp_path / "a.png")
    difference = decode(tmp_path / "a.jpg", 16).pixels.astype(int) - decode(tmp_path / "a.png", 16).pixels.astype(int)
    assert np.abs(difference).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_exif_is_applied(tmp_path: Path, orientation: int) -> None:
    quadrants = np.zeros((32, 32, 3), np.uint8)
    quadrants[:16, :16], quadrants[:16, 16:], quadrants[16:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    upright = Image.fromarray(quadrants)
    # How the camera stored it: the inverse of what each orientation asks a viewer to do.
    stored = {
        1: upright,
        2: ImageOps.mirror(upright),
        3: upright.rotate(180),
        4: ImageOps.flip(upright),
        5: ImageOps.mirror(upright.rotate(-90)),
        6: upright.rotate(90),
        7: ImageOps.mirror(upright.rotate(90)),
        8: upright.rotate(-90),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    decoded = decode(tmp_path / "a.jpg", 8).pixels
    for y, x, expected in ((1, 1, (250, 0, 0)), (1, 6, (0, 250, 0)), (6, 1, (0, 0, 250)), (6, 6, (0, 0, 0))):
        assert np.abs(decoded[y, x].astype(int) - expected).max() <= 12


def test_all_kinds_of_pixels_become_rgb(tmp_path: Path) -> None:
    palette = Image.new("RGB", (9, 9), (200, 100, 50)).quantize(2)
    kinds: dict[str, tuple[Image.Image, tuple[int, int, int], dict[str, object]]] = {
        "grey.png": (Image.new("L", (9, 9), 77), (77, 77, 77), {}),
        "bits.png": (Image.new("1", (9, 9), 1), (255, 255, 255), {}),
        "deep.png": (Image.fromarray(np.full((9, 9), 0x7F80, np.uint16)), (0x7F, 0x7F, 0x7F), {}),
        "palette.gif": (palette, (200, 100, 50), {}),
        "clear.png": (Image.new("RGBA", (9, 9), (0, 0, 0, 0)), (255, 255, 255), {}),
        "opaque.png": (Image.new("RGBA", (9, 9), (9, 8, 7, 255)), (9, 8, 7), {}),
        "half.webp": (Image.new("RGBA", (9, 9), (0, 0, 0, 128)), (127, 127, 127), {"lossless": True}),
        "ink.jpg": (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), (255, 0, 0), {}),
        "bitmap.bmp": (Image.new("RGB", (9, 9), (1, 2, 3)), (1, 2, 3), {}),
        "indexed.png": (palette, (255, 255, 255), {"transparency": bytes([0, 0])}),
    }
    for name, (image, expected, options) in kinds.items():
        image.save(tmp_path / name, **options)
        decoded = decode(tmp_path / name, 4).pixels
        assert (decoded.shape, decoded.dtype) == ((4, 4, 3), np.uint8)
        assert np.abs(decoded.astype(int) - expected).max() <= 2, name


def test_a_file_that_reads_like_a_member_of_an_archive_is_refused(tmp_path: Path) -> None:
    for name in ("a@1+2@b.png", "a.tar@1x.png"):
        (tmp_path / name).write_bytes(b"x")
    assert [path for path, _ in images_below(str(tmp_path), "c")] == ["c/a.tar@1x.png", "c/a@1+2@b.png"]
    (tmp_path / "a.tar@1+2@b.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.tar@1\+2@b\.png: its name reads like .*; rename it"):
        list(images_below(str(tmp_path), "c"))
