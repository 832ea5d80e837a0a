"""Parameter groups, optimisers by name, schedules of learning rate and weight decay, averaged weights (EMA)."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from timm.optim.lamb import Lamb
from torch import Tensor, nn

from trainers import schedules
from trainers.config import OptimConfig

# What has two or more dimensions and still no weight decay unless `optim.decay_tokens` says so.
_UNDECAYED = {
    "none": ("cls_token", "mask_token", "pos_embed"),  # facebookresearch/deit:models_v2.py, `no_weight_decay`
    "position": ("cls_token", "mask_token"),  # open_clip's class token is a vector, its position embedding a matrix
    "all": (),  # facebookresearch/dino:utils.py, facebookresearch/dinov2:dinov2/utils/param_groups.py
}
_REGISTERS = "reg_token"
_LAST_LAYER = "last_layer"  # in the names of prototypes
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
# Parameters of the backbone before its first block, which share the learning rate of layer 0.
_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "mask_token", _REGISTERS, "norm_pre")


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Groups of all parameters that are trained: those with weight decay first, each group in the module's order.

    Never decayed: biases, norms and LayerScale (everything with fewer than two dimensions). Class and mask token,
    position embedding and registers as `optim` says. A group has, besides `params` and `weight_decay`:

        decayed     whether `set_weight_decay` is for it
        lr_scale    layer_decay^(L + 1 - l) for layer l of the L blocks of `module.backbone` (`module` itself where it
                    has none): 0 for what comes before the first block, L + 1 for the final norm, for the heads and
                    for all else; the patch embedding's is multiplied by `patch_embed_lr_scale`
        last_layer  whether it holds prototypes, whose learning rate can be scaled apart

    Parameters that share all three are one group: two in all where `optim` asks for nothing special.
    Source: facebookresearch/dinov2:dinov2/utils/param_groups.py.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    scales = _lr_scales(module, optim)
    undecayed = _UNDECAYED[optim.decay_tokens or "none"]
    undecayed += () if optim.decay_registers is not False else (_REGISTERS,)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and name.rpartition(".")[2] not in undecayed
            key = (decayed, scales.get(id(parameter), 1.0), _LAST_LAYER in name)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "decayed": decayed,
            "lr_scale": lr_scale,
            "last_layer": last_layer,
        }
        for (decayed, lr_scale, last_layer), parameters in sorted(groups.items(), key=lambda group: not group[0][0])
    ]


def _lr_scales(module: nn.Module, optim: OptimConfig) -> dict[int, float]:
    """Factors of the learning rate of the backbone's parameters, by their id."""
    named = list(getattr(module, "backbone", module).named_parameters())
    blocks = [int(found[1]) for name, _ in named if (found := _BLOCK.search(name))]
    last = max(blocks, default=-1) + 2
    scales = {}
    for name, parameter in named:
        block = _BLOCK.search(name)
        layer = int(block[1]) + 1 if block else 0 if name.startswith(_EMBEDDINGS) else last
        scale = optim.layer_decay ** (last - layer)
        scales[id(parameter)] = scale * optim.patch_embed_lr_scale if name.startswith("patch_embed.") else scale
    return scales


def build_optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser that `optim` names, at the learning rate and weight decay of step 0.

    lamb is timm's, which like the official FusedLAMB first scales all gradients to a norm of at most 1. sgd has
    Nesterov momentum `beta1`.
    """
    groups = parameter_groups(module, optim)
    lr, betas = learning_rate(0, optim), (optim.beta1, optim.beta2)
    built: torch.optim.Optimizer
    if optim.optimizer == "adamw":
        built = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=_known(optim.eps), fused=True)
    elif optim.optimizer == "lamb":
        built = Lamb(groups, lr=lr, betas=betas, eps=_known(optim.eps), max_grad_norm=1.0)
    else:
        built = torch.optim.SGD(groups, lr=lr, momentum=optim.beta1, nesterov=optim.beta1 > 0, fused=True)
    set_learning_rate(built, lr)
    return built


def _known(value: float | None) -> float:
    assert value is not None, "the configuration is not resolved"
    return value


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Learning rate of the step after `step` steps are done (0 … steps - 1), with w = warmup_steps and T = steps.

    timm: warmup_lr + (lr - warmup_lr) · step / w before w, then
        min_lr + (lr - min_lr) · (1 + cos(π · (step - w) / (T - w))) / 2, which is lr at w and min_lr at T. Equals
        timm's CosineLRScheduler with `warmup_prefix=True`; the official code of DeiT-III leaves that off, so that
        there the cosine has already begun when the warm-up ends, and goes on once an epoch instead of every step.
    dino: `schedules.cosine`, whose warm-up of w values ends with lr, which the cosine then repeats; DINO and DINOv2
        begin at a `warmup_lr` of 0.
    open_clip: lr · (step + 1) / w before w, then lr · (1 + cos(π · (step - w) / (T - w))) / 2, whatever `warmup_lr` and
        `min_lr` (mlfoundations/open_clip:src/open_clip_train/scheduler.py, `cosine_lr`).
    """
    warmup = optim.warmup_steps
    assert isinstance(warmup, int), "the configuration is not resolved"
    if optim.schedule == "open_clip":
        if step < warmup:
            return optim.lr * (step + 1) / warmup
        return _cosine_after_warmup(step, warmup, optim.steps, optim.lr, 0.0)
    start, end = _known(optim.warmup_lr), _known(optim.min_lr)
    if optim.schedule == "dino":
        return schedules.cosine(step, base=optim.lr, final=end, total=optim.steps, warmup=warmup, start=start)
    if step < warmup:
        return start + (optim.lr - start) * step / warmup
    return _cosine_after_warmup(step, warmup, optim.steps, optim.lr, end)


def _cosine_after_warmup(step: int, warmup: int, steps: int, peak: float, end: float) -> float:
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return end + (peak - end) * (1.0 + math.cos(math.pi * done)) / 2.0


def weight_decay(step: int, optim: OptimConfig) -> float:
    """Weight decay of the step after `step` steps are done: constant, or a cosine over all steps without warm-up.

    Source: facebookresearch/dino:main_dino.py, facebookresearch/dinov2:dinov2/train/train.py.
    """
    if optim.weight_decay_end is None:
        return optim.weight_decay
    return schedules.cosine(step, base=optim.weight_decay, final=optim.weight_decay_end, total=optim.steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, last_layer_scale: float = 1.0) -> None:
    """Give all groups the learning rate `lr` times their `lr_scale`, prototypes times `last_layer_scale` as well."""
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        group["lr"] = lr * scale * (last_layer_scale if group.get("last_layer") else 1.0)


def set_weight_decay(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give the groups of decayed parameters the weight decay `value`."""
    for group in optimizer.param_groups:
        if group.get("decayed", group["weight_decay"] > 0.0):  # older checkpoints bring groups that do not say
            group["weight_decay"] = value


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
