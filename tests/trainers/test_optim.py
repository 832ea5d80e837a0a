"""Parameter groups, optimisers, schedule and EMA."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from trainers import optim, vit
from trainers.config import ModelConfig, OptimConfig
from trainers.streams import Streams

CONFIG = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=5, steps=40)


def small_vit(**settings: Any) -> nn.Module:
    model = {"size": "nano", "patch_size": 8, "image_size": 16, "num_registers": 2, "reg_init_std": 0.02, **settings}
    return vit.build(ModelConfig(**model), Streams(0))


def with_heads() -> nn.Module:
    """A backbone with a mask token, and heads as in DINO; 4 blocks, names as in a method."""
    backbone = small_vit(layer_scale=1e-5)
    backbone.mask_token = nn.Parameter(torch.zeros(1, 64))
    head = nn.ModuleDict({"mlp": nn.Linear(64, 8), "last_layer": nn.Linear(8, 16, bias=False)})
    return nn.ModuleDict({"backbone": backbone, "head": head})


def names_of(module: nn.Module, group: dict[str, Any]) -> list[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


BLOCK = ("norm1.weight", "norm1.bias", "attn.qkv.bias", "attn.proj.bias", "ls1.gamma", "norm2.weight")
BLOCK += ("norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias", "ls2.gamma")
VECTORS = {f"backbone.blocks.{i}.{name}" for i in range(4) for name in BLOCK}
VECTORS |= {"backbone.patch_embed.proj.bias", "backbone.norm.weight", "backbone.norm.bias"}


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, {"cls_token", "pos_embed"}),  # facebookresearch/deit, timm
        ({"decay_tokens": None, "decay_registers": None}, {"cls_token", "pos_embed"}),
        ({"decay_registers": False}, {"cls_token", "pos_embed", "reg_token"}),
        ({"decay_tokens": "position"}, {"cls_token"}),  # mlfoundations/open_clip
        ({"decay_tokens": "all"}, set()),  # facebookresearch/dino, facebookresearch/dinov2
        ({"decay_tokens": "all", "decay_registers": False}, {"reg_token"}),
    ],
    ids=str,
)
def test_two_groups_of_a_vit(settings: dict[str, Any], tokens: set[str]) -> None:
    module = nn.ModuleDict({"backbone": small_vit(), "head": nn.Linear(64, 10)})
    groups = optim.parameter_groups(module, OptimConfig(weight_decay=0.05, **settings))
    assert [(group["weight_decay"], group["decayed"]) for group in groups] == [(0.05, True), (0.0, False)]
    assert [(group["lr_scale"], group["last_layer"]) for group in groups] == [(1.0, False)] * 2
    decayed, kept = (names_of(module, group) for group in groups)
    assert set(kept) == VECTORS | {"head.bias"} | {f"backbone.{name}" for name in tokens}
    order = [name for name, _ in module.named_parameters()]
    assert decayed == [name for name in order if name not in kept]
    assert kept == [name for name in order if name not in decayed]


def test_mask_tokens_are_decayed_with_the_class_token() -> None:
    module = with_heads()
    for decay_tokens, expected in (("none", False), ("position", False), ("all", True)):
        groups = optim.parameter_groups(module, OptimConfig(decay_tokens=decay_tokens))  # type: ignore[arg-type]
        found = {group["decayed"] for group in groups if "backbone.mask_token" in names_of(module, group)}
        assert found == {expected}


def test_prototypes_are_a_group_of_their_own() -> None:
    module = with_heads()
    groups = optim.parameter_groups(module, OptimConfig())
    assert [names_of(module, g) for g in groups if g["last_layer"]] == [["head.last_layer.weight"]]
    assert [(g["decayed"], g["last_layer"]) for g in groups] == [(True, False), (True, True), (False, False)]


def test_learning_rates_by_layer() -> None:
    """As facebookresearch/dinov2:dinov2/utils/param_groups.py gives them: 0.5 for each layer below the heads."""
    module = with_heads()
    config = OptimConfig(layer_decay=0.5, patch_embed_lr_scale=0.2)
    scales = {
        name: group["lr_scale"] for group in optim.parameter_groups(module, config) for name in names_of(module, group)
    }
    assert len(scales) == len(list(module.parameters()))
    for name in ("cls_token", "pos_embed", "mask_token", "reg_token"):
        assert scales.pop(f"backbone.{name}") == 0.5**5
    for name in ("weight", "bias"):
        assert scales.pop(f"backbone.patch_embed.proj.{name}") == pytest.approx(0.2 * 0.5**5, rel=1e-12)
        assert scales.pop(f"backbone.norm.{name}") == 1.0
    for name, scale in scales.items():
        block = int(name.split(".")[2]) if name.startswith("backbone.blocks.") else None
        assert scale == (1.0 if block is None else 0.5 ** (4 - block)), name


def test_blocks_of_other_parts_have_the_full_learning_rate() -> None:
    text = nn.ModuleDict({"resblocks": nn.ModuleList([nn.Linear(2, 2)]), "blocks": nn.ModuleList([nn.Linear(2, 2)])})
    module = nn.ModuleDict({"backbone": small_vit(), "text": text})
    groups = optim.parameter_groups(module, OptimConfig(layer_decay=0.5))
    full = {name for group in groups if group["lr_scale"] == 1.0 for name in names_of(module, group)}
    assert {name for name, _ in module.named_parameters() if name.startswith("text.")} <= full


def test_a_bare_backbone_decays_by_layer_too() -> None:
    groups = optim.parameter_groups(small_vit(), OptimConfig(layer_decay=0.5))
    assert {group["lr_scale"] for group in groups} == {0.5**layer for layer in range(6)}


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(3, 3).requires_grad_(False)
    assert optim.parameter_groups(module, OptimConfig()) == []


def test_schedule_equals_timms() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=CONFIG.lr)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=35, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(41):
        scheduler.step_update(step)
        assert optim.learning_rate(step, CONFIG) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_schedule_at_points_worked_out_by_hand() -> None:
    assert optim.learning_rate(0, CONFIG) == 1e-6
    assert optim.learning_rate(1, CONFIG) == pytest.approx(1e-6 + 0.999e-3 / 5)
    assert optim.learning_rate(5, CONFIG) == 1e-3
    halfway = OptimConfig(lr=1e-3, min_lr=0.0, warmup_steps=0, steps=10)
    assert optim.learning_rate(0, halfway) == 1e-3
    assert optim.learning_rate(5, halfway) == pytest.approx(0.5e-3)
    assert optim.learning_rate(10, halfway) == 0.0
    only_warmup = OptimConfig(lr=1e-3, warmup_steps=4, steps=4)
    assert optim.learning_rate(4, only_warmup) == 1e-3


def test_dinos_schedule_at_points_worked_out_by_hand() -> None:
    config = OptimConfig(schedule="dino", lr=1e-3, min_lr=1e-6, warmup_lr=0.0, warmup_steps=5, steps=9)
    rates = [optim.learning_rate(step, config) for step in range(10)]
    half = 0.5 * 0.999e-3 * 2**-0.5
    expected = [0.0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 0.5005e-3 + half, 0.5005e-3, 0.5005e-3 - half, 1e-6]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert optim.learning_rate(0, config.model_copy(update={"warmup_lr": 1e-4})) == 1e-4
    at_once = OptimConfig(schedule="dino", lr=1e-3, min_lr=0.0, warmup_steps=0, steps=2)
    assert [optim.learning_rate(step, at_once) for step in range(2)] == pytest.approx([1e-3, 0.5e-3])


def test_open_clips_schedule_at_points_worked_out_by_hand() -> None:
    config = OptimConfig(schedule="open_clip", lr=1e-3, min_lr=None, warmup_lr=None, warmup_steps=4, steps=8)
    rates = [optim.learning_rate(step, config) for step in range(9)]
    half = 0.5e-3 * 2**-0.5
    expected = [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 0.5e-3 + half, 0.5e-3, 0.5e-3 - half, 0.0]
    assert rates == pytest.approx(expected, abs=1e-18)
    whatever = config.model_copy(update={"min_lr": 1e-4, "warmup_lr": 1e-4})
    assert [optim.learning_rate(step, whatever) for step in range(9)] == rates


def test_weight_decay_at_points_worked_out_by_hand() -> None:
    assert {optim.weight_decay(step, OptimConfig(weight_decay=0.05)) for step in (0, 7, 10_000)} == {0.05}
    config = OptimConfig(weight_decay=0.04, weight_decay_end=0.4, warmup_steps=2, steps=4)
    half = 0.18 * 2**-0.5
    expected = [0.04, 0.22 - half, 0.22, 0.22 + half, 0.4]
    assert [optim.weight_decay(step, config) for step in range(5)] == pytest.approx(expected, rel=1e-12)


def test_what_is_set_reaches_the_groups_it_is_for() -> None:
    module = with_heads()
    config = OptimConfig(lr=1.0, warmup_steps=0, weight_decay=0.1, patch_embed_lr_scale=0.25)
    optimizer = optim.build_optimizer(module, config)

    def rates() -> dict[str, tuple[float, float]]:
        groups = optimizer.param_groups
        return {name: (g["lr"], g["weight_decay"]) for g in groups for name in names_of(module, g)}

    assert rates()["backbone.patch_embed.proj.weight"] == (0.25, 0.1)  # from the start
    optim.set_learning_rate(optimizer, 2.0, last_layer_scale=0.0)
    optim.set_weight_decay(optimizer, 0.3)
    after = rates()
    assert after["head.last_layer.weight"] == (0.0, 0.3)
    assert after["head.mlp.weight"] == after["backbone.blocks.0.attn.qkv.weight"] == (2.0, 0.3)
    assert after["backbone.patch_embed.proj.weight"] == (0.5, 0.3)
    assert after["backbone.patch_embed.proj.bias"] == (0.5, 0.0)
    assert after["backbone.norm.weight"] == after["head.mlp.bias"] == (2.0, 0.0)
    optim.set_weight_decay(optimizer, 0.0)  # and back: a schedule may begin or end at 0
    optim.set_weight_decay(optimizer, 0.2)
    assert rates()["head.mlp.weight"] == (2.0, 0.2) and rates()["head.mlp.bias"] == (2.0, 0.0)


def test_groups_of_a_checkpoint_that_does_not_say_what_is_decayed() -> None:
    module = nn.Linear(2, 2)
    optimizer = optim.build_optimizer(module, OptimConfig(weight_decay=0.1, warmup_steps=0))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for name in ("decayed", "lr_scale", "last_layer"):
            del group[name]
    optimizer.load_state_dict(state)
    optim.set_learning_rate(optimizer, 0.5)
    optim.set_weight_decay(optimizer, 0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]


def test_epsilon_reaches_the_optimiser() -> None:
    for name in ("adamw", "lamb"):
        config = OptimConfig(optimizer=name, eps=1e-3, warmup_steps=0)  # type: ignore[arg-type]
        assert {group["eps"] for group in optim.build_optimizer(nn.Linear(2, 2), config).param_groups} == {1e-3}
    optim.build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="sgd", eps=None, warmup_steps=0))


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, steps: range) -> None:
    for step in steps:
        optim.set_learning_rate(optimizer, optim.learning_rate(step, config))
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(inputs).pow(2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_resumed_optimiser_is_bit_identical(name: str) -> None:
    config = OptimConfig(optimizer=name, lr=0.1, warmup_steps=2, steps=10)  # type: ignore[arg-type]
    undisturbed = nn.Linear(3, 2)
    start = copy.deepcopy(undisturbed)
    trained(undisturbed, optim.build_optimizer(undisturbed, config), config, range(10))

    optimizer = optim.build_optimizer(start, config)
    trained(start, optimizer, config, range(6))
    file = io.BytesIO()
    torch.save({"module": start.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = nn.Linear(3, 2)
    resumed.load_state_dict(saved["module"])
    optimizer = optim.build_optimizer(resumed, config)
    optimizer.load_state_dict(saved["optimizer"])
    trained(resumed, optimizer, config, range(6, 10))
    assert torch.equal(resumed.weight, undisturbed.weight) and torch.equal(resumed.bias, undisturbed.bias)


def one_step(name: str, **settings: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights before and after one step with gradient 2 everywhere and learning rate 0.1."""
    config = OptimConfig(optimizer=name, lr=0.1, warmup_steps=0, steps=2, **settings)  # type: ignore[arg-type]
    module = nn.Linear(4, 1, bias=False)
    before = module.weight.detach().clone()
    module.weight.grad = torch.full_like(module.weight, 2.0)
    optim.build_optimizer(module, config).step()
    return before, module.weight.detach()


