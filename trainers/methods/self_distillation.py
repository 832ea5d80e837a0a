"""What DINO and DINOv2 share: the projection head with its prototypes, and a teacher that follows the student.

Shapes: n rows, D width of the backbone, K prototypes.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.method_settings import HeadConfig
from trainers.methods import initialise_
from trainers.streams import Streams

M = TypeVar("M", bound=nn.Module)


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
