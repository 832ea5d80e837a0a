"""Linear depth: each patch is classified into bins of depth, and the expected depth is compared with the true one.

Source: facebookresearch/dinov2:dinov2/hub/depth/decode_heads.py (BNHead, whose batch norm is commented out) and
dinov2/hub/depthers.py: tokens before the final norm, the class token beside every patch, uniform bins weighted by
relu(logit) + 0.1, depth at four times the grid's resolution, then resized to the image. SigLoss, its first 100 steps in
warm-up form, and the gradient loss; AdamW, cosine, gradients clipped at 35. Logits are resized where the official code
resizes tokens, which is the same, as both are linear. Different here: the OneCycle momentum is left out, and true
depths beyond `max_depth` have no loss, for no bin can reach them.
The gradient loss acts along rows and columns by default. The official code slices images and channels instead, which
is 0 for the two images of a GPU; the preset `paper` does the same, with SigLoss over two images at a time.
Shapes: B images, N = h × w patches, F features (patch and class token, of all blocks), K bins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers.augment import standardise
from trainers.config import DepthConfig
from trainers.data import DataSet, Whole
from trainers.findings import Score
from trainers.probes import Context, dense, depth_losses, depth_metrics
from trainers.probes import depth_views as views
from trainers.probes.seen import SeenSplit

FLOOR = 0.1  # of a bin's weight
WARMUP_START = 1e-3
CLIP_GRAD = 35.0
SIG_WARMUP = 100  # steps in which only the mean depth is fitted; never more than a fifth of all
LAST_FACTOR = 1e-8  # of the learning rate

_CHUNK_VALUES = 2**24  # bins' logits that are held at a time in testing
_CACHE_VALUES = 2**19  # of these that a CPU handles at a time, so that they stay in its cache


def expected_depth(logits: Tensor, centers_K: Tensor) -> Tensor:
    """Depth from the last axis, K bins: their centres weighted by relu(logit) + 0.1."""
    weights = F.relu(logits)
    total = weights.sum(dim=-1) + FLOOR * len(centers_K)
    return (weights @ centers_K + FLOOR * centers_K.sum()) / total


class Head(nn.Module):
    """One linear layer from features to bins.

    Args:
        features: F.
        settings: how many bins, and how much finer than the grid depth is.
        max_depth: centre of the last bin, in metres; that of the first is `settings.min_depth`.
        generator: draws weights and biases as PyTorch's layers do.
    """

    centers_K: Tensor

    def __init__(self, features: int, settings: DepthConfig, max_depth: float, generator: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(features)
        self.weight = nn.Parameter(torch.empty(settings.bins, features).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(settings.bins).uniform_(-bound, bound, generator=generator))
        self.upsample, self.max_depth = settings.upsample, max_depth
        self.register_buffer("centers_K", torch.linspace(settings.min_depth, max_depth, settings.bins))

    def forward(self, tokens_BNF: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Depths [B, H, W] at `size`."""
        logits = dense.as_map(F.linear(tokens_BNF, self.weight, self.bias), grid)
        finer = [length * self.upsample for length in grid]
        values = len(self.centers_K) * finer[0] * finer[1]
        together = max(1, _CACHE_VALUES // values) if logits.device.type == "cpu" else len(logits)
        depths = [
            expected_depth(
                F.interpolate(part, size=finer, mode="bilinear", align_corners=False).movedim(1, 3), self.centers_K
            )
            for part in torch.split(logits, together)
        ]
        return F.interpolate(torch.cat(depths)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


class Depth:
    """The probe `depth`: see trainers.probes.Probe."""

    transfers = False

    def __init__(self, settings: DepthConfig, context: Context) -> None:
        self._settings, self._streams = settings, context.streams
        self.reads = frozenset[str]() if settings.whole else _reads(settings)

    def fit(self, train: SeenSplit, validation: SeenSplit) -> FittedDepth:
        """The head that the training images give; validation does not serve.

        Raises:
            ValueError: the bins have no extent, or no training image has depth.
            FloatingPointError: the weights have diverged.
        """
        settings, seed = self._settings, self._streams.seed_for("probe/depth")
        max_depth = _max_depth(settings, train.data)
        counts = partial(depth_losses.valid_for_loss, max_depth=max_depth)
        dense.require(train, "depth", counts, whole=settings.whole, what=f"depth above 0 and up to {max_depth} m")
        generator = torch.Generator().manual_seed(seed)

        def batches(order: Iterator[NDArray[np.int64]]) -> Iterator[_Batch]:
            return _crops(train, settings, seed, order) if settings.whole else _squares(train, settings, order)

        def head(first: _Batch) -> Head:
            return Head(first.tokens_BNF.shape[2], settings, max_depth, generator).to(train.device)

        loss, rates = partial(_loss, settings), partial(_rate, settings)
        return FittedDepth(dense.fit(settings, len(train), generator, batches, head, loss, rates, CLIP_GRAD), settings)


@dataclass(frozen=True)
class FittedDepth:
    """A trained head."""

    head: Head
    settings: DepthConfig

    @torch.no_grad()
    def score(self, seen: SeenSplit) -> Iterator[Score]:
        """`depth/rmse` and the others of `depth_metrics.per_image`, each the mean over images with valid pixels.

        `depth/images_without_depth` says how many have none; where that is all, it stands alone.
        """
        found = list((self._whole if self.settings.whole else self._squares)(seen))
        for name in found[0]:
            values = torch.cat([metrics[name] for metrics in found]).cpu().numpy()
            if not np.isnan(values).all():
                yield Score(f"depth/{name}", float(np.nanmean(values)), values)
        yield Score("depth/images_without_depth", float(np.isnan(values).sum()))

    def _squares(self, seen: SeenSplit) -> Iterator[Mapping[str, Tensor]]:
        grid, side = seen.grid, seen.image_size
        chunk = max(1, _CHUNK_VALUES // (self.settings.bins * grid[0] * grid[1] * self.settings.upsample**2))
        for positions in np.split(np.arange(len(seen)), range(chunk, len(seen), chunk)):
            predicted = self.head(_tokens(seen, self.settings, positions), grid, (side, side))
            depth = seen.dense("depth", positions).float()
            yield depth_metrics.per_image(predicted, depth, self._valid(depth))

    def _whole(self, seen: SeenSplit) -> Iterator[Mapping[str, Tensor]]:
        for index in seen.indices:
            pixels, depth = views.inputs(seen.part.whole(int(index)))
            image = standardise(pixels[None], normalization=seen.model.normalization).to(seen.device)
            predicted = self._predict(seen, image)
            if self.settings.flip:
                predicted = (predicted + self._predict(seen, image.flip(3)).flip(2)) / 2
            depth = depth[None].to(seen.device)
            valid = self._valid(depth)
            if self.settings.crop == "nyu":
                counted = torch.zeros_like(valid)
                rows, columns = views.cut(depth.shape[1], depth.shape[2], views.EIGEN_CUT)
                counted[:, rows, columns] = True
                valid &= counted
            yield depth_metrics.per_image(predicted, depth, valid)

    def _predict(self, seen: SeenSplit, image: Tensor) -> Tensor:
        tokens_BNF, grid = _read(seen, self.settings, image)
        predicted: Tensor = self.head(tokens_BNF, grid, (image.shape[2], image.shape[3]))
        return predicted

    def _valid(self, depth: Tensor) -> Tensor:
        return depth_metrics.valid_for_metrics(depth, self.settings.min_depth, self.head.max_depth)


@dataclass(frozen=True)
class _Batch:
    tokens_BNF: Tensor
    grid: tuple[int, int]
    depth: Tensor  # [B, H, W]


def _loss(settings: DepthConfig, head: Head, batch: _Batch, step: int) -> Tensor:
    """Mean over groups of images of their losses."""
    depth, warm_up = batch.depth, step < min(SIG_WARMUP, settings.steps // 5)
    predicted = head(batch.tokens_BNF, batch.grid, (depth.shape[1], depth.shape[2]))
    valid = depth_losses.valid_for_loss(depth, head.max_depth)
    size = settings.group_size or len(depth)
    axes = (-2, -1) if settings.gradient_axes == "image" else (0, 1)
    losses = []
    for start in range(0, len(depth), size):
        group = slice(start, start + size)
        given = predicted[group, None], depth[group, None], valid[group, None]
        loss = depth_losses.sig_loss(*given, warm_up=warm_up)
        if settings.gradient_weight:
            loss = loss + settings.gradient_weight * depth_losses.gradient_loss(*given, axes=axes)
        losses.append(loss)
    return torch.stack(losses).mean()


def _rate(settings: DepthConfig, step: int) -> float:
    decayed = LAST_FACTOR + (1 - LAST_FACTOR) * dense.cosine(step, settings.steps)
    return settings.learning_rate * dense.warmed_up(decayed, step, settings.warmup_steps, WARMUP_START)


def _max_depth(settings: DepthConfig, data: DataSet) -> float:
    found = data.max_depth if settings.max_depth == "auto" else settings.max_depth
    if found is None:
        raise ValueError(f"evaluation.depth.max_depth is auto, but {data.name} does not say it; set it in metres")
    if found <= settings.min_depth:
        raise ValueError(f"evaluation.depth.max_depth is {found}; allowed: more than min_depth, {settings.min_depth}")
    return float(found)


def _reads(settings: DepthConfig) -> frozenset[str]:
    return frozenset({"raw_blocks"} if settings.blocks == 4 else {"raw_patches", "raw_cls"})


def _features(found: Mapping[str, Tensor], blocks: int) -> Tensor:
    """Every patch with its image's class token, of all blocks, [B, N, F]; without class token the patch alone."""
    pairs: list[tuple[Tensor | None, Tensor]]
    if blocks == 4:
        cls_BKD, patches_BKND = found["raw_blocks"][:, :, 0], found["raw_blocks"][:, :, 1:]
        pairs = list(zip(cls_BKD.unbind(1), patches_BKND.unbind(1), strict=True))
    else:
        pairs = [(found.get("raw_cls"), found["raw_patches"])]
    parts = []
    for cls_BD, patches_BND in pairs:
        parts.append(dense.filled(patches_BND))
        if cls_BD is not None:
            parts.append(dense.filled(cls_BD[:, None]).expand_as(patches_BND))
    return torch.cat(parts, dim=2)


def _tokens(seen: SeenSplit, settings: DepthConfig, positions: NDArray[np.int64]) -> Tensor:
    at = torch.from_numpy(positions)
    found = {name: seen.features[name] for name in _reads(settings) if name in seen.features}
    return _features({name: rows[at.to(rows.device)].to(seen.device) for name, rows in found.items()}, settings.blocks)


def _read(seen: SeenSplit, settings: DepthConfig, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    found, grid = dense.read(seen, images, _reads(settings))
    return _features(found, settings.blocks), grid


def _squares(seen: SeenSplit, settings: DepthConfig, order: Iterator[NDArray[np.int64]]) -> Iterator[_Batch]:
    for positions in order:
        yield _Batch(_tokens(seen, settings, positions), seen.grid, seen.dense("depth", positions).float())


def _crops(seen: SeenSplit, settings: DepthConfig, seed: int, order: Iterator[NDArray[np.int64]]) -> Iterator[_Batch]:
    size = (settings.height or seen.image_size, settings.width or seen.image_size)

    def crop(whole: Whole, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        return views.training_crop(whole, size, settings.crop == "nyu", random, seen.model.normalization)

    for images, depths in dense.crops(seen, order, settings.batch_size, seed, crop):
        tokens_BNF, grid = _read(seen, settings, images)
        yield _Batch(tokens_BNF, grid, depths)
