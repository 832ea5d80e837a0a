"""Images of different sizes: how they are kept, where their crops lie, and that equal squares come out as ever."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms import RandomResizedCrop

from trainers import augment, multicrop
from trainers.method_settings import CropsConfig, DeiT3Config
from trainers.methods import Batch
from trainers.ragged import Ragged
from trainers.streams import Streams

SIZES = [(30, 44), (51, 33), (40, 40), (24, 70)]
PLAIN = {"three_augment": False, "color_jitter": 0.0, "flip": False}


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth image with some noise, uint8."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (4 + c) + seed) * np.cos(y / (5 + c)) for c in range(3)]
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    return np.clip(np.stack(waves, axis=2) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def arrays() -> list[np.ndarray]:
    return [picture(height, width, seed) for seed, (height, width) in enumerate(SIZES)]


@pytest.fixture(scope="module")
def squares() -> Tensor:
    return torch.from_numpy(np.stack([picture(40, 40, seed) for seed in range(6)]))


def as_ragged(images: Tensor) -> Ragged:
    return Ragged.of(list(images.numpy()))


def pixels_of(views: Tensor) -> Tensor:
    """Normalised images as grey levels again."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augment.IMAGENET_MEAN, augment.IMAGENET_STD))
    return (views * std + mean) * 255


# --- Ragged -------------------------------------------------------------------------------------------------------


def test_images_come_back_as_they_went_in(arrays: list[np.ndarray]) -> None:
    ragged = Ragged.of(arrays)
    assert len(ragged) == 4
    assert ragged.sizes.tolist() == [list(size) for size in SIZES]
    for image, array in zip(ragged, arrays, strict=True):
        np.testing.assert_array_equal(image.numpy(), array)
    part = ragged[1:3]
    assert part.pixels.data_ptr() == ragged.pixels[30 * 44 :].data_ptr()  # no copy
    for image, array in zip(part, arrays[1:3], strict=True):
        np.testing.assert_array_equal(image.numpy(), array)
    assert len(ragged[2:2]) == 0 and len(list(Ragged.of([]))) == 0
    with pytest.raises(ValueError, match="a slice of images has the step 2; allowed: 1"):
        ragged[::2]


def test_padded_groups_hold_every_image_once_and_little_else(arrays: list[np.ndarray]) -> None:
    ragged = Ragged.of(arrays)
    seen = []
    for rows, group in ragged.padded(2 * 40 * 44):
        assert len(rows) == 1 or group[..., 0].numel() <= 2 * 40 * 44
        for row, padded in zip(rows.tolist(), group.numpy(), strict=True):
            height, width = SIZES[row]
            np.testing.assert_array_equal(padded[:height, :width], arrays[row])
            assert not padded[height:].any() and not padded[:, width:].any()
            seen.append(row)
    assert sorted(seen) == [0, 1, 2, 3]
    assert [rows.tolist() for rows, _ in ragged.padded(2 * 40 * 44)] == [[2, 0], [3], [1]]  # landscapes, portraits
    assert len(list(ragged.padded(10**6))) == 1
    assert len(list(ragged.padded(2 * 40 * 44 - 1))) == 4  # padding counts


# --- equal squares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["simple", "resized", "none"])
@pytest.mark.parametrize("size", [24, 40])
def test_equal_squares_give_the_same_views_to_the_bit(crop: str, size: int, squares: Tensor) -> None:
    settings = DeiT3Config(crop=crop)
    ours, theirs = generator(1), generator(1)
    for _ in range(2):  # the second batch, too: as much is drawn
        usual = augment.three_augment(squares, size, settings, ours)
        assert torch.equal(augment.three_augment(as_ragged(squares), size, settings, theirs), usual)


def test_equal_squares_give_the_same_crops_to_the_bit(squares: Tensor) -> None:
    crops = CropsConfig(local_size=16)
    usual = multicrop.multicrop_views(Batch(squares, {}), 24, crops, Streams(1))
    views = multicrop.multicrop_views(Batch(as_ragged(squares), {}), 24, crops, Streams(1))
    assert views.keys() == usual.keys()
    for name, values in usual.items():
        assert torch.equal(views[name], values), name


