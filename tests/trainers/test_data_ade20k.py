"""ADE20k in its real layout: 150 classes from 1, other things ignored, the published validation set is the test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.trainers.layouts_dense import HEIGHT, WIDTH, ade20k, object_box, save
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import IGNORED, SPLITS, DataSet, open_data

SIDE = HEIGHT


def opened(root: Path, **settings: object) -> DataSet:
    config = DataConfig(train="ade20k", decode_size=SIDE, scenes=None, **{"validation_fraction": 0.2} | settings)  # type: ignore[arg-type]
    return open_data(config, ExecutionConfig(data_root=str(root), threads=1), 32, root / "cache")


def test_splits_names_and_masks(tmp_path: Path) -> None:
    data = opened(ade20k(tmp_path, 10, 3), validation_fraction=0.1)
    assert [len(getattr(data, split)) for split in SPLITS] == [9, 1, 3]
    assert data.provides == ("segmentation",)
    assert data.segmentation_names == tuple(f"name {i}, also {i}" for i in range(1, 151))
    assert data.class_names == ()
    left = (WIDTH - HEIGHT) // 2
    for row, path in enumerate(data.test.paths or ()):
        assert path.startswith("ADEChallengeData2016/images/validation/ADE_val_")
        number = int(path[-12:-4]) - 1
        x0, y0, x1, y1 = object_box(10 + number)
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        expected[y0:y1, x0:x1] = 1 + number
        expected[0] = IGNORED
        whole = data.test.whole(row)
        np.testing.assert_array_equal(whole.targets["segmentation"], expected)
        assert whole.pixels.shape == (HEIGHT, WIDTH, 3)
        np.testing.assert_array_equal(data.test.targets["segmentation"][row], expected[:, left:-left])
    paths = [path for split in SPLITS for path in getattr(data, split).paths]
    assert len(set(paths)) == 13


def test_the_first_and_the_last_number_count_and_the_next_is_refused(tmp_path: Path) -> None:
    root = ade20k(tmp_path, 4, 1)
    folder = root / "ADEChallengeData2016/annotations/training"
    edges = np.repeat(np.array([0, 1, 150], np.uint8), HEIGHT * WIDTH // 3).reshape(HEIGHT, WIDTH)
    for number in (1, 2):
        save(folder / f"ADE_train_{number:08}.png", edges)
    save(folder / "ADE_train_00000003.png", np.where(edges == 150, 151, edges).astype(np.uint8))
    data = opened(root, max_unreadable=0.5)
    assert data.unreadable == ("ADEChallengeData2016/images/training/ADE_train_00000003.jpg",)
    found = [part.whole(row) for part in (data.train, data.validation) for row in range(len(part))]
    numbers = {tuple(np.unique(whole.targets["segmentation"])) for whole in found}
    assert (0, 149, IGNORED) in numbers


def test_images_and_masks_without_the_other_are_named(tmp_path: Path) -> None:
    root = ade20k(tmp_path, 6, 1)
    base = root / "ADEChallengeData2016"
    (base / "annotations/training/ADE_train_00000002.png").unlink()
    (base / "images/training/ADE_train_00000005.jpg").unlink()
    with pytest.raises(ValueError, match="2 of 7 images cannot be read"):
        opened(root)
    assert set(opened(root, max_unreadable=0.5).unreadable) == {
        "ADEChallengeData2016/images/training/ADE_train_00000002.jpg",
        "ADEChallengeData2016/annotations/training/ADE_train_00000005.png",
    }


def test_names_are_numbers_without_the_list_and_a_damaged_one_is_said(tmp_path: Path) -> None:
    root = ade20k(tmp_path, 4, 1)
    file = root / "ADEChallengeData2016/objectInfo150.txt"
    text = file.read_text()
    for damaged in (text.replace("77\t", "78\t", 1), text[: len(text) // 2], text.replace("\t", " ")):
        file.write_text(damaged)
        with pytest.raises(ValueError, match=r"objectInfo150\.txt does not name classes 1 … 150"):
            opened(root)
    file.unlink()
    assert opened(root).segmentation_names == tuple(f"class_{i}" for i in range(1, 151))


def test_missing_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no ADEChallengeData2016 .*ADEChallengeData2016\.zip"):
        opened(tmp_path)
    root = ade20k(tmp_path, 4, 1)
    assert len(opened(root / "ADEChallengeData2016").test) == 1
    (root / "ADEChallengeData2016/images/validation").rename(root / "elsewhere")
    with pytest.raises(ValueError, match="images/validation cannot be read: No such file"):
        opened(root)


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    root = ade20k(tmp_path, 4, 1)
    folder = root / "ADEChallengeData2016/images/training"
    (folder / "ADE_train_00000001.png").write_bytes((folder / "ADE_train_00000001.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"has both ADE_train_00000001\.jpg and ADE_train_00000001\.png"):
        opened(root)
