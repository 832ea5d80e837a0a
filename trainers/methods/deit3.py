"""DeiT-III: supervised training of a ViT's class token (Touvron, Cord, Jégou 2022), whole.

Source: facebookresearch/deit (main.py, engine.py, augment.py) with timm's Mixup, which it calls.
    views     3-Augment (`trainers.augment`), then mixup or CutMix of each image with its mirror in the batch
    targets   smoothed one-hot y = (1 - s) · onehot + s / K, mixed as the images are: λ · y + (1 - λ) · y_mirror
    losses    cross-entropy with these targets, or binary cross-entropy per class where a class counts as present
              however small its share
Drop path, LayerScale and registers belong to the backbone; LAMB, cosine schedule and EMA to the loop. The raw model
is evaluated.
Shapes: B images, K classes, D width, S side of an image in px.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import augment
from trainers.config import TrialConfig
from trainers.method_settings import DeiT3Config
from trainers.methods import Batch, Method, Progress, Views, initialise_
from trainers.ragged import sizes_of
from trainers.streams import Streams

SWITCH_PROBABILITY = 0.5  # of CutMix where mixup is on as well


class Mix(NamedTuple):
    """How a batch is mixed: the share λ of each image itself, and CutMix's box (top, bottom, left, right) in px."""

    share: float
    box: tuple[int, int, int, int] | None


class DeiT3(Method):
    """A linear classifier on the final-normed class token.

    Raises:
        ValueError: the backbone has no class token (when a loss is asked for).
    """

    def __init__(self, config: TrialConfig, backbone: nn.Module, num_classes: int, streams: Streams) -> None:
        super().__init__(config, backbone, num_classes, streams)
        assert config.deit3 is not None and isinstance(config.model.image_size, int), "configuration is not resolved"
        self.settings: DeiT3Config = config.deit3
        self.image_size: int = config.model.image_size
        self.head = nn.Linear(backbone.embed_dim, num_classes)  # type: ignore[arg-type]
        initialise_(self.head.weight, "head.weight", streams, std=0.02)
        nn.init.zeros_(self.head.bias)

    def views(self, batch: Batch, streams: Streams) -> Views:
        """`images` float32 [B, 3, S, S] augmented per image and mixed, and `targets` float32 [B, K].

        One λ and one box for all images of a group, as timm's mode "batch", which the official recipe uses on each
        device. They come from the stream "mixup", so that a change of theirs leaves the augmentations as they are.

        Raises:
            ValueError: this rank's share of the micro-batch does not consist of whole groups.
        """
        source, generator = sizes_of(batch.images), streams.torch("augment")
        draws = augment.draw(batch.drawn, source, self.image_size, self.settings, generator, batch.own)
        images = augment.apply(batch.images, draws, self.image_size, self.settings)
        size = self.settings.mix_group_size or batch.drawn
        mixes, classes = self._mixes(batch, size, streams), torch.split(batch.targets["classes"], size)
        for mix, group in zip(mixes, torch.split(images, size), strict=True):
            mix_images_(group, mix)
        targets = [self._targets(group, mix.share) for mix, group in zip(mixes, classes, strict=True)]
        return {"images": images, "targets": torch.cat(targets)}

    def _mixes(self, batch: Batch, size: int, streams: Streams) -> list[Mix]:
        """How each of this rank's groups is mixed; drawn for the groups of all ranks."""
        count = len(batch.images)
        if self.settings.mixup <= 0.0 and self.settings.cutmix <= 0.0:
            return [Mix(1.0, None)] * -(-count // size)
        if count % size or batch.first % size:
            raise ValueError(
                f"a rank holds {count} of {batch.drawn} images of a micro-batch, which are not whole groups of "
                f"{size}; set deit3.mix_group_size to {count} or a divisor of it"
            )
        generator, settings = streams.numpy("mixup"), self.settings
        groups = range(batch.drawn // size)
        drawn = [draw_mix(settings.mixup, settings.cutmix, self.image_size, generator) for _ in groups]
        return drawn[batch.first // size : (batch.first + count) // size]

    def _targets(self, classes_B: Tensor, share: float) -> Tensor:
        """Targets [B, K]: mixed and smoothed, for `bce` made binary in between.

        The official recipe has no smoothing with BCE, and applies `targets > 0` to mixed targets; with smoothing that
        would mark every class as present, so here smoothing comes last.
        """
        onehot = F.one_hot(classes_B, self.num_classes).float()
        mixed = share * onehot + (1.0 - share) * onehot.flip(0)
        if self.settings.loss == "bce":
            mixed = (mixed > 0.0).float()
        return mixed * (1.0 - self.settings.smoothing) + self.settings.smoothing / self.num_classes

    def losses(self, views: Views, progress: Progress) -> dict[str, Tensor]:
        """`classification`: mean over images (and, for `bce`, over classes)."""
        cls_BD = self.class_tokens(self.backbone.tokens(views["images"]))  # type: ignore[operator]
        logits_BK = self.head(cls_BD).float()
        if self.settings.loss == "bce":
            return {"classification": F.binary_cross_entropy_with_logits(logits_BK, views["targets"])}
        return {"classification": F.cross_entropy(logits_BK, views["targets"])}


def draw_mix(mixup: float, cutmix: float, image_size: int, generator: np.random.Generator) -> Mix:
    """Mixup or CutMix with λ ~ Beta(a, a), a its own parameter; both 0 mix nothing.

    CutMix's box has sides S · √(1 - λ) around a uniform centre, is clipped by the image, and λ is then corrected to
    the area that is left (timm.data.mixup, `rand_bbox` and `correct_lam=True`).
    """
    if mixup <= 0.0 and cutmix <= 0.0:
        return Mix(1.0, None)
    use_cutmix = cutmix > 0.0 and (mixup <= 0.0 or generator.random() < SWITCH_PROBABILITY)
    alpha = cutmix if use_cutmix else mixup
    share = float(generator.beta(alpha, alpha))
    if not use_cutmix:
        return Mix(share, None)
    side = int(image_size * math.sqrt(1.0 - share))
    centre_y, centre_x = (int(centre) for centre in generator.integers(0, image_size, size=2))
    top, bottom = max(centre_y - side // 2, 0), min(centre_y + (side + 1) // 2, image_size)
    left, right = max(centre_x - side // 2, 0), min(centre_x + (side + 1) // 2, image_size)
    return Mix(1.0 - (bottom - top) * (right - left) / image_size**2, (top, bottom, left, right))


def mix_images_(images: Tensor, mix: Mix) -> Tensor:
    """Each image mixed in place with the one at the mirrored position in the batch (the last with the first)."""
    if mix.share == 1.0:
        return images
    if mix.box is None:
        return torch.lerp(images.flip(0), images, mix.share, out=images)
    top, bottom, left, right = mix.box
    window = images[:, :, top:bottom, left:right]
    window.copy_(window.flip(0))
    return images
