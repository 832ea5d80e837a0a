"""DINOv2: the whole loss from its parts, masks, teacher, what trials share, training, and wrong input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainers.test_dinov2_losses import alternating
from trainers import optim, vit
from trainers.config import TrialConfig, resolve
from trainers.methods import Batch, Progress, Upcoming, Views
from trainers.methods.dinov2 import DinoV2, koleo_loss
from trainers.methods.self_distillation import teacher_temp
from trainers.streams import Streams

IMAGES, SIDE = 8, 32
PATCHES = (SIDE // 8) ** 2
HEAD = {"prototypes": 24, "hidden": 16, "bottleneck": 8, "layers": 2}
STEPS = 20
SHARED = {"dinov2.separate_heads": False, "dinov2.ibot_head": None}
SOFTMAX = {"dinov2.centering": "softmax"}


def config(**settings: object) -> TrialConfig:
    base: dict[str, object] = {
        "method": "dinov2",
        "preset": "short",
        "model.size": "nano",
        "model.patch_size": 8,
        "model.image_size": SIDE,
        "model.layer_scale": None,  # so that class tokens differ from the start
        "model.drop_path": 0.0,
        "model.drop_path_group": None,
        "optim.steps": STEPS,
        "optim.batch_size": IMAGES,
        "dinov2.crops.num_local": 3,
        "dinov2.crops.local_size": 16,
        "dinov2.koleo.weight": 0.1,
        "dinov2.koleo.group_size": 4,
        "dinov2.separate_heads": True,
        "dinov2.centering": "sinkhorn",
        "dinov2.teacher_temp": 0.07,
        "dinov2.warmup_teacher_temp": 0.04,
        "dinov2.warmup_teacher_temp_steps": 4,
        "dinov2.teacher_momentum": 0.9,
        **{f"dinov2.{head}.{name}": value for head in ("head", "ibot_head") for name, value in HEAD.items()},
    }
    if settings.get("dinov2.ibot_head", 0) is None:
        base = {name: value for name, value in base.items() if not name.startswith("dinov2.ibot_head.")}
    return resolve({**base, **settings})


def method(trial: TrialConfig, seed: int = 0) -> tuple[DinoV2, Streams]:
    streams = Streams(seed)
    return DinoV2(trial, vit.build(trial.model, streams), 1, streams), streams


def images(count: int = IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)


def batch(trained: DinoV2, step: int = 0, rows: slice = slice(0, IMAGES)) -> Batch:
    prepared = trained.prepare(Upcoming(step, IMAGES, np.arange(IMAGES)[rows]))
    return Batch(images()[rows], {}, prepared, first=rows.start, total=IMAGES)


def stepped(**settings: object) -> tuple[DinoV2, Views, dict[str, Tensor], Progress]:
    """A method, the views of one batch and its losses at a step in the warm-up of the teacher's temperature."""
    trained, streams = method(config(**settings))
    trained.train()
    views = trained.views(batch(trained), streams)
    progress = Progress(step=1, steps=STEPS)
    return trained, views, trained.losses(views, progress), progress


def plain_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher * F.log_softmax(student / 0.1, dim=-1)).sum(dim=-1)


