"""What DINO and DINOv2 share: the projection head with its prototypes, the cross-entropy, and the teacher's path.

Shapes: n rows, D width of the backbone, K prototypes, V views, M rows that each view has.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.method_settings import DinoConfig, DinoV2Config, HeadConfig
from trainers.methods import Progress, initialise_
from trainers.schedules import cosine, linear_then_constant
from trainers.streams import Streams

M = TypeVar("M", bound=nn.Module)

_CACHE_VALUES = 2**18  # float32 values (1 MiB) that a CPU works on at once, so that they stay in its cache
_DEVICE_VALUES = 2**26  # and a GPU (256 MiB), so that it is busy and its memory holds few of the temporary tensors


class PrototypeHead(nn.Module):
    """MLP, L2-normalised bottleneck, and similarities to prototypes of unit length.

    Source: facebookresearch/dino:vision_transformer.py, facebookresearch/dinov2:dinov2/layers/dino_head.py (`DINOHead`
    without batch norm).

    Args:
        width: D.
        settings: sizes.
        streams: every weight is initialised from a stream of its own name, whatever the number of registers.
        purpose: name of this head in those streams.
        learned_gain: let each prototype's length, 1 at first, be learned as in DINOv2; DINO fixes it by default.
    """

    def __init__(
        self, width: int, settings: HeadConfig, streams: Streams, purpose: str, *, learned_gain: bool = False
    ) -> None:
        super().__init__()
        sizes = [width, *[settings.hidden] * (settings.layers - 1), settings.bottleneck]
        self.mlp = nn.Sequential()
        for i in range(settings.layers):
            if i:
                self.mlp.append(nn.GELU())
            self.mlp.append(nn.Linear(sizes[i], sizes[i + 1]))
        for name, parameter in self.mlp.named_parameters():
            if name.endswith(".weight"):
                initialise_(parameter, f"{purpose}.mlp.{name}", streams, std=0.02)
            else:
                nn.init.zeros_(parameter)
        seed = streams.seed_for(f"init:{purpose}.last_layer")
        self.last_layer = Prototypes(settings, torch.Generator().manual_seed(seed), learned_gain)

    def forward(self, x_nD: Tensor) -> Tensor:
        """Logits [n, K]."""
        bottleneck = F.normalize(self.mlp(x_nD).float(), dim=-1)
        logits_nK: Tensor = self.last_layer(bottleneck)
        return logits_nK


class Prototypes(nn.Module):
    """Linear layer without bias whose rows have length 1, or the learned length `weight_g` [K, 1]."""

    def __init__(self, settings: HeadConfig, generator: torch.Generator, learned_gain: bool) -> None:
        super().__init__()
        bound = settings.bottleneck**-0.5  # PyTorch's own for a linear layer, which DINO leaves as it is
        drawn = torch.empty(settings.prototypes, settings.bottleneck).uniform_(-bound, bound, generator=generator)
        self.weight_v = nn.Parameter(drawn)
        if learned_gain:
            self.weight_g = nn.Parameter(torch.ones(settings.prototypes, 1))
        self.learned_gain = learned_gain

    def forward(self, x: Tensor) -> Tensor:
        """Products [n, K] with the rows."""
        weight = F.normalize(self.weight_v, dim=1)
        return F.linear(x, weight * self.weight_g if self.learned_gain else weight)


def teacher_copy(module: M) -> M:
    """A copy of the student's `module` for the teacher: in evaluation mode, without gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def move_teacher_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Every parameter of the teacher := momentum · teacher + (1 - momentum) · student, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)


def teacher_temp(settings: DinoConfig | DinoV2Config, step: int) -> float:
    """Temperature of the teacher at a step: a linear warm-up, then constant."""
    warmup = settings.warmup_teacher_temp_steps
    return linear_then_constant(step, settings.warmup_teacher_temp, settings.teacher_temp, warmup)


def teacher_momentum(settings: DinoConfig | DinoV2Config, progress: Progress) -> float:
    """How much of the teacher stays after a step: on a cosine from start to end over the whole training."""
    base, final = settings.teacher_momentum, settings.teacher_momentum_end
    return cosine(progress.step, base=base, final=final, total=progress.steps)


def cross_entropy(student_VMK: Tensor, teacher_MK: Tensor, temp: float) -> Tensor:
    """-Σ_K teacher · log softmax(student / temp), float32 [V, M]; the gradient is the student's alone."""
    return cast(Tensor, _CrossEntropy.apply(student_VMK, teacher_MK, temp))


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits alone for the backward pass and works on no more rows at once than `_pieces` allows.

    Written with PyTorch's own operations it would keep two more float32 tensors of the logits' size: the largest of all
    in training with 65,536 prototypes.
    """

    @staticmethod
    def forward(ctx: Any, student_VMK: Tensor, teacher_MK: Tensor, temp: float) -> Tensor:
        ctx.save_for_backward(student_VMK, teacher_MK)
        ctx.temp = temp
        result = torch.empty(student_VMK.shape[:2], device=student_VMK.device)
        for rows in _pieces(student_VMK):
            log_probabilities = torch.log_softmax(divided(student_VMK[:, rows], temp), dim=-1)
            result[:, rows] = log_probabilities.mul_(teacher_MK[rows]).sum(dim=-1).neg_()
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        student_VMK, teacher_MK = ctx.saved_tensors
        scale_VM1 = gradients[0][:, :, None] / ctx.temp
        result = torch.empty_like(student_VMK)
        for rows in _pieces(student_VMK):
            targets = teacher_MK[rows]
            scale = scale_VM1[:, rows]
            gradient = torch.softmax(divided(student_VMK[:, rows], ctx.temp), dim=-1)
            gradient.mul_(targets.sum(dim=-1, keepdim=True) * scale)
            result[:, rows] = gradient.addcmul_(targets, scale, value=-1.0)
        return result, None, None


def _pieces(student_VMK: Tensor) -> list[slice]:
    views, count, prototypes = student_VMK.shape
    values = _CACHE_VALUES if student_VMK.device.type == "cpu" else _DEVICE_VALUES
    piece = max(1, values // (views * prototypes))
    return [slice(start, start + piece) for start in range(0, count, piece)]


def divided(logits: Tensor, temp: float) -> Tensor:
    """Logits / temp in float32, one new tensor whatever precision they have."""
    return logits / temp if logits.dtype == torch.float32 else logits.float().div_(temp)
