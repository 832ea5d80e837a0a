"""Multi-crop augmentation: parity with torchvision crop by crop, equal distributions, and draws that trials share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as v1
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as tv
from scipy import stats
from torch import Tensor

from trainers import augment, color, multicrop
from trainers.method_settings import CropsConfig
from trainers.methods import Batch, Views
from trainers.multicrop import DINO_BLUR, DINOV2_BLUR, Blur
from trainers.streams import Streams

STD = torch.tensor(augment.IMAGENET_STD).view(3, 1, 1)
MEAN = torch.tensor(augment.IMAGENET_MEAN).view(3, 1, 1)
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)


def crops_config(**settings: Any) -> CropsConfig:
    return CropsConfig(**{"local_size": 16, "num_local": 3, **settings})


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Sixteen smooth 32 px images with the full range of values, uint8 [16, 32, 32, 3]."""
    coarse = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = tv.resize(coarse, [32, 32], antialias=True)
    low, high = smooth.amin(dim=(1, 2, 3), keepdim=True), smooth.amax(dim=(1, 2, 3), keepdim=True)
    return ((smooth - low) / (high - low) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def views_of(images: Tensor, size: int = 24, seed: int = 0, kind: Blur = DINO_BLUR, **settings: Any) -> Views:
    return multicrop.multicrop_views(Batch(images, {}), size, crops_config(**settings), Streams(seed), kind)


# ---- each operation, given equal parameters


@pytest.mark.parametrize("turn", [-0.5, -0.25, -0.1, -1e-3, 0.0, 0.05, 0.1, 0.3, 0.5])
def test_hue_equals_torchvisions(images: Tensor, turn: float) -> None:
    corners = torch.tensor([[r, g, b] for r in (0, 9, 255) for g in (0, 9, 255) for b in (0, 9, 255)]).float()
    pixels = torch.cat([images[:3].float().permute(3, 0, 1, 2).flatten(1), corners.T], dim=1).view(1, 3, 1, -1)
    expected = tv.adjust_hue(pixels / 255, turn) * 255
    result = color.adjust_hue_(pixels.clone(), torch.tensor([turn]))
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-3)
    turned_back = color.adjust_hue_(result, torch.tensor([-turn]))
    torch.testing.assert_close(turned_back, pixels, rtol=0, atol=2e-3)


@pytest.mark.parametrize("radius", [4, 6])
def test_blur_equals_torchvisions_of_as_many_taps(images: Tensor, radius: int) -> None:
    pixels, sigma = images.permute(0, 3, 1, 2).float(), torch.linspace(0.1, 2.0, 16)
    result = color.gaussian_blur(pixels, sigma, radius)
    for i in range(16):
        expected = tv.gaussian_blur(pixels[i], [2 * radius + 1] * 2, [float(sigma[i])] * 2)
        torch.testing.assert_close(result[i], expected, rtol=0, atol=1e-3)


def reference_crop(image: Tensor, draws: multicrop.Draws, row: int, size: int, radius: int, whole: bool) -> Tensor:
    """torchvision's own functions on one uint8 image in the official order; `whole` keeps to whole grey levels."""
    image = tv.resized_crop(image, *draws.box[row].tolist(), [size, size], tv.InterpolationMode.BICUBIC, True)
    image = tv.horizontal_flip(image) if draws.flip[row] else image
    image = image if whole else image.float() / 255
    for operation in draws.order[row].tolist():
        if operation >= 0:
            image = ADJUST[operation](image, float(draws.factors[row, operation]))
    if draws.grayscale[row]:
        image = tv.rgb_to_grayscale(image, 3)
    if draws.blur[row]:
        image = tv.gaussian_blur(image, [2 * radius + 1] * 2, [float(draws.sigma[row])] * 2)
    if draws.solarize[row]:
        image = tv.solarize(image, 128 if whole else 128 / 255)
    return tv.normalize(tv.to_dtype(image, torch.float32, scale=True), augment.IMAGENET_MEAN, augment.IMAGENET_STD)


