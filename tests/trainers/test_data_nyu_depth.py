"""NYU Depth v2 from lists and from the labelled file: metres, scenes that are held out whole, damaged lists."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.trainers.layouts_dense import HEIGHT, WIDTH, depth_of, nyu_depth, nyu_labelled, object_box, pixels
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS, DataSet, open_data
from trainers.data.nyu_depth import _Labelled, _recording

SIDE = HEIGHT
LEFT = (WIDTH - HEIGHT) // 2


def opened(root: Path, **settings: object) -> DataSet:
    config = DataConfig(train="nyu_depth", decode_size=SIDE, scenes=None, **settings)  # type: ignore[arg-type]
    return open_data(config, ExecutionConfig(data_root=str(root), threads=1), 32, root / "cache")


def test_lists_give_depth_in_metres_and_whole_scenes_are_held_out(tmp_path: Path) -> None:
    data = opened(nyu_depth(tmp_path, scenes=6, frames=4, test=5), validation_fraction=0.2)
    assert data.provides == ("depth",)
    assert data.max_depth == 10
    scenes = {split: {path.split("/")[-2] for path in getattr(data, split).paths} for split in SPLITS}
    # 24 images: two scenes of 4 are the fewest that reach 0.2 of them
    assert [len(getattr(data, split)) for split in SPLITS] == [16, 8, 5]
    assert (len(scenes["train"]), len(scenes["validation"]), scenes["test"]) == (4, 2, {"office"})
    assert not scenes["train"] & scenes["validation"]
    for row, path in enumerate(data.test.paths or ()):
        assert path.startswith("official_splits/test/office/rgb_")
        meters = depth_of(int(path[-9:-4])).astype(np.float32) / 1000
        whole = data.test.whole(row).targets["depth"]
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole, meters, rtol=1e-6)
        cached = data.test.targets["depth"][row]
        np.testing.assert_array_equal(cached, meters[:, LEFT:-LEFT].astype(np.float16))
    other = opened(tmp_path, validation_fraction=0.2, seed=1)
    assert {path.split("/")[-2] for path in other.validation.paths or ()} != scenes["validation"]


def test_the_shorter_names_of_lists_and_scenes_in_the_root_will_do(tmp_path: Path) -> None:
    root = nyu_depth(tmp_path, 3, 2, 2)
    for split in ("train", "test"):
        (root / f"nyudepthv2_{split}_files_with_gt.txt").rename(root / f"nyu_{split}.txt")
    for folder in [*(root / "sync").iterdir(), *(root / "official_splits/test").iterdir()]:
        folder.rename(root / folder.name)
    data = opened(root)
    assert {path.count("/") for path in data.test.paths or ()} == {1}
    assert len(data.train) + len(data.validation) == 6


def append(root: Path, line: str) -> None:
    with (root / "nyudepthv2_train_files_with_gt.txt").open("a") as file:
        file.write(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "scene_0000/rgb_00000.jpg scene_0000/sync_depth_00000.png 1\n",
            "entry 7 names scene_0000/rgb_00000.jpg again",
        ),
        ("../../etc/passwd x.png 1\n", r"entry 7 names '\.\./\.\./etc/passwd', which is no path within a folder"),
        ("a.jpg ../x.png\n", r"entry 7 names '\.\./x\.png', which is no path"),
        ("a.jpg\n", "entry 7 is 'a.jpg'; needed: IMAGE DEPTH"),
        ("a.jpg b.png 5 6\n", "entry 7 is .*needed: IMAGE DEPTH"),
    ],
)
def test_damaged_lists_are_said_in_one_line(tmp_path: Path, line: str, message: str) -> None:
    root = nyu_depth(tmp_path, 3, 2, 1)
    append(root, line)
    with pytest.raises(ValueError, match=message) as raised:
        opened(root)
    assert "\n" not in str(raised.value)


def test_what_a_list_names_and_is_not_there_is_named(tmp_path: Path) -> None:
    root = nyu_depth(tmp_path, 3, 2, 1)
    append(root, "/scene_0000/rgb_77777.jpg None 518.8579\n")
    append(root, "/scene_0000/rgb_88888.jpg /scene_0000/sync_depth_88888.png 518.8579\n")
    (root / "sync/scene_0001/sync_depth_00002.png").unlink()
    data = opened(root, max_unreadable=0.5)
    assert set(data.unreadable) == {
        "scene_0000/rgb_77777.jpg",
        "sync/scene_0000/rgb_88888.jpg",
        "sync/scene_0001/rgb_00002.jpg",
    }
    assert len(data.train) + len(data.validation) == 5


def test_missing_files_and_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has neither lists \(nyu_train\.txt and nyu_test\.txt\) nor nyu_depth_v2_lab"
    ):
        opened(tmp_path)
    root = nyu_depth(tmp_path, 3, 2, 1)
    (root / "sync").rename(root / "elsewhere")
    with pytest.raises(ValueError, match=r"names no image that is in .* or in sync/, official_splits/train/ there"):
        opened(root)


def test_an_image_for_training_and_for_testing_is_refused(tmp_path: Path) -> None:
    root = nyu_depth(tmp_path, 3, 2, 1)
    for folder in [*(root / "sync").iterdir(), *(root / "official_splits/test").iterdir()]:
        folder.rename(root / folder.name)
    append(root, (root / "nyudepthv2_test_files_with_gt.txt").read_text())
    with pytest.raises(ValueError, match=r"office/rgb_00006\.jpg is in the lists of train and of test"):
        opened(root)


def test_one_scene_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images of 1 scenes; needed: 2"):
        opened(nyu_depth(tmp_path, 1, 6, 1))


def test_the_labelled_file_gives_what_was_measured(tmp_path: Path) -> None:
    data = opened(nyu_labelled(tmp_path, 12, test=[9, 10, 11]), validation_fraction=0.2)
    assert [len(getattr(data, split)) for split in SPLITS] == [6, 3, 3]
    assert sorted(data.test.paths or ()) == [f"nyu_depth_v2_labeled.mat@image/{i}" for i in (10, 11, 9)]
    for split in SPLITS:
        for row, path in enumerate(getattr(data, split).paths):
            number = int(path.rpartition("/")[2])
            whole = getattr(data, split).whole(row)
            np.testing.assert_array_equal(whole.pixels, pixels(number, object_box(number)))
            expected = depth_of(number).astype(np.float32) / 1000
            expected[5, 10:13] = 0
            np.testing.assert_array_equal(whole.targets["depth"], expected)
    held = {int(path.rpartition("/")[2]) // 3 for path in data.validation.paths or ()}
    assert len(held) == 1
    assert opened(tmp_path, validation_fraction=0.2).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "splits.mat").unlink(), r"splits\.mat is missing"),
        (lambda root: (root / "splits.mat").write_bytes(b"x" * 300), "has no trainNdxs and testNdxs"),
        (lambda root: nyu_labelled(root, 6, [7]), "names other images than the 6 of"),
        (lambda root: nyu_labelled(root, 6, [1, 1]), "names an image twice"),
        (
            lambda root: (root / "nyu_depth_v2_labeled.mat").write_bytes(b"MATLAB 5.0 MAT-file"),
            "is no HDF5 file, or a damaged one",
        ),
    ],
)
def test_damaged_mat_files_are_said(tmp_path: Path, damage: object, message: str) -> None:
    assert callable(damage)
    damage(nyu_labelled(tmp_path, 6, [4, 5]))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


def test_without_h5py_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nyu_labelled(tmp_path, 6, [4, 5])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"install h5py \(pip install 'register-ablations\[nyu\]'\), or use lists"):
        opened(tmp_path)


def test_parts_of_a_recording_are_held_out_together(tmp_path: Path) -> None:
    root = nyu_depth(tmp_path, scenes=3, frames=4, test=2)
    file = root / "nyudepthv2_train_files_with_gt.txt"
    for number, name in enumerate(("kitchen_0028a", "kitchen_0028b", "study_0001c")):
        scene = f"scene_{number:04}"
        (root / "sync" / scene).rename(root / "sync" / name)
        file.write_text(file.read_text().replace(f"{scene}/", f"{name}/"))
    for seed in range(4):
        data = opened(root, validation_fraction=0.3, seed=seed)
        recordings = [{path.split("/")[-2][:-1] for path in part.paths or ()} for part in (data.train, data.validation)]
        assert sorted(map(sorted, recordings)) == [["kitchen_0028"], ["study_0001"]]


def test_parts_in_the_labelled_file_are_held_out_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = nyu_labelled(tmp_path, 12, test=[9, 10, 11])  # images 0 to 8 are for training
    monkeypatch.setattr(_Labelled, "scenes", lambda self: ["kitchen_0028a"] * 3 + ["kitchen_0028b"] * 3 + ["study"] * 6)
    for seed in range(4):
        data = opened(root, validation_fraction=0.3, seed=seed)
        found = [
            {int(path.rpartition("/")[2]) // 6 for path in part.paths or ()} for part in (data.train, data.validation)
        ]
        assert sorted(map(sorted, found)) == [[0], [1]]


def test_only_the_letter_of_a_part_is_taken_off() -> None:
    names = ["kitchen_0028a", "a/kitchen_0028b", "office_0003", "bedroom"]
    assert [_recording(name) for name in names] == ["kitchen_0028", "a/kitchen_0028", "office_0003", "bedroom"]
