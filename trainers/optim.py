"""Parameter groups, optimisers by name, the learning-rate schedule and the averaged weights (EMA)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from timm.optim.lamb import Lamb
from torch import Tensor, nn

from trainers.config import OptimConfig

NEVER_DECAYED = ("cls_token", "pos_embed")  # facebookresearch/deit:models_v2.py, `no_weight_decay`
REGISTERS = "reg_token"


def parameter_groups(module: nn.Module, weight_decay: float, *, decay_registers: bool = True) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay, of all parameters that are trained, in the module's order.

    Not decayed: biases, norms and LayerScale (everything with fewer than two dimensions), class token, position
    embedding.

    Args:
        module: holds the parameters.
        weight_decay: of the first group.
        decay_registers: DINOv2 decays them (the default), timm does not.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    excluded = NEVER_DECAYED if decay_registers else (*NEVER_DECAYED, REGISTERS)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_kept = parameter.ndim < 2 or name.rpartition(".")[2] in excluded
            (kept if is_kept else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, optim: OptimConfig, *, decay_registers: bool = True) -> torch.optim.Optimizer:
    """The optimiser that `optim` names, at the learning rate of step 0.

    lamb is timm's, which like the official FusedLAMB first scales all gradients to a norm of at most 1. sgd has
    Nesterov momentum `beta1`.
    """
    groups = parameter_groups(module, optim.weight_decay, decay_registers=decay_registers)
    lr, betas = learning_rate(0, optim), (optim.beta1, optim.beta2)
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)
    if optim.optimizer == "lamb":
        # eps: 1e-8 is `--opt-eps` of facebookresearch/deit:main.py
        lamb: torch.optim.Optimizer = Lamb(groups, lr=lr, betas=betas, eps=1e-8, max_grad_norm=1.0)
        return lamb
    return torch.optim.SGD(groups, lr=lr, momentum=optim.beta1, nesterov=optim.beta1 > 0, fused=True)


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Learning rate of the step after `step` steps are done (0 … steps - 1).

    With w = warmup_steps and T = steps: warmup_lr + (lr - warmup_lr) · step / w before w, then
    min_lr + (lr - min_lr) · (1 + cos(π · (step - w) / (T - w))) / 2, which is lr at w and min_lr at T.
    Equals timm's CosineLRScheduler with `warmup_prefix=True`; the official code leaves that off, so that there the
    cosine has already begun when the warm-up ends.
    """
    warmup = optim.warmup_steps
    assert isinstance(warmup, int), "the configuration is not resolved"
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    done = min(1.0, (step - warmup) / max(1, optim.steps - warmup))
    return optim.min_lr + (optim.lr - optim.min_lr) * (1.0 + math.cos(math.pi * done)) / 2.0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give all parameter groups the learning rate `lr`, times their own `lr_scale` where they have one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class EMA:
    """Exponential moving average of a module's parameters: average ← decay · average + (1 - decay) · parameter.

    Starts as a copy. Buffers are copied as they are. `module` is in evaluation mode and needs no gradients.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay is {decay}; allowed: 0 to below 1")
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards `module`, which has the parameters and buffers of the module that this began with."""
        averaged: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(module.parameters())
        torch._foreach_lerp_(averaged, current, weight=1.0 - self.decay)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other, non_blocking=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged module's parameters and buffers."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` gave."""
        self.module.load_state_dict(state)
