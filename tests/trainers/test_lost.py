"""LOST by hand: degrees, seeds, boxes, ties, deleted patches, overlaps, and known answers on synthetic scenes."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from trainers.probes import lost

SIDE = 14  # patches of a side of a synthetic scene


def discover(
    features: list[list[float]], grid: tuple[int, int], bias: float = 0.0, patches: int = 100, normalize: bool = False
) -> lost.Found:
    prepared, there = lost.prepare(torch.tensor([features]), normalize=normalize)
    return lost.discover(prepared, there, (bias,), grid, patches)[0]


def test_a_row_of_patches_by_hand() -> None:
    """Patches 1 and 2 are alike; 0, 3 and 4 are their opposites, and more: degrees 2, 1, 1, 2, 2."""
    found = discover([[-1.0], [2.0], [1.0], [-1.0], [-1.0]], (1, 5))
    assert found.degree_BN.tolist() == [[2, 1, 1, 2, 2]]
    assert found.seed_B.tolist() == [1]  # of equals the first
    assert found.map_BN.tolist() == [[-3.0, 6.0, 3.0, -3.0, -3.0]]  # 1 and 2 extend it: (2 + 1) times each
    assert found.cells_B4.tolist() == [[1, 0, 3, 1]]


def test_candidates_are_those_of_lowest_degree() -> None:
    """With one candidate only the seed's own products make the map, of which the last patch is no part."""
    features = [[1.0, 0.0], [1.0, 0.5], [0.0, 1.0], [0.0, 1.0], [-1.0, 1.0]]  # 0 – 1, 1 – 2, 1 – 3, 2 – 3 – 4
    alone, all_of_them = (discover(features, (1, 5), patches=patches) for patches in (1, 5))
    assert alone.degree_BN.tolist() == [[1, 3, 3, 3, 2]]
    assert alone.seed_B.tolist() == [0]
    assert alone.map_BN.tolist() == [[1.0, 1.0, 0.0, 0.0, -1.0]]
    assert alone.cells_B4.tolist() == [[0, 0, 2, 1]]
    assert all_of_them.map_BN.tolist() == [[2.0, 2.25, 0.5, 0.5, -1.5]]
    assert all_of_them.cells_B4.tolist() == [[0, 0, 4, 1]]


def test_a_bias_shifts_every_product() -> None:
    """Products are 4, 2 and 1 with oneself, and 2 between the two: below −2 nothing is similar but the first."""
    features = [[2.0], [1.0], [-2.0], [-1.0], [-1.0]]
    assert discover(features, (1, 5), -1.5).degree_BN.tolist() == [[1, 1, 2, 1, 1]]
    assert discover(features, (1, 5), -2.0).degree_BN.tolist() == [[0, 0, 0, 0, 0]]  # strictly above 0
    assert discover(features, (1, 5), 5.0).degree_BN.tolist() == [[4, 4, 4, 4, 4]]


def test_a_seed_that_is_not_similar_to_itself_finds_nothing() -> None:
    found = discover([[1.0], [0.5]], (1, 2), -2.0)
    assert found.cells_B4.tolist() == [[0, 0, 0, 0]]
    assert lost.overlap(found.cells_B4.numpy(), np.array([[[0.0, 0.0, 1.0, 1.0]]])).tolist() == [0.0]


def test_only_sides_connect_and_images_are_apart() -> None:
    """A square in a corner with another one diagonally beside it; a second image that is all object."""
    ground = [[-1.0]] * 16
    first = [list(row) for row in ground]
    for place in (0, 1, 4, 5, 10):
        first[place] = [1.0]
    features, there = lost.prepare(torch.tensor([first, [[1.0]] * 16, first]), normalize=False)
    (found,) = lost.discover(features, there, (0.0,), (4, 4), 100)
    assert found.cells_B4.tolist() == [[0, 0, 2, 2], [0, 0, 4, 4], [0, 0, 2, 2]]


def test_rows_and_columns() -> None:
    features = [[-1.0]] * 12
    features[9], features[10] = [1.0], [1.0]  # of 3 × 4: the last row, columns 1 and 2
    found = discover(features, (3, 4))
    assert found.cells_B4.tolist() == [[1, 2, 3, 3]]
    boxes = lost.boxes(found.cells_B4.numpy(), (10, 7), (25, 100))
    assert boxes.tolist() == [[7.0, 20.0, 21.0, 25.0]]  # cut off where the image ends


def test_normalised_features() -> None:
    """A patch at a right angle but for a trifle counts by its direction, not by its length."""
    features = [[10.0, 0.0], [1.0, 9.95], [-1.0, 0.0], [-1.0, 0.0]]  # products 10; cosine of the first two is 0.1
    assert discover(features, (1, 4), -1.5).degree_BN.tolist() == [[1, 1, 0, 0]]
    assert discover(features, (1, 4), -0.2, normalize=True).degree_BN.tolist() == [[0, 0, 1, 1]]
    prepared, _ = lost.prepare(torch.tensor([features]), normalize=True)
    torch.testing.assert_close(prepared.norm(dim=-1), torch.ones(1, 4))


