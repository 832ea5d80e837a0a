"""Classification sets in their published layouts: splits, classes and pixels belong together; wrong files are named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainers import layouts_data as layouts
from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS, DataSet, cifar, open_data, source_of
from trainers.data.listed_sets import CALTECH101

SIDE = 8


def opened(name: str, root: Path, cache: Path, **settings: Any) -> DataSet:
    values = {"train": name, "decode_size": SIDE, "scenes": None, "validation_fraction": 0.2, **settings}
    return open_data(DataConfig(**values), ExecutionConfig(data_root=str(root), threads=2), 224, cache)


# By hand from the files of layouts_data: images for training, validation and testing, and the classes in their order.
EXPECTED: dict[str, tuple[tuple[int, int, int], list[str]]] = {
    "fgvc_aircraft": ((12, 12, 12), ["707-320", "Boeing 717", "A300B4"]),
    "stanford_cars": ((14, 4, 18), ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi S4 Sedan 2007"]),
    "dtd": ((9, 9, 9), ["banded", "blotchy", "braided"]),
    "flowers102": ((9, 9, 9), ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]),
    "food101": ((14, 4, 18), ["apple_pie", "baby_back_ribs", "beet_salad"]),
    "oxford_pets": ((14, 4, 18), ["Abyssinian", "American Bulldog", "Bombay"]),
    "sun397": ((14, 4, 12), ["abbey", "apartment_building/outdoor", "yard"]),
    "cub200": ((12, 3, 9), ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross"]),
    "places205": ((14, 4, 18), ["abbey", "apartment_building/outdoor", "volcano"]),
    "cifar10": ((80, 20, 20), ["airplane", "automobile", "bird"]),
    "cifar100": ((12, 3, 15), ["apple", "aquarium_fish", "baby"]),
    "imagenet1k": ((24, 6, 6), ["tench", "goldfish", "great white shark"]),
    "imagenet22k": (
        (19, 5, 6),
        ["organism, being", "dog, domestic dog, Canis familiaris", "picture, image, icon, ikon"],
    ),
}


def test_every_classification_set_of_the_catalog_is_tested_here() -> None:
    others = {"scenes", "fashion_mnist", "image_folder", "image_text", "hugging_face", "caltech101"}
    ours = {name for name, entry in catalog.DATASETS.items() if entry.provides == ("classes",)} - others
    assert ours <= set(EXPECTED)
    assert set(EXPECTED) == set(layouts.CLASSIFICATION)


@pytest.mark.parametrize("name", EXPECTED)
def test_splits_classes_and_pixels_belong_together(name: str, tmp_path: Path) -> None:
    root = layouts.CLASSIFICATION[name](tmp_path / "root", layouts.Painter())
    data = opened(name, root, tmp_path / "cache")
    counts, names = EXPECTED[name]
    assert tuple(len(getattr(data, split)) for split in SPLITS) == counts
    assert list(data.class_names[:3]) == names
    assert data.provides == catalog.DATASETS[name].provides
    assert data.unreadable == ()
    pixels: list[bytes] = []
    for split in SPLITS:
        part = getattr(data, split)
        assert [layouts.class_of(image[0, 0]) for image in part.images] == part.targets["classes"].tolist()
        assert set(part.targets["classes"].tolist()) == set(range(10 if name == "cifar10" else 3))
        pixels += [image.tobytes() for image in part.images]
        whole = part.whole(0).pixels
        assert whole.shape == ((SIDE, SIDE, 3) if name.startswith("cifar") else (10, 12, 3))
        assert layouts.class_of(whole[0, 0]) == part.targets["classes"][0]
    assert len(set(pixels)) == sum(counts)  # no image is in two splits
    assert opened(name, root, tmp_path / "other").fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "name", [name for name, entry in EXPECTED.items() if "validation" in catalog.DATASETS[name].counts]
)
def test_published_validation_sets_are_validation(name: str, tmp_path: Path) -> None:
    root = layouts.CLASSIFICATION[name](tmp_path / "root", layouts.Painter())
    paths = {split: set(getattr(opened(name, root, tmp_path / "cache"), split).paths) for split in SPLITS}
    if name == "flowers102":
        ids = {split: sorted(int(path[-9:-4]) for path in paths[split]) for split in SPLITS}
        assert ids == {split: list(range(k + 1, 28, 3)) for k, split in enumerate(SPLITS)}
    elif name == "dtd":
        assert {split: {path[-8] for path in paths[split]} for split in SPLITS} == {
            split: {str(k)} for k, split in enumerate(SPLITS)
        }
    else:
        assert {split: {Path(path).name[0] for path in paths[split]} for split in SPLITS} == {
            split: {str(k)} for k, split in enumerate(SPLITS)
        }


@pytest.mark.parametrize("name", ["food101", "dtd", "cub200", "cifar10", "stanford_cars"])
def test_the_root_may_be_named_at_any_height(name: str, tmp_path: Path) -> None:
    root = layouts.CLASSIFICATION[name](tmp_path / "root", layouts.Painter())
    (inner,) = root.iterdir()
    fingerprint = opened(name, root, tmp_path / "cache").fingerprint
    assert opened(name, inner, tmp_path / "cache").fingerprint == fingerprint
    moved = tmp_path / "all" / name
    moved.parent.mkdir()
    shutil.move(root, moved)
    assert opened(name, moved.parent, tmp_path / "cache").fingerprint == fingerprint


def test_sun397_without_its_lists_says_so(tmp_path: Path) -> None:
    root = layouts.sun397(tmp_path / "root", layouts.Painter(), partition=False)
    config = DataConfig(train="sun397", scenes=None, validation_fraction=0.2)
    execution = ExecutionConfig(data_root=str(root))
    (note,) = source_of(config, execution, 224, tmp_path).notes
    assert "is not the published one" in note
    data = opened("sun397", root, tmp_path / "cache")
    assert [len(getattr(data, split)) for split in SPLITS] == [19, 5, 6]
    layouts.sun397(tmp_path / "other", layouts.Painter())
    for name in ("Training_01.txt", "Testing_01.txt"):
        shutil.copy(tmp_path / "other" / "SUN397" / name, root / name)  # beside the folder, as Partitions.zip unpacks
    assert source_of(config, execution, 224, tmp_path).notes == ()
    assert len(opened("sun397", root, tmp_path / "cache").test) == 12


def test_caltech101_takes_thirty_of_each_class_for_training(tmp_path: Path) -> None:
    root = layouts.caltech101(tmp_path / "root", layouts.Painter(), CALTECH101)
    data = opened("caltech101", root, tmp_path / "cache")
    assert len(data.class_names) == 101
    assert data.class_names[:5] == ("Faces", "Faces_easy", "Leopards", "Motorbikes", "accordion")
    numbers = np.concatenate([data.train.targets["classes"], data.validation.targets["classes"]])
    assert np.bincount(numbers).tolist() == [30] + [2] * 100
    assert np.bincount(data.test.targets["classes"]).tolist() == [3] + [1] * 100
    paths = [path for split in SPLITS for path in getattr(data, split).paths]
    assert len(set(paths)) == 33 + 300
    assert not any("BACKGROUND" in path for path in paths)
    for path, number in zip(data.test.paths, data.test.targets["classes"], strict=True):
        assert Path(path).parent.name == data.class_names[number]
    other = opened("caltech101", root, tmp_path / "cache", seed=1)
    assert set(other.test.paths) != set(data.test.paths)
    (root / "caltech101" / "101_ObjectCategories" / "tank").mkdir()
    with pytest.raises(ValueError, match="tank is none of the 101 published classes"):
        opened("caltech101", root, tmp_path / "cache")
    shutil.rmtree(root / "caltech101" / "101_ObjectCategories" / "tank")
    shutil.rmtree(root / "caltech101" / "101_ObjectCategories" / "yin_yang")
    with pytest.raises(ValueError, match="yin_yang has 0 images; needed: one for training, one for testing"):
        opened("caltech101", root, tmp_path / "cache")


def replaced(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


AIRCRAFT, CARS, PETS = "fgvc-aircraft-2013b/data", "stanford_cars", "oxford-iiit-pet/annotations"
CUB, PLACES = "CUB_200_2011", "trainvalsplit_places205"
WRONG: list[tuple[str, Callable[[Path], object], str]] = [
    ("fgvc_aircraft", lambda r: (r / AIRCRAFT / "variants.txt").unlink(), "variants.txt is missing; expected: fgvc-"),
    (
        "fgvc_aircraft",
        lambda r: replaced(r / AIRCRAFT / "images_variant_val.txt", "707-320", "Concorde"),
        r"\(split val.*\).*'Concorde' is no known class",
    ),
    (
        "fgvc_aircraft",
        lambda r: replaced(r / AIRCRAFT / "images_variant_test.txt", "2000001", "2000000"),
        "lists 1 images twice",
    ),
    ("stanford_cars", lambda r: (r / CARS / "devkit" / "cars_meta.mat").unlink(), "cars_meta.mat is missing"),
    (
        "stanford_cars",
        lambda r: (r / CARS / "cars_test_annos_withlabels.mat").write_bytes(b"MATLAB"),
        "lists are not as expected",
    ),
    (
        "dtd",
        lambda r: [replaced(r / "dtd/dtd/labels/val1.txt", f"braided/braided_1{i:03}.jpg\n", "") for i in range(3)],
        "train and validation have different classes: braided",
    ),
    ("food101", lambda r: (r / "food-101/meta/test.json").write_text("{"), "split test.*lists are not as expected"),
    ("food101", lambda r: shutil.rmtree(r / "food-101"), "has no folder food-101; expected: food-101/"),
    (
        "oxford_pets",
        lambda r: replaced(r / PETS / "test.txt", "Bombay_10 3", "Bombay_10 9"),
        "Bombay_10.jpg: its class is none of the|different classes",
    ),
    ("flowers102", lambda r: (r / "flowers-102" / "setid.mat").unlink(), "setid.mat is missing"),
    ("sun397", lambda r: replaced(r / "SUN397/ClassName.txt", "/y/yard\n", ""), "'yard' is no known class"),
    (
        "sun397",
        lambda r: replaced(r / "SUN397/Testing_01.txt", "/y/yard/", "/y/yurt/"),
        "Testing_01.txt names y/yurt/sun_g2.jpg, whose folder is no class",
    ),
    ("cub200", lambda r: (r / CUB / "classes.txt").unlink(), "classes.txt cannot be read"),
    ("cub200", lambda r: (r / CUB / "images.txt").unlink(), "has no images.txt; expected: CUB_200_2011"),
    (
        "cub200",
        lambda r: replaced(r / CUB / "image_class_labels.txt", "24 3", "24 4"),
        "image_class_labels.txt has '4' for image 24, 003.Sooty.*; allowed: 1 to 3",
    ),
    (
        "cub200",
        lambda r: replaced(r / CUB / "image_class_labels.txt", "24 3", "24 1"),
        "Sooty_Albatross_0007.jpg: image_class_labels.txt says class 1, which is 001.Black",
    ),
    (
        "cub200",
        lambda r: replaced(r / CUB / "train_test_split.txt", "24 0\n", ""),
        "train_test_split.txt has nothing for image 24",
    ),
    ("cub200", lambda r: replaced(r / CUB / "images.txt", "24 ", "23 "), "line 24: .* with a new number"),
    (
        "cub200",
        lambda r: replaced(r / CUB / "images.txt", "24 003", "24 ../003"),
        r"images.txt: image 24 names '\.\./003.*, which is no path within a folder",
    ),
    (
        "places205",
        lambda r: replaced(r / PLACES / "val_places205.csv", "a/abbey", "../abbey"),
        r"val_places205.csv line 1 names '\.\./abbey.*, which is no path within a folder",
    ),
    (
        "sun397",
        lambda r: replaced(r / "SUN397/Testing_01.txt", "/y/yard/", "/../../y/yard/"),
        r"Testing_01.txt: entry \d+ names .*, which is no path within a folder",
    ),
    (
        "food101",
        lambda r: replaced(r / "food-101/meta/test.json", '": ["', '": ["../../../'),
        r"lists '\.\./.*', which leads out of",
    ),
    ("cub200", lambda r: replaced(r / CUB / "classes.txt", "3 ", "4 "), "does not number its classes from 1"),
    ("places205", lambda r: (r / PLACES / "val_places205.csv").unlink(), "val_places205.csv cannot be read"),
    (
        "places205",
        lambda r: replaced(r / PLACES / "val_places205.csv", "gsun_1000.jpg 0", "gsun_1000.jpg 1"),
        "val_places205.csv line 1: a/abbey/gsun_1000.jpg has class 1, which is a/apartment_building/outdoor",
    ),
    (
        "places205",
        lambda r: replaced(r / PLACES / "train_places205.csv", "gsun_0000.jpg 0", "gsun_0000.jpg"),
        "line 1: .* is not PATH NUMBER",
    ),
    (
        "places205",
        lambda r: [
            (r / PLACES / f).write_text((r / PLACES / f).read_text().replace(".jpg 2", ".jpg 7"))
            for f in ("train_places205.csv", "val_places205.csv")
        ],
        "do not number their 3 folders from 0",
    ),
    ("cifar10", lambda r: (r / "cifar-10-batches-py" / "data_batch_3").unlink(), "data_batch_3 is missing"),
    ("cifar10", lambda r: (r / "cifar-10-batches-py" / "test_batch").unlink(), "has no cifar-10-batches-py/test_batch"),
    ("cifar100", lambda r: (r / "cifar-100-python" / "meta").unlink(), "meta cannot be read"),
    ("cifar100", lambda r: (r / "cifar-100-python" / "train").write_bytes(b"\x80\x02}"), "train is damaged"),
    (
        "cifar100",
        lambda r: (r / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8)})),
        "fine_labels is no list of 2 numbers",
    ),
    (
        "cifar100",
        lambda r: (r / "cifar-100-python" / "test").write_bytes(
            pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 3]})
        ),
        "fine_labels has '3'; allowed: 0 to 2",
    ),
    ("imagenet1k", lambda r: (r / "ILSVRC2012_img_train.tar").unlink(), "no folder train and no ILSVRC2012_img_train"),
    ("imagenet1k", lambda r: (r / "ILSVRC2012_img_val.tar").unlink(), "no folder val and no ILSVRC2012_img_val.tar"),
    ("imagenet1k", lambda r: (r / "ILSVRC2012_devkit_t12.tar.gz").unlink(), "no ILSVRC2012_devkit_t12, which tells"),
    ("imagenet22k", lambda r: (r / "n00004475.tar").rename(r / "n00000001.tar"), "n00000001 is none of the 21,8"),
    ("imagenet22k", lambda r: (r / "n00004475").mkdir(), "has n00004475 as a folder and as an archive"),
    ("imagenet22k", lambda r: [file.unlink() for file in r.iterdir()], "has no folders or archives of synsets"),
]


@pytest.mark.parametrize(("name", "change", "message"), WRONG, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(WRONG)])
def test_wrong_files_are_named_in_one_line(
    name: str, change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    root = layouts.CLASSIFICATION[name](tmp_path / "root", layouts.Painter())
    change(root)
    with pytest.raises(ValueError, match=message) as raised:
        opened(name, root, tmp_path / "cache")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [ImportError, OverflowError, MemoryError])
def test_whatever_unpickling_raises_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    root = layouts.cifar100(tmp_path / "root", layouts.Painter())

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cifar._Unpickler, "load", fail)
    with pytest.raises(ValueError, match=f"meta is damaged or not the published file: {error.__name__}"):
        opened("cifar100", root, tmp_path / "cache")


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    root = layouts.cifar100(tmp_path / "root", layouts.Painter())

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "attacked",)

    (root / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Attack()}))
    with pytest.raises(ValueError, match=r"asks for pathlib\.\w+"):
        opened("cifar100", root, tmp_path / "cache")
    assert not (tmp_path / "attacked").exists()


def test_arrays_pickled_by_python_2_are_read(tmp_path: Path) -> None:
    """As the published files are: protocol 2, names of numpy 1, byte strings for texts."""
    root = layouts.cifar100(tmp_path / "root", layouts.Painter())
    file = root / "cifar-100-python" / "test"
    before = opened("cifar100", root, tmp_path / "cache").fingerprint
    content = pickle.loads(file.read_bytes())
    raw = content["data"].tobytes()
    labels = b"".join(b"K" + bytes([number]) for number in content["fine_labels"])
    short = lambda text: b"U" + bytes([len(text)]) + text  # noqa: E731  (SHORT_BINSTRING, which Python 3 never writes)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + short(b"b") + b"tR(K\x01"
    array += b"K\x0fM\x00\x0c\x86cnumpy\ndtype\n(" + short(b"u1") + b"K\x00K\x01tR(K\x03" + short(b"|")
    array += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    file.write_bytes(b"\x80\x02}(" + short(b"data") + array + short(b"fine_labels") + b"](" + labels + b"eu.")
    assert opened("cifar100", root, tmp_path / "cache").fingerprint == before


def test_pixels_of_cifar_are_planes_of_rows(tmp_path: Path) -> None:
    root = layouts.cifar100(tmp_path / "root", layouts.Painter())
    planes = np.zeros((1, 3, 32, 32), np.uint8)
    planes[0, 1, 2, 5] = 255  # green, third row, sixth column
    content = {"data": planes.reshape(1, 3072), "fine_labels": [2]}
    (root / "cifar-100-python" / "test").write_bytes(pickle.dumps(content, protocol=2))
    test = opened("cifar100", root, tmp_path / "cache", decode_size=32).test
    assert np.argwhere(test.images).tolist() == [[0, 2, 5, 1]]
    assert test.targets["classes"].tolist() == [2]
    half = opened("cifar100", root, tmp_path / "cache", decode_size=16).test.images
    assert np.unravel_index(half.argmax(), half.shape) == (0, 1, 2, 1)


def test_templates_are_those_of_clip(tmp_path: Path) -> None:
    expected = {
        "dtd": (8, "a photo of a {} texture."),
        "stanford_cars": (8, "i love my {}!"),
        "cub200": (1, "a type of bird"),
    }
    for name, (count, part) in expected.items():
        root = layouts.CLASSIFICATION[name](tmp_path / name, layouts.Painter())
        templates = opened(name, root, tmp_path / "cache").templates
        assert len(set(templates)) == count
        assert any(part in template for template in templates)
        assert all(template.count("{}") == 1 for template in templates)
    root = layouts.imagenet1k_archives(tmp_path / "imagenet1k", layouts.Painter())
    data = opened("imagenet1k", root, tmp_path / "cache")
    assert len(data.class_names) == 1000
    assert len(data.templates) == 80
    assert "a bad photo of a {}." in data.templates


def test_json_of_food_lists_classes_in_any_order(tmp_path: Path) -> None:
    root = layouts.food101(tmp_path / "root", layouts.Painter())
    before = opened("food101", root, tmp_path / "cache")
    file = root / "food-101" / "meta" / "train.json"
    listed = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(listed.items()))))
    after = opened("food101", root, tmp_path / "cache")
    assert after.class_names == before.class_names
    assert sorted(after.train.paths) == sorted(before.train.paths)
