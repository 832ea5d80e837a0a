"""Augmentation in batches: parity with torchvision image by image, and equal distributions of all parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter, ImageOps
from scipy import stats
from torch import Tensor

from trainers import augment, color
from trainers.config import DeiT3Config

GREY_LEVEL = 1 / (255 * min(augment.IMAGENET_STD))  # one step of 0 … 255 after normalisation, at most


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Twelve smooth 24 px images with the full range of values, uint8 [12, 24, 24, 3]."""
    coarse = torch.rand(12, 3, 8, 8, generator=generator())
    smooth = tv.resize(coarse, [24, 24], antialias=True)
    low, high = smooth.amin(dim=(1, 2, 3), keepdim=True), smooth.amax(dim=(1, 2, 3), keepdim=True)
    return ((smooth - low) / (high - low) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float()


# ---- each operation, given equal parameters


def test_simple_crop_equals_padding_cropping_and_flipping_one_by_one(images: Tensor) -> None:
    corner = torch.tensor([[0, 0], [8, 8], [4, 4], [0, 8], [3, 1], [7, 2]]).repeat(2, 1)
    flip = torch.arange(12) >= 6
    result = augment.simple_crop(images, corner, flip, 24)
    for i in range(12):
        padded = tv.pad(planes(images)[i], [4, 4, 4, 4], padding_mode="reflect")
        expected = tv.crop(padded, int(corner[i, 0]), int(corner[i, 1]), 24, 24)
        assert torch.equal(result[i], tv.horizontal_flip(expected) if flip[i] else expected)


@pytest.mark.parametrize("size", [16, 40])
def test_resized_crop_equals_torchvision_one_by_one(images: Tensor, size: int) -> None:
    box = augment.draw_resized_boxes(12, 24, generator(1))
    flip = torch.arange(12) % 2 == 0
    by_integers = augment.resized_crop(images, box, flip, size)
    by_matrices = augment.resized_crop_by_matrices(images, box, flip, size)
    assert by_integers.shape == by_matrices.shape == (12, 3, size, size)
    for i in range(12):
        image = images[i].permute(2, 0, 1)
        arguments = (*box[i].tolist(), [size, size], tv.InterpolationMode.BICUBIC, True)
        whole, exact = (tv.resized_crop(kind, *arguments).float() for kind in (image, image.float()))
        whole, exact = (kind.flip(2) if flip[i] else kind for kind in (whole, exact))
        assert torch.equal(by_integers[i], whole)
        assert (by_matrices[i] - exact.clamp(0, 255)).abs().max() <= 0.501  # rounded once
        assert (by_matrices[i] - whole).abs().mean() <= 0.5  # rounded twice, and clipped in between


def test_grayscale_and_solarize_equal_pil(images: Tensor) -> None:
    gray, solarized = color.grayscale(planes(images)), color.solarize(planes(images))
    for i in range(12):
        picture = Image.fromarray(images[i].numpy())
        expected = np.asarray(picture.convert("L"), dtype=np.float32)
        assert np.abs(gray[i].numpy() - expected).max() <= 0.51  # PIL rounds
        assert np.array_equal(solarized[i].permute(1, 2, 0).numpy(), np.asarray(ImageOps.solarize(picture)))
        assert torch.equal(solarized[i], tv.solarize(images[i].permute(2, 0, 1), 128).float())


def test_blur_equals_torchvision_one_by_one_and_pil_nearly(images: Tensor) -> None:
    sigma = torch.linspace(*augment.BLUR_SIGMA, 12)
    result = color.gaussian_blur(planes(images), sigma)
    for i in range(12):
        expected = tv.gaussian_blur(planes(images)[i], [13, 13], [float(sigma[i])] * 2)
        torch.testing.assert_close(result[i], expected, rtol=0, atol=1e-3)
        picture = Image.fromarray(images[i].numpy()).filter(ImageFilter.GaussianBlur(float(sigma[i])))
        difference = np.abs(np.asarray(picture, dtype=np.float32) - result[i].permute(1, 2, 0).numpy())
        assert difference.mean() <= 2.0  # of 255; without any blur it is 10 at the largest sigma
        assert sigma[i] < 0.5 or difference[6:-6, 6:-6].max() <= 5.0  # borders are treated otherwise there


def test_color_jitter_equals_torchvision_one_by_one_in_every_order(images: Tensor) -> None:
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]).repeat(2, 1)
    factors = 0.7 + 0.6 * torch.rand(12, 3, generator=generator(2))
    result = color.color_jitter_(planes(images), factors, orders)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for i in range(12):
        expected = planes(images)[i] / 255
        for operation in orders[i].tolist():
            expected = adjust[operation](expected, float(factors[i, operation]))
        # torchvision's luma has .2989 where ITU-R 601 and PIL have .299
        torch.testing.assert_close(result[i], expected * 255, rtol=0, atol=0.05)


