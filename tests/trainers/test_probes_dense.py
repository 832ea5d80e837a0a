"""What dense probes share: padding and maps of patches, deleted ones, order, rates, training, jobs made ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from tests.trainers.painted import STEP, painted, reader, seen
from tests.trainers.planted import Planted
from trainers.config import SegmentationConfig
from trainers.probes import HeadDiverged, dense


def test_padding_is_centred_with_the_odd_pixel_last() -> None:
    padded = dense.center_padded(torch.ones(1, 1, 5, 8), 8)
    assert padded.shape == (1, 1, 8, 8)
    assert padded[0, 0, :, 0].tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    wide = dense.center_padded(torch.ones(2, 3, 8, 13), 8)
    assert wide.shape == (2, 3, 8, 16)
    assert wide[1, 2, 7].tolist() == [0] + [1] * 13 + [0] * 2


def test_images_of_512_px_become_those_of_518() -> None:
    """DINOv2's windows with patches of 14 px."""
    padded = dense.center_padded(torch.ones(1, 1, 512, 512), 14)
    assert padded.shape == (1, 1, 518, 518)
    assert padded[0, 0, 2].sum() == 0 and padded[0, 0, 3].sum() == 512 and padded[0, 0, 515].sum() == 0


def test_tokens_lie_row_by_row_on_their_grid() -> None:
    tokens = torch.arange(2 * 6 * 2).view(2, 6, 2).float()
    grid = dense.as_map(tokens, (2, 3))
    assert grid.shape == (2, 2, 2, 3)
    assert grid[1, 0].tolist() == [[12, 14, 16], [18, 20, 22]]
    assert grid[0, 1].tolist() == [[1, 3, 5], [7, 9, 11]]


def test_deleted_patches_become_the_mean_of_the_images_others() -> None:
    nan = torch.nan
    tokens = torch.tensor([[[1.0, 2], [nan, nan], [5, 8]], [[7.0, 7], [8, 8], [9, 9]]])
    assert dense.filled(tokens).tolist() == [[[1, 2], [3, 5], [5, 8]], [[7, 7], [8, 8], [9, 9]]]
    partly = torch.tensor([[[1.0, 2], [3, nan]]])
    assert dense.filled(partly).tolist() == [[[1, 2], [1, 2]]]


def test_whole_tokens_stay_what_they_are() -> None:
    tokens = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert dense.filled(tokens) is tokens


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_images_without_finite_tokens_are_an_error(value: float) -> None:
    tokens = torch.ones(2, 3, 2)
    tokens[1] = value
    with pytest.raises(FloatingPointError, match="the weights have diverged"):
        dense.filled(tokens)


def test_one_infinite_value_is_an_error_beside_deleted_patches() -> None:
    tokens = torch.tensor([[[1.0], [torch.nan], [torch.inf]]])
    with pytest.raises(FloatingPointError, match="the weights have diverged"):
        dense.filled(tokens)


def test_batches_are_passes_over_all_images() -> None:
    drawn = list(dense.batches(5, 3, 5, torch.Generator().manual_seed(0)))
    assert [len(part) for part in drawn] == [3] * 5
    together = np.concatenate(drawn)
    assert all(sorted(together[start : start + 5]) == [0, 1, 2, 3, 4] for start in (0, 5, 10))
    assert together[:5].tolist() != together[5:10].tolist()


def test_batches_may_be_larger_than_the_set_and_depend_on_the_seed_alone() -> None:
    (first,) = dense.batches(3, 8, 1, torch.Generator().manual_seed(1))
    assert np.bincount(first).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    again, other = (next(dense.batches(30, 8, 1, torch.Generator().manual_seed(seed))) for seed in (1, 2))
    assert again.tolist() == next(dense.batches(30, 8, 1, torch.Generator().manual_seed(1))).tolist()
    assert again.tolist() != other.tolist()