def test_first_steps_worked_out_by_hand() -> None:
    before, after = one_step("adamw", weight_decay=0.5)
    torch.testing.assert_close(after, before * (1 - 0.1 * 0.5) - 0.1)  # m̂ / √v̂ is the gradient's sign
    before, after = one_step("sgd", weight_decay=0.0, beta1=0.9)
    torch.testing.assert_close(after, before - 0.1 * (2.0 + 0.9 * 2.0))  # Nesterov: g + momentum · buffer
    before, after = one_step("lamb", weight_decay=0.5)
    update = 1.0 + 0.5 * before
    torch.testing.assert_close(after, before - 0.1 * update * before.norm() / update.norm())  # trust ratio


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.count: torch.Tensor
        self.register_buffer("count", torch.tensor(0))


def test_ema_worked_out_by_hand() -> None:
    module = WithBuffer()
    ema = optim.EMA(module, decay=0.75)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([5.0, 6.0]))
        module.count += 3
    ema.update(module)
    assert ema.module.get_parameter("weight").tolist() == [2.0, 3.0]
    assert int(ema.module.get_buffer("count")) == 3
    ema.update(module)
    assert ema.module.get_parameter("weight").tolist() == [2.75, 3.75]
    assert not ema.module.training and not ema.module.get_parameter("weight").requires_grad

    other = optim.EMA(WithBuffer(), decay=0.75)
    other.load_state_dict(ema.state_dict())
    assert other.module.get_parameter("weight").tolist() == [2.75, 3.75]
    with pytest.raises(ValueError, match="allowed: 0 to below 1"):
        optim.EMA(module, decay=1.0)


def test_ema_of_a_vit() -> None:
    backbone = small_vit()
    ema = optim.EMA(backbone, decay=0.9)
    ema.update(backbone)
    for (name, own), other in zip(ema.module.named_parameters(), backbone.parameters(), strict=True):
        assert torch.allclose(own, other), name
