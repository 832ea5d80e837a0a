"""The seam of measurements: the subject that they look at, and the findings that they give back.

A measurement is a function `measure(subject, settings)` that yields findings; trainers.catalog.MEASUREMENTS lists them.
Shapes: B images, N patches, R registers, T = class token + R + N tokens, D width, L blocks (layers 0 … L).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers import catalog, vit
from trainers.augment import evaluation_view
from trainers.config import ModelConfig, TokensConfig
from trainers.data import DataSet, Split
from trainers.dotted import load
from trainers.findings import Arrays as Arrays  # for measurements, which take all that they need from here
from trainers.findings import Metric as Metric
from trainers.findings import PerImage as PerImage
from trainers.findings import Picture as Picture
from trainers.findings import Statistic as Statistic
from trainers.probes.features import evaluating
from trainers.probes.fitted import FittedProbes, Probes
from trainers.streams import Streams
from trainers.tokens import outliers

CHUNK = 64  # images in a forward pass
DETAIL_CHUNK = 16  # … that keeps whole layers: one of ViT-g, 16 images of 37 × 37 patches, takes 135 MB in float32


Finding = Metric | Statistic | PerImage | Arrays | Picture
Measurement = Callable[["Subject", Any], Iterator[Finding]]


@dataclass(frozen=True)
class Subject:
    """One set of weights, always seen in eval mode, and the images that measurements look at.

    The probe images are the first `tokens.probe_images` of the validation set, the same in every trial.

    Attributes:
        backbone: a Backbone; the built-in ViT unless the user named another.
        model: the backbone's settings as its weights have them.
        tokens: what is measured, and how.
        data: the data set.
        device: where the backbone is.
        streams: for draws; take fresh generators from `generator` or `numpy`, so that training draws the same.
        step: optimiser steps that the weights have seen.
        probes: the trial's downstream probes, to be fitted on variants of the backbone.
        at_end: whether this is the end of a trial, which alone keeps what is large: PerImage, Arrays and Picture.
        fitted: those probes fitted on this backbone; None before the end.
        scores: their metrics `val/…` and `test/…` on this backbone; None before the end.
        kept_threshold: of an edited backbone, the norm that makes outliers of the untouched one; None elsewhere.
    """

    backbone: nn.Module
    model: ModelConfig
    tokens: TokensConfig
    data: DataSet
    device: torch.device
    streams: Streams
    step: int
    probes: Probes
    at_end: bool = False
    fitted: FittedProbes | None = None
    scores: Mapping[str, float] | None = None
    kept_threshold: float | None = None

    def with_backbone(self, backbone: nn.Module) -> Subject:
        """The same question to other weights; probes are not fitted on them, and nothing large is kept of them."""
        return replace(self, backbone=backbone, at_end=False, fitted=None, scores=None)

    def edited(self, backbone: nn.Module) -> Subject:
        """The same question to an edited forward pass: what is an outlier is still decided by the untouched norms.

        A threshold of its own would follow the edit, and call other patches outliers where the bulk has narrowed.
        """
        return replace(self.with_backbone(backbone), kept_threshold=self.threshold)

    @property
    def num_registers(self) -> int:
        """R of the backbone."""
        return int(cast(vit.Backbone, self.backbone).num_registers)

    @property
    def image_size(self) -> int:
        """Side of the images in px."""
        return self.model.side

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches at `image_size`."""
        return self.model.grid

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh generator on the CPU; equal for trials of equal seed."""
        return torch.Generator().manual_seed(self.streams.seed_for(f"measurement/{purpose}"))

    def numpy(self, purpose: str) -> np.random.Generator:
        """A fresh numpy generator; equal for trials of equal seed."""
        return np.random.Generator(np.random.PCG64(self.streams.seed_for(f"measurement/{purpose}")))

    def view(self, pixels: NDArray[np.uint8], image_size: int | None = None) -> Tensor:
        """uint8 [B, H, H, 3] as the backbone takes them: float32 [B, 3, S, S] on the device, normalised."""
        on_device = torch.from_numpy(np.array(pixels)).to(self.device)
        return evaluation_view(on_device, image_size or self.image_size, self.model.normalization)

    def probe_images(self, most: int | None = None) -> NDArray[np.uint8]:
        """Pixels of the probe images, or of the first `most` of them: uint8 [n, H, H, 3]."""
        return self.data.validation.images[: min(self.tokens.probe_images, most or self.tokens.probe_images)]

    def batches(self, pixels: NDArray[np.uint8], chunk: int = CHUNK) -> Iterator[Tensor]:
        """Views of at most `chunk` images at a time; no gradients are taken and the backbone is in eval mode."""
        with torch.no_grad(), evaluating(self.backbone):
            for part in np.array_split(pixels, max(1, -(-len(pixels) // chunk))):
                yield self.view(part)

    @functools.cached_property
    def norms(self) -> tuple[NDArray[np.float32], bool]:
        """L2 norms of the probe images' tokens before the final norm, [L + 1, B, T]; whether T begins with a class.

        Order along T: class, registers, patches. NaN for patches that consist of padding alone.
        """
        parts = [vit.token_norms(cast(vit.Backbone, self.backbone), x) for x in self.batches(self.probe_images())]
        norms_LBT, class_token = np.array(torch.cat([part for part, _ in parts], dim=1).cpu().numpy()), parts[0][1]
        padded_BN = self.padding(self.data.validation, np.arange(norms_LBT.shape[1]))
        if padded_BN is not None:
            norms_LBT[:, :, -padded_BN.shape[1] :][:, padded_BN] = np.nan
        return norms_LBT, class_token

    def padding(
        self, split: Split, indices: NDArray[np.int64], image_size: int | None = None
    ) -> NDArray[np.bool_] | None:
        """Which patches of some images consist of padding alone, [n, N]; None where no image is padded.

        Args:
            split: its target "content" says which part of its images is no padding.
            indices: of the images.
            image_size: side in px at which they are seen, if not that of the model.
        """
        content = split.targets.get("content")
        if content is None:
            return None
        side, patches = split.images.shape[1], (image_size or self.image_size) // self.model.patch_size
        # In patches; multiplied first, so that edges which meet a patch's edge give whole numbers.
        x0, y0, x1, y1 = np.asarray(content[indices], np.float64).T[..., None] * patches / side
        place = np.arange(patches)
        rows_hold, columns_hold = (place < y1) & (place + 1 > y0), (place < x1) & (place + 1 > x0)
        held: NDArray[np.bool_] = rows_hold[:, :, None] & columns_hold[:, None, :]
        return ~held.reshape(len(indices), patches * patches)

    def patch_norms(self, layer: int = -1) -> NDArray[np.float32]:
        """Norms of the probe images' patch tokens at a layer, [B, N]; NaN where a patch is padding.

        Raises:
            ValueError: there is no such layer.
        """
        norms_LBT, class_token = self.norms
        if not -len(norms_LBT) <= layer < len(norms_LBT):
            raise ValueError(f"the layer {layer} is not there; allowed: {-len(norms_LBT)} to {len(norms_LBT) - 1}")
        return norms_LBT[layer, :, int(class_token) + self.num_registers :]

    @functools.cached_property
    def threshold(self) -> float:
        """The norm above which a patch of `tokens.outlier_layer` is an outlier; infinite where the rule gives none."""
        if self.kept_threshold is not None:
            return self.kept_threshold
        return self.threshold_of(self.patch_norms(self.tokens.outlier_layer))

    def threshold_of(self, norms: NDArray[np.floating]) -> float:
        """What `tokens.outlier_rule` gives for these norms, all taken together."""
        return outliers.threshold(norms, self.tokens.outlier_rule, self.tokens.outlier_norm)

    @functools.cached_property
    def outliers(self) -> NDArray[np.bool_]:
        """Which patches of the probe images are outliers, [B, N]."""
        return self.patch_norms(self.tokens.outlier_layer) > self.threshold


def findings(name: str, subject: Subject) -> Iterator[Finding]:
    """What the measurement `name` finds, one of trainers.catalog.MEASUREMENTS or a user's own, by its settings.

    Raises:
        ValueError: it cannot be loaded, or it does not support the subject.
    """
    entry = catalog.MEASUREMENTS.get(name)
    measure = cast(Measurement, load(name if entry is None else entry.build))
    return measure(subject, getattr(subject.tokens, entry.section) if entry is not None and entry.section else None)
