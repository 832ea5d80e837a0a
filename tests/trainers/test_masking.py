"""Block masks: how many patches of how many crops, which ones, and the official distribution of both."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from tests.golden_files import Golden
from trainers.masking import ASPECT, MIN_PATCHES, BlockMasks, requested_counts

STANDARD_ERRORS = 5.0  # of a difference: one comparison in two million is further off by chance


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def official_masks() -> tuple[Golden, BlockMasks]:
    """The reference draws and a generator with the settings that they were made with."""
    golden = Golden("multicrop_mask")
    return golden, BlockMasks(golden["grid"], most=int(golden["max_num_patches"]))


def drawn(masks: BlockMasks, count: int, draws: int) -> NDArray[np.bool_]:
    return masks(np.full(draws, count), range(count * draws, (count + 1) * draws))


def test_exactly_the_share_of_the_crops_is_masked_and_shares_are_stratified() -> None:
    crops, patches = 40, 100_000
    counts = requested_counts(crops, patches, 0.5, (0.1, 0.5), generator())
    masked = np.sort(counts[counts > 0])
    assert len(counts) == crops and len(masked) == 20
    edges = patches * np.linspace(0.1, 0.5, 21)
    assert (masked >= edges[:-1] - 1).all() and (masked <= edges[1:]).all()
    assert not np.array_equal(counts[counts > 0], masked)  # shuffled over the crops
    assert 0 < (counts[:20] > 0).sum() < 20


@pytest.mark.parametrize(("crops", "probability", "masked"), [(7, 0.5, 3), (6, 0.0, 0), (6, 1.0, 6), (1, 0.5, 0)])
def test_the_number_of_masked_crops_is_rounded_down(crops: int, probability: float, masked: int) -> None:
    counts = requested_counts(crops, 100, probability, (0.1, 0.5), generator())
    assert counts.shape == (crops,) and int((counts > 0).sum()) == masked


def test_a_block_is_a_rectangle_of_the_allowed_size_and_shape() -> None:
    masks = BlockMasks(8)
    for seed in range(300):
        bits = masks._with_block(0, 20, Random(seed).random)
        block = np.array([[bits >> (row * 8 + column) & 1 for column in range(8)] for row in range(8)])
        rows, columns = np.flatnonzero(block.any(axis=1)), np.flatnonzero(block.any(axis=0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert block.sum() == height * width <= 20
        assert (height + 0.5) / (width - 0.5) >= 0.3 and (height - 0.5) / (width + 0.5) <= 1 / 0.3
        assert height < 8 and width < 8


def test_masks_have_at_most_the_patches_asked_for_and_seldom_fewer() -> None:
    masks = BlockMasks(7)
    counts = np.tile(np.array([0, 1, 5, 12, 24]), 60)
    found = masks(counts, range(len(counts))).sum(axis=1)
    assert (found <= counts).all() and (found[counts > MIN_PATCHES] > 0).all()
    assert 0.7 < (found == counts)[counts > 0].mean() < 1.0


def test_a_mask_is_a_function_of_its_seed_and_in_raster_order() -> None:
    masks = BlockMasks(5)
    counts, seeds = np.array([9, 0, 9, 9]), [3, 3, 4, 3]
    first = masks(counts, seeds)
    assert first.shape == (4, 25) and first.dtype == np.bool_
    assert np.array_equal(first[0], first[3]) and not np.array_equal(first[0], first[2]) and not first[1].any()
    assert np.array_equal(masks(counts[2:], seeds[2:]), first[2:])  # whatever else is in the batch
    bits = masks.draw(9, Random(3))
    assert first[0].tolist() == [bool(bits >> patch & 1) for patch in range(25)]


@pytest.mark.parametrize(("side", "most"), [(14, 98), (16, 128), (7, 21), (1, 0)])
def test_the_largest_block_is_the_official_one(side: int, most: int) -> None:
    patch = 14
    assert BlockMasks(side).most == most == 0.5 * (side * patch) // patch * (side * patch) // patch


def test_a_crop_of_one_patch_cannot_be_masked() -> None:
    assert not BlockMasks(1)(np.array([1, 0]), [0, 1]).any()


@pytest.mark.golden
def test_settings_are_the_official_ones() -> None:
    golden, masks = official_masks()
    assert golden["min_num_patches"] == MIN_PATCHES
    assert pytest.approx((golden["min_aspect"], golden["max_aspect"])) == ASPECT
    assert masks.most == golden["max_num_patches"]


@pytest.mark.golden
def test_counts_are_distributed_as_the_official_ones() -> None:
    golden, masks = official_masks()
    draws = golden["n_draws"]
    for i, count in enumerate(golden["requested"].tolist()):
        ours = drawn(masks, count, draws).sum(axis=1)
        theirs = golden["counts"][i].numpy()
        assert stats.ks_2samp(ours, theirs).pvalue > 1e-5, count
        error = math.sqrt(ours.var(ddof=1) / draws + golden["std"][i] ** 2 / draws)
        assert abs(ours.mean() - golden["mean"][i]) <= STANDARD_ERRORS * error, count
        assert abs(ours.std(ddof=1) - golden["std"][i]) <= STANDARD_ERRORS * _error_of_std(ours, theirs), count
        share = ((ours == count).mean() + golden["frac_exact"][i]) / 2
        error = math.sqrt(2 * share * (1 - share) / draws)
        assert abs((ours == count).mean() - golden["frac_exact"][i]) <= STANDARD_ERRORS * error, count
        assert ours.max() == golden["maximum"][i]
        # Of two equal samples the twenty smallest values are all of one with probability 2e-6.
        assert (ours < golden["minimum"][i].item()).sum() < 20 and (theirs < ours.min()).sum() < 20


def _error_of_std(*samples: NDArray[np.int64]) -> float:
    """Standard error of the difference of two standard deviations, from the fourth moments."""
    variance = 0.0
    for sample in samples:
        spread = sample.var()
        fourth = ((sample - sample.mean()) ** 4).mean()
        variance += (fourth - spread**2) / (4 * spread * len(sample)) if spread else 0.0
    return math.sqrt(variance)


@pytest.mark.golden
def test_patches_are_masked_as_often_as_officially() -> None:
    golden, masks = official_masks()
    draws = golden["n_draws"]
    scores = []
    for i, count in enumerate(golden["requested"].tolist()):
        ours = drawn(masks, count, draws).mean(axis=0)
        theirs = golden["cell_freq"][i].numpy().reshape(-1)
        both = (ours + theirs) / 2
        error = np.sqrt(2 * both * (1 - both) / draws)
        assert np.array_equal(ours[error == 0], theirs[error == 0])
        scores.append((ours - theirs)[error > 0] / error[error > 0])
    every = np.concatenate(scores)
    assert np.abs(every).max() < STANDARD_ERRORS
    # Patches of one mask go together, so that there are about as many independent scores as blocks, not as patches.
    assert every.std() == pytest.approx(1.0, abs=0.15)


@pytest.mark.golden
def test_batches_are_masked_as_by_the_official_collate_function() -> None:
    golden, masks = official_masks()
    crops, patches = golden["collate_images"], golden["grid"] ** 2
    probability, ratio = golden["collate_mask_probability"], tuple(golden["collate_ratio_min_max"].tolist())
    totals = []
    for batch in range(golden["collate_n_batches"]):
        random = generator(batch)
        counts = requested_counts(crops, patches, probability, ratio, random)
        found = masks(counts, random.integers(2**63, size=crops)).sum(axis=1)
        assert int((found > 0).sum()) == int(golden["collate_images_masked"][batch])
        assert float(golden["collate_weight_sum"][batch]) == pytest.approx((found > 0).sum())
        assert found.sum() <= golden["collate_upperbound"][batch]
        totals.append(found.sum())
    ours, theirs = np.array(totals), golden["collate_total_masked"].numpy()
    error = math.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))
    assert abs(ours.mean() - theirs.mean()) <= STANDARD_ERRORS * error
    assert abs(ours.std(ddof=1) - theirs.std(ddof=1)) <= STANDARD_ERRORS * _error_of_std(ours, theirs)
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-5


@pytest.mark.golden
def test_slices_of_the_ratio_end_where_the_official_ones_do() -> None:
    class Last:
        """Stands for a generator that draws the end of every slice."""

        def random(self, size: int, dtype: type[np.float32]) -> NDArray[np.float32]:
            return np.ones(size, dtype)

        def permutation(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
            return values

    golden, _ = official_masks()
    ratio = tuple(golden["collate_ratio_min_max"].tolist())
    last: np.random.Generator = Last()  # type: ignore[assignment]
    counts = requested_counts(
        golden["collate_images"], golden["grid"] ** 2, golden["collate_mask_probability"], ratio, last
    )
    assert (golden["collate_upperbound"] == int(counts.sum())).all()
