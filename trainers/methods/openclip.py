"""OpenCLIP: contrastive training of a ViT on images and their captions (Radford et al. 2021), whole.

Source: mlfoundations/open_clip (src/open_clip/model.py, loss.py, transform.py; src/open_clip_train/train.py, main.py).
    views     random resized crop, no flip; tokens of the caption
    features  class token after the final norm, and text at its end, each projected to E and scaled to length 1
    losses    open_clip's own: symmetric cross-entropy over the similarities of all pairs, or SigLIP's sigmoid for each
    scale     similarities are multiplied by exp(logit_scale), learned, kept within 1 … max_logit_scale after a step
The text tower, the tokeniser and the losses are those of the package open_clip (`trainers.text`). `ln_pre` and the
patch convolution without bias belong to the backbone.
Different from there: images are normalised with ImageNet's mean and deviation, since those that every method is
evaluated on are; the backbone starts as with the other methods, with deviation 0.02; the loss is computed in float32
whatever the precision; with micro-batches the scale's gradient is that of one pass (there it is once that of each).
Shapes: B images of this rank, D width, E width of the joint space, L tokens of a caption, S side of an image in px.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from trainers import distributed, text
from trainers.augment import check, draw_resized_boxes, resized_crop, standardise
from trainers.config import TrialConfig
from trainers.device import moved
from trainers.method_settings import OpenCLIPConfig
from trainers.methods import Batch, Method, Progress, Upcoming, Views, initialise_
from trainers.ragged import sizes_of
from trainers.streams import Streams

LOGIT_SCALE = {"clip": math.log(1 / 0.07), "siglip": math.log(10)}  # at first
LOGIT_BIAS = -10.0  # of siglip, at first

_TEXTS = 1_024  # that pass through the text tower at a time without gradient


class Features(NamedTuple):
    """Features of length 1 in the joint space, float32 [B, E] each."""

    images: Tensor
    texts: Tensor


class Remembered(NamedTuple):
    """What a micro-batch gave without gradient, and where the random streams stood before it."""

    features: Features
    streams: dict[str, Any]


class OpenCLIP(Method):
    """A ViT and a text tower that meet in a joint space.

    A step may be computed in micro-batches: `remember` computes the features of all of them, and `losses` of each puts
    its own, now with gradient, among them. So every micro-batch reports the loss of the whole batch, and the gradients
    of all of them are summed.

    Raises:
        ValueError: there are no captions (when a batch is prepared), or the backbone has no class token (when a loss
            is asked for).
    """

    accumulation: Literal["mean", "cached", "none"] = "cached"

    def __init__(self, config: TrialConfig, backbone: nn.Module, num_classes: int, streams: Streams) -> None:
        super().__init__(config, backbone, num_classes, streams)
        assert config.openclip is not None and isinstance(config.model.image_size, int), "configuration is not resolved"
        self.settings: OpenCLIPConfig = config.openclip
        self.image_size: int = config.model.image_size
        width = cast(int, backbone.embed_dim)
        self.text = text.build_text_tower(self.settings, streams)
        self.text.set_grad_checkpointing(config.execution.activation_checkpointing)
        self.image_projection = nn.Parameter(torch.empty(width, self.settings.embed_dim))
        initialise_(self.image_projection, "image_projection", streams, std=width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE[self.settings.loss]))
        if self.settings.loss == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor(LOGIT_BIAS))
        self._remembered: list[Remembered] = []

    def prepare(self, upcoming: Upcoming) -> dict[str, Tensor]:
        """`text` int64 [n, L], tokens of the captions; see `trainers.text.tokens_of`."""
        if upcoming.captions is None:
            raise ValueError("method openclip needs captions, which this data set does not provide")
        return {"text": text.tokens_of(upcoming.captions, self.settings.context_length)}

    def views(self, batch: Batch, streams: Streams) -> Views:
        """`images` float32 [B, 3, S, S], cropped and normalised, and `text` int64 [B, L]."""
        check(batch.images, self.image_size, blur_radius=0)
        sizes, scale = sizes_of(batch.images), self.settings.crop_scale
        boxes = draw_resized_boxes(batch.drawn, sizes, streams.torch("augment"), scale=scale, own=batch.own)
        unflipped = torch.zeros(len(boxes), dtype=torch.bool)
        images = standardise(resized_crop(batch.images, boxes, unflipped, self.image_size))
        return {"images": images, "text": moved(batch.prepared["text"], batch.images.device)}

    def features(self, views: Views) -> Features:
        """Of the images and of their captions."""
        cls_BD = self.class_tokens(self.backbone.tokens(views["images"]))  # type: ignore[operator]
        images_BE, texts_BE = cls_BD @ self.image_projection, text.encode(self.text, views["text"])
        return Features(F.normalize(images_BE.float(), dim=-1), F.normalize(texts_BE.float(), dim=-1))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Of n texts, float32 [n, E] of length 1, without gradient, in float32 whatever the precision of training."""
        tokens = text.tokens_of(texts, self.settings.context_length)
        features = [text.encode(self.text, part.to(self.logit_scale.device)) for part in torch.split(tokens, _TEXTS)]
        return F.normalize(torch.cat(features).float(), dim=-1)

    @torch.no_grad()
    def image_features(self, cls_BD: Tensor) -> Tensor:
        """Of images, by their class tokens after the final norm: float32 [B, E] of length 1, without gradient."""
        return F.normalize(cls_BD @ self.image_projection, dim=-1)

    @torch.no_grad()
    def remember(self, views: Sequence[Views], progress: Progress) -> None:
        """Features of all micro-batches, kept until `losses` of the last one."""
        self._remembered = []
        for part in views:
            stand = self.streams.state_dict()
            self._remembered.append(Remembered(self.features(part), stand))

    def losses(self, views: Views, progress: Progress) -> dict[str, Tensor]:
        """`contrastive`: of all pairs of the batch; its mean over ranks is the loss over all their pairs."""
        if progress.parts == 1:
            return {"contrastive": self._loss(self.features(views), 1)}
        kept = self._remembered
        assert len(kept) == progress.parts, "remember comes before losses"
        self.streams.load_state_dict(kept[progress.part].streams)  # drop path falls as it fell there
        parts = [remembered.features for remembered in kept]
        parts[progress.part] = self.features(views)
        if progress.part == progress.parts - 1:
            self._remembered = []
        return {"contrastive": self._loss(Features(*map(torch.cat, zip(*parts, strict=True))), progress.parts)}

    def _loss(self, features: Features, parts: int) -> Tensor:
        """open_clip's loss; each of `parts` micro-batches gives scale and bias its share of their gradient."""
        scale = _share(self.logit_scale, parts).exp()
        ranks: dict[str, Any] = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        with torch.autocast(scale.device.type, enabled=False), warnings.catch_warnings():
            # Both losses may gather with a function that newer PyTorch calls deprecated.
            warnings.filterwarnings("ignore", r"torch\.distributed\.nn\.functional\.all_gather is", FutureWarning)
            if self.settings.loss == "siglip":
                pairwise = SigLipLoss(dist_impl="gather", **ranks)
                return cast(Tensor, pairwise(*features, scale, _share(self.logit_bias, parts)))
            return cast(Tensor, ClipLoss(local_loss=True, gather_with_grad=True, **ranks)(*features, scale))

    @torch.no_grad()
    def after_step(self, progress: Progress) -> None:
        """Keep the scale of the similarities within 1 … max_logit_scale."""
        self.logit_scale.clamp_(0.0, math.log(self.settings.max_logit_scale))


def _share(parameter: Tensor, parts: int) -> Tensor:
    """The same value, with 1 / parts of the gradient."""
    fixed = parameter.detach()
    return fixed + (parameter - fixed) / parts
