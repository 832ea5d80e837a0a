"""Crops of the linear probe: how large they are, the centre for evaluation, and what they change in the heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as tv
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from tests.trainers import coded, planted
from trainers.config import DataConfig, EvaluationConfig, ExecutionConfig, LinearConfig, resolve
from trainers.data import DataSet, Split, open_data
from trainers.probes import Context, crops, linear
from trainers.probes.fitted import Probes
from trainers.probes.seen import SeenSplit
from trainers.streams import Streams
from trainers.vit import Tokens

IMAGES, SIDE = 64, 16
READS = ("cls", "mean_patch")


class Summary(nn.Module):
    """A backbone whose class token, and only patch, is what `look` says of the images in grey levels 0 … 255."""

    num_registers = 0

    def __init__(self, look: Any) -> None:
        super().__init__()
        self._look = look

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        assert not self.training and not torch.is_grad_enabled()
        cls_BD = self._look(torch.stack([planted.levels(images[:, channel:]) for channel in range(2)], dim=1))
        return Tokens(cls_BD, cls_BD[:, None][:, :0], cls_BD[:, None])


def seen(backbone: nn.Module, pixels: np.ndarray, classes: np.ndarray, image_size: int = SIDE) -> SeenSplit:
    model = resolve({"model.size": "nano", "model.patch_size": 8, "model.image_size": image_size}).model
    split = Split(pixels, {"classes": classes})
    data = DataSet("planted", ("left", "right"), ("classes",), split, split, split, "0" * 16)
    return SeenSplit(backbone, model, data, "train", np.arange(len(pixels)), torch.device("cpu"), frozenset(READS))


def fit(shown: SeenSplit, seed: int = 0, **settings: Any) -> linear.LinearProbe:
    config = LinearConfig(**{"steps": 30, "batch_size": 32, **settings})
    return linear.Linear(config, Context(Streams(seed), None, "deit3")).fit(shown, shown.sibling("validation"))


def halves() -> SeenSplit:
    """Images that are light on the left or on the right, seen by a backbone that tells which."""

    def brighter(levels: Tensor) -> Tensor:
        left, right = (levels[:, 0, :, part].mean(dim=(1, 2)) for part in (slice(0, 8), slice(8, 16)))
        return functional.one_hot((right > left).long(), 8).float()

    classes = np.arange(IMAGES) % 2
    pixels = np.full((IMAGES, SIDE, SIDE, 3), 20, np.uint8)
    pixels[classes == 0, :, :8] = 220
    pixels[classes == 1, :, 8:] = 220
    return seen(Summary(brighter), pixels, classes)


def uniform() -> SeenSplit:
    """Images that no crop and no flip changes, each with a code of its own."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, IMAGES)
    code = torch.from_numpy(rng.normal(0, 1, (IMAGES, 8))).float()
    return seen(
        Summary(lambda levels: code[levels[:, 0, 0, 0].round().long()]), planted.numbered(IMAGES, SIDE), classes
    )


def test_crops_that_change_nothing_give_what_features_extracted_once_give() -> None:
    shown = uniform()
    once, cropped = fit(shown), fit(shown, crops=True)
    for one, other in zip(once.trained, cropped.trained, strict=True):
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
        assert (one.right, one.learning_rate) == (other.right, other.learning_rate)
    scores = [[s.value for s in probe.score(shown) if hasattr(s, "value")] for probe in (once, cropped)]
    assert scores[0] == scores[1] and len(scores[0]) == 2


def test_flips_make_left_and_right_alike() -> None:
    shown = halves()
    settings = {"learning_rates": (0.3,), "steps": 60, "batch_size": 256}
    assert fit(shown, **settings).heads["linear"].loss < 0.1
    assert fit(shown, crops=True, **settings).heads["linear"].loss == pytest.approx(np.log(2), abs=0.1)


def test_crops_depend_on_the_seed_alone() -> None:
    shown = halves()
    first, other = fit(shown, crops=True), fit(shown, seed=1, crops=True)
    torch.manual_seed(123)
    again = fit(shown, crops=True)
    for one, two, three in zip(first.trained, again.trained, other.trained, strict=True):
        assert torch.equal(one.weight, two.weight)
        assert not torch.equal(one.weight, three.weight)


