"""Losses, metrics and bins of depth against the official implementations' numbers."""

import pytest
import torch
from torch import Tensor

from tests.golden_files import Golden, close
from trainers.probes import depth, depth_losses, depth_metrics

pytestmark = pytest.mark.golden

NAMES = {"delta1": "a1", "delta2": "a2", "delta3": "a3"} | {
    name: name for name in ("rmse", "abs_rel", "sq_rel", "rmse_log", "log_10", "silog")
}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("depth")


def assert_loss(golden: Golden, name: str, predicted: Tensor, loss: Tensor) -> None:
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert loss.item() == pytest.approx(golden[f"{name}_loss"], rel=1e-5)
    close(gradient, golden[f"{name}_grad"])


def test_sig_loss_and_its_gradient(golden: Golden) -> None:
    predicted, true = golden["pred"].requires_grad_(), golden["gt"]
    positive, known = true > 0, depth_losses.valid_for_loss(true, golden["max_depth"])
    assert positive.sum() > known.sum()
    assert_loss(golden, "sig", predicted, depth_losses.sig_loss(predicted, true, positive))
    assert_loss(golden, "sig_max10", predicted, depth_losses.sig_loss(predicted, true, known))
    warm_up = depth_losses.sig_loss(predicted, true, positive, warm_up=True)
    assert_loss(golden, "sig_warmup_first", predicted, warm_up)


def test_gradient_loss_along_the_axes_of_the_official_code(golden: Golden) -> None:
    predicted, true = golden["pred"].requires_grad_(), golden["gt"]
    known = depth_losses.valid_for_loss(true, golden["max_depth"])
    assert_loss(golden, "gradloss4d", predicted, depth_losses.gradient_loss(predicted, true, known, (0, 1)))


def test_gradient_loss_along_rows_and_columns(golden: Golden) -> None:
    predicted, true = golden["pred"], golden["gt"]
    known = depth_losses.valid_for_loss(true, golden["max_depth"])
    ours = [
        depth_losses.gradient_loss(predicted[i : i + 1], true[i : i + 1], known[i : i + 1]) for i in range(len(true))
    ]
    close(torch.stack(ours), golden["gradloss2d_loss"])


def test_the_official_gradient_loss_of_two_images_is_zero(golden: Golden) -> None:
    """As each GPU has two images there, it has no effect; the preset `paper` relies on it."""
    predicted, true = golden["pred"][:2], golden["gt"][:2]
    assert float(depth_losses.gradient_loss(predicted, true, true > 0, (0, 1))) == 0.0


def test_metrics_of_each_image_and_their_means(golden: Golden) -> None:
    predicted, true = golden["pred"][:, 0], golden["gt"][:, 0]
    valid = depth_metrics.valid_for_metrics(true, golden["min_depth"], golden["max_depth"])
    ours = depth_metrics.per_image(predicted, true, valid)
    assert set(ours) == set(NAMES)
    for name, official in NAMES.items():
        close(ours[name], golden[f"metric_{official}_per_image"], rtol=1e-5)
        assert float(ours[name].mean()) == pytest.approx(golden[f"metric_{official}_mean"], rel=1e-5)


def test_expected_depth_of_bins(golden: Golden) -> None:
    centers = torch.linspace(golden["min_depth"], golden["max_depth"], golden["bins_n"])
    ours = depth.expected_depth(golden["bins_logits"].movedim(1, -1), centers)
    close(ours[:, None], golden["bins_depth_linear"])