# --- rectangles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (20, 200), (200, 20)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    count = 3_000
    boxes = augment.draw_resized_boxes(count, torch.tensor([height, width]).expand(count, 2), generator(2))
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    wanted = torch.tensor([RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    top, left, tall, wide = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + tall <= height).all() and (left + wide <= width).all()
    area, ratio = tall * wide / (height * width), wide / tall
    assert area.min() > 0.08 - 1 / min(height, width) and area.max() <= 1
    assert ratio.min() > 3 / 4 - 0.1 and ratio.max() < 4 / 3 + 0.14
    for column in range(4):
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            ours, theirs = (values[:, column].float().quantile(share) for values in (boxes, wanted))
            assert abs(ours - theirs) <= 2 + 0.04 * (height, width)[column % 2], (column, share)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((20, 100), [0, 36, 20, 27]),  # 20 · 4/3 = 26.7 wide: (100 - 27) // 2
        ((100, 21), [36, 0, 28, 21]),  # 21 / (3/4) = 28 high
        ((30, 40), [0, 0, 30, 40]),  # its own ratio is allowed
        ((40, 40), [0, 0, 40, 40]),
    ],
)
def test_where_no_attempt_fits_the_box_is_centred(size: tuple[int, int], box: list[int]) -> None:
    too_large = torch.ones(1, 10, dtype=torch.float64)  # all of the area at 4 : 3
    ratio = torch.zeros(1, 10, dtype=torch.float64) if size[1] > size[0] else torch.ones(1, 10, dtype=torch.float64)
    corner = torch.full((1, 2), 0.9, dtype=torch.float64)
    assert augment.resized_boxes(too_large, ratio, corner, torch.tensor([size]), (0.08, 1.0)).tolist() == [box]


def test_a_box_that_fits_is_the_first_one_by_hand() -> None:
    # 40 × 90 px; attempts: all of it at 4/3 (52 × 69: too high), then a quarter at 1: √900 = 30.
    area = torch.tensor([[1.0, 0.25, 0.5]], dtype=torch.float64)
    ratio = torch.tensor([[1.0, 0.5, 0.5]], dtype=torch.float64)
    corner = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    boxes = augment.resized_boxes(area, ratio, corner, torch.tensor([[40, 90]]), (0.0, 1.0))
    assert boxes.tolist() == [[5, 15, 30, 30]]  # 0.5 · 11 and 0.25 · 61


@pytest.mark.parametrize("flip", [False, True])
def test_resized_crops_are_pils(flip: bool, arrays: list[np.ndarray]) -> None:
    ragged = Ragged.of(arrays)
    boxes = augment.draw_resized_boxes(4, ragged.sizes, generator(3))
    flips = torch.full((4,), flip)
    for crops in (augment.resized_crop, augment.resized_crop_by_matrices):
        ours = crops(ragged, boxes, flips, 24)
        for row, (top, left, height, width) in enumerate(boxes.tolist()):
            image = Image.fromarray(arrays[row])
            wanted = reference.resized_crop(
                image, top, left, height, width, [24, 24], reference.InterpolationMode.BICUBIC
            )
            wanted = reference.hflip(wanted) if flip else wanted
            difference = (ours[row] - torch.from_numpy(np.array(wanted)).permute(2, 0, 1)).abs()
            assert difference.max() <= 2.0 and difference.mean() <= 0.3, (crops, row)


