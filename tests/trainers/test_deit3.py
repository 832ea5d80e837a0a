"""DeiT-III: mixing and losses against timm's, the head, and what trials share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from timm.data import mixup as timm_mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from trainers import vit
from trainers.config import TrialConfig, resolve
from trainers.methods import Batch, Progress
from trainers.methods.deit3 import DeiT3, Mix, draw_mix, mix_images_
from trainers.streams import Streams

CLASSES = 5
PROGRESS = Progress(step=0, steps=10)


def config(**settings: object) -> TrialConfig:
    model = {"preset": "short", "model.size": "nano", "model.patch_size": 8, "model.image_size": 16}
    return resolve({**model, **settings})


def method(trial: TrialConfig, seed: int = 0) -> tuple[DeiT3, Streams]:
    streams = Streams(seed)
    return DeiT3(trial, vit.build(trial.model, streams), CLASSES, streams), streams


def batch(count: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, {"classes": torch.arange(count) % CLASSES})


def timms(images: Tensor, classes: Tensor, mix: Mix, smoothing: float, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What timm's Mixup makes of the batch with the share and box of `mix`."""
    reference = timm_mixup.Mixup(
        mixup_alpha=0.8, cutmix_alpha=1.0, mode="batch", label_smoothing=smoothing, num_classes=CLASSES
    )
    monkeypatch.setattr(reference, "_params_per_batch", lambda: (mix.share, mix.box is not None))
    monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_args, **_kwargs: mix.box)
    return list(reference(images.clone(), classes))


@pytest.mark.parametrize("mix", [Mix(0.3, None), Mix(1 - 12 / 256, (2, 5, 10, 14)), Mix(0.0, (0, 16, 0, 16))])
def test_images_and_targets_are_mixed_as_by_timm(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    classes = batch().targets["classes"]
    expected_images, expected_targets = timms(images, classes, mix, 0.1, monkeypatch)
    torch.testing.assert_close(mix_images_(images.clone(), mix), expected_images)
    trained, _ = method(config(**{"deit3.smoothing": 0.1}))
    torch.testing.assert_close(trained._targets(classes, mix.share), expected_targets)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_shares_are_distributed_as_timms(mixup: float, cutmix: float) -> None:
    ours = [draw_mix(mixup, cutmix, 16, np.random.default_rng(seed)) for seed in range(1500)]
    reference = timm_mixup.Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, mode="batch")
    state = np.random.get_state()  # noqa: NPY002 - timm draws from numpy's global generator
    np.random.seed(0)  # noqa: NPY002
    theirs = []
    for _ in range(1500):
        share, use_cutmix = reference._params_per_batch()
        if use_cutmix:
            _, share = timm_mixup.cutmix_bbox_and_lam((3, 16, 16), share)
        theirs.append((share, use_cutmix))
    np.random.set_state(state)  # noqa: NPY002
    assert stats.ks_2samp([mix.share for mix in ours], [share for share, _ in theirs]).pvalue > 0.01
    boxed = [sum(mix.box is not None for mix in ours), sum(bool(use_cutmix) for _, use_cutmix in theirs)]
    assert boxed[0] == pytest.approx(boxed[1], abs=4 * math.sqrt(1500 / 2))
    assert (boxed[0] > 0) == (cutmix > 0)


