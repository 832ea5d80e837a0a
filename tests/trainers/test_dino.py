"""DINO: its loss by hand, the teacher's path, frozen prototypes, clipping, and what trials and ranks share."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainers import optim, vit
from trainers.config import TrialConfig, resolve
from trainers.methods import Batch, Progress
from trainers.methods.dino import Dino, dino_loss, sharpened
from trainers.methods.self_distillation import teacher_temp
from trainers.streams import Streams

PROGRESS = Progress(step=0, steps=10)


def config(**settings: Any) -> TrialConfig:
    small = {
        "method": "dino",
        "preset": "short",
        "model.size": "nano",
        "model.patch_size": 8,
        "model.image_size": 16,
        "dino.head.prototypes": 24,
        "dino.head.hidden": 32,
        "dino.head.bottleneck": 12,
        "dino.crops.num_local": 2,
        "dino.crops.local_size": 8,
    }
    return resolve({**small, **{name.replace("__", "."): value for name, value in settings.items()}})


def method(seed: int = 0, **settings: Any) -> tuple[Dino, Streams]:
    trial, streams = config(**settings), Streams(seed)
    built = Dino(trial, vit.build(trial.model, streams), 0, streams)
    built.train()
    return built, streams


def batch(count: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randint(0, 256, (count, 24, 24, 3), dtype=torch.uint8, generator=generator), {})


def step(trained: Dino, streams: Streams, optimizer: torch.optim.Optimizer, progress: Progress, images: Batch) -> float:
    """One step as the loop makes it."""
    losses = trained.losses(trained.views(images, streams), progress)
    losses["dino"].backward()
    trained.before_update(progress)
    trained.clip_gradients(3.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trained.after_step(progress)
    return float(losses["dino"].detach())


def optimizer_of(trained: Dino, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)


# ---- losses


@pytest.mark.parametrize("num_local", [0, 1, 6])
def test_loss_is_the_mean_over_pairs_of_different_crops(num_local: int) -> None:
    crops, images, prototypes = 2 + num_local, 5, 7
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(crops * images, prototypes, generator=generator)
    targets = torch.randn(2 * images, prototypes, generator=generator).softmax(dim=-1)
    pairs = [
        F.cross_entropy(student[images * v : images * (v + 1)] / 0.1, targets[images * a : images * (a + 1)])
        for a in range(2)
        for v in range(crops)
        if v != a
    ]
    assert len(pairs) == 2 * (crops - 1)
    torch.testing.assert_close(dino_loss(student, targets, 0.1), torch.stack(pairs).mean())


def test_loss_of_agreement_by_hand() -> None:
    """All crops of all images sure of the same of two prototypes: the teacher's 1 and the student's logits ±1 / 0.1."""
    student = torch.tensor([[1.0, -1.0]]).repeat(6, 1)
    targets = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    assert float(dino_loss(student, targets, 0.1)) == pytest.approx(math.log1p(math.exp(-20.0)), abs=1e-6)
    assert float(dino_loss(-student, targets, 0.1)) == pytest.approx(20.0, rel=1e-6)
    assert float(dino_loss(0 * student, targets, 0.1)) == pytest.approx(math.log(2.0))


def test_teacher_is_centred_then_sharpened() -> None:
    logits, center = torch.tensor([[0.3, 0.1], [0.1, 0.3]]), torch.tensor([[0.2, 0.1]])
    probabilities = sharpened(logits, center, 0.05)
    ratio = math.exp(0.1 / 0.05), math.exp(-0.3 / 0.05)
    expected = [[r / (1 + r), 1 / (1 + r)] for r in ratio]
    torch.testing.assert_close(probabilities, torch.tensor(expected))


def test_losses_are_those_of_the_parts_one_by_one() -> None:
    """All crops in one pass give what a pass of each group gives, and the teacher sees the global crops alone."""
    trained, streams = method(model__num_registers=2)
    views = trained.views(batch(), streams)
    ours = trained.losses(views, PROGRESS)["dino"]
    groups = [trained.backbone.tokens(views[name]).cls_BD for name in ("global", "local")]  # type: ignore[operator]
    student = trained.head(torch.cat(groups))
    teacher = trained.teacher_head(trained.teacher_backbone.tokens(views["global"]).cls_BD)  # type: ignore[operator]
    expected = dino_loss(student, sharpened(teacher, torch.zeros(1, 24), 0.04), 0.1)
    torch.testing.assert_close(ours, expected)
    ours.backward()
    assert all(parameter.grad is None for parameter in trained.teacher_backbone.parameters())
    learning = [name for name, value in trained.named_parameters() if value.grad is not None and value.grad.any()]
    assert learning == [name for name, value in trained.named_parameters() if value.requires_grad]
    assert not [name for name in learning if name.startswith("teacher")]


def test_without_local_crops_only_the_global_ones_are_compared() -> None:
    trained, streams = method(dino__crops__num_local=0)
    views = trained.views(batch(), streams)
    assert set(views) == {"global"}
    assert math.isfinite(float(trained.losses(views, PROGRESS)["dino"].detach()))


def test_teacher_has_no_stochastic_depth_and_stays_in_evaluation_mode() -> None:
    trained, streams = method(model__drop_path=0.5)
    trained.train()
    assert trained.backbone.training and trained.head.training
    assert not any(module.training for module in trained.teacher_backbone.modules())
    assert not any(module.training for module in trained.teacher_head.modules())
    views = trained.views(batch(), streams)
    first = trained.teacher_backbone.tokens(views["global"]).cls_BD  # type: ignore[operator]
    assert torch.equal(first, trained.teacher_backbone.tokens(views["global"]).cls_BD)  # type: ignore[operator]
    trained.eval()
    assert not trained.backbone.training


def test_a_backbone_without_a_class_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, streams = method()
    views = trained.views(batch(), streams)
    tokens = trained.teacher_backbone.tokens(views["global"])  # type: ignore[operator]
    monkeypatch.setattr(trained.teacher_backbone, "tokens", lambda _images: tokens._replace(cls_BD=None))
    with pytest.raises(ValueError, match="method dino learns from the class token"):
        trained.losses(views, PROGRESS)


# ---- what a step changes


def test_teacher_and_centre_after_two_steps_in_closed_form() -> None:
    trained, streams = method(dino__teacher_momentum=0.6, dino__teacher_momentum_end=1.0)
    optimizer = optimizer_of(trained)
    pairs = [(trained.teacher_backbone, trained.backbone), (trained.teacher_head, trained.head)]
    teachers = [value.clone() for teacher, _ in pairs for value in teacher.parameters()]
    center = torch.zeros(1, 24)
    for number in range(2):
        views = trained.views(batch(), streams)
        with torch.no_grad():
            logits = trained.teacher_head(trained.teacher_backbone.tokens(views["global"]).cls_BD)  # type: ignore[operator]
        center = 0.9 * center + 0.1 * logits.mean(dim=0, keepdim=True)
        progress = Progress(number, 4)
        trained.losses(views, progress)["dino"].backward()
        optimizer.step()
        optimizer.zero_grad()
        momentum = (0.6, 1.0 + 0.5 * (0.6 - 1.0) * (1 + math.cos(math.pi / 4)))[number]
        students = [value.detach() for _, student in pairs for value in student.parameters()]
        teachers = [momentum * t + (1 - momentum) * s for t, s in zip(teachers, students, strict=True)]
        trained.after_step(progress)
        moved = [value for teacher, _ in pairs for value in teacher.parameters()]
        for own, expected in zip(moved, teachers, strict=True):
            torch.testing.assert_close(own, expected)
        torch.testing.assert_close(trained.center_1K, center)


def test_prototypes_stand_still_as_long_as_they_are_frozen() -> None:
    trained, streams = method(dino__freeze_last_layer_steps=2)
    optimizer = optimizer_of(trained)
    start = trained.head.last_layer.weight_v.detach().clone()
    weight = next(trained.head.mlp.parameters())
    for number in range(3):
        before = weight.detach().clone()
        step(trained, streams, optimizer, Progress(number, 10), batch())
        assert torch.equal(trained.head.last_layer.weight_v, start) == (number < 2)
        assert not torch.equal(weight, before)


def test_each_gradient_is_clipped_by_itself() -> None:
    trained, _ = method()
    norms = {}
    for i, (name, parameter) in enumerate(trained.named_parameters()):
        if parameter.requires_grad and i % 5:
            parameter.grad = torch.ones_like(parameter) * (0.2 * i) / parameter.numel() ** 0.5
            norms[name] = 0.2 * i
    assert min(norms.values()) < 3.0 < max(norms.values())
    small = {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None and norms[n] < 3.0}
    trained.clip_gradients(3.0)
    for name, parameter in trained.named_parameters():
        if parameter.grad is None:
            assert name not in norms
        elif name in small:
            assert torch.equal(parameter.grad, small[name])
        else:  # facebookresearch/dino:utils.py, clip_gradients: clip / (norm + 1e-6)
            assert float(parameter.grad.norm()) == pytest.approx(3.0, rel=1e-5)


def test_temperature_of_the_teacher_warms_up_linearly() -> None:
    settings = config(dino__warmup_teacher_temp=0.04, dino__teacher_temp=0.07, dino__warmup_teacher_temp_steps=4).dino
    assert settings is not None
    temperatures = [teacher_temp(settings, number) for number in range(6)]
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


def test_everything_that_a_step_needs_is_in_the_state() -> None:
    """A second method that takes over state and streams goes on to the bit, centre and teacher included."""
    first, streams = method(model__drop_path=0.2)
    optimizer = optimizer_of(first)
    for number in range(2):
        step(first, streams, optimizer, Progress(number, 6), batch(seed=number))
    second, resumed = method(seed=0, model__drop_path=0.2)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(streams.state_dict())
    other = optimizer_of(second)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(2, 4):
        progress, images = Progress(number, 6), batch(seed=number)
        assert step(first, streams, optimizer, progress, images) == step(second, resumed, other, progress, images)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert first.center_1K.any()


# ---- what trials and ranks share


def test_register_counts_share_views_and_initial_weights_to_the_bit() -> None:
    (plain, plain_streams), (registers, register_streams) = (method(model__num_registers=count) for count in (0, 4))
    own = registers.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in plain.state_dict().items())
    assert set(own) - set(plain.state_dict()) == {"backbone.reg_token", "teacher_backbone.reg_token"}
    for number in range(2):
        images = batch(seed=number)
        first, second = plain.views(images, plain_streams), registers.views(images, register_streams)
        for name in ("global", "local"):
            assert torch.equal(first[name], second[name])
        plain.losses(first, PROGRESS)
        registers.losses(second, PROGRESS)  # which would move the streams of drop path


def test_teacher_begins_as_the_student() -> None:
    trained, _ = method(model__num_registers=2)
    assert trained.evaluated() is trained.teacher_backbone
    assert trained.evaluated().num_registers == 2
    student = trained.backbone.state_dict()
    assert all(torch.equal(value, student[name]) for name, value in trained.teacher_backbone.state_dict().items())
    optimized = {id(p) for group in optim.parameter_groups(trained, trained.config.optim) for p in group["params"]}
    assert optimized == {id(p) for module in (trained.backbone, trained.head) for p in module.parameters()}


def test_halves_of_a_batch_average_to_its_loss_gradient_and_centre() -> None:
    """As two ranks share it: each its rows, losses, gradients and centre averaged."""
    whole, streams = method()
    loss = whole.losses(whole.views(batch(), streams), PROGRESS)["dino"]
    loss.backward()
    halves: list[Tensor] = []
    shared, _ = method()
    centers = []
    for first in (0, 4):
        part = Batch(batch().images[first : first + 4], {}, first=first, total=8)
        own = shared.losses(shared.views(part, Streams(0)), PROGRESS)["dino"]
        (own / 2).backward()
        halves.append(own.detach())
        assert shared._batch_center_1K is not None
        centers.append(shared._batch_center_1K)
    torch.testing.assert_close(torch.stack(halves).mean(), loss.detach())
    for own_value, value in zip(shared.parameters(), whole.parameters(), strict=True):
        if value.grad is not None:
            torch.testing.assert_close(own_value.grad, value.grad, rtol=1e-3, atol=1e-6)
    assert whole._batch_center_1K is not None
    torch.testing.assert_close(torch.stack(centers).mean(dim=0), whole._batch_center_1K)


def test_a_short_training_learns_what_a_teacher_that_stands_still_tells() -> None:
    """With a teacher that moves too the loss need not fall, since its target becomes harder."""
    plain = {"color_jitter": 0.0, "grayscale": 0.0, "solarize": 0.0, "blur": False, "local_scale": [0.5, 1.0]}
    trained, streams = method(
        model__layer_scale=None,
        dino__teacher_momentum=1.0,
        dino__center_momentum=0.0,
        **{f"dino__crops__{name}": value for name, value in plain.items()},
    )
    optimizer = optimizer_of(trained)
    smooth = F.interpolate(torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(2)), 24)
    images = Batch((smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), {})
    losses = [step(trained, streams, optimizer, Progress(number, 36), images) for number in range(36)]
    first, last = sum(losses[1:6]) / 5, sum(losses[-5:]) / 5  # at step 0 nothing is centred yet
    assert last < 0.7 * first and last < math.log(24)  # of a guess among all prototypes
