"""`orchestrate data list` and `data check`: every planted fault is named, and what is checked is what trains."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator import data as command
from tests.orchestrator.sweeps import ORCHESTRATE, imported_by, run
from tests.trainers import layouts_data as layouts
from tests.trainers.layouts_dense import coco20k
from trainers import catalog
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import open_data
from trainers.data.cache import Source, Writer
from trainers.data.check import _notes
from trainers.data.listing import Description, Listing, source


def checked(
    name: str, root: Path | None, capsys: pytest.CaptureFixture[str], cache: Path, size: int | None = 8
) -> dict[str, Any]:
    sound = command.check(name, root, size, cache, as_json=True)
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert report["sound"] is sound
    return report


def faults(report: dict[str, Any]) -> dict[str, str]:
    """The kind by file."""
    return {fault["file"]: fault["kind"] for fault in report["faults"]}


def test_list_names_every_data_set_and_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert imported_by(["data", "list"], ("torch", "ray", "mlflow", "timm", "pandas", "numpy", "PIL")) == "[]"
    command.list_data(as_json=True)
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(listed) == set(catalog.DATASETS)
    for entry in listed.values():
        assert entry["provides"] and set(entry["provides"]) <= set(catalog.PROVISIONS)
        assert entry["licence"] and entry["how_to_get"]
        assert entry["layout"] or not entry["needs_root"]
    assert listed["cub200"]["counts"] == {"train": 5994, "test": 5794, "classes": 200}
    command.list_data(as_json=False)
    text = " ".join(capsys.readouterr().out.split())
    for name, entry in catalog.DATASETS.items():
        assert f"{name}/NAME" in text if entry.needs_name else name in text
    assert "CC BY-SA 4.0" in text
    assert "…" not in text  # nothing is cut


def test_the_documentation_has_the_catalog() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name, entry in catalog.DATASETS.items():
        assert f"| `{name}` | {', '.join(entry.provides)} | {entry.licence} | {entry.how_to_get} |" in text


@pytest.mark.parametrize("name", layouts.CLASSIFICATION)
def test_a_sound_set_has_the_fingerprint_of_training(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = layouts.CLASSIFICATION[name](tmp_path / "root", layouts.Painter())
    report = checked(name, root, capsys, tmp_path / "cache")
    config = DataConfig(train=name, decode_size=8, scenes=None)
    data = open_data(config, ExecutionConfig(data_root=str(root)), 224, tmp_path / "cache")
    assert report["fingerprint"] == data.fingerprint
    assert report["images"] == {split: len(getattr(data, split)) for split in ("train", "validation", "test")}
    few = set(report["kinds"])  # the fakes have three classes, and small ones lose all to validation
    assert few <= ({"class without images"} if name in ("imagenet1k", "flowers102") else set())
    classes = {c: counts for c, counts in report["classes"].items() if any(counts.values())}
    totals = {split: sum(counts[split] for counts in classes.values()) for split in report["images"]}
    assert totals == report["images"]
    if "classes" in catalog.DATASETS[name].counts:
        assert any("published are" in note for note in report["notes"])


def folder(root: Path) -> Path:
    draw = layouts.Painter()
    for split, count in (("train", 6), ("validation", 3), ("test", 3)):
        for c, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                draw.save(root / split / name / f"{i}.png", c)
    return root


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def test_planted_faults_of_files_are_named_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "root")
    truncated(root / "train" / "ant" / "0.png")
    (root / "train" / "bee" / "1.png").write_bytes(b"")
    (root / "test" / "cat" / "2.png").write_text("<html>")
    (root / "test" / "ant" / "0.png").unlink()
    (root / "test" / "ant" / "0.png").symlink_to("nowhere")
    shutil.copy(root / "train" / "cat" / "4.png", root / "test" / "cat" / "leak.png")
    report = checked("image_folder/insects", root, capsys, tmp_path / "cache")
    assert faults(report) == {
        "train/ant/0.png": "truncated file",
        "train/bee/1.png": "empty file",
        "test/cat/2.png": "unreadable file",
        "test/ant/0.png": "missing file",
        "test/cat/leak.png": "duplicate",
    }
    assert report["kinds"] == dict.fromkeys(faults(report).values(), 1)
    (leak,) = (fault for fault in report["faults"] if fault["kind"] == "duplicate")
    assert leak["reason"] == "is the same image as train/cat/4.png"
    assert report["images"] == {"train": 16, "validation": 9, "test": 8}
    assert report["classes"]["ant"] == {"train": 5, "validation": 3, "test": 2}
    assert report["fingerprint"]


PLANTED: dict[str, tuple[Callable[[Path], object], dict[str, str]]] = {
    "fgvc_aircraft": (
        lambda r: (r / "fgvc-aircraft-2013b/data/images/0000001.jpg").unlink(),
        {"fgvc-aircraft-2013b/data/images/0000001.jpg": "missing file"},
    ),
    "stanford_cars": (
        lambda r: truncated(r / "stanford_cars/cars_test/00001.jpg"),
        {"stanford_cars/cars_test/00001.jpg": "truncated file"},
    ),
    "dtd": (
        lambda r: (r / "dtd/dtd/images/banded/banded_0001.jpg").write_bytes(b""),
        {"dtd/dtd/images/banded/banded_0001.jpg": "empty file"},
    ),
    "food101": (
        lambda r: shutil.rmtree(r / "food-101/images/beet_salad"),
        {
            **{f"food-101/images/beet_salad/{s}{i:04}.jpg": "missing file" for s in range(2) for i in range(6)},
            "beet_salad": "class without images",
        },
    ),
    "oxford_pets": (
        lambda r: (r / "oxford-iiit-pet/images/Bombay_10.jpg").write_text("GIF89a"),
        {"oxford-iiit-pet/images/Bombay_10.jpg": "unreadable file"},
    ),
    "sun397": (
        lambda r: (r / "SUN397/a/abbey/sun_a0.jpg").unlink(),
        {"SUN397/a/abbey/sun_a0.jpg": "missing file"},
    ),
    "places205": (
        lambda r: (r / "data/vision/torralba/deeplearning/images256/v/volcano/gsun_1000.jpg").write_bytes(b""),
        {"data/vision/torralba/deeplearning/images256/v/volcano/gsun_1000.jpg": "empty file"},
    ),
    "cub200": (
        lambda r: (r / "CUB_200_2011/images/001.Black_footed_Albatross/Black_footed_Albatross_0000.jpg").unlink(),
        {"images/001.Black_footed_Albatross/Black_footed_Albatross_0000.jpg": "missing file"},
    ),
    "imagenet22k": (
        lambda r: layouts.tar(
            r / "n00004475.tar", [(f"n00004475_{i}.JPEG", b"\x89PNG" if i else b"") for i in range(9)]
        ),
        {
            **{f"n00004475_{i}.JPEG": "unreadable file" if i else "empty file" for i in range(9)},
            "organism, being": "class without images",
        },
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_of_published_sets_are_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = PLANTED[name]
    root = layouts.CLASSIFICATION[name](tmp_path / "root", layouts.Painter())
    change(root)
    found = faults(checked(name, root, capsys, tmp_path / "cache"))
    assert {re.split("@", file)[-1]: kind for file, kind in found.items()} == expected


def test_an_image_of_another_class_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = layouts.imagenet22k_archives(tmp_path / "root", layouts.Painter())
    draw = layouts.Painter()
    images = [*layouts.synset_images(draw, "n00004475", 0, 9), *layouts.synset_images(draw, "n02084071", 1, 1)]
    layouts.tar(root / "n00004475.tar", images)
    report = checked("imagenet22k", root, capsys, tmp_path / "cache")
    (fault,) = report["faults"]
    assert fault["kind"] == "wrong class"
    assert fault["file"].endswith("@n02084071_0.JPEG")
    assert fault["reason"] == "its name says class n02084071, its folder n00004475"


def test_faults_of_captions_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw, texts = layouts.Painter(), [f"picture {i}".encode() for i in range(12)]
    texts[1], texts[2], texts[3] = b" ", b"caf\xe9", b"x" * 20_000
    files = [part for i in range(12) for part in ((f"{i}.jpg", draw.bytes(i)), (f"{i}.txt", texts[i]))]
    del files[2 * 5 + 1], files[2 * 4]
    layouts.tar(tmp_path / "root" / "train" / "0.tar", [*files, ("readme.md", b"x")])
    report = checked("image_text/pairs", tmp_path / "root", capsys, tmp_path / "cache")
    assert faults(report) == {
        "train/0.tar/1.jpg": "caption",
        "train/0.tar/2.jpg": "caption",
        "train/0.tar/4.txt": "no image",
        "train/0.tar/5.jpg": "caption",
        "train/0.tar/readme.md": "no pair",
    }
    assert report["notes"] == ["1 captions are longer than 10,000 characters and cut there"]
    assert report["classes"] == {}
    assert sum(report["images"].values()) == 8


def test_duplicates_within_published_sets_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = layouts.food101(tmp_path / "root", layouts.Painter())
    images = root / "food-101" / "images" / "apple_pie"
    shutil.copy(images / "00000.jpg", images / "10000.jpg")
    report = checked("food101", root, capsys, tmp_path / "cache")
    assert report["sound"]
    (note,) = (note for note in report["notes"] if note.startswith("duplicate"))
    folder = "food-101/images/apple_pie"
    assert note == f"duplicate: 1: {folder}/10000.jpg is the same image as {folder}/00000.jpg"


def test_counts_are_compared_with_those_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {
        # 14 for training and 4 for validation, which is taken from the 18
        "food101": ("18 images for train", "75,750", "18 images for test", "25,250", "3 classes", "101"),
        "dtd": (
            *("9 images for train", "1,880", "9 images for validation", "1,880", "9 images for test", "1,880"),
            *("3 classes", "47"),
        ),
    }
    for name, parts in expected.items():
        root = layouts.CLASSIFICATION[name](tmp_path / name, layouts.Painter())
        notes = checked(name, root, capsys, tmp_path / "cache")["notes"]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        assert [note for note in notes if "published" in note] == [
            f"{found}, published are {published}" for found, published in pairs
        ]


@pytest.mark.parametrize(("train", "noted"), [(24_231, False), (795, False), (24_230, True), (0, True)])
def test_either_layout_of_a_published_set_is_complete(train: int, noted: bool) -> None:
    images = {"train": train - min(train, 100), "validation": min(train, 100), "test": 654}
    notes = [note for note in _notes(images, {}, catalog.DATASETS["nyu_depth"]) if "published" in note]
    assert notes == ([f"{train:,} images for train, published are 24,231 or 795"] if noted else [])


def test_a_shortened_list_of_coco20k_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = checked("coco20k", coco20k(tmp_path / "root", 12), capsys, tmp_path / "cache")["notes"]
    assert notes == ["12 images in all, published are 19,817"]
    whole = {"train": 19_000, "validation": 400, "test": 417}
    assert list(_notes(whole, {}, catalog.DATASETS["coco20k"])) == []


def test_a_missing_root_is_said_as_the_command_has_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--root is missing: ade20k needs the folder of its files; http"):
        command.check("ade20k", None, 8, tmp_path, as_json=True)


def own(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """A user's own set in documentation and tests: images with classes, a mask and a box each, by hand."""
    root = Path(str(execution.data_root))
    listings = {}
    for split in ("train", "validation", "test"):
        names = sorted(path.name for path in (root / split).glob("*.png"))
        boxes = [np.loadtxt(root / split / f"{name}.box", ndmin=2, dtype=np.float32) for name in names]
        targets = {"classes": np.array([int(name[0]) for name in names]), "boxes": boxes}
        masks = tuple(f"{split}/{name}.mask" for name in names)
        listings[split] = Listing(tuple(f"{split}/{name}" for name in names), targets, {"segmentation": masks})
    described = Description(
        ("ant", "bee"),
        read={"segmentation": lambda file: np.asarray(Image.open(file))},
        facts={"segmentation_names": ("ground", "insect")},
    )
    return source(config, execution, root, listings, described, "", side)


