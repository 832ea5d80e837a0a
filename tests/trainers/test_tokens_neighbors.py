"""Similarity of patches to their neighbours: planted similarities, gap and AUROC worked out by hand, both readings."""

import numpy as np
import pytest
import torch

from tests.trainers.planted import BULK, HIGH, WIDTH, Planted, metrics, numbered, statistics, subject
from trainers import catalog
from trainers.config import resolve
from trainers.measurement import Arrays
from trainers.streams import Streams
from trainers.tokens import neighbors
from trainers.tokens.neighbors import auroc
from trainers.vit import ViT

IMAGES = 3

# The outlier at (1, 1) and its neighbours are 0; elsewhere 1 and 2 take turns, so that no two neighbours are equal.
KINDS = np.array([[1, 0, 1, 2], [0, 0, 0, 1], [1, 0, 1, 2], [2, 1, 2, 1]])


def entering(kinds: np.ndarray, outliers: list[tuple[int, int]]) -> Planted:
    """Patches that enter as unit vectors, number `kinds` [4, 4], -1 for zeros, and leave with outliers at cells."""
    direction = torch.cat([torch.eye(WIDTH), torch.zeros(1, WIDTH)])[torch.from_numpy(kinds.reshape(-1))]
    norms = torch.full((4, 4), BULK)
    for row, column in outliers:
        norms[row, column] = HIGH
    last = norms.reshape(-1, 1) * torch.eye(WIDTH)[0]
    return Planted(lambda images: torch.stack([direction, last])[:, None].expand(-1, len(images), -1, -1))


def measured(backbone: torch.nn.Module, **settings):
    return list(neighbors.measure(subject(backbone, numbered(IMAGES, 32), **settings), None))


# Means: the outlier 1. Its neighbours at the border (0, 1) and (1, 0) have 1 / 3, those inside (1, 2) and (2, 1)
# 1 / 4, the other 11 nothing. Pairs: 48, of them 4 of the outlier's and 4 back to it are 1, all others 0.
GAP = 1 - (1 / 3 + 1 / 3 + 1 / 4 + 1 / 4) / 15
PAIRS = {"outlier": 1.0, "normal": 4 / 44, "gap": 40 / 44, "auroc": (40 + 4 / 2) / 44}


def test_an_outlier_like_its_neighbours_is_told_apart() -> None:
    found = measured(entering(KINDS, [(1, 1)]))
    assert metrics(found) == pytest.approx({"neighbors/gap": GAP, "neighbors/auroc": 1.0}, abs=1e-12)
    assert metrics(found)["neighbors/auroc"] == 1.0
    by_name = statistics(found)
    for name, value in PAIRS.items():
        assert by_name[f"neighbors/layer_0/pairs/{name}", 0] == pytest.approx(value)
    assert by_name["neighbors/layer_0/mean/outlier", 0] == 1.0
    (arrays,) = (f.arrays for f in found if isinstance(f, Arrays))
    edges, counts = arrays["edges"], {name: value for name, value in arrays.items() if name != "edges"}
    assert (len(edges), edges[0], edges[-1]) == (201, -1.0, 1.0)
    at = {
        name: dict(zip(np.flatnonzero(row).tolist(), row[row > 0].tolist(), strict=True))
        for name, row in counts.items()
    }
    assert at == {
        "mean_outlier": {199: 3},
        "mean_normal": {100: 33, 125: 6, 133: 6},  # 0, 1 / 4 and 1 / 3
        "pairs_outlier": {199: 12},
        "pairs_normal": {100: 120, 199: 12},
    }


def test_an_outlier_unlike_its_neighbours_has_the_opposite_sign() -> None:
    kinds = np.zeros((4, 4), int)
    kinds[2, 2] = 1
    numbers = metrics(measured(entering(kinds, [(2, 2)])))
    assert numbers["neighbors/auroc"] == 0.0
    assert numbers["neighbors/gap"] == pytest.approx(-(11 + 2 * 2 / 3 + 2 * 3 / 4) / 15)  # edge and inside


