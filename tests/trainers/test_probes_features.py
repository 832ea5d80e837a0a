"""Feature extraction in eval mode, the training subset, and what turns predictions into metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainers import probes
from trainers.config import resolve
from trainers.probes.features import Features, evaluating, extract, training_subset
from trainers.streams import Streams
from trainers.vit import Tokens, ViT


def _view(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 255


def _vit(registers: int = 2) -> ViT:
    given = {"size": "nano", "num_registers": registers, "image_size": 16, "patch_size": 8, "drop_path": 0.5}
    return ViT(resolve({"model": {**given, "layer_scale": 0.5}}).model, Streams(0))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), dtype=np.uint8)


CLASSES = np.arange(11) % 3


def test_equal_to_normed_tokens_whatever_the_chunk(images: np.ndarray) -> None:
    backbone = _vit().train()
    features = extract(backbone, images, CLASSES, _view, chunk=4)
    assert backbone.training and features.cls is not None
    with torch.no_grad():
        tokens = backbone.eval().tokens(_view(torch.from_numpy(images)))
    torch.testing.assert_close(features.cls, tokens.cls_BD, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.mean_patch, tokens.patches_BND.sum(dim=1) / 4, rtol=0, atol=1e-5)
    assert features.cls.norm(dim=1).numpy() == pytest.approx(np.full(11, 8.0), rel=1e-3)  # √D after the final norm
    assert features.classes.tolist() == CLASSES.tolist() and len(features) == 11
    assert not features.cls.requires_grad


def test_chosen_images_from_a_read_only_map(images: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    chosen = extract(_vit(), mapped, CLASSES, _view, indices=np.array([1, 4, 10]), chunk=2)
    whole = extract(_vit(), images, CLASSES, _view)
    torch.testing.assert_close(chosen.mean_patch, whole.mean_patch[[1, 4, 10]], rtol=0, atol=1e-5)
    assert chosen.classes.tolist() == [1, 1, 1]


class _Fake(nn.Module):
    """A backbone without class token whose patches are the images' pixels."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.bad = bad

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        assert normed
        patches = images.flatten(2).transpose(1, 2)
        return Tokens(None, patches.new_zeros(len(images), 0, 3), patches / 0 if self.bad else patches)


def test_without_class_token(images: np.ndarray) -> None:
    features = extract(_Fake(), images, CLASSES, _view)
    assert features.cls is None
    np.testing.assert_allclose(features.mean_patch, images.mean(axis=(1, 2)) / 255, rtol=1e-5)


def test_diverged_weights_and_no_images_are_errors(images: np.ndarray) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        extract(_Fake(bad=True), images, CLASSES, _view)
    with pytest.raises(ValueError, match="no images"):
        extract(_Fake(), images[:0], CLASSES[:0], _view)


def test_each_module_gets_its_own_mode_back() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    module[1].eval()
    with pytest.raises(RuntimeError, match="inside"), evaluating(module):
        assert not module[0].training
        raise RuntimeError("inside")
    assert [module.training, module[0].training, module[1].training] == [True, True, False]


def test_subset_is_fixed_spread_and_blind_to_periodic_order() -> None:
    chosen = training_subset(1_000, 100)
    assert len(set(chosen)) == 100 and (np.diff(chosen) > 0).all() and chosen.max() < 1_000
    assert np.array_equal(chosen, training_subset(1_000, 100))
    assert np.bincount(chosen % 10, minlength=10).min() >= 3  # every tenth image would be of one class
    assert np.histogram(chosen, bins=4, range=(0, 1_000))[0].min() >= 15
    assert training_subset(30, 100).tolist() == list(range(30))


def test_correct_and_top1_by_hand() -> None:
    predicted = {"a/top1": torch.tensor([0, 1, 2, 2]), "b/top1": torch.tensor([1, 1, 1, 1])}
    classes = torch.tensor([0, 1, 1, 2])
    assert probes.correct(predicted, classes)["a/top1"].tolist() == [True, True, False, True]
    assert dict(probes.top1(predicted, classes)) == {"a/top1": 0.75, "b/top1": 0.5}
    with pytest.raises(ValueError, match="no images"):
        list(probes.top1({}, classes[:0]))


def test_features_at() -> None:
    part = Features(None, torch.arange(6.0).reshape(3, 2), torch.tensor([5, 6, 7])).at(torch.tensor([2, 0]))
    assert part.cls is None and part.mean_patch.tolist() == [[4, 5], [0, 1]] and part.classes.tolist() == [7, 5]
