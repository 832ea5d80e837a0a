"""How alike tokens are in every layer: class token and patches, neighbouring patches, registers (paper.md §5, 10, 11).

All similarities are cosines of the residual stream, before the final norm.
Shapes: B images, N patches on a grid of h × w cells, R registers, P pairs of registers, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers import vit
from trainers.measurement import DETAIL_CHUNK, Finding, Metric, Statistic, Subject
from trainers.tokens import neighbors

Floats = NDArray[np.floating]
Mask = NDArray[np.bool_]


def to_class(tokens: vit.Tokens) -> Tensor:
    """Cosine of every patch to the class token, float32 [B, N]; NaN without one, or where a vector is all zeros."""
    patches_BND = tokens.patches_BND.float()
    if tokens.cls_BD is None:
        return patches_BND.new_full(patches_BND.shape[:2], torch.nan)
    cls_BD = tokens.cls_BD.float()
    lengths_BN = torch.linalg.vector_norm(patches_BND, dim=-1) * torch.linalg.vector_norm(cls_BD, dim=-1)[:, None]
    return cast(Tensor, ((patches_BND @ cls_BD[..., None]).squeeze(-1) / lengths_BN).clamp(-1, 1))


def among(registers_BRD: Tensor) -> Tensor:
    """Cosine of every pair of registers, float32 [B, P]; NaN where one of the two is all zeros."""
    unit_BRD = registers_BRD.float()
    unit_BRD = unit_BRD / torch.linalg.vector_norm(unit_BRD, dim=-1, keepdim=True)
    first, second = torch.triu_indices(unit_BRD.shape[1], unit_BRD.shape[1], offset=1, device=unit_BRD.device)
    return cast(Tensor, (unit_BRD @ unit_BRD.mT)[:, first, second].clamp(-1, 1))


def summary(cls_BN: Floats, neighbors_B2hw: Floats, pairs_BP: Floats, is_patch_Bhw: Mask) -> dict[str, float]:
    """Means of one layer's cosines by name, what is undefined is left out.

    cls_patch                 mean over patches of their cosine to the class token
    neighbors                 mean over patches of their mean cosine to those of their 4 neighbours that exist
    registers, registers_max  mean and largest, over pairs of registers, of a pair's mean cosine over images

    Args:
        cls_BN: what `to_class` gives.
        neighbors_B2hw: what `trainers.tokens.neighbors.cosines` gives.
        pairs_BP: what `among` gives.
        is_patch_Bhw: which patches count, as patches and as neighbours: not padding.
    """
    to_neighbors_Bhw = neighbors.mean_over_neighbors(neighbors.to_neighbors(neighbors_B2hw, is_patch_Bhw))
    pairs = pairs_BP.mean(axis=0, dtype=np.float64)
    known = pairs[~np.isnan(pairs)]
    found = {
        "cls_patch": _mean(cls_BN[is_patch_Bhw.reshape(cls_BN.shape)]),
        "neighbors": _mean(to_neighbors_Bhw),
        "registers": _mean(known),
        "registers_max": float(known.max()) if known.size else math.nan,
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else math.nan


def measure(subject: Subject, settings: None) -> Iterator[Finding]:
    """`similarity/…` of every layer over the detail images, as in `summary`; of the last layer as metrics.

    `similarity/register_parameters` and `…_max` are the same of the parameters themselves, of no layer, where the
    backbone has them as `reg_token`.

    Raises:
        ValueError: the patches do not fill the grid.
    """
    pixels = subject.probe_images(subject.tokens.detail_images)
    padded_BN = subject.padding(subject.data.validation, np.arange(len(pixels)))
    shape = (len(pixels), *subject.grid)
    is_patch_Bhw = np.ones(shape, np.bool_) if padded_BN is None else ~padded_BN.reshape(shape)
    cls_LBN, neighbors_LB2hw, pairs_LBP = _cosines(subject, pixels)
    for layer, (cls_BN, neighbors_B2hw, pairs_BP) in enumerate(zip(cls_LBN, neighbors_LB2hw, pairs_LBP, strict=True)):
        found = summary(cls_BN, neighbors_B2hw, pairs_BP, is_patch_Bhw)
        yield from (Statistic(f"similarity/{name}", value, layer) for name, value in found.items())
    yield from (Metric(f"similarity/last/{name}", value) for name, value in found.items())
    parameters = getattr(subject.backbone, "reg_token", None)
    if isinstance(parameters, Tensor):
        pairs = among(parameters.detach().reshape(1, -1, parameters.shape[-1])).cpu().numpy()
        if pairs.size and not np.isnan(pairs).any():
            yield Statistic("similarity/register_parameters", float(pairs.mean(dtype=np.float64)))
            yield Statistic("similarity/register_parameters_max", float(pairs.max()))


def _cosines(subject: Subject, pixels: NDArray[np.uint8]) -> list[Floats]:
    """Of all layers and images, brought from the device at once: to class, to neighbours, among registers."""
    backbone = cast(vit.Backbone, subject.backbone)
    batches = []
    for images in subject.batches(pixels, DETAIL_CHUNK):
        layers = [_of_layer(tokens, subject.grid) for tokens in backbone.residuals(images)]
        batches.append([torch.stack(kind) for kind in zip(*layers, strict=True)])
    return [torch.cat(kind, dim=1).cpu().numpy() for kind in zip(*batches, strict=True)]


def _of_layer(tokens: vit.Tokens, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    images, count, width = tokens.patches_BND.shape
    if count != grid[0] * grid[1]:
        raise ValueError(
            f"the backbone gives {count} patches an image, not the {grid[0]} × {grid[1]} of its patch and image size: "
            "which are neighbours cannot be told; set model.patch_size and model.image_size as the backbone has them, "
            "or leave similarity out of tokens.measurements"
        )
    patches_BhwD = tokens.patches_BND.reshape(images, *grid, width)
    return to_class(tokens), neighbors.cosines(patches_BhwD), among(tokens.registers_BRD)
