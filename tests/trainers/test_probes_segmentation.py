"""Linear segmentation: planted classes are found, metrics by hand, whole images by windows, crops and colours."""

from __future__ import annotations

import colorsys
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from tests.trainers.painted import STEP, WIDTH, blocks, context, painted, reader, seen
from tests.trainers.planted import Planted, levels
from trainers.config import SegmentationConfig, resolve
from trainers.data import IGNORED, Whole
from trainers.findings import Score
from trainers.probes import dense, segmentation
from trainers.probes import segmentation_views as views
from trainers.probes.seen import SeenSplit
from trainers.probes.segmentation import Head, Segmentation, confusion, mean_iou

QUICK: dict[str, Any] = {"steps": 60, "learning_rate": 0.03, "warmup_steps": 3, "batch_size": 8}


def found(train: SeenSplit, test: SeenSplit | None = None, seed: int = 0, **settings: Any) -> dict[str, Score]:
    probe = Segmentation(SegmentationConfig(**{**QUICK, **settings}), context(seed)).fit(train, train)
    scores = {score.name: score for score in probe.score(test or train)}
    return {name.removeprefix("segmentation/"): score for name, score in scores.items()}


def squares(seed: int = 0, count: int = 24, **change: Any) -> SeenSplit:
    numbers = blocks(count, 4, 8, np.random.default_rng(seed))
    truth = change.get("truth", numbers.astype(np.uint8))
    return seen(reader(2), painted(numbers), frozenset({"patches"}), 2, segmentation=truth)


def test_planted_classes_are_found_and_a_constant_is_far_below() -> None:
    test = squares(1)
    scores = found(squares(), test)
    assert scores["miou"].value >= 0.98 and scores["accuracy"].value >= 0.98 and scores["mean_accuracy"].value >= 0.98
    each = scores["miou"].per_image
    assert each is not None and each.shape == (24,) and each.min() > 0.9
    truth = torch.from_numpy(test.part.targets["segmentation"])
    constant = mean_iou(confusion(torch.zeros_like(truth), truth, WIDTH).numpy())
    assert constant == pytest.approx(float((truth == 0).double().mean()) / WIDTH)
    assert constant < 0.03


def test_what_patches_do_not_tell_is_not_found() -> None:
    blind = Planted(lambda images: torch.ones(2, len(images), 256, WIDTH))
    numbers = blocks(24, 4, 8, np.random.default_rng(0))
    given = seen(blind, painted(numbers), frozenset({"patches"}), 2, segmentation=numbers.astype(np.uint8))
    assert found(given)["miou"].value < 0.05


def test_metrics_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1], [1, 1, IGNORED]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1], [1, 3, 2]])
    table = confusion(predicted, truth, 5).numpy()
    assert table.tolist() == [[1, 1, 0, 0, 0], [0, 2, 0, 1, 0], [0] * 5, [0] * 5, [0] * 5]
    # Class 0: 1 of 2; class 1: 2 of 4; class 3 is only predicted: 0 of 1; 2 and 4 do not occur.
    assert mean_iou(table) == pytest.approx((1 / 2 + 2 / 4 + 0) / 3)
    assert segmentation.accuracy(table) == pytest.approx(3 / 5)
    assert segmentation.mean_accuracy(table) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert np.isnan(mean_iou(np.zeros((5, 5), np.int64)))


def test_miou_is_that_of_torchmetrics_and_of_sets_of_pixels() -> None:
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 6, (2, 3, 20, 20))
    truth[random.random(truth.shape) < 0.1] = IGNORED
    truth[truth == 4], predicted[predicted == 4] = 0, 1
    pair = torch.from_numpy(predicted), torch.from_numpy(truth)
    ours = mean_iou(confusion(*pair, 6).numpy())
    assert ours == pytest.approx(float(MulticlassJaccardIndex(6, ignore_index=IGNORED)(*pair)), rel=1e-6)
    counts = truth != IGNORED
    shares = []
    for number in range(6):
        both, either = (
            (op(truth == number, predicted == number) & counts).sum() for op in (np.logical_and, np.logical_or)
        )
        shares += [both / either] if either else []
    assert len(shares) == 5 and ours == pytest.approx(np.mean(shares))


