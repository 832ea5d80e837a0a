"""Masks that DINOv2 prepares: of the seed and the step alone, in balanced groups, and the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.trainers.test_dinov2 import IMAGES, PATCHES, config, method, unmasked
from trainers.config import trial_id
from trainers.masking import requested_counts
from trainers.methods import Upcoming


def test_prepared_masks_are_those_of_the_seed_and_the_step_alone() -> None:
    trained, _ = method(config())
    again, _ = method(config(**{"model.num_registers": 4, "dinov2.crops.num_local": 1}))
    first, same, later = (
        m.prepare(Upcoming(s, IMAGES, np.arange(IMAGES))) for m, s in ((trained, 3), (again, 3), (trained, 4))
    )
    assert first["masks"].shape == (IMAGES, 2, PATCHES) and first["masks"].dtype == torch.bool
    assert torch.equal(first["masks"], same["masks"])
    assert not torch.equal(first["masks"], later["masks"])
    other, _ = method(config(), seed=1)
    assert not torch.equal(first["masks"], other.prepare(Upcoming(3, IMAGES, np.arange(IMAGES)))["masks"])


def test_half_of_the_crops_of_the_whole_batch_are_masked() -> None:
    trained, _ = method(config(**{"dinov2.mask_ratio": [0.4, 0.5]}))
    for step in range(5):
        masks = trained.prepare(Upcoming(step, 64, np.arange(64)))["masks"]
        counts = masks.sum(dim=2).flatten()
        assert int((counts > 0).sum()) == 64  # of 128 crops
        assert int(counts.max()) == 7 and float(counts[counts > 0].float().mean()) == pytest.approx(6.4, abs=0.7)


def test_half_of_the_crops_of_every_group_are_masked_and_their_shares_spread() -> None:
    trained, _ = method(config(**{"dinov2.mask_group_size": 4, "dinov2.mask_ratio": [0.4, 0.5]}))
    halves = []
    for step in range(5):
        counts = trained._masked_counts(16, 10_000, np.random.default_rng(step))
        for group in counts.reshape(2, 4, 4).transpose(1, 0, 2).reshape(4, 8):
            masked = np.sort(group[group > 0])
            assert len(masked) == 4  # one in each quarter of the range
            assert (masked >= [3999, 4249, 4499, 4749]).all() and (masked <= [4250, 4500, 4750, 5000]).all()
        masks = trained.prepare(Upcoming(step, 16, np.arange(16)))["masks"]
        halves += masks.any(dim=2).view(4, 8).sum(dim=1).tolist()
    assert halves == [4] * 20


def test_masks_of_one_group_are_those_of_the_whole_batch() -> None:
    """In the order in which numbers have always been drawn: shares, where they go, and a seed for each crop."""
    whole, _ = method(config())
    group, _ = method(config())
    assert whole.settings.mask_group_size is None
    group.settings = group.settings.model_copy(update={"mask_group_size": IMAGES})
    for step in range(3):
        generator = np.random.default_rng(whole.streams.seed_for(f"masks/{step}"))
        counts = requested_counts(2 * IMAGES, PATCHES, 0.5, (0.1, 0.5), generator)
        masks = whole.block_masks(counts, generator.integers(2**63, size=2 * IMAGES))
        expected = torch.from_numpy(masks).view(2, IMAGES, PATCHES).transpose(0, 1)
        for trained in (whole, group):
            assert torch.equal(trained.prepare(Upcoming(step, IMAGES, np.arange(IMAGES)))["masks"], expected)


@pytest.mark.parametrize("group", [None, 2, 4])
def test_a_rank_prepares_its_rows_of_what_one_rank_prepares(group: int | None) -> None:
    trained, _ = method(config(**{"dinov2.mask_group_size": group}))
    whole = trained.prepare(Upcoming(2, IMAGES, np.arange(IMAGES)))
    for positions in (np.arange(4, 8), np.array([1, 6, 2])):
        part = trained.prepare(Upcoming(2, IMAGES, positions))
        assert torch.equal(part["masks"], whole["masks"][positions])
        assert all(len(tensor) == len(positions) for tensor in part.values())


def test_mask_groups_must_fill_a_batch_and_count_only_where_they_change_masks() -> None:
    with pytest.raises(ValueError, match=r"dinov2\.mask_group_size 3 does not divide optim\.batch_size 8"):
        config(**{"dinov2.mask_group_size": 3})
    assert trial_id(config(**{"dinov2.mask_group_size": IMAGES})) == trial_id(config())
    assert trial_id(config(**{"dinov2.mask_group_size": 4})) != trial_id(config())
    plain = config(**dict(unmasked()), **{"dinov2.mask_group_size": 4})
    assert trial_id(plain) == trial_id(config(**dict(unmasked())))
