"""Linear classification on frozen features: the official DINOv2 protocol, all heads trained at once.

Source: facebookresearch/dinov2:dinov2/eval/linear.py. Kept: SGD with momentum 0.9 and no weight decay, cosine to 0,
learning rates per 256 images, weights from N(0, 0.01²), unscaled features, an endless shuffled pass over the images;
heads on class tokens of the last blocks side by side, and on these with the last block's mean patch behind them.
Different here: the two are families of their own, since the mean patch takes in outliers; the best head of a family is
chosen on a held-out part of the training features (official, `select_on: val`: on the evaluated split; here that is
validation even when the test set is evaluated); all learning rates of an input start from the same weights. Without
`crops` features are extracted once, from the plain view of each image.
Shapes: n images, B batch, W columns of the wide input, F columns of a head, K learning rates, C classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

from trainers.config import LinearConfig
from trainers.findings import Arrays, Score
from trainers.probes import Context, HeadDiverged, classification, crops, heads
from trainers.probes.classification import Features
from trainers.probes.crops import RandomCrops
from trainers.probes.heads import Group, Heads
from trainers.probes.linear_inputs import Input, ReadWide, inputs_of, rows_of, wide
from trainers.probes.seen import SeenSplit
from trainers.streams import Streams

INIT_STD = 0.01
HELD_OUT = 0.1
LEAST_HELD_OUT = 50  # fewer tell learning rates apart by chance; but never more than half of the images

_CHUNK = 4_096  # images whose logits are held at a time

log = logging.getLogger(__name__)

Read = Callable[[Tensor], Features]  # positions int64 [B] → what is seen of these images


@dataclass(frozen=True)
class Head:
    """A trained head, and how well it did where heads are chosen."""

    input: Input
    weight: Tensor  # float32 [F, C]
    bias: Tensor  # float32 [C]
    learning_rate: float  # per 256 images
    right: int  # images that it classified correctly
    loss: float  # mean cross-entropy of them


class Linear:
    """The probe `linear`: see trainers.probes.Probe."""

    transfers = False

    def __init__(self, settings: LinearConfig, context: Context) -> None:
        self._settings, self._streams = settings, context.streams
        self._needs = frozenset({"cls", "mean_patch"} | ({"cls_blocks"} if max(settings.blocks) > 1 else set()))
        self.reads = frozenset[str]() if settings.crops else self._needs

    def fit(self, train: SeenSplit, validation: SeenSplit) -> LinearProbe:
        """All heads, of which the best of each family are kept."""
        chosen_on = self._look(validation) if self._settings.select_on == "val" else None
        classes = len(train.data.class_names)
        if not self._settings.crops:
            features = classification.features(train)
            return fit(features, self._settings, self._streams, classes, look=self._look, chosen_on=chosen_on)
        draws = torch.Generator().manual_seed(self._streams.seed_for("probe/linear/crops"))
        random = RandomCrops(train, self._needs, draws)

        def cropped(positions: Tensor, blocks: int) -> Tensor:
            return wide(_features(random.features(positions), train.classes[positions.to(train.device)]), blocks)

        def centred(positions: Tensor) -> Features:
            rows = crops.centre_features(train, self._needs, positions)
            return _features(rows, train.classes[positions.to(train.device)])

        return train_and_choose(
            train.classes, cropped, centred, self._settings, self._streams, classes, self._look, chosen_on
        )

    def _look(self, seen: SeenSplit) -> Features:
        """Features of all images of a split, as heads are chosen and evaluated on them."""
        if not self._settings.crops:
            return classification.features(seen)
        return _features(crops.centre_features(seen, self._needs), seen.classes)


def _features(rows: Mapping[str, Tensor], classes: Tensor) -> Features:
    return Features(rows.get("cls"), rows["mean_patch"], classes, rows.get("cls_blocks"))


@dataclass(frozen=True)
class LinearProbe:
    """All heads, and by family the best of them; a family without finite head has none."""

    trained: Sequence[Head]
    heads: Mapping[str, Head]
    num_chosen_on: int
    look: Callable[[SeenSplit], Features] = classification.features

    @torch.no_grad()
    def predict(self, evaluated: Features) -> dict[str, Tensor]:
        """Classes, int64 [n], as `linear/top1` and `linear_mean_patch/top1`; of equal logits the lowest class."""
        most = max(head.input.blocks for head in self.trained)
        predicted: dict[str, list[Tensor]] = {family: [] for family in self.heads}
        for positions in torch.split(torch.arange(len(evaluated)), _CHUNK):
            x_BW = wide(evaluated.at(positions), most)
            for family, head in self.heads.items():
                logits = torch.addmm(head.bias, x_BW[:, head.input.columns], head.weight)
                predicted[family].append(logits.argmax(dim=1))
        return {f"{family}/top1": torch.cat(parts) for family, parts in predicted.items()}

    def score(self, seen: SeenSplit) -> Iterator[Score | Arrays]:
        """Top-1 accuracies under the names that `predict` gives, and how all heads did where they were chosen."""
        evaluated = self.look(seen)
        yield from classification.accuracies(self.predict(evaluated), evaluated.classes)
        yield self.report()

    def report(self) -> Arrays:
        """`linear_heads`, one value per head: family, blocks, learning rate, accuracy and loss, whether it was chosen.

        Accuracy and loss are those on the images on which heads are chosen.
        """
        best = [id(head) for head in self.heads.values()]
        columns = {
            "family": np.array([head.input.family for head in self.trained]),
            "blocks": np.array([head.input.blocks for head in self.trained]),
            "learning_rate": np.array([head.learning_rate for head in self.trained]),
            "accuracy": np.array([head.right for head in self.trained]) / self.num_chosen_on,
            "loss": np.array([head.loss for head in self.trained]),
            "chosen": np.array([id(head) in best for head in self.trained]),
        }
        return Arrays("linear_heads", columns)


def fit(
    train: Features,
    settings: LinearConfig,
    streams: Streams,
    num_classes: int,
    *,
    look: Callable[[SeenSplit], Features] = classification.features,
    chosen_on: Features | None = None,
) -> LinearProbe:
    """`train_and_choose` on features that were extracted once; they may be memory-mapped on the CPU.

    Raises:
        ValueError: there are fewer than two images.
        HeadDiverged: no head has finite logits.
    """
    return train_and_choose(train.classes, rows_of(train), train.at, settings, streams, num_classes, look, chosen_on)


@torch.no_grad()
def train_and_choose(
    classes_n: Tensor,
    read: ReadWide,
    read_plain: Read,
    settings: LinearConfig,
    streams: Streams,
    num_classes: int,
    look: Callable[[SeenSplit], Features],
    chosen_on: Features | None,
) -> LinearProbe:
    """Train all heads and find the best of each family on `chosen_on`, or on a tenth of the images that is held out.

    The result depends on what is read, the settings and the seed of `streams` alone: it does not matter what was drawn
    before. All heads see the same batches.

    Args:
        classes_n: int64 [n], on the device.
        read: wide inputs of training images, as they are trained on.
        read_plain: training images, as heads are chosen on them.
        settings: learning rates per 256 images, blocks, steps, batch size.
        streams: for their seed.
        num_classes: C.
        look: how the probe sees splits that it is evaluated on.
        chosen_on: images on which heads are chosen; none stands for the tenth.

    Raises:
        ValueError: there are fewer than two images.
        HeadDiverged: no head has finite logits.
    """
    count = len(classes_n)
    if count < 2:
        raise ValueError(f"linear probing needs at least two training images; there are {count}")
    generator = torch.Generator().manual_seed(streams.seed_for("probe/linear"))
    kept = torch.arange(count)
    if chosen_on is None:
        order = torch.randperm(count, generator=generator)
        num_held_out = min(max(round(HELD_OUT * count), LEAST_HELD_OUT), count // 2)
        kept, held_out = order[num_held_out:], order[:num_held_out]
    batches = kept[_batches(len(kept), settings, generator)]
    inputs = inputs_of(read_plain(kept[:1]), settings.blocks)
    most = max(part.blocks for part in inputs)
    pairs = ((read(index, most), classes_n[index.to(classes_n.device)]) for index in batches)
    groups = [Group(part.columns, _start(part, num_classes, streams).to(classes_n.device)) for part in inputs]
    rates = torch.tensor(settings.learning_rates, device=classes_n.device) * settings.batch_size / 256
    learned = heads.train(pairs, settings.steps, groups, rates)
    judged = read_plain(held_out) if chosen_on is None else chosen_on
    trained = list(_judged(inputs, learned, settings.learning_rates, judged))
    return LinearProbe(trained, _best_of_families(trained), len(judged), look)


def _batches(num_images: int, settings: LinearConfig, generator: Generator) -> Tensor:
    """Indices int64 [steps, B]: shuffled passes over the images, one after another."""
    wanted = settings.steps * settings.batch_size
    passes = [torch.randperm(num_images, generator=generator) for _ in range(math.ceil(wanted / num_images))]
    return torch.cat(passes)[:wanted].reshape(settings.steps, settings.batch_size)


def _start(part: Input, num_classes: int, streams: Streams) -> Tensor:
    """Weights [F, C] from a stream of their own."""
    draws = torch.Generator().manual_seed(streams.seed_for(part.purpose))
    return torch.randn(part.columns.stop - part.columns.start, num_classes, generator=draws).mul_(INIT_STD)


def _judged(
    inputs: Sequence[Input], learned: Sequence[Heads], learning_rates: Sequence[float], judged: Features
) -> Iterator[Head]:
    """All heads, with how well they do on the images on which they are chosen."""
    most = max(part.blocks for part in inputs)
    ways = [
        (part, head, index) for part, head in zip(inputs, learned, strict=True) for index in range(len(learning_rates))
    ]
    right, loss = [0] * len(ways), [0.0] * len(ways)
    for positions in torch.split(torch.arange(len(judged)), _CHUNK):
        some = judged.at(positions)
        x_BW = wide(some, most)
        for way, (part, head, index) in enumerate(ways):
            logits = torch.addmm(head.bias_KC[index], x_BW[:, part.columns], head.weight_FKC[:, index])
            loss[way] += float(functional.cross_entropy(logits, some.classes)) * len(some) / len(judged)
            right[way] += int((logits.argmax(dim=1) == some.classes).sum())
    for way, (part, head, index) in enumerate(ways):
        weight, bias = head.weight_FKC[:, index].contiguous(), head.bias_KC[index].clone()
        yield Head(part, weight, bias, learning_rates[index], right[way], loss[way])


def _best_of_families(trained: Sequence[Head]) -> dict[str, Head]:
    """The best head of each family; a family that has diverged is left out, which is said.

    Raises:
        HeadDiverged: all have.
    """
    best = {}
    for family in dict.fromkeys(head.input.family for head in trained):
        try:
            best[family] = _best([head for head in trained if head.input.family == family])
        except HeadDiverged as error:
            diverged = error
            log.warning("probe linear has no %s/top1: %s", family, error)
    if not best:
        raise diverged
    return best


def _best(trained: Sequence[Head]) -> Head:
    """Which head classifies most images correctly; among equals the one of lower cross-entropy, then the first.

    A head with infinite or NaN logits never wins.

    Raises:
        HeadDiverged: all have them.
    """
    finite = [head for head in trained if math.isfinite(head.loss)]
    if not finite:
        raise HeadDiverged("the logits of all its heads are infinite or NaN; lower learning_rates may help")
    return max(finite, key=lambda head: (head.right, -head.loss))