def test_scores_are_of_the_whole_split_and_of_each_image() -> None:
    """Two images of unlike classes: the mean over the split's classes is not the mean over images."""
    train = squares()
    numbers = np.zeros((3, 32, 32), np.int64)
    numbers[1, :, 16:] = 1
    truth = numbers.astype(np.uint8)
    truth[1, :8, 16:] = 5  # which patches do not tell
    truth[2] = IGNORED
    test = seen(reader(2), painted(numbers), frozenset({"patches"}), 2, segmentation=truth)
    scores = found(train, test, steps=100)
    each = scores["miou"].per_image
    assert each is not None and each[0] == 1.0 and np.isnan(each[2])
    assert each[1] == pytest.approx((1 + 0.75 + 0) / 3, abs=0.01)
    assert scores["miou"].value == pytest.approx((1 + 0.75 + 0) / 3, abs=0.01)
    assert scores["accuracy"].value == pytest.approx((1024 + 896) / 2048, abs=0.01)
    assert scores["accuracy"].per_image == pytest.approx([1, 896 / 1024, np.nan], abs=0.01, nan_ok=True)
    assert scores["mean_accuracy"].value == pytest.approx((1 + 1 + 0) / 3, abs=0.01)
    nothing = seen(reader(2), painted(numbers), frozenset({"patches"}), 2, segmentation=np.full_like(truth, IGNORED))
    assert {name: score.value for name, score in found(train, nothing).items()} == {"images_without_classes": 3.0}
    assert scores["images_without_classes"].value == 1.0
    with pytest.raises(ValueError, match="has no pixel of a class in train to learn from"):
        found(nothing, test)


def test_ignored_pixels_are_not_learned() -> None:
    numbers = blocks(24, 4, 8, np.random.default_rng(0), most=3)
    truth = numbers.astype(np.uint8)
    wrong = np.where((numbers == 1) & (np.arange(24) % 3 > 0)[:, None, None], IGNORED, truth)
    given = seen(reader(2), painted(numbers), frozenset({"patches"}), 2, segmentation=wrong)
    test = seen(reader(2), painted(numbers), frozenset({"patches"}), 2, segmentation=truth)
    assert found(given, test)["miou"].value > 0.97


