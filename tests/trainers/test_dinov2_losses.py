"""DINOv2's losses and teacher normalisations: by hand, against plain PyTorch, and in half precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.methods.dinov2 import Center, koleo_loss, sinkhorn_knopp


def alternating(logits: Tensor, temp: float) -> Tensor:
    """Three iterations of Sinkhorn-Knopp that write the matrix."""
    matrix = torch.exp(logits.double() / temp)
    for _ in range(3):
        matrix = matrix / matrix.sum(dim=0, keepdim=True)
        matrix = matrix / matrix.sum(dim=1, keepdim=True)
    return matrix.float()


def test_koleo_looks_for_neighbours_within_a_group() -> None:
    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    by_hand = []
    for group in F.normalize(x, dim=1).split(4):
        distances = torch.cdist(group, group) + 10 * torch.eye(4)
        by_hand.append(-distances.min(dim=1).values.log().mean())
    assert koleo_loss(x, 4).item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-4)
    assert koleo_loss(x, 12) > koleo_loss(x, 4)
    with pytest.raises(ValueError, match=r"koleo\.group_size 5 does not divide the 12 images of a crop"):
        koleo_loss(x, 5)


def test_opposite_rows_are_neighbours_of_each_other_rather_than_of_themselves() -> None:
    assert koleo_loss(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]), 2).item() == pytest.approx(-math.log(2.0))


def test_sinkhorn_knopp_uses_all_prototypes_alike() -> None:
    logits = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    balanced = sinkhorn_knopp(logits, 0.5, 100)
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((10,), 4.0))
    torch.testing.assert_close(balanced.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.5, 3), alternating(logits, 0.5))
    torch.testing.assert_close(
        sinkhorn_knopp(logits + 1000.0, 0.5, 3), sinkhorn_knopp(logits, 0.5, 3), rtol=1e-3, atol=0
    )
    assert torch.equal(logits, torch.randn(40, 10, generator=torch.Generator().manual_seed(0)))  # not changed in place
    assert sinkhorn_knopp(logits[:0], 0.5, 3).shape == (0, 10)


def test_half_precision_logits_are_normalised_in_single_precision() -> None:
    logits = torch.randn(12, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = sinkhorn_knopp(logits, 0.1, 3)
        loss = koleo_loss(logits, 12)
    torch.testing.assert_close(probabilities, alternating(logits.float(), 0.1))
    assert probabilities.dtype == torch.float32
    assert torch.equal(loss, koleo_loss(logits.float(), 12))


def test_a_center_stays_where_there_is_no_row() -> None:
    center = Center(3, 0.9)
    center.update(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]))
    center.probabilities(torch.zeros(1, 3), 1.0)
    torch.testing.assert_close(center.center, torch.tensor([[0.2, 0.2, 0.2]]))
    center.update(torch.zeros(0, 3))
    center.probabilities(torch.zeros(1, 3), 1.0)
    torch.testing.assert_close(center.center, torch.tensor([[0.2, 0.2, 0.2]]))