def placed(root: Path) -> Path:
    draw = layouts.Painter()
    for split in ("train", "validation", "test"):
        for i in range(4):
            path = root / split / f"{i % 2}_{i}.png"
            draw.save(path, i % 2)
            mask = np.zeros((10, 12), np.uint8)
            mask[2:6, 3:9] = 1
            Image.fromarray(mask).save(path.with_name(f"{path.name}.mask"), "PNG")
            path.with_name(f"{path.name}.box").write_text("3 2 9 6 0\n")
    return root


OWN = f"{__name__}:own"


def test_a_users_own_set_with_masks_and_boxes_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = placed(tmp_path / "root")
    report = checked(OWN, root, capsys, tmp_path / "cache")
    assert report["sound"] and report["images"] == {"train": 4, "validation": 4, "test": 4}
    config = DataConfig(train=OWN, decode_size=10, scenes=None)
    data = open_data(config, ExecutionConfig(data_root=str(root)), 224, tmp_path / "cache")
    assert data.provides == ("classes", "segmentation", "boxes")
    assert data.test.targets["segmentation"][0].sum() == 24
    assert data.test.targets["boxes"][0].tolist() == [[2, 2, 8, 6, 0]]  # the centre 10 of 12 columns
    (root / "train" / "0_0.png.box").write_text("3 2 9 6 0\n-1 2 9 6 0\n3 3 20 4 1\n5 5 5 9 1\n")
    Image.new("L", (12, 9)).save(root / "validation" / "1_1.png.mask", "PNG")
    Image.new("L", (12, 10), 7).save(root / "validation" / "0_2.png.mask", "PNG")
    (root / "test" / "1_3.png.mask").unlink()
    for kind in ("", ".mask", ".box"):
        (root / "test" / f"0_0.png{kind}").rename(root / "test" / f"2_0.png{kind}")
    report = checked(OWN, root, capsys, tmp_path / "cache")
    listed = sorted((fault["file"], fault["kind"], fault["reason"]) for fault in report["faults"])
    assert listed == [
        ("test/1_3.png", "missing file", "ValueError: its segmentation test/1_3.png.mask: is not a file"),
        ("test/2_0.png", "wrong class", "has class 2; allowed: 0 to 1"),
        ("train/0_0.png", "wrong box", "1 of 4 boxes without an area"),
        ("train/0_0.png", "wrong box", "2 of 4 boxes clipped to the image"),
        ("validation/0_2.png", "wrong map", "its segmentation has 7; allowed: 0 to 1 and 255"),
        ("validation/1_1.png", "wrong map", "ValueError: its segmentation has 12 × 9 px, the image 12 × 10"),
    ]