@pytest.mark.parametrize("centering", ["sinkhorn", "softmax"])
@pytest.mark.parametrize("heads", [{}, SHARED])
def test_losses_are_the_official_sum_of_pairs(heads: dict[str, object], centering: str) -> None:
    """Against the training step of dinov2/train/ssl_meta_arch.py written out crop by crop, with all patches dense."""
    trained, views, losses, _ = stepped(**{"dinov2.centering": centering, **heads})
    temp = 0.04 + 0.03 / 3  # the second of the four values of its warm-up
    assert trained.dino_head is not None and trained.teacher_dino_head is not None
    of_patches, teacher_of_patches = trained.ibot_head, trained.teacher_ibot_head
    assert (of_patches is None) == bool(heads)
    with torch.no_grad():
        tokens = trained.teacher_backbone.tokens(views["global"])  # type: ignore[operator]
        cls, patches = (
            trained.teacher_dino_head(tokens.cls_BD),
            (teacher_of_patches or trained.teacher_dino_head)(tokens.patches_BND),
        )
    normalise: Callable[[Tensor, float], Tensor] = alternating
    if centering == "softmax":  # the centre is still 0
        normalise = lambda logits, temp: torch.softmax(logits / temp, dim=-1)  # noqa: E731
    first, second = normalise(cls, temp).chunk(2)
    masks = views["masks"]
    patch_targets = torch.zeros_like(patches)
    patch_targets[masks] = normalise(patches[masks], temp)

    student, local = vit.forward_groups(trained.backbone, [views["global"], views["local"]], masks)  # type: ignore[arg-type]
    assert student.cls_BD is not None and local.cls_BD is not None
    one, two = trained.dino_head(student.cls_BD).chunk(2)
    pairs = [plain_cross_entropy(one, second), plain_cross_entropy(two, first)]
    terms = 2 + 2 * 3
    torch.testing.assert_close(losses["dino_global"], sum(pair.mean() for pair in pairs) / terms)
    pairs = [
        plain_cross_entropy(crop, target)
        for crop in trained.dino_head(local.cls_BD).chunk(3)
        for target in (first, second)
    ]
    torch.testing.assert_close(losses["dino_local"], sum(pair.mean() for pair in pairs) / terms)
    dense = plain_cross_entropy((of_patches or trained.dino_head)(student.patches_BND), patch_targets)
    per_crop = (dense * masks).sum(dim=1) / masks.sum(dim=1).clamp(min=1)
    torch.testing.assert_close(losses["ibot"], per_crop.mean())
    groups = student.cls_BD.split(4)
    torch.testing.assert_close(losses["koleo"], 0.1 * 2 * torch.stack([koleo_loss(g, 4) for g in groups]).mean())
    assert set(losses) == {"dino_global", "dino_local", "ibot", "koleo"}


def test_weights_scale_their_losses() -> None:
    _, _, losses, _ = stepped()
    scaled = stepped(**{"dinov2.dino_weight": 2.0, "dinov2.ibot_weight": 0.5, "dinov2.koleo.weight": 0.3})[2]
    for name, factor in {"dino_global": 2.0, "dino_local": 2.0, "ibot": 0.5, "koleo": 3.0}.items():
        torch.testing.assert_close(scaled[name], factor * losses[name])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"dino_global", "dino_local", "ibot", "koleo"}),
        ({"model.num_registers": 2, "dinov2.koleo": None}, {"dino_global", "dino_local", "ibot"}),
        ({**SHARED, **SOFTMAX, "dinov2.crops.num_local": 0}, {"dino_global", "ibot", "koleo"}),
        ({"dinov2.ibot_weight": 0.0}, {"dino_global", "dino_local", "koleo"}),
        ({"dinov2.ibot_weight": 0.0, "dinov2.mask_probability": 0.0}, {"dino_global", "dino_local", "koleo"}),
        ({"dinov2.dino_weight": 0.0}, {"ibot", "koleo"}),
        ({"dinov2.dino_weight": 0.0, **SHARED, **SOFTMAX}, {"ibot", "koleo"}),
    ],
)
def test_every_loss_can_be_left_out_and_all_parameters_learn(settings: dict[str, Any], names: set[str]) -> None:
    if "dinov2.koleo" in settings:
        settings = {**settings, "dinov2.koleo.weight": 0.0}
        del settings["dinov2.koleo"]
    trained, _, losses, _ = stepped(**settings)
    assert set(losses) == names
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, value in trained.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []  # DistributedDataParallel would wait for them
    assert [
        name for name, value in trained.named_parameters() if not value.requires_grad and value.grad is not None
    ] == []


