"""PASCAL VOC in its real layout: splits, boxes, classes, masks; lists and XML files that are damaged or hostile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.trainers.layouts_dense import HEIGHT, WIDTH, object_box, palette, save, voc, voc_xml
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import IGNORED, SPLITS, DataSet, open_data
from trainers.data.voc import CLASSES, read_annotation

SIDE = HEIGHT  # the centre square at its own size: x moves by 6, nothing is resized
LEFT = (WIDTH - HEIGHT) // 2


def opened(root: Path, name: str, **settings: object) -> DataSet:
    config = DataConfig(train=name, decode_size=SIDE, scenes=None, **{"validation_fraction": 0.2} | settings)  # type: ignore[arg-type]
    return open_data(config, ExecutionConfig(data_root=str(root), threads=1), 32, root / "cache")


def number_of(path: str) -> int:
    return int(path[-10:-4])


def test_voc2007_has_the_published_splits_with_classes_and_boxes(tmp_path: Path) -> None:
    data = opened(voc(tmp_path, "2007", {"train": 5, "val": 4, "test": 6}), "voc2007")
    assert data.provides == ("classes", "boxes")
    assert data.class_names == CLASSES and len(set(CLASSES)) == 20 and sorted(CLASSES) == list(CLASSES)
    assert data.protocol_splits == ("train", "validation")
    first = {"train": 0, "validation": 5, "test": 9}
    for split, count in zip(SPLITS, (5, 4, 6), strict=True):
        part = getattr(data, split)
        numbers = [number_of(path) for path in part.paths]
        assert sorted(numbers) == list(range(first[split], first[split] + count))
        assert part.targets["classes"].tolist() == [number % 20 for number in numbers]
        for row, number in enumerate(numbers):
            x0, y0, x1, y1 = object_box(number)
            assert part.targets["boxes"][row].tolist() == [[x0 - LEFT, y0, x1 - LEFT, y1, number % 20]]
            bright = part.images[row].mean(axis=2) > 120
            assert (np.flatnonzero(bright.any(axis=0))[[0, -1]] == (x0 - LEFT, x1 - LEFT - 1)).all()
            whole = part.whole(row)
            assert whole.pixels.shape == (HEIGHT, WIDTH, 3)
            assert whole.targets["boxes"].tolist() == [[x0, y0, x1, y1, number % 20]]


def test_of_voc2012_the_published_validation_set_is_the_test_split(tmp_path: Path) -> None:
    data = opened(voc(tmp_path, "2012", {"train": 10, "val": 4}), "voc2012", validation_fraction=0.2)
    assert [len(getattr(data, split)) for split in SPLITS] == [8, 2, 4]
    assert sorted(number_of(path) for path in data.test.paths) == [10, 11, 12, 13]
    assert data.protocol_splits == SPLITS


@pytest.mark.parametrize(("year", "sizes"), [("2007", [5, 3, 2]), ("2012", [4, 1, 3])])
def test_masks_are_of_21_classes_and_void_does_not_count(tmp_path: Path, year: str, sizes: list[int]) -> None:
    root = voc(tmp_path, year, {"train": 5, "val": 3} | ({"test": 2} if year == "2007" else {}))
    data = opened(root, f"voc{year}_segmentation")
    assert [len(getattr(data, split)) for split in SPLITS] == sizes
    assert data.provides == ("segmentation",)
    assert data.segmentation_names == ("background", *CLASSES)
    for row, path in enumerate(data.test.paths or ()):
        x0, y0, x1, y1 = object_box(number_of(path))
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        expected[y0 - 1 : y1 + 1, x0 - 1 : x1 + 1] = IGNORED
        expected[y0:y1, x0:x1] = number_of(path) % 20 + 1
        np.testing.assert_array_equal(data.test.whole(row).targets["segmentation"], expected)
        np.testing.assert_array_equal(data.test.targets["segmentation"][row], expected[:, LEFT:-LEFT])


def test_the_class_is_that_of_the_largest_object_that_is_not_difficult(tmp_path: Path) -> None:
    root = voc(tmp_path, "2007", {"train": 3, "val": 1, "test": 1})
    folder = root / "VOCdevkit/VOC2007/Annotations"

    def some(*objects: tuple[int, str, int]) -> str:
        texts = [voc_xml((8, 2, 8 + side, 2 + side), name, difficult) for side, name, difficult in objects]
        more = "".join(text[text.index("<object>") : text.index("</annotation>")] for text in texts[1:])
        return texts[0].replace("<object>", more + "<object>", 1)

    (folder / "2007_000000.xml").write_text(some((9, "dog", 0), (12, "cat", 0), (20, "person", 1)))
    (folder / "2007_000001.xml").write_text(some((12, "cat", 1), (9, "dog", 1)))
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></part>"
    (folder / "2007_000002.xml").write_text(voc_xml((8, 2, 20, 14), "person").replace("</object>", f"{part}</object>"))
    data = opened(root, "voc2007")
    classes = dict(zip(map(number_of, data.train.paths or ()), data.train.targets["classes"].tolist(), strict=True))
    assert {number: CLASSES[c] for number, c in classes.items()} == {0: "cat", 1: "cat", 2: "person"}
    row = [number_of(path) for path in data.train.paths or ()].index(0)
    # All objects have boxes, difficult ones too; the largest comes first.
    assert [CLASSES[int(c)] for c in data.train.targets["boxes"][row][:, 4]] == ["person", "cat", "dog"]
    assert np.isnan(data.train.targets["boxes"][1 - row]).any() or np.isnan(data.train.targets["boxes"]).any()


BOMB = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;&x;">]>'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: BOMB + text.replace("<name>aeroplane", "<name>&y;"), "declares a document type"),
        (lambda text: (BOMB + text).encode("utf-16"), "declares a document type"),
        (lambda text: '<!DOCTYPE a SYSTEM "file:///etc/passwd">' + text, "declares a document type"),
        (lambda text: text[:200], "is no XML"),
        (lambda text: "", "is no XML"),
        (lambda text: text.replace("aeroplane", "zebra"), "class 'zebra', which is none of VOC's"),
        (lambda text: text.replace("<xmin>", "<xmin>x"), "as object/bndbox/xmin, which is no number"),
        (lambda text: text.replace("bndbox", "box"), "has no object/bndbox/xmin"),
        (lambda text: "<annotation/>", "has no object, so the image has no class"),
        (lambda text: text.replace("<folder>", "<folder>" + " " * 2**20), "more than 1,048,576 bytes"),
        (lambda text: text.replace(f"<width>{WIDTH}", "<width>99"), "its annotation has 99 × 36 px, the image 48 × 36"),
        (None, "is not a file"),
    ],
)
def test_annotations_that_cannot_be_right_are_named(
    tmp_path: Path, change: Callable[[str], str | bytes] | None, message: str
) -> None:
    root = voc(tmp_path, "2007", {"train": 2, "val": 1, "test": 1})
    file = root / "VOCdevkit/VOC2007/Annotations/2007_000000.xml"
    if change is None:
        file.unlink()
    else:
        changed = change(file.read_text())
        file.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(ValueError, match=r"1 of 4 images cannot be read.*JPEGImages/2007_000000\.jpg") as raised:
        opened(root, "voc2007")
    assert message in Path(str(raised.value).rpartition("named in ")[2]).read_text()
    data = opened(root, "voc2007", max_unreadable=0.5)
    assert data.unreadable == ("VOCdevkit/VOC2007/JPEGImages/2007_000000.jpg",)
    assert len(data.train) == 1


def test_fractions_of_pixels_and_sizes_that_are_not_said_are_taken(tmp_path: Path) -> None:
    text = voc_xml((10, 20, 30, 33), "cow", size=(0, 0)).replace("<xmin>11<", "<xmin> 11.5 <")
    (tmp_path / "a.xml").write_text(text)
    annotation = read_annotation(tmp_path / "a.xml")
    assert annotation.boxes.tolist() == [[10.5, 20, 30, 33, CLASSES.index("cow")]]
    assert annotation.size is None


@pytest.mark.parametrize(
    ("list_text", "message"),
    [
        ("2007_000000\n../../../etc/passwd\n", "names '../../../etc/passwd', which is no image of VOC"),
        ("2007_000000\n2007_000000\n", "names 2007_000000 twice"),
        ("2007_000001\n", "is in the lists of train and of validation"),
        (b"\xff\xfe\x00", "is no list of images"),
        (None, "cannot be read: No such file"),
    ],
)
@pytest.mark.parametrize("name", ["voc2007", "voc2007_segmentation"])
def test_damaged_lists_are_said_in_one_line(
    tmp_path: Path, name: str, list_text: str | bytes | None, message: str
) -> None:
    root = voc(tmp_path, "2007", {"train": 1, "val": 1, "test": 1})
    kind = "Segmentation" if name.endswith("segmentation") else "Main"
    file = root / f"VOCdevkit/VOC2007/ImageSets/{kind}/train.txt"
    file.unlink()
    if list_text is not None:
        file.write_bytes(list_text if isinstance(list_text, bytes) else list_text.encode())
    with pytest.raises(ValueError, match=message) as raised:
        opened(root, name)
    assert "\n" not in str(raised.value)


def test_a_root_without_voc_says_how_to_get_it_and_the_folder_itself_will_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no VOCdevkit/VOC2007 .*VOCtrainval_06-Nov-2007\.tar"):
        opened(tmp_path, "voc2007")
    voc(tmp_path, "2007", {"train": 2, "val": 1, "test": 1})
    for root in (tmp_path / "VOCdevkit", tmp_path / "VOCdevkit/VOC2007"):
        assert len(opened(root, "voc2007").train) == 2
    with pytest.raises(ValueError, match="has no VOCdevkit/VOC2012"):
        opened(tmp_path, "voc2012")


def test_masks_with_other_numbers_or_colours_are_refused_by_name(tmp_path: Path) -> None:
    root = voc(tmp_path, "2012", {"train": 6, "val": 2})
    folder = root / "VOCdevkit/VOC2012/SegmentationClass"
    good = np.zeros((HEIGHT, WIDTH), np.uint8)
    wrong = good.copy()
    wrong[0, 0] = 21
    save(folder / "2012_000000.png", palette(wrong))
    save(folder / "2012_000001.png", palette(good).convert("RGB"))
    save(folder / "2012_000002.png", palette(good[:-1]))
    (folder / "2012_000003.png").unlink()
    data = opened(root, "voc2012_segmentation", max_unreadable=0.9)
    (cache,) = (path for path in (root / "cache").iterdir() if path.is_dir())
    lines = dict(line.split("\t") for line in (cache / "unreadable.txt").read_text().splitlines())
    reasons = {number_of(path): reason for path, reason in lines.items()}
    assert len(data.unreadable) == 4
    assert "1 of its pixels have other class numbers than 0 … 20 and 255: 21" in reasons[0]
    assert "mode RGB" in reasons[1]
    assert "its segmentation has 48 × 35 px, the image 48 × 36" in reasons[2]
    assert "SegmentationClass/2012_000003.png: is not a file" in reasons[3]
