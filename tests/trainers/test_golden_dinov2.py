"""DINOv2's losses and teacher normalisations against the official ones: probabilities, losses, gradients, centres."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.golden_files import Golden, close
from trainers.methods.dinov2 import (
    Center,
    dino_global_loss,
    dino_local_loss,
    ibot_loss,
    koleo_loss,
    patch_weights,
    sinkhorn_knopp,
)

pytestmark = pytest.mark.golden


def center_of(golden: Golden) -> Center:
    start = golden["init_center"].flatten()[None]
    center = Center(start.shape[1], golden["center_momentum"])
    center.center.copy_(start)
    return center


def leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


@pytest.mark.parametrize("name", ["dinov2_dino_loss", "dinov2_ibot_loss"])
def test_centring_is_the_official_one_and_as_lazy(name: str) -> None:
    golden = Golden(name)
    center, temp = center_of(golden), golden["teacher_temp"]
    close(center.probabilities(golden["teacher_logits"], temp), golden["softmax_probs"])
    center.update(golden["teacher_logits"])
    assert torch.equal(center.center.flatten(), golden["center_right_after_update_call"].flatten())
    close(center.probabilities(golden["teacher_logits_next"], temp), golden["softmax_probs_next"])
    close(center.center.flatten(), golden["center_after_next_use"].flatten())


@pytest.mark.parametrize("name", ["dinov2_dino_loss", "dinov2_ibot_loss"])
def test_a_batch_that_waits_for_its_use_survives_in_the_checkpoint(name: str) -> None:
    golden = Golden(name)
    first = center_of(golden)
    first.update(golden["teacher_logits"])
    resumed = Center(golden["teacher_logits"].shape[1], golden["center_momentum"])
    resumed.load_state_dict(first.state_dict())
    close(resumed.probabilities(golden["teacher_logits_next"], golden["teacher_temp"]), golden["softmax_probs_next"])


@pytest.mark.parametrize("name", ["dinov2_dino_loss", "dinov2_ibot_loss"])
def test_sinkhorn_knopp(name: str) -> None:
    golden = Golden(name)
    logits, temp = golden["teacher_logits"], golden["teacher_temp"]
    close(sinkhorn_knopp(logits, temp, golden["sk_iterations"]), golden["sk_probs"])
    for key, iterations in {"sk_probs_1iter": 1, "sk_probs_count_plus_10": golden["sk_iterations"]}.items():
        if key in golden:
            close(sinkhorn_knopp(logits, temp, iterations), golden[key])


@pytest.mark.parametrize(("crops", "dino_loss"), [("local", dino_local_loss), ("global", dino_global_loss)])
@pytest.mark.parametrize("normalisation", ["softmax", "sk"])
def test_dino_loss(normalisation: str, crops: str, dino_loss: Callable[..., torch.Tensor]) -> None:
    golden = Golden("dinov2_dino_loss")
    student = leaf(golden[f"student_{crops}"])
    loss = dino_loss(student, golden[f"{normalisation}_probs"], golden["student_temp"])
    close(loss, torch.tensor(golden[f"{normalisation}_{crops}_loss"]))
    loss.backward()
    assert student.grad is not None
    close(student.grad, golden[f"{normalisation}_grad_{crops}"])


def test_weights_of_masked_patches() -> None:
    golden = Golden("dinov2_ibot_loss")
    indices = golden["masks"].flatten().nonzero()[:, 0]
    assert len(indices) == golden["n_masked"]
    close(patch_weights(golden["masks"], indices), golden["masks_weight"])


@pytest.mark.parametrize("normalisation", ["softmax", "sk"])
def test_ibot_loss_of_masked_patches_and_padding(normalisation: str) -> None:
    golden = Golden("dinov2_ibot_loss")
    masks, padding = golden["masks"], golden["n_pad"]
    student = leaf(golden["student"])
    teacher = torch.cat([golden[f"{normalisation}_probs"], golden["pad_probs"]])
    weights = patch_weights(masks, masks.flatten().nonzero()[:, 0])
    padded = torch.cat([weights, torch.zeros(padding)])
    loss = ibot_loss(student, teacher, padded, len(masks), golden["student_temp"])
    close(loss, torch.tensor(golden[f"{normalisation}_loss"]))
    if f"{normalisation}_loss_weight_none" in golden:
        close(loss, torch.tensor(golden[f"{normalisation}_loss_weight_none"]))
    loss.backward()
    assert student.grad is not None
    close(student.grad, golden[f"{normalisation}_grad_student"])
    assert not student.grad[golden["n_masked"] :].any()


def test_the_dense_form_of_ibot_is_the_masked_one() -> None:
    golden = Golden("dinov2_ibot_loss")
    masks = golden["masks"]
    indices = masks.flatten().nonzero()[:, 0]
    student = leaf(golden["full_student"])
    rows, targets = student.flatten(0, 1)[indices], golden["full_teacher_probs"].flatten(0, 1)[indices]
    loss = ibot_loss(rows, targets, patch_weights(masks, indices), len(masks), golden["student_temp"])
    close(loss, torch.tensor(golden["full_loss"]))
    loss.backward()
    assert student.grad is not None
    close(student.grad, golden["full_grad_student"])


@pytest.mark.parametrize("case", ["plain", "dup"])
def test_koleo_loss_and_gradient(case: str) -> None:
    golden = Golden("koleo")
    x = leaf(golden[f"{case}_x"])
    loss = koleo_loss(x, len(x))
    close(loss, torch.tensor(golden[f"{case}_loss"]))
    loss.backward()
    assert x.grad is not None
    close(x.grad, golden[f"{case}_grad"])


@pytest.mark.parametrize("case", ["plain", "dup"])
def test_koleo_is_the_mean_over_the_official_neighbours(case: str) -> None:
    golden = Golden("koleo")
    x = golden[f"{case}_x"]
    distances, neighbours = golden[f"{case}_nn_dist"], golden[f"{case}_nn_index"]
    assert koleo_loss(x, len(x)).item() == pytest.approx(-torch.log(distances + 1e-8).mean().item(), rel=1e-5)
    for i, j in enumerate(neighbours.tolist()):  # a pair by itself has each other as neighbours
        pair = koleo_loss(x[[i, j]], 2)
        assert pair.item() == pytest.approx(-torch.log(distances[i] + 1e-8).item(), rel=1e-5, abs=1e-6)


def test_koleo_leaves_equal_rows_together() -> None:
    golden = Golden("koleo")
    rows = golden["dup_rows"]
    x = leaf(golden["dup_x"])
    koleo_loss(x, len(x)).backward()
    assert x.grad is not None and not x.grad[rows].any()
    width = x.shape[1]
    close(golden["dup_nn_dist"][rows], torch.full((len(rows),), 1e-8 * width**0.5))