def test_without_local_crops_the_official_divisor_counts_one() -> None:
    trained, views, losses, _ = stepped(**{"dinov2.crops.num_local": 0})
    targets = trained._targets(views, 0.05).cls[0]
    student = trained._logits(trained._student_tokens(views), views, trained.dino_head, trained.ibot_head)
    torch.testing.assert_close(losses["dino_global"], 2 * plain_cross_entropy(student.cls[0], targets).mean() / 3)


# Masks


@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.0001, 0.0001)])
def test_views_hold_the_masks_crop_by_crop_and_where_they_are_true(ratio: tuple[float, float]) -> None:
    trained, streams = method(config())
    # The second ratio masks nothing, which no trial may ask for, but a small batch of one rank may have drawn.
    trained.settings = trained.settings.model_copy(update={"mask_ratio": ratio})
    for step in range(6):
        made = batch(trained, step)
        views = trained.views(made, streams)
        assert views["global"].shape == (2 * IMAGES, 3, SIDE, SIDE) and views["local"].shape == (3 * IMAGES, 3, 16, 16)
        for image in range(IMAGES):
            for crop in range(2):
                assert torch.equal(views["masks"][crop * IMAGES + image], made.prepared["masks"][image, crop])
        assert torch.equal(views["masked"], views["masks"].flatten().nonzero()[:, 0])
    losses = trained.losses(views, Progress(0, STEPS))
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    assert (losses["ibot"].item() == 0.0) == (ratio[1] == 0.0001)


def test_only_masked_patches_are_hidden_from_the_student() -> None:
    trained, views, losses, progress = stepped()
    trained.backbone.mask_token.data.fill_(3.0)  # type: ignore[operator]
    changed = trained.losses(views, progress)
    assert not torch.equal(changed["ibot"], losses["ibot"])
    views["masks"] = torch.zeros_like(views["masks"])
    views["masked"] = views["masked"][:0]
    whole = trained.losses(views, progress)
    trained.backbone.mask_token.data.zero_()  # type: ignore[operator]
    assert torch.equal(trained.losses(views, progress)["dino_global"], whole["dino_global"])


# Teacher


def test_the_teacher_sees_whole_crops_without_drop_path() -> None:
    trained, views, _, _ = stepped(**{"model.drop_path": 0.5})
    assert trained.backbone.training and not trained.teacher_backbone.training
    first, second = (trained._targets(views, 0.07) for _ in range(2))
    assert torch.equal(first.cls[0], second.cls[0]) and torch.equal(first.patches, second.patches)
    assert not any(parameter.requires_grad for parameter in trained.teacher_backbone.parameters())
    assert trained.evaluated() is trained.teacher_backbone


def test_the_teacher_follows_by_the_cosine_of_its_momentum() -> None:
    trained, _ = method(config(**{"dinov2.teacher_momentum": 0.6, "dinov2.teacher_momentum_end": 0.9}))
    assert trained.dino_head is not None and trained.ibot_head is not None
    pairs = [
        (trained.teacher_backbone, trained.backbone),
        (trained.teacher_dino_head, trained.dino_head),
        (trained.teacher_ibot_head, trained.ibot_head),
    ]
    before = [[p.clone() for p in teacher.parameters()] for teacher, _ in pairs if teacher is not None]
    with torch.no_grad():
        for _, student in pairs:
            for parameter in student.parameters():
                parameter.add_(1.0)
    step = 5
    trained.after_step(Progress(step, STEPS))
    momentum = 0.9 + 0.5 * (0.6 - 0.9) * (1 + math.cos(math.pi * step / STEPS))
    for (teacher, student), old in zip(pairs, before, strict=True):
        assert teacher is not None
        for now, follows, was in zip(teacher.parameters(), student.parameters(), old, strict=True):
            torch.testing.assert_close(now, momentum * was + (1 - momentum) * follows)


