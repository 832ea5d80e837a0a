"""Scenes: what their targets claim holds in their pixels, and what decides them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainers.config import DataConfig, ExecutionConfig, ScenesConfig
from trainers.data import SPLITS, DataSet, open_data
from trainers.data.scenes import (
    PHOTOGRAPHS,
    SMALLER,
    STANDS_OUT,
    Renderer,
    _Canvas,
    _installed,
    _paint,
    _photograph,
    read_digits,
)

LUMINANCE = np.array([0.299, 0.587, 0.114])
CROWDED = ScenesConfig(num_others=(2, 5), main_size=(0.4, 0.9), contrast=0.5)


def opened(cache: Path, side: int = 32, seed: int = 0, **settings: Any) -> DataSet:
    counts = {"num_train": 6, "num_validation": 3, "num_test": 3}
    scenes = ScenesConfig(**{**counts, **settings})
    return open_data(DataConfig(seed=seed, decode_size=side, scenes=scenes), ExecutionConfig(), side, cache)


@pytest.fixture(scope="module")
def crowded() -> tuple[np.ndarray, dict[str, Any]]:
    return Renderer(CROWDED, 0, "train", 64).render(0, 200)


@pytest.fixture(scope="module")
def alone() -> tuple[np.ndarray, dict[str, Any]]:
    return Renderer(ScenesConfig(contrast=0.0), 0, "test", 48).render(0, 200)


def test_shapes_and_types(tmp_path: Path) -> None:
    data = opened(tmp_path, num_others=(0, 2))
    assert data.provides == ("classes", "segmentation", "depth", "boxes", "captions")
    assert data.class_names == tuple("0123456789")
    for name, count in (("train", 6), ("validation", 3), ("test", 3)):
        split = getattr(data, name)
        targets = split.targets
        assert (split.images.shape, split.images.dtype) == ((count, 32, 32, 3), np.uint8)
        assert (targets["classes"].shape, targets["classes"].dtype) == ((count,), np.int64)
        assert (targets["segmentation"].shape, targets["segmentation"].dtype) == ((count, 32, 32), np.uint8)
        assert (targets["depth"].shape, targets["depth"].dtype) == ((count, 32, 32), np.float16)
        assert (targets["boxes"].shape, targets["boxes"].dtype) == ((count, 3, 5), np.float32)
        assert len(targets["captions"]) == count
        assert split.paths is None


def test_an_image_depends_on_seed_split_and_index_alone(tmp_path: Path) -> None:
    few, many = opened(tmp_path, num_train=4), opened(tmp_path, num_train=9, num_validation=1)
    np.testing.assert_array_equal(few.train.images, many.train.images[:4])
    for name in ("classes", "segmentation", "depth", "boxes"):
        np.testing.assert_array_equal(few.train.targets[name], many.train.targets[name][:4])
    assert list(few.train.targets["captions"]) == many.train.targets["captions"][:4]
    np.testing.assert_array_equal(few.test.images, many.test.images)
    assert few.fingerprint != many.fingerprint
    assert (opened(tmp_path, seed=1).train.images[:4] != few.train.images).any()
    renderer = Renderer(CROWDED, 0, "validation", 32)
    images, targets = renderer.render(0, 10)
    parts = [renderer.render(*part) for part in ((0, 1), (1, 7), (7, 10))]
    np.testing.assert_array_equal(images, np.concatenate([part for part, _ in parts]))
    np.testing.assert_array_equal(targets["boxes"], np.concatenate([part["boxes"] for _, part in parts]))


def test_splits_share_neither_digits_nor_photographs() -> None:
    digits = {split: read_digits(split) for split in SPLITS}
    seen = {split: {image.tobytes() for image in images} for split, (images, _) in digits.items()}
    assert [len(digits[split][0]) for split in SPLITS] == [3_500, 500, 1_000]
    for split, (_, classes) in digits.items():
        assert np.bincount(classes).tolist() == [len(classes) // 10] * 10, split
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    names = [name for split in SPLITS for name in PHOTOGRAPHS[split]]
    assert len(set(names)) == len(names) == 14
    assert len({_photograph(name).read_bytes() for name in names}) == 14


def test_the_only_digit_is_what_class_segmentation_box_and_depth_say(alone: tuple[np.ndarray, Any]) -> None:
    _, targets = alone
    for i in range(200):
        mask = targets["segmentation"][i] > 0
        assert set(targets["segmentation"][i][mask].tolist()) == {1 + targets["classes"][i]}
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, targets["classes"][i]]
        np.testing.assert_array_equal(targets["boxes"][i, 0], box)
        longer = max(box[2] - box[0], box[3] - box[1])
        assert 0.8 * 48 - 3 <= longer <= 48  # the ink's faint edge lies outside the mask
        depth = targets["depth"][i]
        distance = np.unique(depth[mask])
        assert len(distance) == 1
        assert 1.0 <= distance[0] <= 1.25  # 1 m tall at 0.8 to 1 of the side, the focal length
        assert longer * distance[0] / 48 == pytest.approx(1, abs=0.08)
        assert depth[~mask].min() > distance[0]
    assert set(targets["classes"].tolist()) == set(range(10))


def test_the_background_is_a_plane(alone: tuple[np.ndarray, Any]) -> None:
    _, targets = alone
    rows, columns = np.mgrid[:48, :48]
    for i in range(20):
        behind = targets["segmentation"][i] == 0
        design = np.stack([rows[behind], columns[behind], np.ones(behind.sum())], 1)
        depth = targets["depth"][i][behind].astype(np.float64)
        plane = np.linalg.lstsq(design, depth, rcond=None)[0]
        assert np.abs(design @ plane - depth).max() <= depth.max() * 2.0**-11 * 1.5  # rounding of float16


@pytest.mark.parametrize("size", [(0.8, 1.0), (0.3, 0.6)])
def test_depth_counts_up_to_the_farthest_digit_and_not_on_the_background(
    tmp_path: Path, size: tuple[float, float]
) -> None:
    data = opened(tmp_path, side=64, num_others=(3, 5), main_size=size)
    depth = np.concatenate([data.train.targets["depth"], data.test.targets["depth"]]).astype(np.float64)
    digit = np.concatenate([data.train.targets["segmentation"], data.test.targets["segmentation"]]) > 0
    assert data.max_depth == 1 / (SMALLER[0] * size[0])
    assert depth[digit].min() > 0 and depth[digit].max() <= data.max_depth * (1 + 1e-3) < depth[~digit].min()


def test_without_contrast_only_the_digit_is_seen_and_stands_out(alone: tuple[np.ndarray, Any]) -> None:
    images, targets = alone
    for i in range(200):
        x0, y0, x1, y1 = targets["boxes"][i, 0, :4].astype(int)
        outside = np.ones((48, 48), bool)
        outside[max(y0 - 9, 0) : y1 + 9, max(x0 - 9, 0) : x1 + 9] = False  # faint ink
        inside = targets["segmentation"][i] > 0
        luminance = images[i] @ LUMINANCE
        if outside.any():
            assert (images[i][outside] == images[i][outside][0]).all()
            assert np.abs(luminance[inside] - luminance[outside][0]).max() >= STANDS_OUT - 2
            assert np.abs(luminance[inside] - luminance[outside][0]).min() >= 0.45 * STANDS_OUT
    colours = np.stack([images[i][targets["segmentation"][i] > 0].mean(0) for i in range(200)])
    assert (colours.std(0) > 25).all()


def test_without_colours_digits_are_white_on_grey_and_all_else_is_as_with_them() -> None:
    plain = ScenesConfig(contrast=0.0, colored=False)
    grey, targets = Renderer(plain, 0, "train", 48).render(0, 50)
    _, colored_targets = Renderer(ScenesConfig(contrast=0.0), 0, "train", 48).render(0, 50)
    for name in ("classes", "segmentation", "depth", "boxes"):
        assert np.array_equal(targets[name], colored_targets[name], equal_nan=name == "boxes"), name
    assert targets["captions"] == colored_targets["captions"]
    assert np.array_equal(grey[..., 0], grey[..., 1]) and np.array_equal(grey[..., 0], grey[..., 2])
    assert {int(image.min()) for image in grey} == {64}  # the background of every image, whatever its photograph
    assert all(image.max() == 255 for image in grey)
    textured, _ = Renderer(ScenesConfig(contrast=0.3, colored=False, num_others=(0, 0)), 0, "train", 48).render(0, 50)
    behind = targets["segmentation"] == 0
    assert 30 < textured[behind].mean() < 100 and textured[behind].std() > 5


def test_with_full_contrast_the_photograph_is_untouched_outside() -> None:
    images, targets = Renderer(ScenesConfig(contrast=1.0, main_size=(0.2, 0.3)), 0, "validation", 300).render(0, 12)
    chelsea = np.asarray(Image.open(_photograph("chelsea.png")).convert("RGB"))  # 300 px high: every crop is as high
    found = 0
    for i in range(12):
        clear = np.flatnonzero((targets["segmentation"][i] == 0).all(0))
        clear = clear[np.abs(clear[:, None] - np.flatnonzero(targets["segmentation"][i].any(0))).min(1) > 30]
        if "a cat" in targets["captions"][i] and len(clear):
            strip, x = images[i][:, clear], clear
            both = (chelsea, chelsea[:, ::-1])
            shifts = range(chelsea.shape[1] - 300 + 1)
            assert any((source[:, x + shift] == strip).all() for source in both for shift in shifts)
            found += 1
    assert found > 0


def test_the_main_digit_is_the_largest_the_nearest_and_never_hidden(crowded: tuple[np.ndarray, Any]) -> None:
    _, targets = crowded
    hidden = 0
    for i in range(200):
        boxes = targets["boxes"][i]
        boxes = boxes[~np.isnan(boxes[:, 0])].astype(int)
        assert 3 <= len(boxes) <= 6
        sides = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
        assert (sides[1:] <= SMALLER[1] * sides[0] + 2).all()
        assert boxes[0, 4] == targets["classes"][i]
        segmentation, depth = targets["segmentation"][i], targets["depth"][i]
        distances = np.unique(depth[segmentation > 0])
        assert len(distances) == len(boxes)
        assert depth[segmentation == 0].min() > distances[-1]
        for k, distance in enumerate(distances):  # near to far, as the boxes
            rows, columns = np.nonzero((depth == distance) & (segmentation > 0))
            assert set(segmentation[rows, columns].tolist()) == {1 + boxes[k, 4]}
            extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            inside = (extent[:2] >= boxes[k, :2]).all() and (extent[2:] <= boxes[k, 2:4]).all()
            assert inside
            hidden += (extent != boxes[k, :4]).any()
            assert k > 0 or (extent == boxes[0, :4]).all()
    assert hidden > 20  # the boxes of hidden digits reach beyond what is seen


def test_captions_name_the_digits_and_the_photograph(crowded: tuple[np.ndarray, Any]) -> None:
    _, targets = crowded
    for i in range(20):
        digits, _, photograph = targets["captions"][i].partition(" over a photograph of ")
        assert photograph in PHOTOGRAPHS["train"].values()
        named = digits.replace(" and ", ", ").split(", ")
        classes = targets["boxes"][i, :, 4]
        classes = classes[~np.isnan(classes)].astype(int).tolist()
        assert named == [f"a {'small' if k else 'large'} {c}" for k, c in enumerate(classes)]


def test_nearer_ink_hides_farther_ink() -> None:
    canvas = _Canvas(
        np.zeros((4, 4, 3), np.float32),
        np.ones((4, 4), np.float32),
        np.zeros((4, 4), np.uint8),
        np.full((4, 4), 9, np.float16),
    )
    half, whole = np.full((2, 2), 102, np.uint8), np.full((3, 3), 255, np.uint8)
    full = np.full((1, 2), 255, np.uint8)
    assert _paint(canvas, full, np.full(3, 100, np.float32), (0, 0), 4, 1.0) == (0, 0, 2, 1)
    assert _paint(canvas, whole, np.full(3, 200, np.float32), (0, 0), 7, 2.0) == (0, 0, 3, 3)
    np.testing.assert_array_equal(canvas.segmentation, [[5, 5, 8, 0], [8, 8, 8, 0], [8, 8, 8, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(canvas.depth, [[1, 1, 2, 9], [2, 2, 2, 9], [2, 2, 2, 9], [9, 9, 9, 9]])
    np.testing.assert_allclose(canvas.light[0, :, 0], [100, 100, 200, 0])
    np.testing.assert_allclose(canvas.through[0], [0, 0, 0, 1])
    # Ink that covers 0.4 of a pixel lets 0.6 of what is behind through: 0.4 · 50 + 0.6 · 200 = 140.
    canvas.light[:], canvas.through[:] = 0, 1
    half_mask = half.copy()
    half_mask[0, 0] = 255  # somewhere the ink is full, as in every digit
    _paint(canvas, half_mask, np.full(3, 50, np.float32), (2, 2), 1, 1.0)
    _paint(canvas, np.full((2, 2), 255, np.uint8), np.full(3, 200, np.float32), (2, 2), 2, 3.0)
    np.testing.assert_allclose(canvas.light[2:, 2:, 0], [[50, 140], [140, 140]], rtol=1e-6)


def test_it_works_at_every_allowed_difficulty(tmp_path: Path) -> None:
    for side, size in ((8, (0.1, 0.1)), (8, (1.0, 1.0)), (37, (0.1, 1.0))):
        data = opened(tmp_path, side=side, main_size=size, num_others=(8, 8), num_train=40)
        boxes = data.train.targets["boxes"]
        sides = np.maximum(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])
        assert (np.nan_to_num(sides[:, 1:]) < sides[:, :1]).all()
        assert (np.nan_to_num(boxes[..., :4]) >= 0).all()
        assert (np.nan_to_num(boxes[..., :4]) <= side).all()


def test_it_needs_neither_torch_nor_the_packages_that_hold_the_files() -> None:
    check = "import sys, trainers.data.scenes as s; s.Renderer(s.ScenesConfig(), 0, 'test', 8)"
    check += "; print(sorted({'torch', 'skimage', 'mlxtend', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"the file data/none\.png of the package skimage is missing; install it again"
    ):
        _photograph("none.png")
    with pytest.raises(ValueError, match="package no_such_package_of_test is missing"):
        _installed("no_such_package_of_test", "x")
