"""How alike patches were to their neighbours when they entered, outliers and normal ones apart (paper, Fig. 5a).

The paper compares embeddings "right after the patch embedding layer". Whether it takes all pairs or the mean over a
patch's neighbours is not said: both are kept.
Shapes: B images, patches on a grid of h × w cells, N = h · w, D width; 4 neighbours: right, left, below, above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from trainers import vit
from trainers.measurement import Arrays, Finding, Metric, Statistic, Subject
from trainers.tokens.location import on_grid

BINS = 200  # of the densities, each 0.01 wide

Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]


def cosines(x_BhwD: Tensor) -> Tensor:
    """Cosine of every patch to the patch on its right and to the one below, float32 [B, 2, h, w].

    NaN where there is no such patch, or where one of the two is a vector of zeros.
    """
    unit = x_BhwD.float()
    unit = unit / torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    found: Tensor = unit.new_full((len(unit), 2, *unit.shape[1:3]), torch.nan)
    found[:, 0, :, :-1] = (unit[:, :, :-1] * unit[:, :, 1:]).sum(dim=-1)
    found[:, 1, :-1] = (unit[:, :-1] * unit[:, 1:]).sum(dim=-1)
    return found.clamp_(-1, 1)  # which rounding may have left


def to_neighbors(cosines_B2hw: Floats, is_patch_Bhw: Mask) -> Floats:
    """Cosine of every patch to its 4 neighbours, [B, 4, h, w], from `cosines`; NaN where one of the two is no patch."""
    right, below = (np.array(cosines_B2hw[:, number]) for number in (0, 1))
    right[:, :, :-1][~(is_patch_Bhw[:, :, :-1] & is_patch_Bhw[:, :, 1:])] = np.nan
    below[:, :-1][~(is_patch_Bhw[:, :-1] & is_patch_Bhw[:, 1:])] = np.nan
    left, above = np.full_like(right, np.nan), np.full_like(below, np.nan)
    left[:, :, 1:], above[:, 1:] = right[:, :, :-1], below[:, :-1]
    return np.stack([right, left, below, above], axis=1)


def mean_over_neighbors(neighbors_B4hw: Floats) -> Floats:
    """The mean over the neighbours that a patch has, [B, h, w]; NaN where it has none."""
    has = ~np.isnan(neighbors_B4hw)
    count = has.sum(axis=1)
    total = np.where(has, neighbors_B4hw, 0).sum(axis=1, dtype=np.float64)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def auroc(values: Floats, positive: Mask) -> float:
    """Probability that a positive value exceeds a negative one, ties counting half (Mann–Whitney U / (n₊ · n₋)).

    NaN where there are no positive or no negative values.
    """
    positives = int(positive.sum())
    negatives = len(values) - positives
    if not positives or not negatives:
        return math.nan
    excess = rankdata(values)[positive].sum() - positives * (positives + 1) / 2
    return float(excess / positives / negatives)


def contrast(values: Floats, is_outlier: Mask) -> dict[str, float]:
    """How the similarities of outliers differ from those of normal patches; what is undefined is left out.

    Args:
        values: [n] without NaN.
        is_outlier: [n], whose similarity it is.

    Returns:
        `outlier` and `normal`: the means; `gap`: the first minus the second; `auroc` of the similarity for being an
        outlier.
    """
    outlier, normal = (
        float(part.mean(dtype=np.float64)) if len(part) else math.nan
        for part in (values[is_outlier], values[~is_outlier])
    )
    numbers = {"outlier": outlier, "normal": normal, "gap": outlier - normal, "auroc": auroc(values, is_outlier)}
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


def measure(subject: Subject, settings: None) -> Iterator[Finding]:
    """`neighbors/…` of the probe images: the mean over a patch's neighbours as metrics, both readings as statistics.

    Statistics are `neighbors/SOURCE/mean/…` and `neighbors/SOURCE/pairs/…`, where SOURCE is patch_embedding: the
    patches before position embedding. A backbone other than the built-in ViT need not tell these: there SOURCE is
    layer_0, what enters the first block, which holds the position embedding as a rule. The arrays `neighbors` are
    counts of both readings in bins between `edges`, of outliers and of normal patches.

    Raises:
        ValueError: the patches do not fill the grid.
    """
    source, layer = ("patch_embedding", None) if isinstance(subject.backbone, vit.ViT) else ("layer_0", 0)
    is_patch_Bhw = ~np.isnan(on_grid(subject.patch_norms(subject.tokens.outlier_layer), subject.grid))
    is_outlier_Bhw = on_grid(subject.outliers, subject.grid)
    neighbors_B4hw = to_neighbors(_cosines_of(subject), is_patch_Bhw)
    readings = {
        "mean": (mean_over_neighbors(neighbors_B4hw), is_outlier_Bhw),
        "pairs": (neighbors_B4hw, np.broadcast_to(is_outlier_Bhw[:, None], neighbors_B4hw.shape)),
    }
    edges = np.linspace(-1, 1, BINS + 1)
    arrays: dict[str, NDArray[Any]] = {"edges": edges}
    for reading, (all_values, membership) in readings.items():
        there = ~np.isnan(all_values)
        values, is_outlier = all_values[there], membership[there]
        found = contrast(values, is_outlier)
        for name, value in found.items():
            yield Statistic(f"neighbors/{source}/{reading}/{name}", value, layer, token="patch")
        if reading == "mean":
            yield from (Metric(f"neighbors/{name}", found[name]) for name in ("gap", "auroc") if name in found)
        arrays[f"{reading}_outlier"] = np.histogram(values[is_outlier], edges)[0]
        arrays[f"{reading}_normal"] = np.histogram(values[~is_outlier], edges)[0]
    yield Arrays("neighbors", arrays)


def _cosines_of(subject: Subject) -> Floats:
    """`cosines` of all probe images, [B, 2, h, w], brought from the device at once."""
    parts = [cosines(_embedded(subject, images)) for images in subject.batches(subject.probe_images())]
    return np.asarray(torch.cat(parts).cpu().numpy())


def _embedded(subject: Subject, images: Tensor) -> Tensor:
    """What patches enter with, [B, h, w, D]."""
    if isinstance(subject.backbone, vit.ViT):
        return cast(Tensor, subject.backbone.patch_embed(images))
    backbone = cast(vit.Backbone, subject.backbone)
    patches_BND = next(iter(backbone.residuals(images))).patches_BND
    return patches_BND.reshape(len(patches_BND), *subject.grid, -1)