def test_the_teachers_temperature_warms_up_and_stays() -> None:
    settings = config().dinov2
    assert settings is not None
    temperatures = [teacher_temp(settings, step) for step in (0, 1, 2, 3, 4, 19)]
    assert temperatures == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])


def test_local_crops_that_no_loss_takes_are_not_made_and_the_others_stay_as_they_are() -> None:
    trained, streams = method(config())
    without, others = method(config(**{"dinov2.dino_weight": 0.0}))
    for step in range(2):
        ours, theirs = without.views(batch(without, step), others), trained.views(batch(trained, step), streams)
        assert set(theirs) - set(ours) == {"local"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_prototypes_are_frozen_at_first_and_all_else_learns() -> None:
    trial = config(**{"dinov2.freeze_last_layer_steps": 2, "optim.weight_decay": 0.5})
    trained, streams = method(trial)
    trained.train()
    optimizer = optim.build_optimizer(trained, trial.optim)
    start = {name: value.detach().clone() for name, value in trained.named_parameters() if value.requires_grad}
    frozen = {name for name in start if "last_layer" in name}
    assert {name.split(".")[0] for name in frozen} == {"dino_head", "ibot_head"}
    for step in range(3):
        progress = Progress(step, STEPS)
        optim.set_learning_rate(optimizer, 1e-2, trained.last_layer_lr_scale(progress))
        losses = trained.losses(trained.views(batch(trained, step), streams), progress)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        now = dict(trained.named_parameters())
        moved = {name for name in start if not torch.equal(now[name], start[name])}
        assert moved == (set(start) - frozen if step < 2 else set(start))


def test_gradients_are_clipped_module_by_module() -> None:
    trained, _ = method(config())
    parts: list[nn.Module] = [
        part for part in (trained.backbone, trained.dino_head, trained.ibot_head) if part is not None
    ]
    for part, norm in zip(parts, (50.0, 0.5, 4.0), strict=True):
        parameters = list(part.parameters())
        count = sum(parameter.numel() for parameter in parameters)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, norm / math.sqrt(count))
    trained.clip_gradients(3.0)
    norms = [
        math.sqrt(sum(float((p.grad**2).sum()) for p in part.parameters() if p.grad is not None)) for part in parts
    ]
    assert norms == pytest.approx([3.0, 0.5, 3.0], rel=1e-4)


