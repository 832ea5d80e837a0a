"""What measurements say of a backbone in which patches were deleted: what they would say if these were not there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.trainers.labelled import IMAGES, PATCHES, labelled
from tests.trainers.planted import metrics
from trainers import catalog, edits
from trainers.edits import EditedViT, State
from trainers.measurement import Arrays, Finding, Metric, Statistic, Subject, findings
from trainers.tokens import attention
from trainers.vit import ViT

LAYER = 2
GONE = (4, 9)  # patches of all images but the first
EVERY = [name for name, entry in catalog.MEASUREMENTS.items() if entry.every]
Row = tuple[str, int | None, int | None, str | None]


def planting(images: Tensor) -> edits.Step:
    """Patch 4, which is deleted, and patch 10, which stays, are outliers from layer 1 on."""

    def step(state: State) -> State:
        if state.layer != 1:
            return state
        scale = torch.ones(PATCHES, 1)
        scale[[4, 10]] = 20.0
        return state.with_patches(state.patches_BND * scale)

    return step


def deleting(images: Tensor) -> edits.Step:
    """Deletes at LAYER all of GONE, but none in the first image, which is known by its first pixel."""
    chosen = torch.zeros(len(images), PATCHES, dtype=torch.bool)
    chosen[:, list(GONE)] = True
    chosen &= (images[:, :, 0, 0] != FIRST).any(dim=1, keepdim=True)
    return lambda state: edits.deleted(state, chosen, chosen) if state.layer == LAYER else state


UNTOUCHED = labelled(lambda ours: EditedViT(ours, planting), registers=2)
FIRST = UNTOUCHED.view(UNTOUCHED.probe_images(1))[0, :, 0, 0]


@pytest.fixture(scope="module")
def variant() -> Subject:
    return UNTOUCHED.with_backbone(EditedViT(UNTOUCHED.backbone, deleting))


def gone() -> NDArray[np.bool_]:
    deleted = np.zeros((IMAGES, PATCHES), bool)
    deleted[1:, GONE] = True
    return deleted


def rows(found: list[Finding]) -> dict[Row, float]:
    return {(s.name, s.layer, s.head, s.token): s.value for s in found if isinstance(s, Statistic)}


def test_it_is_these_patches_that_are_gone(variant: Subject) -> None:
    assert np.array_equal(np.isnan(variant.patch_norms(LAYER)), gone())
    assert not np.isnan(variant.patch_norms(LAYER - 1)).any()


@pytest.mark.parametrize("name", EVERY)
def test_every_number_is_finite(name: str, variant: Subject) -> None:
    found = list(findings(name, variant))
    assert metrics(found) and set(metrics(found)) == set(metrics(list(findings(name, UNTOUCHED))))
    assert all(math.isfinite(finding.value) for finding in found if isinstance(finding, Metric | Statistic))


def test_cells_count_the_patches_that_are_left(variant: Subject) -> None:
    (arrays,) = (f.arrays for f in findings("location", variant) if isinstance(f, Arrays))
    assert (arrays["images"] == IMAGES - gone().sum(0).reshape(4, 4)).all()
    assert arrays["counts"].flatten().nonzero()[0].tolist() == [4, 10]
    assert arrays["counts"].flatten()[[4, 10]].tolist() == [1, IMAGES]


def test_channels_and_cosines_are_of_the_tokens_that_are_left(variant: Subject) -> None:
    backbone = variant.backbone
    assert isinstance(backbone, ViT)
    with torch.no_grad():
        layers = list(backbone.residuals(variant.view(variant.probe_images())))
    stays = torch.from_numpy(~gone())
    by_row = {name: rows(list(findings(name, variant))) for name in ("channels", "similarity")}
    for layer, (cls_BD, _, patches_BND) in enumerate(layers):
        of_layer = stays if layer >= LAYER else torch.ones_like(stays)
        largest = torch.stack([p[s].abs().max() for p, s in zip(patches_BND, of_layer, strict=True)])
        found = by_row["channels"]["channels/top1", layer, None, "patch"]
        assert found == pytest.approx(float(largest.mean()), rel=1e-5)
        assert cls_BD is not None
        cosine = torch.nn.functional.cosine_similarity(patches_BND, cls_BD[:, None], dim=-1)[of_layer].mean()
        found = by_row["similarity"]["similarity/cls_patch", layer, None, None]
        assert found == pytest.approx(float(cosine), rel=1e-4, abs=1e-6)


def test_attention_by_hand_is_that_without_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(3 * torch.randn(2, 3, 7, 7, generator=generator), -1)
    weights[..., 4] = 0.0  # a query may still be there
    weights = weights / weights.sum(-1, keepdim=True)
    outliers = np.array([[0, 1, 1, 0], [0, 1, 0, 0]], bool)
    deleted = np.zeros_like(outliers)
    deleted[:, 1] = True
    prefix, stays = ("cls", "register_0", "register_1"), [0, 1, 2, 3, 5, 6]
    found = attention.statistics(weights, attention.group_keys(outliers, None, prefix, deleted), has_sink=False)
    without = attention.group_keys(outliers[:, [0, 2, 3]], None, prefix)
    expected = attention.statistics(weights[:, :, stays][..., stays], without, has_sink=False)
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values)


def test_attention_before_the_deletion_is_untouched_and_after_it_that_without_them(variant: Subject) -> None:
    before, after = (rows(list(findings("attention", one))) for one in (UNTOUCHED, variant))
    # Block l reads layer l - 1. Patches were deleted at layer 2, which block 3 is the first to read; whether they are
    # outliers is told at the last layer, where they are none.
    for (name, block, head, token), value in after.items():
        if block is not None and block <= LAYER and not name.endswith(("/outliers", "/normal", "over_normal")):
            assert before[name, block, head, token] == pytest.approx(value, rel=1e-6), name
    backbone = variant.backbone
    assert isinstance(backbone, ViT)
    for block in (3, 4):
        with torch.no_grad():
            weights = backbone.attention(variant.view(variant.probe_images()), block)[1:]
        stays = [token for token in range(3 + PATCHES) if token - 3 not in GONE]
        outliers = np.delete(variant.outliers[1:], GONE, axis=1)
        keys = attention.group_keys(outliers, None, ("cls", "register_0", "register_1"))
        expected = attention.statistics(weights[:, :, stays][..., stays], keys, has_sink=False)
        alone = of_first(variant, block)
        for (name, token), values_BH in expected.items():
            if not name.endswith("/padding"):
                means = (values_BH.sum(0) + alone[name, token][0]) / IMAGES
                of_heads = [after[f"attention/{name}", block, head, token] for head in range(2)]
                assert of_heads == pytest.approx(means.tolist(), rel=1e-4), name


def of_first(variant: Subject, block: int) -> dict[attention.Name, Tensor]:
    """Of the first image, from which nothing was deleted."""
    backbone = variant.backbone
    assert isinstance(backbone, ViT)
    with torch.no_grad():
        weights = backbone.attention(variant.view(variant.probe_images(1)), block)
    keys = attention.group_keys(variant.outliers[:1], None, ("cls", "register_0", "register_1"))
    return attention.statistics(weights, keys, has_sink=False)
