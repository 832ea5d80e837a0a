"""What every training method is to the loop: views of a batch, losses, a step's end, and the evaluated weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers.config import TrialConfig
from trainers.ragged import Images
from trainers.streams import Streams
from trainers.vit import Tokens

Views = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """A rank's images of a micro-batch, uint8 [B, H, W, 3] or Ragged, and what belongs to them, on the device.

    Random numbers are drawn for all `total` images of the micro-batch, and the rows `own` of them used: with several
    ranks each holds B of the total.

    Attributes:
        targets: what the data set provides; `classes` is int64 [B].
        prepared: what the method's `prepare` made of them, tensors [B, …] still on the CPU, so that `views` can
            look at their values without waiting for the device.
        first: where the first of these images stands in the micro-batch of all ranks.
        total: images of that micro-batch; 0 stands for B.
    """

    images: Images
    targets: Mapping[str, Tensor]
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    first: int = 0
    total: int = 0

    @property
    def drawn(self) -> int:
        """For how many images random numbers are drawn."""
        return self.total or len(self.images)

    @property
    def own(self) -> slice:
        """Which of these belong to the images here."""
        return slice(self.first, self.first + len(self.images))


@dataclass(frozen=True)
class Upcoming:
    """A batch that the loader's thread is about to read: what `prepare` may depend on, besides the seed.

    Attributes:
        step: optimiser steps done before it.
        batch_size: images of all ranks and micro-batches.
        positions: int64 [n], where in that batch this rank's images stand.
        captions: of this rank's images, where the data set provides them and the method needs them.
    """

    step: int
    batch_size: int
    positions: NDArray[np.int64]
    captions: Sequence[str] | None = None


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` optimiser steps done of `steps`, in micro-batch `part` of `parts`."""

    step: int
    steps: int
    part: int = 0
    parts: int = 1


class Method(nn.Module, ABC):
    """A training method; its mathematics stands whole in its own file.

    Of every step the loop calls `views`, then `losses` under autocast, sums and goes backward, for each micro-batch;
    then `before_update`, `clip_gradients`, the optimiser's step, and `after_step`. `prepare` is called in the loader's
    thread, ahead of time. A method never reports, never saves and never reads the clock. All random numbers come from
    `streams`, drawn on the CPU; those of `prepare` from `streams.seed_for` and the step alone. What must survive an
    interruption is a parameter or a buffer.

    With several ranks (`trainers.distributed`) each calls all this on its own rows; gradients are averaged over ranks,
    so that a loss is a mean over images, and whatever couples images of several ranks is summed or gathered by the
    method.

    Attributes:
        accumulation: "mean" where the loss of a batch is the mean over its micro-batches, "cached" where `remember` and
            `losses` divide the work, "none" where a batch is one micro-batch (trainers.catalog says so too).
    """

    accumulation: Literal["mean", "cached", "none"] = "mean"

    def __init__(self, config: TrialConfig, backbone: nn.Module, num_classes: int, streams: Streams) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.num_classes = num_classes
        self.streams = streams

    def train(self, mode: bool = True) -> Method:
        """As `nn.Module.train`, but parts without a parameter that learns (teachers) stay in evaluation mode."""
        super().train(mode)
        for part in self.children():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        return self

    def prepare(self, upcoming: Upcoming) -> dict[str, Tensor]:
        """CPU tensors [n, …] for the images of a batch, from the seed and `upcoming` alone: tokens, masks."""
        return {}

    @abstractmethod
    def views(self, batch: Batch, streams: Streams) -> Views:
        """Augmented inputs and targets of a micro-batch, with parameters drawn per image."""

    @abstractmethod
    def losses(self, views: Views, progress: Progress) -> dict[str, Tensor]:
        """Named scalar losses, weights included; the loop sums them."""

    def forward(self, views: Views, progress: Progress) -> dict[str, Tensor]:
        """`losses`, under the name by which PyTorch's DistributedDataParallel calls it."""
        return self.losses(views, progress)

    def remember(self, views: Sequence[Views], progress: Progress) -> None:
        """With accumulation "cached" and several micro-batches: called with all views before `losses` of each."""

    def before_update(self, progress: Progress) -> None:
        """Called when all gradients are there, unscaled: a method may drop some."""

    def clip_gradients(self, max_norm: float) -> None:
        """Limit the norm of all gradients together; methods whose recipe clips otherwise override this."""
        nn.utils.clip_grad_norm_(self.parameters(), max_norm)

    def last_layer_lr_scale(self, progress: Progress) -> float:
        """Factor of the learning rate of parameters whose name contains `last_layer`."""
        return 1.0

    def after_step(self, progress: Progress) -> None:
        """Called after each optimiser step: teacher, centre; `progress.step` is that of the step just done."""

    def class_tokens(self, tokens: Tokens) -> Tensor:
        """The class tokens [B, D].

        Raises:
            ValueError: the backbone has none.
        """
        if tokens.cls_BD is None:
            raise ValueError(
                f"method {self.config.method} learns from the class token, which this backbone does not have"
            )
        return tokens.cls_BD

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