def test_rates_by_hand() -> None:
    assert [dense.poly(step, 4) for step in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [dense.cosine(step, 4) for step in (0, 2)] == pytest.approx([1, 0.5])
    assert dense.cosine(1, 3) == pytest.approx(0.75) and dense.cosine(4, 4) == pytest.approx(0)
    assert [dense.warmed_up(2.0, step, 4, 0.2) for step in (0, 1, 3, 4, 9)] == pytest.approx([0.4, 0.8, 1.6, 2, 2])
    assert dense.warmed_up(2.0, 0, 0, 0.2) == 2.0


def _weight(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(value)
    return layer


def test_heads_are_trained_by_adamw_and_left_in_eval_mode() -> None:
    layer, rates = _weight(2.0).eval(), [0.5, 0.25]
    modes = []

    def loss() -> torch.Tensor:
        modes.append(layer.training)
        return layer.weight.sum() * 0.0

    dense.train(layer, [loss] * 2, lambda step: rates[step], weight_decay=0.1)
    assert layer.weight.item() == pytest.approx(2 * (1 - 0.05) * (1 - 0.025))
    assert modes == [True, True] and not layer.training
    layer = _weight(2.0)
    dense.train(layer, [lambda: layer.weight.sum() * 3.0], lambda step: 0.5, weight_decay=0.0)
    assert layer.weight.item() == pytest.approx(1.5)  # a first step of Adam is as long as its rate


def test_gradients_are_of_one_step_and_their_norm_is_bounded() -> None:
    """Adam's first step does not tell how long a gradient is, so that a second, of another length, has to."""

    def after(second: float, clip_grad: float | None) -> float:
        layer = _weight(0.0)
        losses = [lambda: layer.weight.sum() * 1.0, lambda: layer.weight.sum() * second]
        dense.train(layer, losses, lambda step: 1.0, 0.0, clip_grad)
        return layer.weight.item()

    def by_hand(first: float, second: float) -> float:
        mean, square = 0.9 * 0.1 * first + 0.1 * second, 0.999 * 0.001 * first**2 + 0.001 * second**2
        return -1 - (mean / (1 - 0.9**2)) / (square / (1 - 0.999**2)) ** 0.5

    assert after(-3.0, None) == pytest.approx(by_hand(1, -3), abs=1e-5)
    assert after(-3.0, 0.5) == pytest.approx(by_hand(0.5, -0.5), abs=1e-5)
    assert after(-3.0, 2.0) == pytest.approx(by_hand(1, -2), abs=1e-5)


def test_training_needs_no_gradients_switched_on() -> None:
    layer = _weight(2.0)
    with torch.no_grad():
        dense.train(layer, [lambda: layer.weight.sum()], lambda step: 0.5, 0.0)
    assert layer.weight.item() == pytest.approx(1.5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_an_error_even_if_later_ones_are(bad: float) -> None:
    layer = _weight(1.0)
    losses = [lambda: layer.weight.sum() + bad, lambda: layer.weight.sum()]  # whose gradients are finite
    with pytest.raises(HeadDiverged, match="its loss is not finite"):
        dense.train(layer, losses, lambda step: 0.0, weight_decay=0.0)


def test_images_of_any_size_are_read_through_padding() -> None:
    """5 × 7 px in patches of 4 px are 2 × 2 patches: a row of zeros above, two below, and a column at the right."""
    given = seen(reader(4, scale=1.0), painted(np.zeros((1, 8, 8), np.int64)), frozenset(), 4)
    given.backbone.train()
    image = given.view(np.array([0]))[:, :, :5, :7]  # normalised black, unlike what is padded
    zero_level = 255 * 0.485  # what 0 is of red, before it is normalised
    found, grid = dense.read(given, image, {"patches"})
    assert grid == (2, 2) and set(found) == {"patches"} and given.backbone.training
    black = torch.tensor([[3 / 4, 3 / 4 * 3 / 4], [2 / 4, 2 / 4 * 3 / 4]])  # share of each patch
    numbers = ((1 - black) * zero_level / STEP).round().long()
    assert found["patches"].argmax(dim=2).view(2, 2).tolist() == numbers.tolist()
    assert not found["patches"].requires_grad


def test_backbones_are_asked_in_eval_mode_without_gradients() -> None:
    states = []

    def plant(images: torch.Tensor) -> torch.Tensor:
        states.append((backbone.training, torch.is_grad_enabled()))
        return torch.ones(2, len(images), 4, 8)

    backbone = Planted(plant)
    given = seen(backbone, painted(np.zeros((1, 8, 8), np.int64)), frozenset(), 4)
    backbone.train()
    dense.read(given, given.view(np.array([0])), {"patches"})
    assert states == [(False, False)] and backbone.training and torch.is_grad_enabled()


def test_jobs_are_made_ahead_and_stay_in_order() -> None:
    asked: list[int] = []

    def batches() -> Iterator[list[int]]:
        for number in range(5):
            asked.append(number)
            yield [number, 10 * number]

    made = dense.ahead(batches(), lambda job: job + 1, workers=2)
    assert next(made) == [1, 1] and asked == [0, 1, 2]
    assert list(made) == [[2, 11], [3, 21], [4, 31], [5, 41]]


def test_jobs_are_made_at_once_by_several_threads() -> None:
    both = threading.Barrier(2, timeout=5)  # breaks where one thread makes one job after another
    assert list(dense.ahead([[0, 1]], lambda job: (both.wait(), job)[1], workers=2)) == [[0, 1]]


def test_a_job_that_fails_is_the_callers_error() -> None:
    with pytest.raises(ZeroDivisionError):
        list(dense.ahead([[1], [0]], lambda job: 1 // job, workers=1))


def test_every_batch_is_learned_from_in_its_order_the_first_one_too() -> None:
    layer, learned = _weight(1.0), []

    def loss_of(head: nn.Module, batch: list[int], step: int) -> torch.Tensor:
        learned.append((batch, step))
        return layer.weight.sum()

    settings = SegmentationConfig(steps=3, batch_size=2)
    made = dense.fit(
        settings,
        6,
        torch.Generator().manual_seed(0),
        lambda order: (positions.tolist() for positions in order),
        lambda first: layer,
        loss_of,
        lambda step: 0.1,
    )
    order = list(dense.batches(6, 2, 3, torch.Generator().manual_seed(0)))
    assert made is layer and learned == [(positions.tolist(), step) for step, positions in enumerate(order)]
    assert sorted(position for batch, _ in learned for position in batch) == list(range(6))