def damaged_depth(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    def write(writer: Writer, progress: object) -> None:
        for number, split in enumerate(("train", "validation", "test")):
            images = (
                np.arange(number * 9, number * 9 + 3, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2)
            )
            depth = np.ones((3, 2, 2), np.float16)
            depth[0, 0, 0], depth[1, 0, 0] = np.nan, -1
            captions = ["a", "b", " "]
            writer.append(split, images.repeat(3, 3), {"depth": depth, "captions": captions})

    return Source("depth", {}, (), write)


def test_impossible_depth_and_captions_of_a_users_own_set_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = checked(f"{__name__}:damaged_depth", None, capsys, tmp_path / "cache")
    assert report["kinds"] == {"wrong map": 6, "caption": 3}
    assert faults(report)["test[2]"] == "caption"
    assert "no distances" in report["faults"][0]["reason"]


def test_a_split_without_any_readable_image_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "root")
    for file in (root / "test").rglob("*.png"):
        file.write_bytes(b"")
    report = checked("image_folder", root, capsys, tmp_path / "cache")
    assert report["kinds"] == {"empty file": 9, "empty split": 1}
    assert report["fingerprint"] is None


@pytest.mark.slow  # 10,000 images
def test_builtin_sets_are_checked_without_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = checked("scenes", None, capsys, tmp_path / "cache", 16)
    assert report["sound"]
    assert report["images"]["train"] > 0
    assert len(report["classes"]) == 10


