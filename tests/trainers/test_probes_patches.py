"""Reading tokens of a split: after the final norm, outliers by norms before it, padding, one forward pass per image."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.trainers.coded import Coded, coded_subject, images
from tests.trainers.planted import subject
from trainers.measurement import Subject
from trainers.probes import patches
from trainers.streams import Streams
from trainers.vit import Backbone, Tokens, ViT


def random_images(count: int) -> NDArray[np.uint8]:
    return images(count, 32, np.random.Generator(np.random.PCG64(0)))


def vit_subject(**settings: Any) -> tuple[Subject, ViT]:
    """A random ViT of 4 blocks with 2 registers, on 10 images of 16 patches."""
    given = subject(nn.Identity(), random_images(10), model__num_registers=2, **settings)
    backbone = ViT(given.model, Streams(0))
    nn.init.uniform_(backbone.norm.weight, generator=torch.Generator().manual_seed(0))  # else an even one hides itself
    return subject(backbone, random_images(10), model__num_registers=2, **settings), backbone


class Wrapped(nn.Module):
    """Someone's own backbone: it has nothing of the ViT's but what every backbone has."""

    def __init__(self, backbone: ViT) -> None:
        super().__init__()
        self.embed_dim, self.num_registers = backbone.embed_dim, backbone.num_registers
        self.tokens, self.residuals = backbone.tokens, backbone.residuals
        self.attention, self.qkv = backbone.attention, backbone.qkv


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("layer", [-1, 2, 0, -3])
def test_tokens_are_normed_and_outliers_are_told_by_norms_before_that(own: bool, layer: int) -> None:
    middle = subject_median(layer)
    given, backbone = vit_subject(
        tokens__outlier_rule="fixed", tokens__outlier_norm=middle, tokens__outlier_layer=layer
    )
    if own:
        given = given.with_backbone(Wrapped(backbone))
    indices = np.array([7, 2, 3])
    (seen,) = patches.read(given, "test", indices)
    views = given.view(given.data.test.images[indices])
    with torch.no_grad():
        wanted, residual = backbone.tokens(views), list(backbone.residuals(views))[layer]
    for found, expected in zip(seen.tokens, wanted, strict=True):
        torch.testing.assert_close(found, expected)
    assert seen.tokens.cls_BD is not None and seen.tokens.registers_BRD.shape[1] == 2
    norms_BN = residual.patches_BND.norm(dim=2)
    assert torch.equal(seen.outlier_BN, norms_BN > middle) and 0 < int(seen.outlier_BN.sum()) < seen.outlier_BN.numel()
    assert seen.indices.tolist() == [7, 2, 3] and bool(seen.content_BN.all())
    assert torch.equal(seen.views, views)


def subject_median(layer: int) -> float:
    """A norm that about half of the patches exceed."""
    given, _ = vit_subject()
    return float(np.median(given.patch_norms(layer)))


def test_a_normed_token_of_even_weight_has_the_norm_of_root_d() -> None:
    given, backbone = vit_subject()
    nn.init.ones_(backbone.norm.weight)
    (seen,) = patches.read(given, "train", np.arange(3))
    norms = seen.tokens.patches_BND.norm(dim=2)
    torch.testing.assert_close(norms, torch.full_like(norms, 64**0.5), rtol=1e-3, atol=0)


def test_every_image_passes_once_in_portions_and_eval_mode_and_the_mode_comes_back() -> None:
    given, backbone = vit_subject()
    backbone.train()
    assert given.threshold > 0  # looks at the probe images
    passed: list[tuple[int, bool]] = []
    handle = backbone.patch_embed.register_forward_hook(
        lambda module, inputs, _: passed.append((len(inputs[0]), module.training))
    )
    seen = list(patches.read(given, "train", np.arange(10), chunk=4))
    handle.remove()
    assert sum(count for count, _ in passed) == 10 and max(count for count, _ in passed) <= 4
    assert not any(training for _, training in passed) and backbone.training
    assert np.concatenate([part.indices for part in seen]).tolist() == list(range(10))
    assert not any(part.tokens.patches_BND.requires_grad for part in seen)


def test_the_threshold_is_that_of_the_probe_images_whatever_is_read() -> None:
    outlier = torch.zeros(24, 16, dtype=torch.bool)
    outlier[:8, 0] = True  # of the probe images; one in 16 is far above the rest
    outlier[16:] = True  # all of the test images
    backbone = Coded(torch.zeros(24, 16, 8), outlier)
    given = coded_subject(backbone, random_images(24), np.zeros(24, np.int64), 8, tokens__outlier_rule="mad")
    seen = next(patches.read(given, "test", np.arange(8)))
    assert bool(seen.outlier_BN.all())  # by themselves they would have no outlier


def test_padding_is_no_content_and_no_outlier() -> None:
    content = np.tile(np.array([0, 0, 16, 32], np.float32), (4, 1))  # px: the left half of 4 × 4 patches
    backbone = Coded(torch.zeros(4, 16, 8), torch.ones(4, 16, dtype=torch.bool))
    given = coded_subject(backbone, random_images(4), np.zeros(4, np.int64), 2, content)
    seen = next(patches.read(given, "test", np.arange(2)))
    wanted = np.tile([True, True, False, False], (2, 4))
    np.testing.assert_array_equal(seen.content_BN, wanted)
    np.testing.assert_array_equal(seen.outlier_BN.numpy(), wanted)


def test_a_backbone_without_class_token_and_registers_is_read_too() -> None:
    given = coded_subject(
        Coded(torch.ones(4, 16, 8), torch.zeros(4, 16, dtype=torch.bool)), random_images(4), np.zeros(4, np.int64), 2
    )
    seen = next(patches.read(given, "train", np.arange(2)))
    assert seen.tokens.cls_BD is None and seen.tokens.registers_BRD.shape == (2, 0, 8)


@pytest.mark.parametrize("where", ["cls", "registers", "patches"])
def test_tokens_that_are_not_finite_are_an_error(where: str) -> None:
    parts: dict[str, Tensor] = {
        "cls": torch.ones(4, 8),
        "registers": torch.ones(4, 1, 8),
        "patches": torch.ones(4, 16, 8),
    }
    parts[where][1].view(-1)[3] = float("nan")
    backbone = Coded(parts["patches"], torch.zeros(4, 16, dtype=torch.bool), parts["cls"], parts["registers"])
    given = coded_subject(backbone, random_images(4), np.zeros(4, np.int64), 2, model__num_registers=1)
    with pytest.raises(FloatingPointError, match="the weights have diverged"):
        list(patches.read(given, "train", np.arange(2)))


def test_coded_backbones_are_backbones() -> None:
    assert isinstance(cast(Any, Coded(torch.ones(1, 16, 8), torch.zeros(1, 16, dtype=torch.bool))), Backbone)
    assert Tokens._fields == ("cls_BD", "registers_BRD", "patches_BND")