class Watch(TorchDispatchMode):
    """Notes every operation that would make the host wait for a device: values read, sizes that depend on them."""

    WAITING = ("item", "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.WAITING or by_mask:
            self.seen.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("settings", [{}, {**SOFTMAX, **SHARED}, {"model.drop_path": 0.5, "model.drop_path_group": 4}])
def test_a_step_never_waits_for_the_device(settings: dict[str, Any]) -> None:
    trained, streams = method(config(**settings))
    trained.train()
    views = trained.views(batch(trained), streams)
    progress = Progress(0, STEPS)
    with Watch() as watch:
        assert float(torch.ones(())) and watch.seen == ["_local_scalar_dense"]  # it does notice
        watch.seen.clear()
        torch.stack(list(trained.losses(views, progress).values())).sum().backward()
        trained.clip_gradients(3.0)
        trained.after_step(progress)
    assert watch.seen == []


# What trials share, training, wrong input


def test_register_counts_share_views_masks_and_initial_weights() -> None:
    (plain, streams), (registers, others) = method(config()), method(config(**{"model.num_registers": 4}))
    state = registers.state_dict()
    extra = set(state) - set(plain.state_dict())
    assert extra == {"backbone.reg_token", "teacher_backbone.reg_token"}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name]), name
    for step in range(3):
        ours, theirs = plain.views(batch(plain, step), streams), registers.views(batch(registers, step), others)
        assert ours.keys() == theirs.keys() == {"global", "local", "masks", "masked"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_two_heads_start_apart_and_teachers_as_their_students() -> None:
    trained, _ = method(config())
    state = trained.state_dict()
    assert not torch.equal(state["dino_head.mlp.0.weight"], state["ibot_head.mlp.0.weight"])
    assert not torch.equal(state["dino_head.last_layer.weight_v"], state["ibot_head.last_layer.weight_v"])
    assert torch.equal(state["dino_head.last_layer.weight_g"], torch.ones(24, 1))
    teachers = [name for name in state if name.startswith("teacher_")]
    assert {name.split(".")[0] for name in teachers} == {"teacher_backbone", "teacher_dino_head", "teacher_ibot_head"}
    assert all(torch.equal(state[name], state[name.removeprefix("teacher_")]) for name in teachers)


def losses_of_training(lr: float, steps: int, settings: dict[str, Any]) -> list[float]:
    trial = config(**{"dinov2.warmup_teacher_temp_steps": 0, **settings})
    trained, streams = method(trial)
    trained.train()
    optimizer = optim.build_optimizer(trained, trial.optim)
    optim.set_learning_rate(optimizer, lr)
    history = []
    for step in range(steps):
        progress = Progress(step, STEPS)
        losses = trained.losses(trained.views(batch(trained, step), streams), progress)
        loss = torch.stack(list(losses.values())).sum()
        history.append(loss.item())
        loss.backward()
        trained.clip_gradients(3.0)
        optimizer.step()
        optimizer.zero_grad()
        trained.after_step(progress)
    return history


@pytest.mark.parametrize("settings", [{}, {**SOFTMAX, **SHARED}])
def test_training_lowers_the_loss(settings: dict[str, Any]) -> None:
    learning, standing = (losses_of_training(lr, 8, settings) for lr in (2e-3, 0.0))
    assert learning[0] == standing[0]
    assert sum(learning[-4:]) / 4 < sum(standing[-4:]) / 4 - 2.0


class Other(nn.Module):
    """A user's backbone: nothing but a class token, if that."""

    embed_dim, num_registers = 64, 0

    def __init__(self, has_cls: bool = True) -> None:
        super().__init__()
        self.projection = nn.Linear(3, 64)
        self.has_cls = has_cls

    def tokens(self, images: Tensor, *, normed: bool = True) -> vit.Tokens:
        patches = self.projection(F.avg_pool2d(images, 8).flatten(2).transpose(1, 2))
        return vit.Tokens(patches.mean(dim=1) if self.has_cls else None, patches[:, :0], patches)


def unmasked() -> Iterator[tuple[str, float]]:
    yield "dinov2.mask_probability", 0.0
    yield "dinov2.ibot_weight", 0.0


def test_a_backbone_that_cannot_mask_is_refused_where_masks_are_asked_for() -> None:
    with pytest.raises(ValueError, match="which the backbone Other cannot do: it has no add_mask_token"):
        DinoV2(config(), Other(), 1, Streams(0))
    trained, streams = DinoV2(config(**dict(unmasked())), Other(), 1, Streams(0)), Streams(0)
    losses = trained.losses(trained.views(batch(trained), streams), Progress(0, STEPS))
    assert set(losses) == {"dino_global", "dino_local", "koleo"}


def test_a_backbone_without_class_token_is_refused() -> None:
    trained, streams = DinoV2(config(**dict(unmasked())), Other(has_cls=False), 1, Streams(0)), Streams(0)
    with pytest.raises(ValueError, match="dinov2 learns from the class token, which this backbone does not have"):
        trained.losses(trained.views(batch(trained), streams), Progress(0, STEPS))


def test_groups_of_koleo_must_fit_a_ranks_images() -> None:
    trained, streams = method(config())
    part = slice(0, 6)
    with pytest.raises(ValueError, match="group_size 4 does not divide the 6 images of a crop that one rank holds"):
        trained.losses(trained.views(batch(trained, rows=part), streams), Progress(0, STEPS))


def test_a_teacher_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dinov2\.teacher_temp"):
        config(**{"dinov2.teacher_temp": 0.0})