class Fixed:
    """Stands for a generator whose share and centre are chosen."""

    def __init__(self, share: float, centre: tuple[int, int]) -> None:
        self.share, self.centre = share, centre

    def beta(self, _a: float, _b: float) -> float:
        return self.share

    def integers(self, _low: int, _high: int, size: int) -> tuple[int, int]:
        assert size == 2
        return self.centre


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("centre", [(0, 0), (15, 3), (8, 8), (5, 12)])
def test_boxes_equal_timms(share: float, centre: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    coordinates = iter(centre)
    monkeypatch.setattr(np.random, "randint", lambda *_args, **_kwargs: next(coordinates))
    box, corrected = timm_mixup.cutmix_bbox_and_lam((3, 16, 16), share)
    mix = draw_mix(0.0, 1.0, 16, Fixed(share, centre))  # type: ignore[arg-type]
    assert mix.box == tuple(int(edge) for edge in box)
    assert mix.share == pytest.approx(corrected)


def test_share_is_the_area_outside_the_box() -> None:
    for seed in range(50):
        mix = draw_mix(0.0, 1.0, 16, np.random.default_rng(seed))
        assert mix.box is not None
        own = mix_images_(torch.arange(2.0).view(2, 1, 1, 1).repeat(1, 3, 16, 16), mix)
        assert float(own[1].mean()) == pytest.approx(mix.share)
    assert draw_mix(0.0, 0.0, 16, np.random.default_rng(0)) == Mix(1.0, None)


def test_bce_targets_by_hand() -> None:
    classes = torch.tensor([0, 1, 2, 3])
    trained, _ = method(config(**{"deit3.loss": "bce", "deit3.smoothing": 0.0}))
    binary = trained._targets(classes, 0.9)
    assert binary.tolist() == [[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 0]]
    smoothed, _ = method(config(**{"deit3.loss": "bce", "deit3.smoothing": 0.1}))
    torch.testing.assert_close(smoothed._targets(classes, 0.9), 0.9 * binary + 0.02)


@pytest.mark.parametrize("loss", ["bce", "soft_ce"])
def test_losses_equal_timms(loss: str) -> None:
    smoothing = 0.1
    trained, streams = method(config(**{"deit3.loss": loss, "deit3.smoothing": smoothing, "deit3.cutmix": 0.0}))
    trained.eval()
    views = trained.views(batch(), streams)
    ours = trained.losses(views, PROGRESS)
    logits = trained.head(trained.evaluated().tokens(views["images"]).cls_BD)  # type: ignore[operator]
    if loss == "bce":
        expected = BinaryCrossEntropy(smoothing=smoothing)(logits, batch().targets["classes"])
    else:
        expected = SoftTargetCrossEntropy()(logits, views["targets"])
        same = F.cross_entropy(logits, batch().targets["classes"], label_smoothing=smoothing)
        torch.testing.assert_close(expected, same)
    assert set(ours) == {"classification"}
    torch.testing.assert_close(ours["classification"], expected)


def test_bce_without_smoothing_is_the_official_loss_of_mixed_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = Mix(0.3, None)
    classes = batch().targets["classes"]
    _, mixed = timms(torch.zeros(8, 3, 16, 16), classes, mix, 0.0, monkeypatch)
    trained, _ = method(config(**{"deit3.loss": "bce", "deit3.smoothing": 0.0}))
    assert torch.equal(trained._targets(classes, mix.share), mixed.gt(0.0).type(mixed.dtype))  # engine.py


def test_head_starts_as_in_timm_and_is_shared_by_register_counts() -> None:
    heads = [method(config(**{"model.num_registers": count}))[0].head for count in (0, 4)]
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not heads[0].bias.any()
    assert float(heads[0].weight.detach().std()) == pytest.approx(0.02, rel=0.15)  # 320 values
    assert not torch.equal(heads[0].weight, method(config(), seed=1)[0].head.weight)


def test_trials_share_views_whatever_their_registers_and_mixing_leaves_augmentation_alone() -> None:
    views = []
    for settings in ({"model.num_registers": 0}, {"model.num_registers": 4}, {"deit3.cutmix": 0.0}):
        trained, streams = method(config(**settings))
        views.append([trained.views(batch(), streams) for _ in range(6)])
    for first, second, unmixed in zip(*views, strict=True):
        assert torch.equal(first["images"], second["images"]) and torch.equal(first["targets"], second["targets"])
        same = (first["images"] == unmixed["images"]).all(dim=1).float().mean()
        assert float(same) == pytest.approx(float(first["targets"][0, 0] - 0.02) / 0.9, abs=0.02)
    assert not torch.equal(views[0][0]["images"], views[0][1]["images"])


def test_all_parameters_learn() -> None:
    trained, streams = method(config(**{"model.num_registers": 2, "model.layer_scale": 0.1}))
    trained.train()
    sum(trained.losses(trained.views(batch(), streams), PROGRESS).values(), torch.zeros(())).backward()
    assert [name for name, value in trained.named_parameters() if value.grad is None or not value.grad.any()] == []
