"""The depth probe: what it learns of planted tokens, which pixels count, crops of whole images, and its losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.trainers.planted import levels
from trainers.config import DepthConfig, ModelConfig, resolve
from trainers.data import DataSet, Split, Whole
from trainers.probes import Context, depth, depth_losses, depth_metrics, depth_views
from trainers.probes.seen import SeenSplit
from trainers.streams import Streams
from trainers.vit import Tokens

BINS, PATCH, SIDE = 8, 4, 16
MIN, MAX = 0.5, 4.0
WIDTH = (MAX - MIN) / (BINS - 1)  # of a bin, 0.5 m
SCALE = 10.0  # of the tokens, about as long as those of a ViT
IMAGES = 48


class Binned(nn.Module):
    """A backbone whose raw patches and class token have the number of a bin as one-hot: grey level / 30."""

    embed_dim, num_registers = BINS, 0

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda patches: patches, patches: bool = True) -> None:
        super().__init__()
        self.change, self.patches = change, patches

    def residuals(self, images: Tensor) -> Iterator[Tokens]:
        grey = nn.functional.avg_pool2d(levels(images)[:, None], PATCH).flatten(1)
        number_BN = (grey / 30).round().long().clamp(0, BINS - 1)
        coded_BND = SCALE * nn.functional.one_hot(number_BN, BINS).float()
        cls_BD = coded_BND[:, 0]
        patches_BND = self.change(coded_BND if self.patches else torch.zeros_like(coded_BND))
        for layer in range(3):
            yield Tokens(cls_BD * layer / 2, cls_BD[:, None][:, :0], patches_BND * layer / 2)

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        *_, last = self.residuals(images)
        return last


def _numbers(count: int, rows: int, columns: int, seed: int) -> NDArray[np.int64]:
    """Bins of patches that rise, fall or stay by one from row to row; never the first or last, which do not count."""
    rng = np.random.default_rng(seed)
    start, slope = rng.integers(1, BINS - 1, (count, 1)), rng.integers(-1, 2, (count, 1))
    numbers = (start + slope * np.arange(rows)).clip(1, BINS - 2)
    return np.repeat(numbers[:, :, None], columns, axis=2)


def _image(numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pixels and depth of patches with these bins."""
    whole = numbers.repeat(PATCH, axis=-2).repeat(PATCH, axis=-1)
    pixels = np.repeat((whole * 30).astype(np.uint8)[..., None], 3, axis=-1)
    return pixels, (MIN + WIDTH * whole).astype(np.float32)