@pytest.mark.parametrize("bias", [0.0, 0.5, -0.5])
def test_deleted_patches_are_as_if_they_were_not_there(bias: float) -> None:
    """Whatever is deleted at the end of a row: seed, degrees and box of the rest stay, and no NaN gets in."""
    rest = [[-1.0], [-1.0], [2.0], [1.0], [-1.0]]
    whole = discover(rest, (1, 5), bias)
    holed = discover([*rest, [torch.nan], [torch.inf]], (1, 7), bias)
    assert holed.degree_BN[:, :5].tolist() == whole.degree_BN.tolist()
    assert holed.degree_BN[:, 5:].tolist() == [[0, 0]]
    assert holed.seed_B.tolist() == whole.seed_B.tolist()
    torch.testing.assert_close(holed.map_BN, torch.nn.functional.pad(whole.map_BN, (0, 2)))
    assert holed.cells_B4.tolist() == whole.cells_B4.tolist()


def test_an_image_without_any_patch_has_diverged() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        lost.prepare(torch.tensor([[[1.0], [2.0]], [[torch.nan], [torch.nan]]]), normalize=True)


def test_overlap_by_hand() -> None:
    predicted = np.array([[0.0, 0.0, 2.0, 2.0]] * 5)
    nothing = [np.nan] * 4
    truth = np.array(
        [
            [[0.0, 0.0, 2.0, 2.0], nothing],  # equal
            [[0.0, 0.0, 4.0, 2.0], nothing],  # 4 of 8: exactly a half
            [[1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 6.0, 6.0]],  # 1 of 7, beside one that is far away
            [[-9.0, -9.0, -8.0, -8.0], nothing],  # apart in both directions, whose signs must not cancel
            [nothing, nothing],
        ]
    )
    np.testing.assert_allclose(lost.overlap(predicted, truth), [1, 0.5, 1 / 7, 0, np.nan])
    assert np.isnan(lost.overlap(predicted[:1], np.zeros((1, 0, 4)))).all()


def scenes(count: int, *, outliers: int = 0, mean: float = 0.0) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """Features [n, 196, 16] of objects and their opposites, of patches with 10 times the norm, and boxes.

    High-norm patches lie in a direction of which all others have a little of the opposite, less than their noise.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    features, boxes = 0.25 * rng.normal(size=(count, SIDE, SIDE, 16)), np.zeros((count, 1, 4))
    for image, box in zip(features, boxes, strict=True):
        height, width = rng.integers(4, 8, 2)
        y, x = rng.integers(0, SIDE - height + 1), rng.integers(0, SIDE - width + 1)
        box[0] = x, y, x + width, y + height
        inside = np.zeros((SIDE, SIDE), bool)
        inside[y : y + height, x : x + width] = True
        image[..., 0] += np.where(inside, 1.0, -1.0)
        image[..., 1] -= 0.3
        for place in rng.choice(np.flatnonzero(~inside), outliers, replace=False):
            image.reshape(-1, 16)[place, :2] = 0.0, 10.0
        image[..., 2] += mean
    return torch.from_numpy(features.reshape(count, -1, 16)).float(), boxes


def corloc(found: tuple[torch.Tensor, NDArray[np.float64]], bias: float, normalize: bool = False) -> float:
    features, there = lost.prepare(found[0], normalize=normalize)
    (of_bias,) = lost.discover(features, there, (bias,), (SIDE, SIDE), 100)
    predicted = lost.boxes(of_bias.cells_B4.numpy(), (1, 1), (SIDE, SIDE))
    return float((lost.overlap(predicted, found[1]) >= 0.5).mean())


def test_known_answers_on_synthetic_scenes() -> None:
    """paper.md §6: clean 100 %; six high-norm patches 31 %, 32 % where all have length 1; a shared mean 0 % at b ≥ 0,
    97 % at b = −1, and 100 % at b = −0.5 where all have length 1."""
    assert corloc(scenes(100), 0.0) == 1.0
    high = scenes(100, outliers=6)
    assert 0.2 < corloc(high, 0.0) < 0.5
    assert 0.2 < corloc(high, 0.0, normalize=True) < 0.5  # so it is not the norm alone
    shared = scenes(100, mean=1.2)
    assert corloc(shared, 0.0) == corloc(shared, 0.1) == 0.0
    assert corloc(shared, -1.0) > 0.9
    assert corloc(shared, 0.0, normalize=True) == 0.0
    assert corloc(shared, -0.5, normalize=True) > 0.95


def test_two_thousand_images_take_seconds() -> None:
    features, there = lost.prepare(
        torch.randn(2_000, 64, 64, generator=torch.Generator().manual_seed(0)), normalize=True
    )
    start = time.process_time()
    for part in torch.arange(2_000).split(256):
        lost.discover(features[part], there[part], (-0.9, -0.8, -0.6, -0.4, -0.2, 0.0, 0.1), (8, 8), 100)
    assert time.process_time() - start < 10  # about 0.6 s
