"""What every training method is to the loop: views of a batch, losses, a step's end, and the evaluated weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainers.config import TrialConfig
from trainers.streams import Streams

Views = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Images uint8 [B, H, W, 3] and their targets, on the device; `classes` is int64 [B]."""

    images: Tensor
    targets: Mapping[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` optimiser steps done of `steps`."""

    step: int
    steps: int


class Method(nn.Module, ABC):
    """A training method; its mathematics stands whole in its own file.

    The loop calls `views`, then `losses` under autocast, sums and steps, then `after_step`. A method never reports,
    never saves and never reads the clock. All random numbers come from `streams`, drawn on the CPU.
    """

    def __init__(self, config: TrialConfig, backbone: nn.Module, num_classes: int, streams: Streams) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.num_classes = num_classes
        self.streams = streams

    @abstractmethod
    def views(self, batch: Batch, streams: Streams) -> Views:
        """Augmented inputs and targets of a batch, with parameters drawn per image."""

    @abstractmethod
    def losses(self, views: Views, progress: Progress) -> dict[str, Tensor]:
        """Named scalar losses, weights included; the loop sums them."""

    def after_step(self, progress: Progress) -> None:
        """Called after each optimiser step: teacher, centre."""

    def evaluated(self) -> nn.Module:
        """The backbone that is evaluated, as the recipe says; the raw one unless a method overrides this."""
        return self.backbone


def initialise_(tensor: Tensor, purpose: str, streams: Streams, std: float = 0.02) -> None:
    """Fill `tensor` from N(0, std²) cut at ±2 (timm's `trunc_normal_`), drawn from the stream `init:purpose`."""
    generator = torch.Generator().manual_seed(streams.seed_for(f"init:{purpose}"))
    with torch.no_grad():
        drawn = torch.empty(tensor.shape)
        nn.init.trunc_normal_(drawn, std=std, a=-2.0, b=2.0, generator=generator)
        tensor.copy_(drawn)