def test_heads_are_chosen_on_the_centres_of_images_that_are_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing on random crops would make the choice a draw."""
    looked_at: list[int] = []
    centre = crops.centre_features

    def noted(shown: SeenSplit, reads: Any, positions: Tensor | None = None) -> dict[str, Tensor]:
        assert positions is not None
        looked_at.extend(positions.tolist())
        return centre(shown, reads, positions)

    monkeypatch.setattr(crops, "centre_features", noted)
    probe = fit(uniform(), crops=True)
    held_out = set(looked_at[1:])  # the first is looked at for its width
    assert len(looked_at) == 1 + IMAGES // 2 and len(held_out) == probe.num_chosen_on == IMAGES // 2


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({}, {"cls", "mean_patch"}),
        ({"blocks": (1, 4)}, {"cls", "mean_patch", "cls_blocks"}),
        ({"crops": True, "blocks": (1, 4)}, set()),
    ],
)
def test_what_is_read_once_is_what_heads_without_crops_see(settings: dict[str, Any], reads: set[str]) -> None:
    assert linear.Linear(LinearConfig(**settings), Context(Streams(0), None, "deit3")).reads == reads


def test_crops_are_of_the_chosen_images_as_their_weights_expect_them() -> None:
    """Of images 5 and 2 alone, and normalised by another mean and deviation than ImageNet's."""
    every = uniform()
    model = every.model.model_copy(update={"normalization": "inception"})
    views: list[Tensor] = []

    def look(images: Tensor) -> Tensor:
        views.append(images)
        return images.flatten(1)[:, :8]

    class Plain(Summary):
        def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
            cls_BD = self._look(images)
            return Tokens(cls_BD, cls_BD[:, None][:, :0], cls_BD[:, None])

    shown = replace(every, backbone=Plain(look), model=model, indices=np.array([5, 2]))
    crops.RandomCrops(shown, READS, torch.Generator()).features(torch.arange(2))
    crops.centre_features(shown, READS)
    for images in views:
        assert ((images[:, 0, 0, 0] * 0.5 + 0.5) * 255).tolist() == pytest.approx([5, 2], abs=1e-3)
    assert len(views) == 2


