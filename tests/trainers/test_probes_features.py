"""Feature extraction in eval mode, the training subset, and what turns predictions into metrics."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainers.config import resolve
from trainers.probes import features as features_module
from trainers.probes.classification import Features, accuracies
from trainers.probes.features import READS, evaluating, even_blocks, extract, last_blocks, training_subset
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


def _batches(images: np.ndarray, chunk: int = 4) -> list[Tensor]:
    return list(_view(torch.from_numpy(images)).split(chunk))


def test_equal_to_normed_tokens_whatever_the_chunk(images: np.ndarray) -> None:
    backbone = _vit().train()
    features = extract(backbone, _batches(images), 11, {"cls", "mean_patch"})
    assert backbone.training
    with torch.no_grad():
        tokens = backbone.eval().tokens(_view(torch.from_numpy(images)))
    torch.testing.assert_close(features["cls"], tokens.cls_BD, rtol=0, atol=1e-5)
    torch.testing.assert_close(features["mean_patch"], tokens.patches_BND.sum(dim=1) / 4, rtol=0, atol=1e-5)
    assert features["cls"].norm(dim=1).numpy() == pytest.approx(np.full(11, 8.0), rel=1e-3)  # √D after the final norm
    assert not features["cls"].requires_grad


def test_everything_that_can_be_read_is_what_the_backbone_says(images: np.ndarray) -> None:
    backbone = _vit().eval()
    found = extract(backbone, _batches(images), 11, set(READS), norm_layer=2)
    x = _view(torch.from_numpy(images))
    with torch.no_grad():
        raw, normed = backbone.intermediate(x, range(5), normed=False), backbone.intermediate(x, range(5))
        projected = backbone.qkv(x, 4)
    expected = {
        "cls": normed[4].cls_BD,
        "mean_patch": normed[4].patches_BND.mean(dim=1),
        "cls_blocks": torch.stack([tokens.cls_BD for tokens in normed[1:]], dim=1),
        "patches": normed[4].patches_BND,
        "raw_cls": raw[4].cls_BD,
        "raw_patches": raw[4].patches_BND,
        "raw_blocks": torch.stack([torch.cat([t.cls_BD[:, None], t.patches_BND], dim=1) for t in raw[1:]], dim=1),
        "norms": raw[2].patches_BND.norm(dim=-1),
    }
    for name, part in zip(("queries", "keys", "values"), projected, strict=True):
        expected[name] = part[:, :, 3:].transpose(1, 2).reshape(11, 4, 64)  # class and 2 registers before 4 patches
    assert set(found) == set(READS) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("depth", "blocks"), [(12, [3, 6, 9, 12]), (24, [5, 12, 18, 24]), (40, [10, 20, 30, 40])])
def test_blocks_of_dense_heads_are_dinov2s(depth: int, blocks: list[int]) -> None:
    assert even_blocks(depth) == blocks
    assert last_blocks(depth) == [depth - 3, depth - 2, depth - 1, depth]
    assert even_blocks(2) == last_blocks(2) == [1, 2]


def test_large_features_lie_in_a_file_that_leaves_nothing(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = extract(_vit(), _batches(images), 11, {"patches"})["patches"]
    monkeypatch.setattr(features_module, "_LARGE", 100)
    mappings: list[tuple[int, ...]] = []
    memmap = np.memmap

    def noted(*arguments: Any, **named: Any) -> Any:
        mappings.append(named["shape"])
        return memmap(*arguments, **named)

    monkeypatch.setattr(np, "memmap", noted)
    mapped = extract(_vit(), _batches(images), 11, {"patches"}, scratch=tmp_path)["patches"]
    assert torch.equal(kept, mapped) and mappings == [(11, 4, 64)] and not list(tmp_path.iterdir())


def test_keys_alone(images: np.ndarray) -> None:
    backbone = _vit().eval()
    keys = extract(backbone, _batches(images), 11, {"keys"})["keys"]
    with torch.no_grad():
        _, expected, _ = backbone.qkv(_view(torch.from_numpy(images)), 4)
    torch.testing.assert_close(keys, expected[:, :, 3:].transpose(1, 2).reshape(11, 4, 64), rtol=0, atol=2e-5)


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
    features = extract(_Fake(), _batches(images), 11, {"cls", "mean_patch"})
    assert set(features) == {"mean_patch"}
    np.testing.assert_allclose(features["mean_patch"], images.mean(axis=(1, 2)) / 255, rtol=1e-5)


def test_diverged_weights_and_no_images_are_errors(images: np.ndarray) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        extract(_Fake(bad=True), _batches(images), 11, {"mean_patch"})
    with pytest.raises(ValueError, match="no images"):
        extract(_Fake(), [], 0, {"mean_patch"})


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


def test_accuracies_by_hand() -> None:
    predicted = {"a/top1": torch.tensor([0, 1, 2, 2]), "b/top1": torch.tensor([1, 1, 1, 1])}
    classes = torch.tensor([0, 1, 1, 2])
    first, second = accuracies(predicted, classes)
    assert (first.name, first.value, second.name, second.value) == ("a/top1", 0.75, "b/top1", 0.5)
    assert first.per_image is not None and first.per_image.tolist() == [1.0, 1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="no images"):
        list(accuracies({}, classes[:0]))


def test_features_at() -> None:
    part = Features(None, torch.arange(6.0).reshape(3, 2), torch.tensor([5, 6, 7])).at(torch.tensor([2, 0]))
    assert part.cls is None and part.mean_patch.tolist() == [[4, 5], [0, 1]] and part.classes.tolist() == [7, 5]


def test_a_full_disk_is_said_before_features_are_mapped(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features_module, "_LARGE", 100)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"features of 11,264 bytes cannot be kept in .*: No space left on device"):
        extract(_vit(), _batches(images), 11, {"patches"}, scratch=tmp_path)