@pytest.mark.parametrize("blur", [DINO_BLUR, DINOV2_BLUR])
@pytest.mark.parametrize(("name", "count", "size"), [("global", 2, 24), ("local", 3, 16)])
def test_whole_recipe_equals_torchvision_crop_by_crop(
    images: Tensor, blur: Blur, name: str, count: int, size: int
) -> None:
    batch = Batch(images, {})
    draws = multicrop.draw(batch, name, count, crops_config(solarize=0.5), Streams(1), blur)
    result = multicrop.apply(images, draws, size, blur.radius)
    assert result.shape == (count * 16, 3, size, size)
    for row in range(len(result)):
        image = images[row % 16].permute(2, 0, 1)
        exact = reference_crop(image, draws, row, size, blur.radius, whole=False)
        difference = ((result[row] - exact) * STD * 255).abs()
        # torchvision's luma has .2989 where ITU-R 601 and PIL have .299; at 127.5 to 128 it solarizes nothing yet
        assert difference.max() <= (1.0 if draws.solarize[row] else 0.15) and difference.mean() <= 0.05
        rounded = reference_crop(image, draws, row, size, blur.radius, whole=True)
        assert ((result[row] - rounded) * STD * 255).abs().mean() <= 2.5  # which cuts fractions off each time


def test_crops_by_matrices_are_those_of_the_integer_kernels(images: Tensor) -> None:
    settings = crops_config(color_jitter=0.0, grayscale=0.0, blur=False, solarize=0.0)
    draws = multicrop.draw(Batch(images, {}), "local", 3, settings, Streams(2))
    by_integers = multicrop.apply(images, draws, 16, 6)
    by_matrices = augment.standardise(augment.resized_crop_by_matrices(images, draws.box, draws.flip, 16))
    difference = ((by_integers - by_matrices) * STD * 255).abs()
    assert difference.mean() <= 0.5 and difference.max() <= 6.0  # rounded twice, and clipped in between


