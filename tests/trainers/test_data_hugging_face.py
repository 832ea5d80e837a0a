"""Data sets of the hub that lie in a folder: rows, classes and splits belong together; what is wrong is named."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.trainers import layouts_data as layouts
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS, DataSet, open_data
from trainers.data.hugging_face import _within

ANT_BEE = {"names": ["ant", "bee"], "_type": "ClassLabel"}


def parquet(
    root: Path,
    split: str,
    classes: Sequence[int],
    draw: layouts.Painter,
    columns: tuple[str, str] = ("image", "label"),
    images: Sequence[bytes] | None = None,
    label: dict[str, Any] = ANT_BEE,
) -> None:
    """A file as the hub has it: bytes of images, and the features in the schema's metadata."""
    (root / "data").mkdir(parents=True, exist_ok=True)
    contents = images or [draw.bytes(max(number, 0)) for number in classes]
    table = pa.table(
        {
            columns[0]: pa.array([{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]),
            columns[1]: pa.array(classes, pa.int64()),
        }
    )
    features = {columns[0]: {"_type": "Image"}, columns[1]: label}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), root / "data" / f"{split}-00000-of-00001.parquet")


def opened(root: Path, cache: Path, **settings: Any) -> DataSet:
    values = {"train": "hugging_face", "name": "insects", "decode_size": 8, "scenes": None, "validation_fraction": 0.2}
    execution = ExecutionConfig(data_root=str(root), threads=2)
    return open_data(DataConfig(**values | settings), execution, 224, cache)


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package datasets; install it with pip install '.*\[hf\]'"):
        opened(tmp_path, tmp_path / "cache")


@pytest.fixture
def draw() -> layouts.Painter:
    pytest.importorskip("datasets")
    return layouts.Painter()


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
def test_rows_classes_and_splits_belong_together(
    columns: tuple[str, str], tmp_path: Path, draw: layouts.Painter
) -> None:
    root = tmp_path / "root"
    parquet(root, "train", [0, 1] * 5, draw, columns)
    parquet(root, "test", [1, 1, 0], draw, columns)
    data = opened(root, tmp_path / "cache")
    assert data.class_names == ("ant", "bee")
    assert [len(getattr(data, split)) for split in SPLITS] == [8, 2, 3]
    for split in SPLITS:
        part = getattr(data, split)
        assert [layouts.class_of(image[0, 0]) for image in part.images] == part.targets["classes"].tolist()
        assert layouts.class_of(part.whole(0).pixels[0, 0]) == part.targets["classes"][0]
    assert sorted(data.test.paths) == ["test[0]", "test[1]", "test[2]"]
    assert opened(root, tmp_path / "other").fingerprint == data.fingerprint


def test_published_validation_sets_and_secret_labels(tmp_path: Path, draw: layouts.Painter) -> None:
    root = tmp_path / "root"
    parquet(root, "train", [0, 1] * 5, draw)
    parquet(root, "validation", [1, 0], draw)
    parquet(root, "test", [-1, -1, -1], draw)  # a challenge
    data = opened(root, tmp_path / "cache")
    assert sorted(data.validation.paths) == ["validation[0]", "validation[1]"]
    assert [len(getattr(data, split)) for split in SPLITS] == [8, 2, 2]
    assert data.unreadable == ()


def test_damaged_images_and_missing_classes_are_named(tmp_path: Path, draw: layouts.Painter) -> None:
    root = tmp_path / "root"
    images = [draw.bytes(i % 2) for i in range(10)]
    images[3], images[4] = b"", images[4][:45]
    parquet(root, "train", [0, 1, 0, 1, 0, 1, 0, 1, 0, -1], draw, images=images)
    parquet(root, "test", [0, 1], draw)
    data = opened(root, tmp_path / "cache", max_unreadable=0.5)
    assert sorted(data.unreadable) == ["train[3]", "train[4]", "train[9]"]
    with pytest.raises(ValueError, match=r"3 of 12 images cannot be read"):
        opened(root, tmp_path / "cache")