def test_exit_codes_and_text(tmp_path: Path) -> None:
    root = folder(tmp_path / "root")
    arguments = ["data", "check", "image_folder/insects", "--root", str(root), "--size", "8", "--state", str(tmp_path)]
    done = run([*ORCHESTRATE, *arguments])
    assert done.returncode == 0, done.stderr
    assert "insects: 18 train, 9 validation, 9 test" in done.stdout
    assert "  bee: 6 train, 3 validation, 3 test" in done.stdout
    assert done.stdout.endswith("sound\n")
    (root / "train" / "bee" / "1.png").write_bytes(b"")
    done = run([*ORCHESTRATE, *arguments])
    assert done.returncode == 1
    assert "empty file: 1\n  train/bee/1.png: OSError: is empty\n" in done.stdout
    assert done.stdout.endswith("1 faults\n")
    (root / "test" / "wasp").mkdir()
    done = run([*ORCHESTRATE, *arguments])
    assert done.returncode == 2
    assert "has the class 'wasp', which" in done.stderr
    done = run([*ORCHESTRATE, "data", "check", "imagenet"])
    assert done.returncode == 2
    assert "'imagenet' is no data set; allowed: scenes," in done.stderr
    assert "Traceback" not in done.stderr


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "root")
    for name in ("\udcff.png", "two\nlines.png"):
        (root / "train" / "ant" / name).write_bytes(b"")
    report = checked("image_folder/insects", root, capsys, tmp_path / "cache")
    assert set(faults(report)) == {"train/ant/\\udcff.png", "train/ant/two\\nlines.png"}
    assert not command.check("image_folder/insects", root, 8, tmp_path / "cache", as_json=False)
    assert "  train/ant/two\\nlines.png: OSError: is empty\n" in capsys.readouterr().out


def test_what_is_checked_is_written_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "root")
    before = sorted(tmp_path.rglob("*"))
    checked("image_folder/insects", root, capsys, tmp_path / "cache")
    assert sorted(tmp_path.rglob("*")) == before
