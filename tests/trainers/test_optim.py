"""Parameter groups, optimisers, schedule and EMA."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from trainers import optim, vit
from trainers.config import ModelConfig, OptimConfig
from trainers.streams import Streams

CONFIG = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=5, steps=40)


def small_vit() -> nn.Module:
    return vit.build(
        ModelConfig(size="nano", patch_size=8, image_size=16, num_registers=2, reg_init_std=0.02), Streams(0)
    )


def names_without_decay(module: nn.Module, decay_registers: bool) -> set[str]:
    groups = optim.parameter_groups(module, 0.05, decay_registers=decay_registers)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)] for parameter in groups[1]["params"]}


def test_groups_of_a_vit() -> None:
    module = nn.ModuleDict({"backbone": small_vit(), "head": nn.Linear(64, 10)})
    block = ("norm1.weight", "norm1.bias", "attn.qkv.bias", "attn.proj.bias", "ls1.gamma", "norm2.weight")
    block += ("norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias", "ls2.gamma")
    expected = {f"backbone.blocks.{i}.{name}" for i in range(4) for name in block}
    expected |= {f"backbone.{name}" for name in ("cls_token", "pos_embed", "patch_embed.proj.bias")}
    expected |= {"backbone.norm.weight", "backbone.norm.bias", "head.bias"}
    assert names_without_decay(module, decay_registers=True) == expected
    assert names_without_decay(module, decay_registers=False) == expected | {"backbone.reg_token"}


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(3, 3).requires_grad_(False)
    assert optim.parameter_groups(module, 0.05) == []


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
