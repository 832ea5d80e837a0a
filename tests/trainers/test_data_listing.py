"""From lists of files to a data set: rows stay together, labels are checked against their image, remarks are kept."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.trainers import layouts_dense
from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import IGNORED, SPLITS, DataSet, open_data
from trainers.data import listing as listing_module
from trainers.data.cache import open_source
from trainers.data.labels import read_class_numbers
from trainers.data.listing import Description, Listing, divided, read_whole, source, stamps

SIDE = 8


def listing(root: Path, prefix: str, count: int, **targets: Any) -> Listing:
    paths = [f"{prefix}{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (SIDE, SIDE), (i, 0, 0)).save(root / path)
    return Listing(tuple(paths), targets)


def opened(root: Path, found: dict[str, Listing], described: Description | None = None, **settings: Any) -> DataSet:
    values = {"train": "image_folder", "name": "mine", "scenes": None, "validation_fraction": 0.25, **settings}
    config, execution = DataConfig(**values), ExecutionConfig(data_root=str(root), threads=2)
    files = tuple(path for part in found.values() for path in part.paths)
    made = source(config, execution, root, found, described or Description(), stamps(root, files), SIDE)
    return open_source(made, root / "cache", lambda *_: None)


def remarks(root: Path) -> dict[str, list[str]]:
    """What was said of each image."""
    said: dict[str, list[str]] = {}
    for file in (root / "cache").glob("*/remarks.txt"):
        for line in file.read_text().splitlines():
            path, what = line.split("\t")
            said.setdefault(path, []).append(what)
    return said


def test_rows_stay_together() -> None:
    boxes = tuple(np.full((i, 5), i, np.float32) for i in range(4))
    rows = Listing(
        ("a", "b", "c", "d"),
        {"classes": np.arange(4), "captions": ("A", "B", "C", "D"), "boxes": boxes},
        {"depth": ("1", "2", "3", "4")},
    )
    for chosen in (np.array([3, 1]), np.array([False, True, False, True])):
        found = rows.where(chosen)
        order = [3, 1] if chosen.dtype != bool else [1, 3]
        assert found.paths == tuple("abcd"[i] for i in order)
        assert found.targets["classes"].tolist() == order
        assert found.targets["captions"] == tuple("ABCD"[i] for i in order)
        assert [len(some) for some in found.targets["boxes"]] == order
        assert found.maps["depth"] == tuple("1234"[i] for i in order)


def test_missing_splits_come_from_training_and_are_stratified(tmp_path: Path) -> None:
    config = DataConfig(train="image_folder", name="mine", validation_fraction=0.25, scenes=None)
    rows = Listing(tuple(map(str, range(32))), {"classes": np.arange(32) % 2})
    splits = divided({"train": rows}, config, "mine")
    assert [len(splits[split]) for split in SPLITS] == [18, 6, 8]
    assert {path for split in SPLITS for path in splits[split].paths} == set(rows.paths)
    assert np.bincount(splits["test"].targets["classes"]).tolist() == [4, 4]
    given = {"train": rows, "test": Listing(("x",), {"classes": np.zeros(1, np.int64)})}
    assert [len(divided(given, config, "mine")[split]) for split in SPLITS] == [24, 8, 1]


def test_stamps_notice_other_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    first = stamps(tmp_path, ("a", "b"))
    assert stamps(tmp_path, ("a", "b")) == first
    assert stamps(tmp_path, ("b", "a")) != first
    assert stamps(tmp_path, ("a@0+1@x", "b")) != first
    os.utime(tmp_path / "a", ns=(1, 1))
    second = stamps(tmp_path, ("a", "b"))
    assert second != first
    (tmp_path / "b").unlink()
    assert stamps(tmp_path, ("a", "b")) not in (first, second)


def test_boxes_are_clipped_or_dropped_and_the_image_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = [[2, 2, 1, 6, 0], [9, 0, 12, 4, 0]]
    boxes = ([[1, 2, 3, 4, 5]], [[-1, 2, 30, 4, 6], *wrong], wrong, [])
    rows = listing(tmp_path, "t", 4, boxes=tuple(np.array(b, np.float32).reshape(-1, 5) for b in boxes))
    few = listing(tmp_path, "v", 1, boxes=(np.zeros((0, 5), np.float32),))
    other = listing(tmp_path, "w", 1, boxes=(np.array([[0, 0, 8, 8, 1]], np.float32),))
    with caplog.at_level(logging.WARNING):
        data = opened(tmp_path, {"train": rows, "validation": few, "test": other})
    assert len(data.train) == 4 and data.unreadable == ()
    expected = {"t0.png": [[1, 2, 3, 4, 5]], "t1.png": [[0, 2, 8, 4, 6]], "t2.png": [], "t3.png": []}
    for row, path in enumerate(data.train.paths or ()):
        stored = data.train.targets["boxes"][row]
        assert stored[~np.isnan(stored).any(1)].tolist() == expected[path]
        assert data.train.whole(row).targets["boxes"].tolist() == expected[path]
    assert remarks(tmp_path) == {
        "t1.png": [
            "1 of 3 boxes without an area",
            "1 of 3 boxes outside of the image",
            "1 of 3 boxes clipped to the image",
        ],
        "t2.png": ["1 of 2 boxes without an area", "1 of 2 boxes outside of the image"],
    }
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    assert json.loads(meta.read_text())["remarks"] == 5
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "5 remarks on its images" in warning and "remarks.txt" in warning
    assert (meta.parent / "remarks.txt").exists() and f"{meta.parent.name}/remarks.txt" in warning


def test_without_remarks_there_is_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(tmp_path, {"train": listing(tmp_path, "t", 8)})
    assert not list((tmp_path / "cache").glob("*/remarks.txt"))
    assert not caplog.records


def masked(root: Path, change: Callable[[Path], object], fraction: float = 0.5) -> DataSet:
    """24 images with masks of class 1, after a change."""
    rows = listing(root, "t", 24)
    for i in range(24):
        Image.new("L", (SIDE, SIDE), 1).save(root / f"m{i}.png")
    change(root)
    found = Listing(rows.paths, maps={"segmentation": tuple(f"m{i}.png" for i in range(24))})
    described = Description(read={"segmentation": lambda file: read_class_numbers(file, 2)})
    return opened(root, {"train": found}, described, max_unreadable=fraction)


def reasons(root: Path) -> dict[str, str]:
    (file,) = (root / "cache").glob("*/unreadable.txt")
    return dict(line.split("\t") for line in file.read_text().splitlines())


def test_maps_that_do_not_fit_or_cannot_be_read_are_named_with_their_file(tmp_path: Path) -> None:
    def change(root: Path) -> None:
        Image.new("L", (SIDE, SIDE - 1), 1).save(root / "m0.png")
        (root / "m1.png").unlink()
        (root / "m2.png").write_bytes((root / "m2.png").read_bytes()[:-30])

    masked(tmp_path, change)
    found = reasons(tmp_path)
    assert set(found) == {"t0.png", "t1.png", "t2.png"}
    assert "its segmentation has 8 × 7 px, the image 8 × 8" in found["t0.png"]
    assert "its segmentation m1.png: is not a file" in found["t1.png"]
    assert "its segmentation m2.png: " in found["t2.png"]


def test_a_mask_in_which_nothing_counts_is_remarked(tmp_path: Path) -> None:
    data = masked(tmp_path, lambda root: Image.new("L", (SIDE, SIDE), IGNORED).save(root / "m3.png"))
    assert remarks(tmp_path) == {"t3.png": ["its segmentation is known nowhere"]}
    assert sum(len(getattr(data, split)) for split in SPLITS) == 24


def turned(path: Path, size: tuple[int, int], orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", size, "red").save(path, exif=exif)


def test_labels_of_turned_images_have_to_be_upright(tmp_path: Path) -> None:
    sizes = {"t0.jpg": (4, 8), "t1.jpg": (8, 4), "t2.jpg": (4, 8)}  # as the annotations of the first three state them
    orientations = (6, 6, 6, 3)
    for i, orientation in enumerate(orientations):  # stored 8 wide and 4 high
        turned(tmp_path / f"t{i}.jpg", (8, 4), orientation)
        Image.new("L", (8, 4) if i > 1 else (4, 8), 1).save(tmp_path / f"m{i}.png")
    rows = Listing(tuple(f"t{i}.jpg" for i in range(4)), maps={"segmentation": tuple(f"m{i}.png" for i in range(4))})
    described = Description(read={"segmentation": lambda file: read_class_numbers(file, 2)}, sizes=sizes)
    whole = read_whole(tmp_path, rows, 0, described)
    assert whole.pixels.shape == (8, 4, 3)
    with pytest.raises(ValueError, match="its annotation has 8 × 4 px, the image turned as EXIF says 4 × 8"):
        read_whole(tmp_path, rows, 1, described)
    with pytest.raises(ValueError, match="its segmentation has 8 × 4 px, the image turned as EXIF says 4 × 8"):
        read_whole(tmp_path, rows, 2, described)
    other = listing(tmp_path, "v", 1), listing(tmp_path, "w", 1)
    for name in ("v", "w"):
        Image.new("L", (SIDE, SIDE), 1).save(tmp_path / f"m{name}.png")
    found = {
        "train": rows,
        "validation": Listing(other[0].paths, maps={"segmentation": ("mv.png",)}),
        "test": Listing(other[1].paths, maps={"segmentation": ("mw.png",)}),
    }
    data = opened(tmp_path, found, described, max_unreadable=0.5)
    assert set(data.unreadable) == {"t1.jpg", "t2.jpg"}
    expected = "EXIF turns it (orientation {}): what belongs to it has to be upright"
    assert remarks(tmp_path) == {"t0.jpg": [expected.format(6)], "t3.jpg": [expected.format(3)]}


def test_depth_is_known_or_zero_whatever_a_reader_gives(tmp_path: Path) -> None:
    rows = listing(tmp_path, "t", 8)
    values = np.full((SIDE, SIDE), 2.5, np.float64)
    values[0, :5] = [np.nan, np.inf, -np.inf, -1, 1e9]
    given = {"m0": values, **{f"m{i}": np.full((SIDE, SIDE), np.nan) for i in range(1, 8)}}
    found = Listing(rows.paths, maps={"depth": tuple(given)})
    described = Description(
        read={"depth": lambda name: given[name]}, open=lambda root, path: path if path in given else root / path
    )
    data = opened(tmp_path, {"train": found}, described)
    expected = np.full((SIDE, SIDE), 2.5, np.float32)
    expected[0, :5] = [0, 0, 0, 0, 65504]
    for split in SPLITS:
        part = getattr(data, split)
        assert np.isfinite(part.targets["depth"]).all()
        for row, path in enumerate(part.paths):
            np.testing.assert_array_equal(part.targets["depth"][row], expected if path == "t0.png" else 0)
            np.testing.assert_array_equal(part.whole(row).targets["depth"], expected if path == "t0.png" else 0)
    assert remarks(tmp_path) == {f"t{i}.png": ["its depth is known nowhere"] for i in range(1, 8)}


def test_faults_that_were_found_before_decoding_count_as_unreadable(tmp_path: Path) -> None:
    rows = listing(tmp_path, "t", 8)
    described = Description(faults=(("lost.png", "has no pair"),))
    with pytest.raises(ValueError, match=r"1 of 9 images cannot be read.*lost\.png"):
        opened(tmp_path, {"train": rows}, described)
    assert opened(tmp_path, {"train": rows}, described, max_unreadable=0.12).unreadable == ("lost.png",)


@pytest.mark.parametrize("name", ["voc2012_segmentation", "ade20k", "nyu_depth", "coco20k", "labelled"])
def test_images_at_their_own_size_can_be_opened_in_other_processes(tmp_path: Path, name: str) -> None:
    makers: dict[str, Callable[[Path], Path]] = {
        "voc2012_segmentation": lambda root: layouts_dense.voc(root, "2012", {"train": 8, "val": 2}),
        "ade20k": lambda root: layouts_dense.ade20k(root, 8, 2),
        "nyu_depth": lambda root: layouts_dense.nyu_depth(root, 3, 3, 2),
        "coco20k": lambda root: layouts_dense.coco20k(root, 10),
        "labelled": lambda root: layouts_dense.nyu_labelled(root, 12, [9, 10]),
    }
    train = "nyu_depth" if name == "labelled" else name
    config = DataConfig(train=train, decode_size=SIDE, scenes=None, validation_fraction=0.25)
    execution = ExecutionConfig(data_root=str(makers[name](tmp_path)), threads=1)
    data = open_data(config, execution, 32, tmp_path / "cache")
    assert data.provides == catalog.DATASETS[train].provides
    copied = pickle.loads(pickle.dumps(data.test.open_whole))
    path = (data.test.paths or [""])[0]
    expected, found = data.test.whole(0), copied(path)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found.pixels.shape == (layouts_dense.HEIGHT, layouts_dense.WIDTH, 3)
    for target in data.provides:
        np.testing.assert_array_equal(found.targets[target], expected.targets[target])


def test_a_change_shows_in_files_with_an_at_sign_too(tmp_path: Path) -> None:
    (tmp_path / "image@2x.jpg").write_bytes(b"one")
    before = stamps(tmp_path, ["image@2x.jpg"])
    (tmp_path / "image@2x.jpg").write_bytes(b"three")
    assert stamps(tmp_path, ["image@2x.jpg"]) != before


def test_members_with_long_names_are_stamped_as_their_archive(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"one")
    reference = "a.tar@0+3@" + "n" * 300  # longer than a file's name may be
    before = stamps(tmp_path, [reference])
    (tmp_path / "a.tar").write_bytes(b"three")
    assert stamps(tmp_path, [reference]) != before


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "too many open files")])
def test_a_shortage_of_the_machine_leaves_no_image_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It ends the decoding; the next time all images are there."""
    for index in range(12):
        (tmp_path / "root" / "train" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / "root" / "train" / "a" / f"{index}.png")
    config = DataConfig(
        train="image_folder", name="mine", decode_size=SIDE, scenes=None, max_unreadable=1.0, validation_fraction=0.2
    )
    execution = ExecutionConfig(data_root=str(tmp_path / "root"), threads=1)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(listing_module, "decode", fail)
        open_data(config, execution, SIDE, tmp_path / "cache")
    data = open_data(config, execution, SIDE, tmp_path / "cache")
    assert (sum(len(getattr(data, split)) for split in SPLITS), data.unreadable) == (12, ())
