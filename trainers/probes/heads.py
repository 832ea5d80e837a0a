"""Linear classifiers trained together by SGD: many heads of several inputs and learning rates as one step.

Source: facebookresearch/dinov2:dinov2/eval/linear.py (SGD with momentum 0.9 and no weight decay, cosine to 0).
Shapes: B batch, W columns of the wide input, F columns that a head reads, G groups, K heads of a group, one for each
learning rate, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOMENTUM = 0.9

_FEW_CLASSES, _MANY_HEADS = 32, 16


class Group(NamedTuple):
    """Heads that differ in their learning rate alone."""

    columns: slice  # of the wide input, which they read
    start_FC: Tensor  # weight from which all of them start; biases start from 0


class Heads(NamedTuple):
    """What the heads of a group have learned."""

    weight_FKC: Tensor
    bias_KC: Tensor


@torch.no_grad()
def train(batches: Iterable[tuple[Tensor, Tensor]], steps: int, groups: Sequence[Group], rates: Tensor) -> list[Heads]:
    """All heads of all groups, trained on the same batches.

    The weights of all groups are the rows of one matrix [sum of F, K · C], so that a step is one softmax and one update
    for any number of heads, and two matrix products a group. The gradient of the mean cross-entropy, softmax minus
    one-hot over B, is written out.

    Args:
        batches: as many as `steps` of inputs float32 [B, W] and classes int64 [B], all of one size.
        steps: of the cosine.
        groups: what each group reads and starts from.
        rates: learning rates at first, float32 [K], for batches of B.
    """
    trained = _Together(groups, rates)
    for step, (x_BW, classes_B) in enumerate(batches):
        trained.step(x_BW, classes_B, 0.5 * (1 + math.cos(math.pi * step / steps)))
    return trained.heads()


class _Together:
    """Weights, biases and their momenta."""

    def __init__(self, groups: Sequence[Group], rates: Tensor) -> None:
        self._columns = [group.columns for group in groups]
        self._count, self._classes = len(rates), groups[0].start_FC.shape[1]
        ends = torch.tensor([len(group.start_FC) for group in groups]).cumsum(0).tolist()
        self._rows = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self._weight = torch.cat([group.start_FC for group in groups]).repeat(1, self._count)  # [sum of F, K · C]
        self._bias = self._weight.new_zeros(len(groups), self._weight.shape[1])  # [G, K · C]
        self._momentum, self._bias_momentum = torch.zeros_like(self._weight), torch.zeros_like(self._bias)
        self._rates = rates.repeat_interleave(self._classes)  # [K · C]

    def step(self, x_BW: Tensor, classes_B: Tensor, fraction: float) -> None:
        """One step of SGD with this fraction of the learning rates."""
        gradient_GBK = self._gradient(x_BW, classes_B)
        self._momentum.mul_(MOMENTUM)
        self._bias_momentum.mul_(MOMENTUM)
        for group, (columns, rows) in enumerate(zip(self._columns, self._rows, strict=True)):
            self._momentum[rows].addmm_(x_BW[:, columns].T, gradient_GBK[group])
            self._bias_momentum[group].add_(gradient_GBK[group].sum(dim=0))
        now = self._rates * fraction
        self._weight.addcmul_(self._momentum, now, value=-1)
        self._bias.addcmul_(self._bias_momentum, now, value=-1)

    def _gradient(self, x_BW: Tensor, classes_B: Tensor) -> Tensor:
        """Of each group's logits, [G, B, K · C]."""
        batch, groups = len(x_BW), len(self._rows)
        logits = x_BW.new_empty(groups, batch, self._weight.shape[1])
        for group, (columns, rows) in enumerate(zip(self._columns, self._rows, strict=True)):
            torch.addmm(self._bias[group], x_BW[:, columns], self._weight[rows], out=logits[group])
        gradient = _softmax(logits.view(groups, batch, self._count, self._classes))
        target = classes_B[None, :, None, None].expand(groups, -1, self._count, 1)
        gradient.scatter_add_(3, target, gradient.new_full((), -1.0).expand_as(target))
        return gradient.view_as(logits).div_(batch)

    def heads(self) -> list[Heads]:
        """By group."""
        return [
            Heads(self._weight[rows].view(-1, self._count, self._classes), bias.view(self._count, self._classes))
            for rows, bias in zip(self._rows, self._bias, strict=True)
        ]


def _softmax(logits_GBKC: Tensor) -> Tensor:
    """Over classes; PyTorch's takes five times as long on a CPU for many short rows."""
    groups, _, heads, classes = logits_GBKC.shape
    if classes >= _FEW_CLASSES or groups * heads <= _MANY_HEADS:
        return logits_GBKC.softmax(dim=3)
    powers = logits_GBKC.sub_(logits_GBKC.amax(dim=3, keepdim=True)).exp_()
    return powers.div_(powers.sum(dim=3, keepdim=True))
