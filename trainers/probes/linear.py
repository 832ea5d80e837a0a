"""Linear classification on frozen features: the official DINOv2 protocol, all learning rates trained at once.

Source: facebookresearch/dinov2:dinov2/eval/linear.py. Kept: SGD with momentum 0.9 and no weight decay, cosine to 0,
learning rates per 256 images, weights from N(0, 0.01²), unscaled features, an endless shuffled pass over the images.
Different here: features are extracted once, from the plain view of each image and the last block only (official:
re-extracted from random crops; last 1 and 4 blocks); the learning rate is chosen on a held-out part of the training
features (official: on the evaluated split); class token and class token + mean patch are families of their own.
Shapes: n images, B batch, F features, K learning rates, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from trainers.config import LinearConfig
from trainers.findings import Score
from trainers.probes import Context, classification
from trainers.probes.classification import Features
from trainers.probes.seen import SeenSplit
from trainers.streams import Streams

MOMENTUM = 0.9
INIT_STD = 0.01
HELD_OUT = 0.1
LEAST_HELD_OUT = 50  # fewer tell learning rates apart by chance; but never more than half of the images

_CHUNK = 4_096  # images whose logits are held at a time


@dataclass(frozen=True)
class Head:
    """The head of one family that did best on the held-out images."""

    weight: Tensor  # float32 [F, C]
    bias: Tensor  # float32 [C]
    learning_rate: float  # per 256 images


class Linear:
    """The probe `linear`: see trainers.probes.Probe."""

    reads = frozenset({"cls", "mean_patch"})
    transfers = False

    def __init__(self, settings: LinearConfig, context: Context) -> None:
        self._settings, self._streams = settings, context.streams

    def fit(self, train: SeenSplit, validation: SeenSplit) -> LinearProbe:
        """All heads, of which the best of each family are kept."""
        return fit(classification.features(train), self._settings, self._streams, len(train.data.class_names))


@dataclass(frozen=True)
class LinearProbe:
    """The chosen head of each family."""

    heads: dict[str, Head]

    @torch.no_grad()
    def predict(self, evaluated: Features) -> dict[str, Tensor]:
        """Classes, int64 [n], as `linear/top1` and `linear_mean_patch/top1`; of equal logits the lowest class."""
        inputs = _families(evaluated)
        return {
            f"{family}/top1": torch.cat(
                [
                    torch.addmm(head.bias, part, head.weight).argmax(dim=1)
                    for part in torch.split(inputs[family], _CHUNK)
                ]
            )
            for family, head in self.heads.items()
        }

    def score(self, seen: SeenSplit) -> Iterator[Score]:
        """Top-1 accuracies under the names that `predict` gives."""
        evaluated = classification.features(seen)
        yield from classification.accuracies(self.predict(evaluated), evaluated.classes)


@torch.no_grad()
def fit(train: Features, settings: LinearConfig, streams: Streams, num_classes: int) -> LinearProbe:
    """Train all heads on `train` but a held-out tenth, and keep the best of each family on that tenth.

    The result depends on features, settings and the seed of `streams` alone: it does not matter what was drawn
    before. Both families see the same batches.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(train) < 2:
        raise ValueError(f"linear probing needs at least two training images; there are {len(train)}")
    generator = torch.Generator().manual_seed(streams.seed_for("probe/linear"))
    order = torch.randperm(len(train), generator=generator).to(train.classes.device)
    num_held_out = min(max(round(HELD_OUT * len(train)), LEAST_HELD_OUT), len(train) // 2)
    held_out, kept = train.at(order[:num_held_out]), train.at(order[num_held_out:])
    batches = _batches(len(kept), settings, generator).to(train.classes.device)
    heads = {}
    for family, inputs in _families(kept).items():
        draws = torch.Generator().manual_seed(streams.seed_for(f"probe/{family}"))
        weight = torch.randn(inputs.shape[1], num_classes, generator=draws).mul_(INIT_STD).to(inputs.device)
        weight_FKC, bias_KC = train_heads(inputs, kept.classes, weight, batches, settings)
        best = _best(_families(held_out)[family], held_out.classes, weight_FKC, bias_KC)
        heads[family] = Head(weight_FKC[:, best].clone(), bias_KC[best].clone(), settings.learning_rates[best])
    return LinearProbe(heads)


def _families(features: Features) -> dict[str, Tensor]:
    """Inputs [n, F] of each family; without class token there is only the mean patch."""
    if features.cls is None:
        return {"linear_mean_patch": features.mean_patch}
    return {"linear": features.cls, "linear_mean_patch": torch.cat([features.cls, features.mean_patch], dim=1)}


def _batches(num_images: int, settings: LinearConfig, generator: Generator) -> Tensor:
    """Indices int64 [steps, B]: shuffled passes over the images, one after another."""
    wanted = settings.steps * settings.batch_size
    passes = [torch.randperm(num_images, generator=generator) for _ in range(math.ceil(wanted / num_images))]
    return torch.cat(passes)[:wanted].reshape(settings.steps, settings.batch_size)


@torch.no_grad()
def train_heads(
    inputs_nF: Tensor, classes: Tensor, weight_FC: Tensor, batches: Tensor, settings: LinearConfig
) -> tuple[Tensor, Tensor]:
    """One head for each learning rate from the same start; weight [F, K, C] and bias [K, C].

    All heads are one matrix [F, K · C]. The gradient of the mean cross-entropy, softmax minus one-hot over B, is
    written out, which makes a step a dozen kernels for any number of heads.

    Args:
        inputs_nF: features, float32 [n, F].
        classes: int64 [n].
        weight_FC: initial weight, float32 [F, C]; biases start from 0.
        batches: indices of each step's images, int64 [steps, B].
        settings: learning rates per 256 images, steps, batch size.
    """
    heads, (features, classes_) = len(settings.learning_rates), weight_FC.shape
    weight = weight_FC.repeat(1, heads)  # [F, K · C]
    bias = weight.new_zeros(heads * classes_)
    momentum, bias_momentum = torch.zeros_like(weight), torch.zeros_like(bias)
    peak = weight.new_tensor(settings.learning_rates) * settings.batch_size / 256
    rates = peak.repeat_interleave(classes_)  # of every column
    for step, index in enumerate(batches):
        x_BF = inputs_nF[index]
        target_B11 = classes[index][:, None, None].expand(-1, heads, 1)
        gradient = torch.addmm(bias, x_BF, weight).view(-1, heads, classes_).softmax(dim=2)
        gradient.scatter_add_(2, target_B11, gradient.new_full((), -1.0).expand_as(target_B11))
        gradient_BK = gradient.view(len(index), -1).div_(len(index))
        momentum.mul_(MOMENTUM).addmm_(x_BF.T, gradient_BK)
        bias_momentum.mul_(MOMENTUM).add_(gradient_BK.sum(dim=0))
        now = rates * (0.5 * (1 + math.cos(math.pi * step / len(batches))))
        weight.addcmul_(momentum, now, value=-1)
        bias.addcmul_(bias_momentum, now, value=-1)
    return weight.view(features, heads, classes_), bias.view(heads, classes_)


def _best(inputs: Tensor, classes: Tensor, weight_FKC: Tensor, bias_KC: Tensor) -> int:
    """Which head classifies most images correctly; among equals the one of lower cross-entropy, then the first.

    A head with infinite or NaN logits never wins against one without.
    """
    scores = []
    for head in range(len(bias_KC)):
        logits = torch.addmm(bias_KC[head], inputs, weight_FKC[:, head])
        loss = float(functional.cross_entropy(logits, classes))
        right = int((logits.argmax(dim=1) == classes).sum())
        scores.append((right, -loss) if math.isfinite(loss) else (-1, -math.inf))
    return max(range(len(scores)), key=scores.__getitem__)