def test_crops_stand_one_after_another_each_of_all_images() -> None:
    levels = torch.arange(5, dtype=torch.uint8) * 40
    plain = {"color_jitter": 0.0, "grayscale": 0.0, "solarize": 0.0}
    views = views_of(levels.view(5, 1, 1, 1).expand(5, 32, 32, 3), **plain)
    assert {name: tuple(crops.shape) for name, crops in views.items()} == {
        "global": (10, 3, 24, 24),
        "local": (15, 3, 16, 16),
    }
    for crops in views.values():
        seen = ((crops * STD + MEAN) * 255).flatten(1).mean(dim=1)
        torch.testing.assert_close(seen, levels.float().repeat(len(crops) // 5), rtol=0, atol=1e-2)


def test_nothing_is_changed_when_everything_is_off(images: Tensor) -> None:
    off = {"color_jitter": 0.0, "grayscale": 0.0, "solarize": 0.0, "blur": False, "flip": False}
    views = views_of(images, size=32, global_scale=(1.0, 1.0), num_local=0, **off)
    assert set(views) == {"global"}
    assert torch.equal(views["global"], augment.normalize(images).repeat(2, 1, 1, 1))


def test_results_do_not_depend_on_how_crops_are_put_together(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = multicrop.draw(Batch(images, {}), "local", 3, crops_config(), Streams(3))
    pieces = multicrop._pieces(draws.order, 4)
    assert sorted(torch.cat(pieces).tolist()) == list(range(48)) and max(map(len, pieces)) == 4
    assert all(len(draws.order[piece].unique(dim=0)) == 1 for piece in pieces)
    together = multicrop.apply(images, draws, 16, 6)
    monkeypatch.setattr(augment, "_CACHE_VALUES", 1)
    torch.testing.assert_close(multicrop.apply(images, draws, 16, 6), together, rtol=0, atol=1e-5)


def test_wrong_images_and_crops_too_small_to_be_blurred_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"torch\.float32 \[16, 32, 32, 3\]; allowed: torch.uint8"):
        views_of(images.float())
    with pytest.raises(ValueError, match=r"crops\.local_size is 6 px; augmentation needs at least 7 px"):
        views_of(images, local_size=6)
    with pytest.raises(ValueError, match="image_size is 4 px; augmentation needs at least 5 px"):
        views_of(images, size=4, kind=DINOV2_BLUR)
    assert views_of(images, local_size=6, kind=DINOV2_BLUR)["local"].shape == (48, 3, 6, 6)


# ---- parameters are each crop's own, and are distributed as the reference's

COUNT = 3000


@pytest.fixture(scope="module")
def many() -> dict[str, multicrop.Draws]:
    """Draws of COUNT images of side 96, two global and two local crops."""
    batch = Batch(torch.zeros(1, 96, 96, 3, dtype=torch.uint8).expand(COUNT, -1, -1, -1), {})
    streams = Streams(4)
    return {name: multicrop.draw(batch, name, 2, CropsConfig(), streams) for name in ("global", "local")}


def torchvision_params(transform: v2.Transform, side: int = 96) -> list[dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return [transform.make_params([torch.zeros(3, side, side, dtype=torch.uint8)]) for _ in range(COUNT)]


@pytest.mark.parametrize(("name", "scale"), [("global", (0.32, 1.0)), ("local", (0.05, 0.32))])
def test_boxes_are_distributed_as_torchvisions(many: Any, name: str, scale: tuple[float, float]) -> None:
    drawn = torchvision_params(v2.RandomResizedCrop(24, scale=scale))
    for column, key in enumerate(("top", "left", "height", "width")):
        expected = np.array([params[key] for params in drawn], dtype=float)
        for crop in range(2):
            own = many[name].box[crop * COUNT : (crop + 1) * COUNT, column].numpy()
            assert stats.ks_2samp(own, expected).pvalue > 0.01
    box = many[name].box
    assert bool((box[:, :2] >= 0).all()) and bool((box[:, :2] + box[:, 2:] <= 96).all())


def test_colour_jitter_is_distributed_as_torchvisions(many: Any) -> None:
    drawn = torchvision_params(v2.ColorJitter(0.4, 0.4, 0.2, 0.1))
    draws = many["global"]
    for column, key in enumerate(("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")):
        expected = np.array([params[key] for params in drawn])
        assert stats.ks_2samp(draws.factors[:, column].numpy(), expected).pvalue > 0.01
    jittered = draws.order[:, 0] >= 0
    assert stats.binomtest(int(jittered.sum()), 2 * COUNT, 0.8).pvalue > 0.01
    orders = draws.order[jittered]
    assert bool((orders.sort(dim=1).values == torch.arange(4)).all()) and bool((draws.order[~jittered] == -1).all())
    counts = np.unique(orders.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 0.01


def test_flip_grayscale_blur_and_solarize_have_the_official_probabilities(many: Any) -> None:
    expected = {"blur": {"global": (1.0, 0.1), "local": (0.5, 0.5)}, "solarize": {"global": (0.0, 0.2)}}
    for name, draws in many.items():
        for crop in range(2):
            rows = slice(crop * COUNT, (crop + 1) * COUNT)
            probabilities = {
                "flip": 0.5,
                "grayscale": 0.2,
                **{key: value.get(name, (0.0, 0.0))[crop] for key, value in expected.items()},
            }
            for key, probability in probabilities.items():
                hits = int(getattr(draws, key)[rows].sum())
                assert stats.binomtest(hits, COUNT, probability).pvalue > 0.005, (name, crop, key)
        low, high = 0.1, 2.0
        assert stats.kstest(draws.sigma.numpy(), stats.uniform(low, high - low).cdf).pvalue > 0.01


def test_blur_of_dinov2_happens_as_often_as_its_code_makes_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for asked, ours in zip((1.0, 0.1, 0.5), DINOV2_BLUR[:3], strict=True):
            # dinov2/data/transforms.py: RandomApply(transforms=[blur], p=1 - p)
            official = v1.RandomApply([lambda _: 1], p=1 - asked)
            hits = sum(official(0) for _ in range(1000))
            assert stats.binomtest(hits, 1000, ours).pvalue > 0.01


def test_parameters_of_one_image_are_independent_in_all_its_crops(many: Any) -> None:
    columns = []
    for draws in many.values():
        for crop in range(2):
            rows = slice(crop * COUNT, (crop + 1) * COUNT)
            columns += [draws.flip[rows].float(), draws.sigma[rows], draws.grayscale[rows].float()]
            columns += [*draws.factors[rows].unbind(1), draws.box[rows, 2].float(), draws.box[rows, 0].float()]
            columns += [(draws.order[rows, 0] >= 0).float()]
    correlation = torch.corrcoef(torch.stack(columns))
    of_a_crop = len(columns) // 4
    for crop in range(4):  # where a crop begins depends on its height
        own = slice(of_a_crop * crop, of_a_crop * (crop + 1))
        correlation[own, own].fill_diagonal_(0.0)
        correlation[own, own][[7, 8], [8, 7]] = 0.0
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(COUNT)


# ---- what trials share


def test_number_of_local_crops_changes_no_other_crop(images: Tensor) -> None:
    streams = {count: Streams(5) for count in (0, 2, 5)}
    for _ in range(2):  # of two batches
        views = {
            count: multicrop.multicrop_views(Batch(images, {}), 24, crops_config(num_local=count), own)
            for count, own in streams.items()
        }
        assert torch.equal(views[0]["global"], views[2]["global"])
        assert torch.equal(views[0]["global"], views[5]["global"])
        torch.testing.assert_close(views[5]["local"][:32], views[2]["local"], rtol=0, atol=1e-5)


def test_settings_switch_parts_off_without_moving_the_other_draws(images: Tensor) -> None:
    def draws(**settings: Any) -> multicrop.Draws:
        return multicrop.draw(Batch(images, {}), "global", 2, crops_config(**settings), Streams(6))

    usual = draws()
    plain = draws(flip=False, color_jitter=0.0, grayscale=0.0, solarize=0.0, blur=False)
    assert not plain.flip.any() and not plain.grayscale.any() and not plain.solarize.any() and not plain.blur.any()
    assert bool((plain.order == -1).all()) and torch.equal(plain.factors, torch.tensor([[1.0, 1, 1, 0]]).expand(32, 4))
    assert torch.equal(plain.box, usual.box) and torch.equal(plain.sigma, usual.sigma)
    stronger = draws(color_jitter=0.8, global_scale=(0.1, 0.5))
    unchanged = torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(stronger.factors - unchanged, 2 * (usual.factors - unchanged))
    for name in ("flip", "order", "grayscale", "blur", "sigma", "solarize"):
        assert torch.equal(getattr(stronger, name), getattr(usual, name)), name
    assert not torch.equal(stronger.box, usual.box)


def test_ranks_make_the_crops_that_one_rank_makes(images: Tensor) -> None:
    whole = views_of(images, seed=7)
    for first in (0, 8):
        batch = Batch(images[first : first + 8], {}, first=first, total=16)
        part = multicrop.multicrop_views(batch, 24, crops_config(), Streams(7))
        for name, crops in part.items():
            expected = whole[name].view(-1, 16, *crops.shape[1:])[:, first : first + 8]
            torch.testing.assert_close(crops, expected.flatten(0, 1), rtol=0, atol=1e-5)


def test_every_batch_and_every_seed_has_draws_of_its_own(images: Tensor) -> None:
    streams = Streams(8)
    first, second = (multicrop.multicrop_views(Batch(images, {}), 24, crops_config(), streams) for _ in range(2))
    other = views_of(images, seed=9)
    assert not torch.equal(first["global"], second["global"]) and not torch.equal(first["local"], other["local"])
    again = views_of(images, seed=8)
    assert all(torch.equal(first[name], again[name]) for name in first)