def ramps(count: int) -> np.ndarray:
    """Red rises to the right, green downwards: 8 levels a pixel on 32 px."""
    ramp = (np.arange(32) * 8).astype(np.uint8)
    pixels = np.zeros((count, 32, 32, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp[None, None, :], ramp[None, :, None]
    return pixels


def test_crops_take_8_to_100_per_cent_of_the_image_and_every_second_is_flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "CHUNK", 170)

    def extent(levels: Tensor) -> Tensor:
        red, green = levels[:, 0].mean(dim=1), levels[:, 1].mean(dim=2)
        # Outermost of 16 pixels are 15/16 of the crop apart, and the image is 256 levels wide.
        width, height = ((ramp.amax(dim=1) - ramp.amin(dim=1)) / 256 * 16 / 15 for ramp in (red, green))
        return torch.stack([width * height, (red[:, 0] > red[:, -1]).float(), width / height], dim=1)

    shown = seen(Summary(extent), ramps(400), np.zeros(400, np.int64))
    random = crops.RandomCrops(shown, READS, torch.Generator().manual_seed(0))
    area, falling, ratio = random.features(torch.arange(400))["cls"].unbind(1)
    assert float(area.mean()) == pytest.approx(0.52, abs=0.04)  # uniform in 0.08 … 1, but for wide ones that do not fit
    assert float(area.min()) < 0.15 and float(area.max()) > 0.9
    assert float(falling.mean()) == pytest.approx(0.5, abs=0.1)
    assert float(ratio.min()) > 0.6 and float(ratio.max()) < 1.6
    later = random.features(torch.arange(400))["cls"]
    assert not torch.equal(later[:, 0], area)


@pytest.mark.parametrize("side", [64, 80])
def test_the_centre_is_that_of_torchvision(side: int) -> None:
    """Resize to 64, the square's own size or less, and CenterCrop to 56, as 256 and 224."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    official = tv.Compose(
        [
            tv.Resize(64, interpolation=tv.InterpolationMode.BICUBIC),
            tv.CenterCrop(56),
            tv.ToImage(),
            tv.ToDtype(torch.float32, scale=True),
            tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = torch.stack([official(Image.fromarray(image)) for image in pixels])
    ours = crops.centre_view(torch.from_numpy(pixels), 56)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 if side == 64 else 0.02)  # a grey level is 0.0175


def test_smaller_images_are_taken_whole() -> None:
    pixels = torch.from_numpy(ramps(1))
    assert torch.equal(crops.centre_view(pixels, 32), crops.evaluation_view(pixels, 32))
    assert torch.equal(crops.centre_view(pixels, 30), crops.evaluation_view(pixels, 30))
    assert float(planted.levels(crops.centre_view(pixels, 28))[0, 0, 0]) == pytest.approx(16, abs=1e-3)  # 2 px cut off


def test_evaluated_and_chosen_on_the_centre() -> None:
    """Only the outermost pixels tell the classes apart, and the centre leaves them out."""
    classes = np.arange(IMAGES) % 2
    pixels = np.full((IMAGES, 64, 64, 3), 100, np.uint8)
    pixels[:, :4] = (20 + 200 * classes).astype(np.uint8)[:, None, None, None]

    def top(levels: Tensor) -> Tensor:
        return functional.one_hot((levels[:, 0, 0].mean(dim=1) > 150).long(), 8).float()

    shown = seen(Summary(top), pixels, classes, image_size=56)
    settings = {"learning_rates": (0.3,), "steps": 60}
    accuracies = {}
    for name, given in (("once", {}), ("train", {"crops": True}), ("val", {"crops": True, "select_on": "val"})):
        probe = fit(shown, **settings, **given)
        accuracies[name] = next(iter(probe.score(shown))).value, probe.heads["linear"].right
        assert probe.num_chosen_on == (64 if name == "val" else 32)
    assert accuracies["once"] == (1.0, 32)
    assert accuracies["train"][0] == accuracies["val"][0] == 0.5
    assert accuracies["val"][1] == 32 and accuracies["train"][1] < 32


def test_diverged_weights_raise() -> None:
    shown = seen(
        Summary(lambda levels: levels[:, 0, 0, :8] * float("nan")), planted.numbered(9, SIDE), np.arange(9) % 2
    )
    random = crops.RandomCrops(shown, READS, torch.Generator())
    with pytest.raises(FloatingPointError, match="diverged"):
        random.features(torch.arange(9))
    with pytest.raises(FloatingPointError, match="diverged"):
        fit(shown, crops=True)


@pytest.mark.parametrize("settings", [{}, {"blocks": (1,), "select_on": "val"}, {"crops": True}])
def test_labels_in_the_class_token_are_found_and_noise_is_not(settings: dict[str, Any]) -> None:
    """From images to metrics: linear and kNN."""
    rng = np.random.default_rng(0)
    count, classes = 240, 5
    labels = rng.integers(0, classes, count)
    pixels = np.zeros((count, SIDE, SIDE, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = (part[:, None, None] for part in np.divmod(np.arange(count), 256))
    noise = torch.from_numpy(rng.normal(0, 1, (count, 8))).float()
    planted_cls = functional.one_hot(torch.from_numpy(labels), 8).float() * 4
    for cls_nD, low, high in ((planted_cls, 1.0, 1.0), (noise, 0.0, 0.42)):  # four standard errors above 0.2
        backbone = coded.Coded(noise[:, None], torch.zeros(count, 1, dtype=torch.bool), cls_nD)
        subject = coded.coded_subject(backbone, pixels, labels, 120)
        evaluation = EvaluationConfig(
            probes=("linear", "knn"), linear={"steps": 60, **settings}, knn={"k": (5, 20)}, train_images=count
        )
        probes = Probes(evaluation, subject.data, subject.model, Context(Streams(0), None, "deit3"), subject.device)
        found = probes.fit(backbone, at_end=True).score(backbone, "test")
        assert set(found.metrics) == {f"test/{name}/top1" for name in ("linear", "linear_mean_patch", "knn", "knn/k5")}
        assert [file.name for file in found.files] == ["linear_heads"]
        assert all(low <= value <= high for value in found.metrics.values()), found.metrics


def test_streamed_images_are_cropped_at_their_own_size(tmp_path: Path) -> None:
    """A strip three times as wide as high, green at its ends: squares show its middle alone, originals its ends too."""
    strip = np.zeros((40, 120, 3), np.uint8)
    strip[:, :40, 1] = strip[:, 80:, 1] = 255
    for split in ("train", "validation", "test"):
        for index in range(3):
            (tmp_path / "data" / split / "one").mkdir(parents=True, exist_ok=True)
            Image.fromarray(strip).save(tmp_path / "data" / split / "one" / f"{index}.png")

    def green(decode_size: int | str) -> float:
        config = DataConfig(train="image_folder", name="strips", decode_size=decode_size, scenes=None)
        execution = ExecutionConfig(data_root=str(tmp_path / "data"), threads=1)
        data = open_data(config, execution, 32, tmp_path / "cache")
        backbone = Summary(lambda levels: levels[:, 1].mean(dim=(1, 2))[:, None])
        shown = replace(seen(backbone, ramps(3), np.zeros(3, np.int64)), data=data)
        random = crops.RandomCrops(shown, READS, torch.Generator().manual_seed(0))
        return max(float(random.features(torch.arange(3))["cls"].max()) for _ in range(8))

    assert green(32) < 20.0 and green("original") > 60.0