def test_wrong_folders_are_said_in_one_line(tmp_path: Path, draw: layouts.Painter) -> None:
    root = tmp_path / "root"
    parquet(root, "train", [0, 1] * 5, draw, ("picture", "label"))
    wrong = [(root, "split train has the columns picture, label; needed: image or img, and label or labels")]
    numbers = tmp_path / "numbers"
    parquet(numbers, "train", [0, 1] * 5, draw, label={"dtype": "int64", "_type": "Value"})
    wrong.append((numbers, r"split train has no names of classes \(ClassLabel\)"))
    other = tmp_path / "other"
    parquet(other, "train", [0, 1] * 5, draw)
    parquet(other, "test", [0, 1], draw, label={"names": ["bee", "ant"], "_type": "ClassLabel"})
    wrong.append((other, "test-00000-of-00001.parquet names its classes otherwise than the files before: bee"))
    lonely = tmp_path / "lonely"
    parquet(lonely, "test", [0, 1], draw)
    wrong.append((lonely, "has no split train; there are: test"))
    (tmp_path / "empty").mkdir()
    wrong.append((tmp_path / "empty", "is no data set that `datasets` reads, or damaged"))
    damaged = tmp_path / "damaged"
    parquet(damaged, "train", [0, 1], draw)
    (damaged / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    wrong.append((damaged, "is no data set that `datasets` reads, or damaged"))
    for folder, message in wrong:
        with pytest.raises(ValueError, match=message) as raised:
            opened(folder, tmp_path / "cache")
        assert "\n" not in str(raised.value)


def test_odd_kinds_of_pixels_come_out_as_everywhere_else(tmp_path: Path, draw: layouts.Painter) -> None:
    root = tmp_path / "root"
    buffer = io.BytesIO()
    Image.new("LA", (12, 10), (0, 0)).save(buffer, "PNG")  # transparent becomes white
    parquet(root, "train", [0, 1] * 5, draw)
    parquet(root, "test", [0], draw, images=[buffer.getvalue()])
    assert (opened(root, tmp_path / "cache").test.images == 255).all()


def saved(root: Path, split: str, count: int, draw: layouts.Painter, names: list[str]) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [{"image": {"bytes": draw.bytes(i % 2), "path": None}, "label": i % 2} for i in range(count)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(root / split))


def test_what_save_to_disk_wrote_is_read(tmp_path: Path, draw: layouts.Painter) -> None:
    root = tmp_path / "root"
    saved(root, "train", 10, draw, ["ant", "bee"])
    saved(root, "test", 3, draw, ["ant", "bee"])
    data = opened(root, tmp_path / "cache")
    assert [len(getattr(data, split)) for split in SPLITS] == [8, 2, 3]
    assert [layouts.class_of(image[0, 0]) for image in data.train.images] == data.train.targets["classes"].tolist()
    saved(root, "test", 3, draw, ["bee", "ant"])
    with pytest.raises(ValueError, match=r"test/data-00000-of-00001\.arrow names its classes otherwise"):
        opened(root, tmp_path / "cache")


def test_columns_that_hold_no_images_are_said_in_one_line(tmp_path: Path, draw: layouts.Painter) -> None:
    root = tmp_path / "root" / "data"
    root.mkdir(parents=True)
    pq.write_table(pa.table({"image": [1, 2], "label": [0, 1]}), root / "train-0.parquet")
    with pytest.raises(ValueError, match="is no data set that `datasets` reads, or damaged") as raised:
        opened(root.parent, tmp_path / "cache")
    assert "\n" not in str(raised.value)


def test_files_that_tables_name_lie_in_the_folder_or_are_linked_there(tmp_path: Path) -> None:
    root = tmp_path / "snapshot"
    root.mkdir()
    (tmp_path / "blob").write_bytes(b"x")
    (root / "a.png").symlink_to(tmp_path / "blob")  # as the hub keeps its files
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    for folder, path in ((root, "a.png"), (root, str(root / "a.png")), (linked, str(root / "a.png"))):
        assert _within(folder, path).read_bytes() == b"x"
    for path in ("../blob", str(tmp_path / "blob"), "b/../../blob", str(root) + "2/a.png"):
        with pytest.raises(OSError, match="leads out of the folder"):
            _within(root, path)