def _split(seed: int, count: int = IMAGES) -> Split:
    pixels, distances = _image(_numbers(count, SIDE // PATCH, SIDE // PATCH, seed))
    return Split(pixels, {"depth": distances.astype(np.float16)})


def _data(train: Split, test: Split, max_depth: float | None = MAX) -> DataSet:
    return DataSet("planted", (), ("depth",), train, test, test, "0" * 16, max_depth=max_depth)


def _seen(data: DataSet, split: str, backbone: nn.Module, settings: DepthConfig) -> SeenSplit:
    model: ModelConfig = resolve({"model": {"size": "nano", "image_size": SIDE, "patch_size": PATCH}}).model
    count = len(getattr(data, split))
    return SeenSplit(backbone, model, data, split, np.arange(count), torch.device("cpu"), _probe(settings).reads)


def _probe(settings: DepthConfig, streams: Streams | None = None) -> depth.Depth:
    return depth.Depth(settings, Context(streams or Streams(0), None, "deit3"))


def _settings(**given: Any) -> DepthConfig:
    quick = {"bins": BINS, "min_depth": MIN, "steps": 150, "batch_size": 8, "learning_rate": 0.02, "warmup_steps": 5}
    return DepthConfig.model_validate(quick | given)


def _scores(
    settings: DepthConfig, data: DataSet, backbone: nn.Module | None = None, tested: nn.Module | None = None
) -> dict[str, Any]:
    backbone = backbone or Binned()
    train, test = _seen(data, "train", backbone, settings), _seen(data, "test", tested or backbone, settings)
    return {score.name: score for score in _probe(settings).fit(train, test).score(test)}


@pytest.fixture(scope="module")
def data() -> DataSet:
    return _data(_split(0), _split(1, 12))


def _constant_rmse(data: DataSet) -> float:
    """Of the median depth of the training images, which knows nothing of an image."""
    median = np.median(data.train.targets["depth"])
    errors = np.asarray(data.test.targets["depth"], np.float32) - median
    return float(np.sqrt((errors**2).mean(axis=(1, 2))).mean())


@pytest.mark.parametrize("given", [{}, {"blocks": 4}, {"group_size": 2}, {"gradient_axes": "batch"}], ids=str)
def test_depth_that_tokens_hold_is_found_within_half_a_bin(data: DataSet, given: dict[str, Any]) -> None:
    found = _scores(_settings(**given), data)
    assert found["depth/rmse"].value < WIDTH / 2 < _constant_rmse(data) / 3
    assert found["depth/rmse"].per_image.shape == (12,)
    assert found["depth/rmse"].value == pytest.approx(found["depth/rmse"].per_image.mean())
    assert set(found) == {
        f"depth/{name}"
        for name in ("rmse", "abs_rel", "sq_rel", "rmse_log", "log_10", "silog", "delta1", "delta2", "delta3")
    } | {"depth/images_without_depth"}
    assert found["depth/images_without_depth"].value == 0


@pytest.mark.parametrize(("steps", "warm"), [(12, 2), (4, 0), (600, 100)])
def test_the_first_steps_fit_the_mean_depth_alone(
    data: DataSet, monkeypatch: pytest.MonkeyPatch, steps: int, warm: int
) -> None:
    """A hundred of them, or a fifth of a short run."""
    flags: list[bool] = []

    def noted(*given: Tensor, warm_up: bool) -> Tensor:
        flags.append(warm_up)
        return given[0].sum() * 0.0

    monkeypatch.setattr(depth_losses, "sig_loss", noted)
    settings = _settings(steps=steps, batch_size=1, gradient_weight=0.0)
    given = _seen(data, "train", Binned(), settings)
    _probe(settings).fit(given, given)
    assert flags == [True] * warm + [False] * (steps - warm)


def test_the_class_token_stands_beside_every_patch(data: DataSet) -> None:
    """Where images are of one depth, it is enough; patches are zeros here."""
    flat = {
        split: Split(*(lambda image: (image[0], {"depth": image[1]}))(_image(np.broadcast_to(numbers, (24, 4, 4)))))
        for split in ("train", "test")
        for numbers in [1 + np.arange(24)[:, None, None] % (BINS - 2)]
    }
    for blocks in (1, 4):
        found = _scores(_settings(blocks=blocks), _data(flat["train"], flat["test"]), Binned(patches=False))
        assert found["depth/rmse"].value < WIDTH < _constant_rmse(_data(flat["train"], flat["test"]))


def test_four_blocks_are_side_by_side_each_patch_then_class() -> None:
    raw = torch.arange(2 * 2 * 3 * 1, dtype=torch.float32).view(2, 2, 3, 1)  # images, blocks, class and two patches
    features = depth._features({"raw_blocks": raw}, 4)
    assert features[0].tolist() == [[1, 0, 4, 3], [2, 0, 5, 3]]
    assert features[1].tolist() == [[7, 6, 10, 9], [8, 6, 11, 9]]
    of_one = depth._features({"raw_patches": raw[:, 0, 1:], "raw_cls": raw[:, 0, 0]}, 1)
    assert of_one[0].tolist() == [[1, 0], [2, 0]]
    assert depth._features({"raw_patches": raw[:, 0, 1:]}, 1)[0].tolist() == [[1], [2]]
    assert _probe(_settings(blocks=4)).reads == {"raw_blocks"} and not _probe(_settings(whole=True)).reads


def test_pixels_without_depth_count_nowhere(data: DataSet) -> None:
    settings, outcomes = _settings(steps=20), []
    for unknown in (0.0, np.nan, np.inf, -np.inf, -1.0):
        parts = []
        for split in (data.train, data.test):
            distances = np.array(split.targets["depth"])
            distances[:, ::3, 1::2] = unknown
            distances[2] = unknown
            parts.append(Split(split.images, {"depth": distances}))
        outcomes.append(_scores(settings, _data(*parts)))
    first = outcomes[0]
    assert first["depth/images_without_depth"].value == 1
    values = first["depth/rmse"].per_image
    assert np.isnan(values[2]) and np.isfinite(np.delete(values, 2)).all()
    assert first["depth/rmse"].value == pytest.approx(np.delete(values, 2).mean())
    for other in outcomes[1:]:
        assert {name: score.value for name, score in other.items()} == {n: s.value for n, s in first.items()}


def test_metrics_count_what_lies_strictly_between_the_bins_ends() -> None:
    head = depth.Head(2, _settings(), MAX, torch.Generator().manual_seed(0))
    given = torch.tensor([0.0, MIN, MIN + 0.01, MAX - 0.01, MAX, torch.nan])
    assert depth.FittedDepth(head, _settings())._valid(given).tolist() == [False, False, True, True, False, False]


def test_test_images_without_any_depth_have_no_metrics(data: DataSet) -> None:
    nothing = Split(data.test.images, {"depth": np.zeros_like(data.test.targets["depth"])})
    found = _scores(_settings(steps=2), _data(data.train, nothing))
    assert set(found) == {"depth/images_without_depth"} and found["depth/images_without_depth"].value == 12


def test_what_cannot_be_learned_is_an_error(data: DataSet) -> None:
    nothing = Split(data.train.images, {"depth": np.full_like(data.train.targets["depth"], MAX + 1)})
    with pytest.raises(ValueError, match=r"planted has no depth above 0 and up to 4\.0 m in train"):
        _scores(_settings(), _data(nothing, data.test))
    with pytest.raises(ValueError, match="max_depth is auto, but planted does not say it"):
        _scores(_settings(), _data(data.train, data.test, None))
    with pytest.raises(ValueError, match=r"max_depth is 0\.5; allowed: more than min_depth, 0\.5"):
        _scores(_settings(max_depth=MIN), data)


def test_deleted_patches_take_the_mean_of_the_others(data: DataSet) -> None:
    def deleted(patches: Tensor) -> Tensor:
        return torch.cat([torch.full_like(patches[:, :3], torch.nan), patches[:, 3:]], dim=1)

    def replaced(patches: Tensor) -> Tensor:
        return torch.cat([patches[:, 3:].mean(dim=1, keepdim=True).expand(-1, 3, -1), patches[:, 3:]], dim=1)

    for given in ({}, {"blocks": 4}, {"whole": True}):
        settings = _settings(steps=10, **given)
        expected = _scores(settings, data, tested=Binned(replaced))
        found = _scores(settings, data, tested=Binned(deleted))
        assert found["depth/rmse"].value == pytest.approx(expected["depth/rmse"].value, rel=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_diverged_backbone_is_an_error(data: DataSet, bad: float) -> None:
    with pytest.raises(FloatingPointError):
        _scores(_settings(steps=2), data, Binned(lambda patches: patches * 0 + bad))


def test_the_result_depends_on_the_seed_alone(data: DataSet) -> None:
    def weights(seed: int, **given: Any) -> Tensor:
        settings, streams = _settings(steps=3, **given), Streams(seed)
        torch.manual_seed(seed + int(torch.randint(100, ()))), streams.torch("probe/depth")
        train = _seen(data, "train", Binned(), settings)
        return _probe(settings, streams).fit(train, train).head.weight

    for given in ({}, {"whole": True, "height": 8, "width": 12}):
        assert torch.equal(weights(0, **given), weights(0, **given))
        assert not torch.equal(weights(0, **given), weights(1, **given))


def _wholes(sizes: list[tuple[int, int]], seed: int) -> Split:
    """Images of different sizes, each of one depth, with squares beside them."""
    numbers = np.random.default_rng(seed).permutation(len(sizes)) % (BINS - 2) + 1
    made = [
        _image(np.full((math.ceil(height / PATCH), math.ceil(width / PATCH)), number))
        for number, (height, width) in zip(numbers, sizes, strict=True)
    ]
    wholes = [
        Whole(pixels[:height, :width], {"depth": distances[:height, :width]})
        for (pixels, distances), (height, width) in zip(made, sizes, strict=True)
    ]
    squares = np.stack([whole.pixels[:SIDE, :SIDE] for whole in wholes])
    depths = np.stack([whole.targets["depth"][:SIDE, :SIDE] for whole in wholes])
    return Split(squares, {"depth": depths}, tuple(map(str, range(len(sizes)))), lambda path: wholes[int(path)])


def test_whole_images_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are no multiples of the patch, so that padding is needed; crops larger than the image are padded too."""
    monkeypatch.setattr(depth_views, "colored", lambda pixels, random: pixels)
    sizes = [(18, 29), (31, 21), (24, 24), (16, 45)] * 4
    given = _data(_wholes(sizes, 0), _wholes(sizes, 1))
    settings = _settings(whole=True, flip=True, height=20, width=22, steps=100)
    found = _scores(settings, given)
    assert found["depth/rmse"].value < WIDTH and found["depth/rmse"].per_image.shape == (16,)


def test_whole_squares_are_predicted_as_squares_are(data: DataSet) -> None:
    settings = _settings(steps=10)
    fitted = _probe(settings).fit(_seen(data, "train", Binned(), settings), _seen(data, "test", Binned(), settings))
    test = _seen(data, "test", Binned(), settings)
    as_wholes = depth.FittedDepth(fitted.head, _settings(whole=True))
    for square, whole in zip(fitted.score(test), as_wholes.score(test), strict=True):
        assert whole.name == square.name and whole.value == pytest.approx(square.value, rel=1e-5)


def test_the_mirrored_image_is_averaged_in(data: DataSet) -> None:
    """A head that sees but the left column of patches differs from its mirror image; their mean is symmetric."""

    def left(patches: Tensor) -> Tensor:
        return patches * (torch.arange(16) % 4 == 0).float()[:, None]

    test = _seen(data, "test", Binned(left), _settings(whole=True))
    head = _probe(_settings(steps=30)).fit(_seen(data, "train", Binned(), _settings()), test).head
    flat = _split(1, 12).targets["depth"]
    values = {}
    for flip in (False, True):
        fitted = depth.FittedDepth(head, _settings(whole=True, flip=flip))
        values[flip] = {score.name: score for score in fitted.score(test)}["depth/rmse"].per_image
    image = test.view(np.array([0]))
    with torch.no_grad():
        mean = (fitted._predict(test, image) + fitted._predict(test, image.flip(3)).flip(2)) / 2
    true = torch.from_numpy(flat[:1].astype(np.float32))
    valid = depth_metrics.valid_for_metrics(true, MIN, MAX)
    assert values[True][0] == pytest.approx(float(((mean - true)[valid] ** 2).mean().sqrt()), rel=1e-5)
    assert abs(values[True][0] - values[False][0]) > 1e-3


def test_the_eigen_crop_alone_counts() -> None:
    numbers = np.full((2, 12, 16), 3)
    pixels, distances = _image(numbers)  # 48 × 64 px, a tenth of NYU's
    inside = np.zeros(distances.shape, bool)
    inside[:, 4:47, 4:60] = True  # of rows 45 … 471 and columns 41 … 601
    split = Split(pixels, {"depth": np.where(inside, distances, MIN + 0.1)})
    settings = _settings(whole=True, crop="nyu", height=24, width=24, steps=1)
    given = _data(split, split)
    test = _seen(given, "test", Binned(), settings)
    fitted = _probe(settings).fit(test, test)
    cut = {score.name: score.value for score in fitted.score(test)}
    everywhere = _data(*[Split(pixels, {"depth": np.where(inside, distances, 0.0)})] * 2)
    whole = depth.FittedDepth(fitted.head, _settings(whole=True))
    same = {score.name: score.value for score in whole.score(_seen(everywhere, "test", Binned(), settings))}
    assert cut == pytest.approx(same, rel=1e-9)
    full = {score.name: score.value for score in whole.score(test)}
    assert full["depth/rmse"] != pytest.approx(cut["depth/rmse"], rel=1e-2)


def test_cuts_of_nyu_and_of_other_sizes() -> None:
    assert depth_views.cut(480, 640, depth_views.TRAINING_CUT) == (slice(45, 472), slice(43, 608))
    assert depth_views.cut(480, 640, depth_views.EIGEN_CUT) == (slice(45, 471), slice(41, 601))
    assert depth_views.cut(240, 320, depth_views.EIGEN_CUT) == (slice(22, 235), slice(20, 300))


@pytest.fixture
def ramp() -> Whole:
    """Red is 4 × the column, green 4 × the row, depth 1 + column / 10 + row / 1000."""
    rows, columns = np.mgrid[:40, :60]
    pixels = np.stack([columns * 4, rows * 4, rows * 0], axis=2).astype(np.uint8)
    return Whole(pixels, {"depth": (1 + columns / 10 + rows / 1000).astype(np.float32)})


def _crops(ramp: Whole, size: tuple[int, int], count: int, nyu: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for seed in range(count):
        pixels, distances = depth_views.training_crop(ramp, size, nyu, np.random.default_rng(seed), "imagenet")
        assert pixels.shape == (3, *size) and distances.shape == size
        yield (pixels * std[:, None, None] + mean[:, None, None]) * 255, distances


def test_training_crops_move_depth_with_the_image(ramp: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_views, "colored", lambda pixels, random: pixels)
    flipped, turned, corners = 0, 0, set()
    for pixels, distances in _crops(ramp, (24, 30), 60):
        known = distances > 0
        column = ((distances - 1) * 10).floor()
        assert ((pixels[0] / 4 - column)[known].abs() < 1.5).float().mean() > 0.95  # turned borders are mixed with 0
        flipped += bool(pixels[0, 12, 20] < pixels[0, 12, 10])
        turned += bool((pixels[1, 12] - pixels[1, 12, :1]).abs().max() > 0.05)
        corners.add((round(float(pixels[1, 12, 15])), round(float(pixels[0, 12, 15]))))
    assert 20 < flipped < 40 and 20 < turned < 40 and len(corners) > 40


def test_the_margin_of_nyu_is_cut_before_training_crops(ramp: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth_views, "colored", lambda pixels, random: pixels)
    seen = torch.cat([pixels[0].flatten() for pixels, distances in _crops(ramp, (30, 50), 30, nyu=True)])
    assert seen.max() < 57 * 4 and seen[seen > 1].min() > 0  # columns 4 … 56 of 60


def test_crops_larger_than_the_image_are_padded_without_depth(ramp: Whole) -> None:
    (pixels, distances), *_ = list(_crops(ramp, (48, 64), 1))
    assert (distances[40:] == 0).all() and (distances[:, 60:] == 0).all() and (distances[5:35, 5:55] > 0).all()
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None] * 255
    torch.testing.assert_close(pixels[:, 44], mean.expand(-1, 64))


def _drawn(gate: float, *uniform: Any) -> np.random.Generator:
    """Draws that a test says."""
    values = iter(uniform)
    limits: list[Any] = []
    random = SimpleNamespace(
        random=lambda: gate, uniform=lambda *args, **_: limits.append(args) or next(values), limits=limits
    )
    return cast(np.random.Generator, random)


def test_colours_change_by_power_brightness_and_colour() -> None:
    pixels = torch.tensor([[[100.0, 0.0, 250.0]]]).expand(3, 1, 3)
    random = _drawn(0.49, 0.9, 1.25, np.array([1.0, 0.9, 1.1]))
    found = depth_views.colored(pixels, random)
    powered = 100**0.9  # 63.1
    expected = [powered * 1.25, powered * 1.25 * 0.9, powered * 1.25 * 1.1]
    torch.testing.assert_close(found[:, 0, 0], torch.tensor(expected))
    assert found[:, 0, 1].tolist() == [0, 0, 0]
    assert cast(Any, random).limits == [(0.9, 1.1), (0.75, 1.25), (0.9, 1.1)]
    bright = depth_views.colored(pixels, _drawn(0.1, 1.1, 1.25, np.ones(3)))
    assert bright[:, 0, 2].tolist() == [255, 255, 255]
    assert torch.equal(depth_views.colored(pixels, _drawn(0.5)), pixels)


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    settings = _settings(steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [depth._rate(settings, step) for step in range(101)]
    assert rates[0] == pytest.approx(2e-3) and rates[50] == pytest.approx(1.0)
    assert rates[5] == pytest.approx(2 * 0.5005 * 0.5 * (1 + math.cos(math.pi * 0.05)))
    assert rates[75] == pytest.approx(1 - math.cos(math.pi / 4)) and rates[100] == pytest.approx(2e-8)


def test_the_head_predicts_at_four_times_the_grid() -> None:
    """Logits of bin 1 in two patches side by side are 0 and 8: bilinear between them, then depth, then its size."""
    settings = DepthConfig(bins=2, min_depth=1.0)
    head = depth.Head(1, settings, 3.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [1.0]])), head.bias.zero_()
        found = head(torch.tensor([[[0.0], [8.0]]]), (1, 2), (4, 8))
    logits = torch.tensor([0, 0, 1, 3, 5, 7, 8, 8.0])
    expected = (0.1 * 1 + (logits + 0.1) * 3) / (logits + 0.2)
    torch.testing.assert_close(found, expected.expand(1, 4, 8))


def test_losses_of_pixels_known_by_hand() -> None:
    depths = torch.tensor([[[[1.0, 1.0, 1.0, 0.0]]]])
    predicted = ((depths + 1e-3) * torch.tensor([1.0, 1.0, math.e, 5.0]) - 1e-3).requires_grad_()
    valid = depth_losses.valid_for_loss(depths, 10.0)
    assert valid.tolist() == [[[[True, True, True, False]]]]
    sig = depth_losses.sig_loss(predicted, depths, valid)  # logarithms 0, 0, 1
    assert sig.item() == pytest.approx(math.sqrt(1 / 3 + 0.15 / 9), rel=1e-5)
    assert depth_losses.gradient_loss(predicted, depths, valid).item() == pytest.approx(1 / 3, rel=1e-5)
    limits = torch.tensor([0.0, 1e-6, 10.0, 10.1, torch.nan, torch.inf])
    assert depth_losses.valid_for_loss(limits, 10.0).tolist() == [False, True, True, False, False, False]
    counted = depth_metrics.valid_for_metrics(torch.tensor([0.0, 1e-3, 0.01, 10.0, torch.nan, torch.inf]), 1e-3, 10.0)
    assert counted.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("known", [0, 1, 4])
def test_losses_of_few_pixels_and_perfect_predictions_have_finite_gradients(known: int) -> None:
    depths = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    depths[..., known:] = torch.nan
    predicted = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]], requires_grad=True)
    valid = depth_losses.valid_for_loss(depths, 10.0)
    loss = depth_losses.sig_loss(predicted, depths, valid) + depth_losses.gradient_loss(predicted, depths, valid)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert loss.item() == pytest.approx(0, abs=1e-5) and gradient.isfinite().all()


def test_a_group_of_images_has_a_loss_of_its_own() -> None:
    head = depth.Head(2, _settings(), MAX, torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(1)
    tokens = torch.randn(4, 16, 2, generator=random)
    distances = torch.rand(4, 16, 16, generator=random) + torch.tensor([0.6, 0.6, 3.0, 3.0])[:, None, None]
    whole = depth._Batch(tokens, (4, 4), distances)
    pairs = [depth._Batch(tokens[i : i + 2], (4, 4), distances[i : i + 2]) for i in (0, 2)]
    together = depth._loss(_settings(), head, whole, 1_000)
    of_pairs = torch.stack([depth._loss(_settings(), head, pair, 1_000) for pair in pairs]).mean()
    assert depth._loss(_settings(group_size=2), head, whole, 1_000).item() == pytest.approx(of_pairs.item())
    assert together.item() != pytest.approx(of_pairs.item(), rel=1e-4)
    only_sig = depth._loss(_settings(gradient_weight=0.0), head, whole, 1_000).item()
    double = depth._loss(_settings(gradient_weight=1.0), head, whole, 1_000).item()
    assert together.item() - only_sig == pytest.approx((double - only_sig) / 2, rel=1e-4) and double > only_sig + 1e-3
    batch = depth._loss(_settings(gradient_axes="batch", group_size=2), head, whole, 1_000).item()
    assert batch == pytest.approx(depth._loss(_settings(gradient_weight=0.0, group_size=2), head, whole, 1_000).item())


def test_the_preset_paper_is_the_protocol_of_dinov2() -> None:
    given = {"evaluation.depth.preset": "paper", "data.train": "scenes", "method": "deit3"}
    chosen = resolve(given | {"evaluation.probes": ["depth"]}).evaluation.depth
    assert chosen is not None
    assert (chosen.steps, chosen.batch_size, chosen.warmup_steps) == (38_400, 16, 12_800)
    assert (chosen.learning_rate, chosen.weight_decay) == (1e-4, 0.01)
    assert (chosen.bins, chosen.upsample, chosen.min_depth, chosen.max_depth) == (256, 4, 1e-3, 10.0)
    assert (chosen.whole, chosen.crop, chosen.height, chosen.width, chosen.flip) == (True, "nyu", 416, 544, True)
    assert (chosen.blocks, chosen.group_size, chosen.gradient_axes, chosen.at) == (4, 2, "batch", "end")
