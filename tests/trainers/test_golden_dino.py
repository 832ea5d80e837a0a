"""DINO's loss, its gradient, its centre and the teacher's temperature against the official implementation's numbers."""

from __future__ import annotations

import pytest
import torch

from tests.golden_files import Golden, close
from trainers import schedules, vit
from trainers.config import resolve
from trainers.methods import Batch, Progress
from trainers.methods.dino import Dino, dino_loss, sharpened
from trainers.streams import Streams

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("dino_v1_loss")


@pytest.mark.parametrize("call", ["step0", "step1"])
def test_loss_and_its_gradient(golden: Golden, call: str) -> None:
    student = golden[f"{call}_student"].requires_grad_()
    targets = sharpened(golden[f"{call}_teacher"], golden[f"{call}_center_before"], golden[f"{call}_temp"])
    loss = dino_loss(student, targets, golden["student_temp"])
    loss.backward()
    close(loss.detach(), torch.tensor(golden[f"{call}_loss"]))
    close(student.grad, golden[f"{call}_grad_student"])


def test_temperature_of_the_teacher(golden: Golden) -> None:
    start, end, warmup = (
        golden[name] for name in ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs")
    )
    ours = [schedules.linear_then_constant(epoch, start, end, warmup) for epoch in range(golden["n_epochs"])]
    close(torch.tensor(ours, dtype=torch.float64), golden["teacher_temp_schedule"], rtol=1e-12, atol=0)
    for call in ("step0", "step1"):
        assert ours[golden[f"{call}_epoch"]] == pytest.approx(golden[f"{call}_temp"], rel=1e-12)


def test_method_goes_through_two_steps_as_the_official_loss_object(
    golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of `losses` and `after_step` on given logits: temperature, loss, and the centre after its use."""
    steps, prototypes = golden["n_epochs"], golden["init_center"].shape[1]
    method = _method(golden, prototypes)
    assert not method.center_1K.any()
    method.center_1K.copy_(golden["init_center"])
    given: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(method.head, "forward", lambda _x: given["student"])
    monkeypatch.setattr(method.teacher_head, "forward", lambda _x: given["teacher"])
    views = method.views(_images(golden["batch"]), Streams(0))
    for call in ("step0", "step1"):
        given["student"], given["teacher"] = golden[f"{call}_student"], golden[f"{call}_teacher"]
        progress = Progress(golden[f"{call}_epoch"], steps)
        close(method.center_1K, golden[f"{call}_center_before"])
        losses = method.losses(views, progress)
        assert set(losses) == {"dino"}
        close(losses["dino"], torch.tensor(golden[f"{call}_loss"]))
        close(method.center_1K, golden[f"{call}_center_before"])
        method.after_step(progress)
        close(method.center_1K, golden[f"{call}_center_after"])


def _images(count: int) -> Batch:
    return Batch(torch.zeros(count, 16, 16, 3, dtype=torch.uint8), {})


def _method(golden: Golden, prototypes: int) -> Dino:
    trial = resolve(
        {
            "method": "dino",
            "preset": "short",
            "model.size": "nano",
            "model.patch_size": 8,
            "model.image_size": 16,
            "dino.head.prototypes": prototypes,
            "dino.head.hidden": 8,
            "dino.head.bottleneck": 8,
            "dino.crops.num_local": golden["n_local"],
            "dino.student_temp": golden["student_temp"],
            "dino.teacher_temp": golden["teacher_temp"],
            "dino.warmup_teacher_temp": golden["warmup_teacher_temp"],
            "dino.warmup_teacher_temp_steps": golden["warmup_teacher_temp_epochs"],
            "dino.center_momentum": golden["center_momentum"],
        }
    )
    streams = Streams(0)
    return Dino(trial, vit.build(trial.model, streams), 0, streams)