def test_whole_recipe_equals_the_reference_image_by_image(images: Tensor) -> None:
    settings = DeiT3Config()
    draws = augment.draw(12, 24, 24, settings, generator(3))
    assert set(draws.choice.tolist()) == {0, 1, 2}
    result = augment.apply(images, draws, 24, settings)
    for i in range(12):
        image = images[i].permute(2, 0, 1)
        exact = reference_image(tv.to_dtype(image, scale=True), draws, i)
        assert (result[i] - exact).abs().max() <= 0.1 * GREY_LEVEL
        rounded = reference_image(image, draws, i)  # which cuts fractions off after each operation
        assert (result[i] - rounded).abs().max() <= 5 * GREY_LEVEL


def reference_image(image: Tensor, draws: augment.Draws, i: int) -> Tensor:
    """torchvision's own functions on one image, uint8 or float, in the order of the official code."""
    image = tv.crop(tv.pad(image, [4] * 4, padding_mode="reflect"), *draws.box[i].tolist())
    image = tv.horizontal_flip(image) if draws.flip[i] else image
    if draws.choice[i] == augment.GRAYSCALE:
        image = tv.rgb_to_grayscale(image, 3)
    elif draws.choice[i] == augment.SOLARIZE:
        image = tv.solarize(image, 128 / 255 if image.is_floating_point() else 128)
    else:
        image = tv.gaussian_blur(image, [13, 13], [float(draws.sigma[i])] * 2)
    for operation in draws.order[i].tolist():
        adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[operation]
        image = adjust(image, float(draws.factors[i, operation]))
    return tv.normalize(tv.to_dtype(image, scale=True), augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def test_results_do_not_depend_on_how_the_batch_is_cut(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = augment.draw(12, 24, 24, DeiT3Config(), generator(4))
    whole = augment.apply(images, draws, 24, DeiT3Config())
    monkeypatch.setattr(augment, "_CACHE_VALUES", 1)
    torch.testing.assert_close(augment.apply(images, draws, 24, DeiT3Config()), whole, rtol=0, atol=1e-5)


def test_normalize_and_evaluation_view(images: Tensor) -> None:
    expected = tv.normalize(planes(images) / 255, augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    torch.testing.assert_close(augment.normalize(images), expected)
    assert torch.equal(augment.evaluation_view(images, 24), augment.normalize(images))
    small = augment.evaluation_view(images, 16)
    assert small.shape == (12, 3, 16, 16)
    picture = Image.fromarray(images[0].numpy()).resize((16, 16), Image.Resampling.BICUBIC)
    difference = small[0] - augment.normalize(torch.from_numpy(np.array(picture))[None])[0]
    assert difference.abs().max() <= GREY_LEVEL * 1.001


def test_larger_images_are_resized_before_a_simple_crop(images: Tensor) -> None:
    settings = DeiT3Config(three_augment=False, color_jitter=0.0, flip=False)
    draws = augment.draw(12, 24, 16, settings, generator())
    centred = draws._replace(box=torch.tensor([4, 4, 16, 16]).expand(12, 4))
    assert torch.equal(augment.apply(images, centred, 16, settings), augment.evaluation_view(images, 16))


def test_wrong_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"torch\.float32 \[12, 24, 24, 3\]; allowed: torch.uint8"):
        augment.three_augment(images.float(), 24, DeiT3Config(), generator())
    with pytest.raises(ValueError, match="needs at least 7 px"):
        augment.three_augment(images, 6, DeiT3Config(), generator())


# ---- parameters are each image's own, and are distributed as the reference's

COUNT = 4000


def where_pixels_came_from(crop: str, side: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Offsets (y, x) found in the augmented pixels of COUNT copies of one image whose values are its coordinates."""
    coordinate = 5 * torch.arange(side)
    image = torch.zeros(side, side, 3, dtype=torch.uint8)
    image[..., 0], image[..., 1] = coordinate[:, None], coordinate[None, :]
    settings = DeiT3Config(crop=crop, three_augment=False, color_jitter=0.0, flip=False)  # type: ignore[arg-type]
    result = augment.three_augment(image.expand(COUNT, -1, -1, -1), side, settings, generator(5))
    mean, std = torch.tensor(augment.IMAGENET_MEAN), torch.tensor(augment.IMAGENET_STD)
    centre = (result[:, :2, side // 2, side // 2] * std[:2] + mean[:2]) * 255 / 5 - side // 2
    return centre[:, 0].numpy(), centre[:, 1].numpy()


@pytest.mark.parametrize("crop", ["simple", "resized", "none"])
def test_two_copies_of_one_image_get_different_augmentations(images: Tensor, crop: str) -> None:
    settings = DeiT3Config(crop=crop)  # type: ignore[arg-type]
    copies = augment.three_augment(images[:1].expand(16, -1, -1, -1), 24, settings, generator())
    different = [bool((copies[i] != copies[j]).any()) for i in range(16) for j in range(i)]
    assert all(different)


def test_offsets_seen_in_the_pixels_are_uniform_and_independent_per_image() -> None:
    y, x = (np.rint(offset).astype(int) for offset in where_pixels_came_from("simple"))
    table = np.histogram2d(y, x, bins=np.arange(-4.5, 5))[0]
    assert table.sum() == COUNT
    assert stats.chisquare(table.ravel()).pvalue > 0.01  # 81 equally likely offsets, as RandomCrop(padding=4)


def torchvision_params(transform: v2.Transform, count: int, side: int = 24) -> list[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(6)
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        return [transform.make_params([image]) for _ in range(count)]


def test_offsets_equal_those_of_torchvisions_random_crop() -> None:
    drawn = torchvision_params(v2.RandomCrop(24, padding=4, padding_mode="reflect"), COUNT)
    box = augment.draw(COUNT, 24, 24, DeiT3Config(), generator(7)).box
    for column, name in enumerate(("top", "left")):
        counts = [np.bincount(values, minlength=9) for values in (box[:, column], [p[name] for p in drawn])]
        assert len(counts[0]) == len(counts[1]) == 9
        assert stats.chi2_contingency(np.stack(counts)).pvalue > 0.01


def test_resized_boxes_equal_those_of_torchvisions_random_resized_crop() -> None:
    drawn = torchvision_params(v2.RandomResizedCrop(24), COUNT, side=96)
    box = augment.draw_resized_boxes(COUNT, 96, generator(8))
    assert bool((box[:, :2] >= 0).all()) and bool((box[:, :2] + box[:, 2:] <= 96).all())
    for column, name in enumerate(("top", "left", "height", "width")):
        expected = np.array([p[name] for p in drawn], dtype=float)
        assert stats.ks_2samp(box[:, column].numpy(), expected).pvalue > 0.01
    ratios = [np.array([p["width"] / p["height"] for p in drawn]), (box[:, 3] / box[:, 2]).numpy()]
    for quantile in (0.001, 0.05, 0.5, 0.95, 0.999):  # the ends: 3/4 and 4/3
        assert np.quantile(ratios[0], quantile) == pytest.approx(np.quantile(ratios[1], quantile), rel=0.03)
    # A box is drawn anew until it fits: without that, 14 % of the boxes would be the whole image.
    whole = float((box[:, 2:] == 96).all(dim=1).float().mean())
    assert whole == pytest.approx(np.mean([p["height"] == p["width"] == 96 for p in drawn]), abs=0.01)


def test_jitter_factors_and_their_order_equal_torchvisions() -> None:
    drawn = torchvision_params(v2.ColorJitter(0.3, 0.3, 0.3), COUNT)
    draws = augment.draw(COUNT, 24, 24, DeiT3Config(), generator(9))
    for column, name in enumerate(("brightness_factor", "contrast_factor", "saturation_factor")):
        expected = np.array([p[name] for p in drawn])
        assert stats.ks_2samp(draws.factors[:, column].numpy(), expected).pvalue > 0.01
        assert float(draws.factors[:, column].min()) >= 0.7 and float(draws.factors[:, column].max()) <= 1.3
    theirs = [tuple(i for i in torch.as_tensor(p["fn_idx"]).tolist() if i < 3) for p in drawn]  # 3 is hue, unused
    ours = [tuple(order) for order in draws.order.tolist()]
    kinds = sorted(set(theirs))
    assert len(kinds) == 6
    counts = [[orders.count(kind) for kind in kinds] for orders in (ours, theirs)]
    assert sum(counts[0]) == COUNT
    assert stats.chi2_contingency(counts).pvalue > 0.01


def test_blur_choice_and_flip_are_distributed_as_in_the_official_code() -> None:
    draws = augment.draw(COUNT, 24, 24, DeiT3Config(), generator(10))
    low, high = 0.1, 2.0  # facebookresearch/deit:augment.py, GaussianBlur: random.uniform(radius_min, radius_max)
    assert stats.kstest(draws.sigma.numpy(), stats.uniform(low, high - low).cdf).pvalue > 0.01
    assert stats.chisquare(np.bincount(draws.choice, minlength=3)).pvalue > 0.01  # RandomChoice of three
    assert stats.binomtest(int(draws.flip.sum()), COUNT, 0.5).pvalue > 0.01
    together = [draws.flip.float(), draws.choice.float(), draws.sigma, *draws.factors.unbind(1)]
    correlation = torch.corrcoef(torch.stack([*together, *draws.box[:, :2].float().unbind(1)]))
    assert (correlation - torch.eye(8)).abs().max() < 4.5 / math.sqrt(COUNT)


def test_settings_switch_parts_off_without_moving_the_other_draws() -> None:
    usual = augment.draw(64, 24, 24, DeiT3Config(), generator(11))
    plain = augment.draw(64, 24, 24, DeiT3Config(flip=False, color_jitter=0.0, crop="none"), generator(11))
    assert not plain.flip.any() and torch.equal(plain.factors, torch.ones(64, 3))
    assert torch.equal(usual.sigma, plain.sigma) and torch.equal(usual.choice, plain.choice)
    strong = augment.draw(64, 24, 24, DeiT3Config(color_jitter=0.6), generator(11))
    assert torch.equal(strong.box, usual.box)
    torch.testing.assert_close(strong.factors - 1, 2 * (usual.factors - 1))


def test_nothing_is_changed_when_everything_is_off(images: Tensor) -> None:
    settings = DeiT3Config(crop="none", flip=False, three_augment=False, color_jitter=0.0)
    assert torch.equal(augment.three_augment(images, 24, settings, generator()), augment.normalize(images))
