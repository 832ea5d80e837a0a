"""COCO 20k in its real layout: listed images, no crowds, rounded boxes, annotations that are read once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainers.layouts_dense import HEIGHT, WIDTH, coco20k, object_box
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS, DataSet, open_data
from trainers.data.coco20k import read_boxes

SIDE = WIDTH


def opened(root: Path, **settings: object) -> DataSet:
    values = {"train": "coco20k", "decode_size": SIDE, "fit": "pad", "scenes": None, "validation_fraction": 0.2}
    config = DataConfig.model_validate(values | settings)
    return open_data(config, ExecutionConfig(data_root=str(root), threads=1), 32, root / "cache")


def annotations(root: Path) -> Path:
    return root / "annotations/instances_train2014.json"


def change(root: Path, how: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(annotations(root).read_text())
    how(content)
    annotations(root).write_text(json.dumps(content))


def test_all_splits_are_parts_of_the_list_and_boxes_are_those_of_the_official_code(tmp_path: Path) -> None:
    data = opened(coco20k(tmp_path, 10))
    assert [len(getattr(data, split)) for split in SPLITS] == [6, 2, 2]
    assert data.provides == ("boxes",)
    assert data.protocol_splits == SPLITS
    assert data.class_names == ("person", "dog", "bottle")  # by their ids 1, 18, 44
    paths = [path for split in SPLITS for path in getattr(data, split).paths]
    assert sorted(paths) == [f"train2014/COCO_train2014_{100 + i:012}.jpg" for i in range(10)]
    for split in SPLITS:
        for row, path in enumerate(getattr(data, split).paths):
            number = int(path[-16:-4]) - 100
            x0, y0, x1, y1 = object_box(number)
            # The file has x0 + 0.3, y0 − 0.3, and a width and height that end at x1 − 0.2 and y1 − 0.1; no crowd.
            expected = [[x0, y0, x1, y1, 1 + number % 2]]
            assert getattr(data, split).whole(row).targets["boxes"].tolist() == expected
            shown = [[x0, y0 + (WIDTH - HEIGHT) // 2, x1, y1 + (WIDTH - HEIGHT) // 2, 1 + number % 2]]
            assert getattr(data, split).targets["boxes"][row].tolist() == shown


def test_halves_are_rounded_to_even_as_python_does(tmp_path: Path) -> None:
    box = {"id": 99, "image_id": 100, "category_id": 1, "bbox": [0.5, 1.5, 2, 3], "iscrowd": 0}
    root = coco20k(tmp_path, 5, extra=[box])
    found = read_boxes(annotations(root), frozenset({100}))
    assert found["boxes"][0].tolist() == [0, 2, 2, 4, 0]  # 2.5 → 2, 4.5 → 4
    assert found["ids"].tolist() == [100] and found["ends"].tolist() == [2]
    assert found["sizes"].tolist() == [[WIDTH, HEIGHT]]


def test_annotations_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = coco20k(tmp_path, 6)
    first = opened(root).fingerprint
    monkeypatch.setattr("trainers.data.coco20k.read_boxes", lambda *_: pytest.fail("read again"))
    assert opened(root).fingerprint == first
    with pytest.raises(pytest.fail.Exception, match="read again"):
        (root / "coco_20k_filenames.txt").write_text("train2014/COCO_train2014_000000000100.jpg\n")
        opened(root)


def test_images_without_an_object_are_left_out_and_said(tmp_path: Path) -> None:
    root = coco20k(tmp_path, 8)
    change(root, lambda c: [a.update(iscrowd=1) for a in c["annotations"] if a["image_id"] in (101, 105)])
    data = opened(root)
    assert sum(len(getattr(data, split)) for split in SPLITS) == 6
    assert data.unreadable == ()
    from trainers.data import source_of

    config = DataConfig(train="coco20k", decode_size=SIDE, scenes=None, validation_fraction=0.2)
    source = source_of(config, ExecutionConfig(data_root=str(root)), 32, root / "cache")
    assert source.notes == ("2 of 8 images have no object that is no crowd, and are left out",)


def test_images_that_the_annotations_do_not_know_or_that_are_not_there_are_named(tmp_path: Path) -> None:
    root = coco20k(tmp_path, 16)
    change(root, lambda c: c.update(images=[i for i in c["images"] if i["id"] != 103]))
    (root / "train2014/COCO_train2014_000000000105.jpg").unlink()
    assert set(opened(root, max_unreadable=0.5).unreadable) == {
        f"train2014/COCO_train2014_000000000{n}.jpg" for n in (103, 105)
    }


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    root = coco20k(tmp_path, 8)
    change(root, lambda c: c["images"][0].update(width=HEIGHT, height=WIDTH))
    assert opened(root, max_unreadable=0.5).unreadable == ("train2014/COCO_train2014_000000000100.jpg",)


def objects(data: DataSet) -> int:
    """How many boxes there are in all splits."""
    boxes = (np.asarray(getattr(data, split).targets["boxes"]) for split in SPLITS)
    return sum(int((~np.isnan(of_split).any(axis=2)).sum()) for of_split in boxes)


def test_a_box_of_a_category_that_is_not_listed_is_dropped_and_remarked_on(tmp_path: Path) -> None:
    root = coco20k(tmp_path, 6)
    before = objects(opened(root))
    change(root, lambda c: c["annotations"][0].update(category_id=99))
    assert objects(opened(root)) == before - 1
    remarks = "".join(path.read_text() for path in tmp_path.rglob("remarks.txt"))
    assert "000000000100.jpg" in remarks and "1 of 1 boxes of a class that is not listed" in remarks


@pytest.mark.parametrize("value", ["NaN", "1e400", "1e308", "1" + "0" * 400])
def test_a_box_that_is_not_finite_is_dropped_and_remarked_on(tmp_path: Path, value: str) -> None:
    root = coco20k(tmp_path, 6)
    before = objects(opened(root))
    change(root, lambda c: c["annotations"][0].update(bbox=["IT", 1, 3, 4]))
    (file,) = root.glob("annotations/*.json")
    file.write_text(file.read_text().replace('"IT"', value))
    assert objects(opened(root)) == before - 1
    assert any("000000000100.jpg" in path.read_text() for path in tmp_path.rglob("remarks.txt"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
            r"annotation 0 has \[1, 2, 3\] as bbox; needed: four numb",
        ),
        (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]), "annotation 0 has .* as bbox"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 0 has None as bbox"),
        (lambda c: c["annotations"][0].update(category_id=[5]), r"annotation 0 has \[5\] as category_id; needed: a"),
        (lambda c: c.pop("categories"), "has no images and categories of COCO"),
        (lambda c: c.update(images=[5]), "has no images and categories of COCO"),
    ],
)
def test_annotations_that_cannot_be_right_are_said(
    tmp_path: Path, how: Callable[[dict[str, Any]], object], message: str
) -> None:
    root = coco20k(tmp_path, 6)
    change(root, how)
    with pytest.raises(ValueError, match=message) as raised:
        opened(root)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON of COCO"),
        ("[1]", "list instead of an object"),
        ('{"images": [', "is no JSON of COCO"),
        ("[" * 200_000, "is no JSON of COCO"),
        (b"\xff\xfe{", "is no JSON of COCO"),
    ],
)
def test_files_that_are_no_json_of_coco_are_said(tmp_path: Path, text: str | bytes, message: str) -> None:
    root = coco20k(tmp_path, 6)
    annotations(root).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        opened(root)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "coco_20k_filenames.txt").unlink(), r"has no coco_20k_filenames\.txt; train2014\.zip"),
        (lambda root: (root / "train2014").rename(root / "x"), "has no folder train2014; "),
        (lambda root: annotations(root).unlink(), r"has no annotations/instances_train2014\.json; "),
        (lambda root: (root / "coco_20k_filenames.txt").write_text("a.jpg\n"), r"names 'a\.jpg'; needed: names like"),
        (
            lambda root: (root / "coco_20k_filenames.txt").write_text("a/COCO_train2014_000000000100.jpg\n" * 2),
            r"names COCO_train2014_000000000100\.jpg twice",
        ),
    ],
)
def test_missing_and_damaged_files_are_said(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    root = coco20k(tmp_path, 6)
    damage(root)
    with pytest.raises(ValueError, match=message):
        opened(root)


def test_the_folders_of_the_official_code_will_do(tmp_path: Path) -> None:
    root = coco20k(tmp_path, 8)
    (root / "COCO/images").mkdir(parents=True)
    (root / "train2014").rename(root / "COCO/images/train2014")
    (root / "annotations").rename(root / "COCO/annotations")
    data = opened(root)
    assert sum(len(getattr(data, split)) for split in SPLITS) == 8
    assert all(path.startswith("COCO/images/train2014/") for path in data.test.paths or ())
    np.testing.assert_array_equal(data.train.whole(0).pixels.shape, (HEIGHT, WIDTH, 3))