def test_the_loss_is_that_of_mmsegmentation() -> None:
    """Cross-entropy of upsampled logits, summed over pixels that count and divided by all."""
    head = Head(3, 2, torch.Generator().manual_seed(0)).eval()
    tokens = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    truth = torch.randint(0, 2, (2, 6, 6), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    truth[0] = IGNORED
    loss = segmentation._loss(head, segmentation._Batch(tokens, (2, 2), truth), 0)
    logits = F.linear(tokens[1] / np.sqrt(1 + 1e-5), head.weight, head.bias)
    upsampled = F.interpolate(logits.T.view(1, 2, 2, 2), size=(6, 6), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(upsampled, truth[1:].long(), reduction="sum") / 72
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0.002 < head.weight.std().item() < 0.03 and head.bias.abs().max().item() == 0


def test_patches_are_normalised_over_the_batch_then_by_running_means() -> None:
    head = Head(3, 2, torch.Generator().manual_seed(0))
    tokens = 50 + 100 * torch.randn(4, 16, 3, generator=torch.Generator().manual_seed(1))
    normed = (tokens - tokens.mean(dim=(0, 1))) / tokens.var(dim=(0, 1), correction=0).sqrt()
    with torch.no_grad():
        found_logits = head(tokens, (4, 4), (4, 4)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found_logits, F.linear(normed, head.weight, head.bias), rtol=1e-4, atol=1e-5)
        head.eval()
        later = head(tokens[:1] * 0, (4, 4), (4, 4))[0, :, 0, 0]
    running = -0.1 * tokens.mean(dim=(0, 1)) / (0.9 + 0.1 * tokens.var(dim=(0, 1)) + 1e-5).sqrt()
    torch.testing.assert_close(later, F.linear(running, head.weight, head.bias), rtol=1e-4, atol=1e-5)


def test_equal_bits_again_and_no_draw_of_others() -> None:
    before = torch.get_rng_state()
    first, again, other = found(squares()), found(squares()), found(squares(), seed=1, steps=5)
    assert torch.equal(before, torch.get_rng_state())
    assert first["miou"].value == again["miou"].value
    assert other["miou"].value != found(squares(), steps=5)["miou"].value


def test_rates_are_mmcvs() -> None:
    settings = SegmentationConfig(steps=100, warmup_steps=10, learning_rate=0.5)
    rates = [segmentation._rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.5e-6)
    assert rates[5] == pytest.approx(0.5 * 0.95 * (1 - 0.5 * (1 - 1e-6)))
    assert rates[10] == pytest.approx(0.5 * 0.9) and rates[99] == pytest.approx(0.005)


def test_diverged_weights_are_an_error() -> None:
    infinite = Planted(lambda images: torch.full((2, len(images), 256, WIDTH), torch.inf))
    numbers = blocks(4, 4, 8, np.random.default_rng(0))
    given = seen(infinite, painted(numbers), frozenset({"patches"}), 2, segmentation=numbers.astype(np.uint8))
    with pytest.raises(FloatingPointError, match="not finite"):
        found(given)
    with pytest.raises(FloatingPointError, match="not finite"):
        found(given, whole=True)


class TestWholeImages:
    def wholes(self, seed: int) -> list[Whole]:
        """Of 48 × 80 px: five numbers on cells of 16 px."""
        random = np.random.default_rng(seed)
        drawn = random.integers(0, 5, (8, 3, 5)).repeat(16, axis=1).repeat(16, axis=2)
        return [Whole(painted(numbers), {"segmentation": numbers.astype(np.uint8)}) for numbers in drawn]

    def seen(self, seed: int, patch_size: int = 2) -> SeenSplit:
        pixels = np.zeros((8, 16, 16, 3), np.uint8)
        return seen(reader(patch_size), pixels, frozenset(), patch_size, self.wholes(seed), side=32)

    def test_planted_classes_are_found_by_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(views, "distorted", lambda pixels, random: pixels)  # colours say the class here
        test = self.seen(1)
        test.part.whole(3).targets["segmentation"][:] = IGNORED
        scores = found(self.seen(0), test, whole=True, side=48, stride=32, steps=40)
        assert scores["miou"].value > 0.95
        each = scores["miou"].per_image
        assert each is not None and np.flatnonzero(np.isnan(each)).tolist() == [3] and len(each) == 8

    def test_test_images_are_scaled_before_windows_are_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """48 × 80 px become 24 × 40 px, two windows."""
        settings = SegmentationConfig(**{**QUICK, "whole": True, "side": 24, "stride": 16, "steps": 1})
        probe = Segmentation(settings, context()).fit(self.seen(0), self.seen(0))
        shapes, read = [], segmentation._read

        def watched(given: SeenSplit, images: torch.Tensor) -> Any:
            shapes.append(tuple(images.shape))
            return read(given, images)

        monkeypatch.setattr(segmentation, "_read", watched)
        list(probe.score(self.seen(0)))
        assert shapes == [(1, 3, 24, 24)] * 2 * 8

    def test_sides_that_are_no_multiple_of_the_patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(views, "distorted", lambda pixels, random: pixels)
        train = self.seen(0, patch_size=4)
        assert found(train, whole=True, side=46, steps=30)["miou"].value > 0.6

    def test_equal_bits_whatever_threads_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = found(self.seen(0), whole=True, side=32, steps=4)
        workers: list[int] = []
        ahead = dense.ahead
        monkeypatch.setattr(dense, "ahead", lambda *given: (workers.append(given[2]), ahead(*given))[1])
        for cores in (1, 7):
            monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
            assert found(self.seen(0), whole=True, side=32, steps=4)["accuracy"].value == first["accuracy"].value
        assert workers == [1, 7]

    def test_each_crop_has_an_image_and_draws_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def drawn(seed: int) -> tuple[set[float], set[int]]:
            draws, images = set(), set()

            def crop(whole: Whole, side: int, random: np.random.Generator, normalization: str) -> Any:
                draws.add(random.random())
                images.add(whole.pixels.tobytes().__hash__())
                return torch.zeros(3, side, side), torch.zeros(side, side, dtype=torch.uint8)

            monkeypatch.setattr(views, "training_crop", crop)
            settings = SegmentationConfig(**{**QUICK, "whole": True, "steps": 3})
            Segmentation(settings, context(seed)).fit(self.seen(0), self.seen(0))
            return draws, images

        (first, images), (again, _), (other, _) = drawn(0), drawn(0), drawn(1)
        assert len(first) == 24 and len(images) == 8
        assert first == again and not first & other

    def test_windows_by_hand(self) -> None:
        found_windows = list(views.windows(512, 900, 512, 341))
        assert [(w[0].start, w[0].stop, w[1].start, w[1].stop) for w in found_windows] == [
            (0, 512, 0, 512),
            (0, 512, 341, 853),
            (0, 512, 388, 900),
        ]
        assert list(views.windows(20, 30, 512, 341)) == [(slice(0, 20), slice(0, 30))]

    def test_sides_and_strides_that_are_not_set_follow_the_model(self) -> None:
        given = self.seen(0)  # of 32 px
        assert (segmentation._side(given, SegmentationConfig()), segmentation._stride(given, SegmentationConfig())) == (
            32,
            21,
        )
        chosen = SegmentationConfig(side=512, stride=100)
        assert (segmentation._side(given, chosen), segmentation._stride(given, chosen)) == (512, 100)
        assert segmentation._stride(given, SegmentationConfig(side=1)) == 1

    def test_a_backbone_that_has_diverged_since_is_an_error(self) -> None:
        probe = Segmentation(SegmentationConfig(**{**QUICK, "whole": True, "steps": 2}), context()).fit(
            self.seen(0), self.seen(0)
        )
        infinite = Planted(lambda images: torch.full((2, len(images), 256, WIDTH), torch.inf))
        with pytest.raises(FloatingPointError, match="weights have diverged"):
            list(probe.score(replace(self.seen(0), backbone=infinite)))

    def test_overlapping_windows_are_averaged(self) -> None:
        calls = iter([1.0, 5.0])
        image = torch.zeros(3, 4, 6)
        logits = views.by_windows(image, 4, 2, lambda window: torch.full((1, 2, 4, 4), next(calls)))
        assert logits.shape == (2, 4, 6) and logits[1, 0].tolist() == [1, 1, 3, 3, 5, 5]

    def test_crops_keep_pixels_and_classes_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(views, "distorted", lambda pixels, random: pixels)
        smaller = 0
        for number in range(12):
            pixels, labels = views.training_crop(self.wholes(0)[0], 40, np.random.default_rng(number), "imagenet")
            assert pixels.shape == (3, 40, 40) and labels.shape == (40, 40) and labels.dtype == torch.uint8
            shown = labels != IGNORED
            smaller += int(not shown.all())
            assert (pixels[:, ~shown] == 0).all()
            numbers = levels(pixels[None])[0] / STEP
            agree = (numbers.round() == labels)[shown].double().mean()
            assert shown[0, 0] and agree > 0.75  # all but between classes, where colours are mixed
        assert 0 < smaller < 12  # half of the scales are below 1

    def test_a_crop_of_one_class_is_drawn_again(self) -> None:
        """Of 57 places for 8 columns three hold 3 to 5 columns of either class, and four others fewer of one."""
        labels = torch.zeros(8, 64, dtype=torch.uint8)

        def shares() -> tuple[float, float]:
            starts = [views._crop(labels, 8, np.random.default_rng(seed))[1].start for seed in range(300)]
            return float(np.isin(starts, [27, 28, 29]).mean()), float(np.isin(starts, [25, 26, 30, 31]).mean())

        labels[:, 32:] = 1
        even, uneven = shares()
        assert even == pytest.approx(1 - (54 / 57) ** 11, abs=0.08) and uneven < 0.1
        labels[:, 32:] = IGNORED  # which is no second class
        assert shares()[0] < 0.12

    def test_saturation_is_that_of_hsv(self) -> None:
        random = np.random.default_rng(0)
        pixels = torch.from_numpy(random.uniform(0, 255, (3, 4, 4))).float()
        for factor in (0.5, 1.5):
            changed = views.saturated(pixels, factor)
            for row, column in np.ndindex(4, 4):
                h, s, v = colorsys.rgb_to_hsv(*(pixels[:, row, column] / 255).tolist())
                expected = np.array(colorsys.hsv_to_rgb(h, min(1.0, s * factor), v)) * 255
                np.testing.assert_allclose(changed[:, row, column], expected, atol=1e-2)
        assert torch.equal(views.saturated(torch.full((3, 1, 1), 7.0), 1.5), torch.full((3, 1, 1), 7.0))

    def test_colours_change_within_their_range(self) -> None:
        pixels = torch.tensor([160.0, 100.0, 100.0])[:, None, None]
        changed = torch.stack([views.distorted(pixels, np.random.default_rng(seed)) for seed in range(1200)])
        assert float(changed.min()) >= 0 and float(changed.max()) <= 255
        same = (changed - pixels).abs().amax(dim=(1, 2, 3)) < 1e-3
        assert float(same.double().mean()) == pytest.approx(1 / 16, abs=0.02)  # four changes, each of every other image
        hues = [colorsys.rgb_to_hsv(*(values / 255).tolist())[0] for values in changed[:, :, 0, 0]]
        turns = [(hue + 0.5) % 1 - 0.5 for hue in hues]
        assert 0.09 < max(turns) < 0.101 and -0.101 < min(turns) < -0.09
        grey = torch.stack(
            [views.distorted(pixels[1:].repeat(3, 1, 1)[:3], np.random.default_rng(s)) for s in range(200)]
        )
        assert float(grey.max()) <= (100 + 32) * 1.5 + 0.1 and float(grey.min()) >= (100 - 32) * 0.5 - 0.1
        assert float(grey.max()) > 160 and float(grey.min()) < 50

    def test_colours_of_training_crops_change(self) -> None:
        whole = Whole(np.full((40, 40, 3), 120, np.uint8), {"segmentation": np.zeros((40, 40), np.uint8)})
        crops = [views.training_crop(whole, 20, np.random.default_rng(seed), "imagenet")[0] for seed in range(12)]
        assert len({round(float(crop[0, 0, 0]), 3) for crop in crops}) > 4


def test_the_paper_preset_is_dinov2s() -> None:
    config = resolve({"evaluation.probes": ["segmentation"], "evaluation.segmentation.preset": "paper"})
    expected = (40_000, 16, 1e-3, 1e-4, 1_500, True, 512, 341, "end")
    names = ("steps", "batch_size", "learning_rate", "weight_decay", "warmup_steps", "whole", "side", "stride", "at")
    assert tuple(getattr(config.evaluation.segmentation, name) for name in names) == expected