def test_no_relation_is_one_half_exactly() -> None:
    stripes = np.tile([[0], [1], [2], [3]], (1, 4))  # alike in a row: an inner patch has 1 / 2, one at a corner 1 / 2
    values = neighbors.mean_over_neighbors(
        neighbors.to_neighbors(
            neighbors.cosines(torch.eye(WIDTH)[torch.from_numpy(stripes)][None]).numpy(), np.ones((1, 4, 4), bool)
        )
    )
    # Corners 1 / 2, upper and lower edge 2 / 3, left and right edge 1 / 3, inside 2 / 4.
    expected = [[1 / 2, 2 / 3, 2 / 3, 1 / 2], [1 / 3, 1 / 2, 1 / 2, 1 / 3]]
    np.testing.assert_allclose(values[0], [*expected, *expected[::-1]])
    # One of each: the order statistics of both groups are alike, with ties.
    outliers = [(0, 0), (0, 1), (1, 0), (1, 1), (3, 3), (3, 2), (2, 3), (2, 2)]
    numbers = metrics(measured(entering(stripes, outliers), tokens__outlier_rule="fixed", tokens__outlier_norm=50.0))
    assert numbers == {"neighbors/gap": pytest.approx(0, abs=1e-7), "neighbors/auroc": 0.5}


def test_auroc_by_hand() -> None:
    values, positive = np.array([1.0, 2, 2, 3, 2, 5]), np.array([False, True, False, False, False, True])
    # 2 against 1, 2, 3, 2: 1 + ½ + 0 + ½; 5 against all: 4.
    assert auroc(values, positive) == 6 / 8
    assert auroc(values, ~positive) == 2 / 8
    assert np.isnan(auroc(values, np.zeros(6, bool)))
    assert np.isnan(auroc(values, np.ones(6, bool)))


@pytest.mark.parametrize("outliers", [[], [(row, column) for row in range(4) for column in range(4)]])
def test_without_outliers_or_without_normal_patches_there_is_no_metric(outliers: list[tuple[int, int]]) -> None:
    found = measured(entering(KINDS, outliers), tokens__outlier_rule="fixed", tokens__outlier_norm=50.0)
    assert metrics(found) == {}
    names = {name.rpartition("/")[2] for name, _ in statistics(found)}
    assert names == ({"outlier"} if outliers else {"normal"})


def test_patches_without_direction_and_patches_of_padding_are_no_neighbours() -> None:
    kinds = np.zeros((4, 4), int)
    kinds[0, 0] = -1
    content = np.tile(np.array([0, 0, 32, 16], np.float32), (IMAGES, 1))  # the lower half is padding
    backbone = entering(kinds, [(0, 2), (2, 2)])
    found = list(neighbors.measure(subject(backbone, numbered(IMAGES, 32), content=content), None))
    (arrays,) = (f.arrays for f in found if isinstance(f, Arrays))
    assert arrays["mean_outlier"].sum() == IMAGES
    assert arrays["mean_normal"].sum() == IMAGES * 6  # 8 patches, an outlier and the one without direction
    # The grid of 2 × 4 has 10 pairs, 20 both ways, of which the zeros take 4; the outlier has 3 neighbours.
    assert (arrays["pairs_outlier"].sum(), arrays["pairs_normal"].sum()) == (IMAGES * 3, IMAGES * 13)
    assert arrays["mean_outlier"][199] == IMAGES


@pytest.fixture(scope="module")
def colours() -> ViT:
    """A ViT whose patch embedding is the colour of a patch's first pixel; position makes cell (1, 1) an outlier."""
    model = resolve({"model.size": "nano", "model.patch_size": 8, "model.image_size": 32}).model
    vit = ViT(model, Streams(0), catalog.ModelSize(WIDTH, 1, 1))
    with torch.no_grad():
        vit.patch_embed.proj.weight.zero_()
        vit.patch_embed.proj.bias.zero_()
        for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
            vit.patch_embed.proj.weight[channel, channel, 0, 0] = std
            vit.patch_embed.proj.bias[channel] = mean
        assert vit.pos_embed is not None
        vit.pos_embed.copy_(torch.randn(vit.pos_embed.shape, generator=torch.Generator().manual_seed(0)))
        vit.pos_embed[0, 1 + 5] *= 100
    return vit


def test_the_built_in_vit_is_looked_at_before_its_position_embedding(colours: ViT) -> None:
    pixels = np.kron(255 * np.eye(3)[KINDS], np.ones((8, 8, 1))).astype(np.uint8)[None].repeat(IMAGES, 0)
    found = list(neighbors.measure(subject(colours, pixels, tokens__outlier_layer=0), None))
    assert metrics(found) == pytest.approx({"neighbors/gap": GAP, "neighbors/auroc": 1.0}, abs=1e-5)
    assert statistics(found)["neighbors/patch_embedding/pairs/normal", None] == pytest.approx(4 / 44, abs=1e-5)
    assert not any(name.startswith("neighbors/layer_0") for name, _ in statistics(found))


def test_another_number_of_patches_is_said() -> None:
    with pytest.raises(ValueError, match="gives 16 patches an image, not the 8 × 8"):
        measured(entering(KINDS, []), model__patch_size=4)