def test_several_crops_of_each_image_by_matrices(arrays: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = Ragged.of(arrays)
    boxes = augment.draw_resized_boxes(12, ragged.sizes.repeat(3, 1), generator(4))
    flips = torch.arange(12) % 2 == 0
    monkeypatch.setattr(augment, "_PADDED_PIXELS", 2 * 40 * 44)  # several groups
    together = augment.resized_crop_by_matrices(ragged, boxes, flips, 16)
    for crop in range(3):
        rows = slice(4 * crop, 4 * crop + 4)
        assert (together[rows] - augment.resized_crop(ragged, boxes[rows], flips[rows], 16)).abs().max() <= 6


def simple_reference(array: np.ndarray, size: int, top: int, left: int) -> Tensor:
    """transforms.Resize(S, BICUBIC), reflected padding of 4 px, and the window, as facebookresearch/deit has them."""
    image = reference.resize(Image.fromarray(array), size, reference.InterpolationMode.BICUBIC)
    image = reference.crop(reference.pad(image, [4], padding_mode="reflect"), top, left, size, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("by_matrices", [False, True])
def test_simple_crops_are_those_of_the_official_transforms(
    by_matrices: bool, arrays: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    ragged, settings = Ragged.of(arrays), DeiT3Config(**PLAIN)
    draws = augment.draw(4, ragged.sizes, 24, settings, generator(5))
    monkeypatch.setattr(augment, "_PADDED_PIXELS", 2 * 40 * 44)  # several groups
    sizes = augment.shorter_side_resized(ragged.sizes, 24)
    for flip in (False, True):
        flips = torch.full((4,), flip)
        if by_matrices:
            places = augment._window(sizes, draws.box[:, :2], flips, 24)
            ours = augment._simple_crop_by_matrices(ragged, places, sizes)
        else:
            ours = augment._simple_crop_of_rectangles(ragged, draws.box[:, :2], flips, 24)
        for row, (top, left, height, width) in enumerate(draws.box.tolist()):
            assert (height, width) == (24, 24)
            wanted = simple_reference(arrays[row], 24, top, left)
            difference = (ours[row] - (wanted.flip(2) if flip else wanted)).abs()
            assert difference.max() <= 3.0 and difference.mean() <= 0.3, row


def test_simple_crops_reach_every_place_of_the_longer_side() -> None:
    count = 4_000
    sizes = torch.tensor([[24, 48], [60, 40]]).repeat(count // 2, 1)
    box = augment.draw(count, sizes, 24, DeiT3Config(**PLAIN), generator(6)).box
    wide, tall = box[::2], box[1::2]
    assert set(wide[:, 0].tolist()) == set(range(9)) and set(tall[:, 1].tolist()) == set(range(9))
    assert set(wide[:, 1].tolist()) == set(range(24 + 9))  # 48 + 8 - 24
    assert set(tall[:, 0].tolist()) == set(range(12 + 9))  # 60 · 24 / 40 = 36
    for places, most in ((wide[:, 1], 32), (tall[:, 0], 20), (wide[:, 0], 8)):
        assert abs(places.float().mean() - most / 2) < 4 * (most + 1) / math.sqrt(12 * len(places))


def test_a_square_is_cropped_alike_whatever_stands_beside_it() -> None:
    mixed = torch.tensor([[40, 40], [24, 48]]).repeat(20, 1)
    settings = DeiT3Config(**PLAIN)
    alone, beside = (augment.draw(40, sizes, 24, settings, generator(6)).box for sizes in (40, mixed))
    assert torch.equal(beside[::2], alone[::2]) and torch.equal(beside[1::2, 0], alone[1::2, 0])
    assert not torch.equal(beside[1::2, 1], alone[1::2, 1])


def test_without_a_crop_the_centre_square_is_shown(arrays: list[np.ndarray]) -> None:
    views = augment.three_augment(Ragged.of(arrays), 24, DeiT3Config(crop="none", **PLAIN), generator())
    for row, (height, width) in enumerate(SIZES):
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = Image.fromarray(arrays[row][top : top + side, left : left + side])
        wanted = torch.from_numpy(np.array(image.resize((24, 24), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        assert (pixels_of(views[row]) - wanted).abs().max() <= 2.0


@pytest.mark.parametrize("crop", ["simple", "resized", "none"])
def test_a_ranks_share_has_the_views_that_it_has_in_the_whole_batch(crop: str, arrays: list[np.ndarray]) -> None:
    whole, settings = Ragged.of(arrays), DeiT3Config(crop=crop)
    first, second = generator(7), generator(7)
    for own in (slice(0, 2), slice(2, 4)):
        together = augment.draw(4, whole.sizes, 24, settings, generator(7))
        part = augment.draw(4, whole[own].sizes, 24, settings, generator(7), own)
        for ours, theirs in zip(part, together, strict=True):
            assert torch.equal(ours, theirs[own])
    augment.draw(4, whole.sizes, 24, settings, first)
    augment.draw(4, torch.tensor([[40, 40]]).expand(4, 2), 24, settings, second)
    assert torch.equal(first.get_state(), second.get_state())  # whatever the sizes


def test_multicrops_of_a_ranks_share(arrays: list[np.ndarray]) -> None:
    ragged, crops = Ragged.of(arrays), CropsConfig(local_size=16)
    whole = multicrop.multicrop_views(Batch(ragged, {}), 24, crops, Streams(2))
    part = multicrop.multicrop_views(Batch(ragged[1:3], {}, first=1, total=4), 24, crops, Streams(2))
    for name, count in (("global", 2), ("local", crops.num_local)):
        rows = [4 * crop + image for crop in range(count) for image in (1, 2)]
        assert torch.equal(part[name], whole[name][rows])
