"""LOST: a box around the main object of an image, from the similarities of its patches and no training at all.

Source: Siméoni et al. 2021 (arXiv 2109.14279), valeoai/LOST:object_discovery.py; the bias added to all products is the
paper's (paper.md §1, Table 3), and moves similarities below 0 where all features share a mean.

Shapes: B images, N patches on a grid of h × w, D width, K biases, M candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

_PRODUCTS = 2**24  # products of patches that are held at a time, 64 MiB
# Patches touch at their sides, within an image alone (images lie along the first axis).
_TOUCHING = np.zeros((3, 3, 3), bool)
_TOUCHING[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True)
class Found:
    """What LOST finds in B images under one bias.

    Attributes:
        degree_BN: int64, to how many other patches each is similar (product + bias > 0).
        seed_B: int64, the patch of lowest degree; of several the first in the rows of the grid.
        map_BN: the products of each patch with all patches that extend the seed, summed; the seed's component is the
            object. 0 for patches that are not there.
        cells_B4: int64, x0, y0, x1, y1 in patches (x1 and y1 exclusive) of the component of map > 0 with the seed; all
            0 where the seed is in none, because it is not even similar to itself.
    """

    degree_BN: Tensor
    seed_B: Tensor
    map_BN: Tensor
    cells_B4: Tensor


def prepare(features_BND: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Features in float32 and, if wanted, of length 1, and which patches are there, bool [B, N].

    Patches that were deleted from a forward pass have features that are no numbers: they become zeros.

    Raises:
        FloatingPointError: an image has no patch whose features are numbers.
    """
    there_BN = features_BND.isfinite().all(dim=-1)
    if not bool(there_BN.any(dim=1).all()):
        raise FloatingPointError("features of all patches of an image are not finite: the weights have diverged")
    features_BND = features_BND.float().masked_fill(~there_BN[..., None], 0.0)
    return (functional.normalize(features_BND, dim=-1) if normalize else features_BND), there_BN


@torch.no_grad()
def discover(
    features_BND: Tensor, there_BN: Tensor, biases: Sequence[float], grid: tuple[int, int], patches: int
) -> list[Found]:
    """LOST under each of some biases; the products are computed once, and a bias shifts them.

    Args:
        features_BND: float32, as `prepare` gives them, in the order of the grid's rows.
        there_BN: patches that are not there are similar to none.
        biases: K.
        grid: h and w.
        patches: M, how many patches of lowest degree may extend the seed; 100 in LOST.
    """
    assert features_BND.shape[1] == grid[0] * grid[1], "the patches do not fill the grid"
    degrees_KBN = _degrees(features_BND, there_BN, biases)
    return [
        _expand(features_BND, there_BN, degrees_KBN[number], bias, grid, patches) for number, bias in enumerate(biases)
    ]


def _degrees(features_BND: Tensor, there_BN: Tensor, biases: Sequence[float]) -> Tensor:
    """How many other patches each is similar to under each bias, int64 [K, B, N]; a block of rows at a time."""
    batch, count, _ = features_BND.shape
    degrees_KBN = torch.zeros(len(biases), batch, count, dtype=torch.int64, device=features_BND.device)
    rows = max(1, _PRODUCTS // (batch * count))
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        products_BrN = features_BND[:, part] @ features_BND.transpose(1, 2)
        is_self_rN = torch.eye(count, dtype=torch.bool, device=there_BN.device)[part]
        # A sum that stays below 0 under every bias: neither patches that are not there nor oneself count.
        products_BrN.masked_fill_(is_self_rN | ~there_BN[:, None] | ~there_BN[:, part, None], -torch.inf)
        for number, bias in enumerate(biases):
            degrees_KBN[number, :, part] = (products_BrN + bias > 0).sum(dim=-1)
    return degrees_KBN


def _expand(
    features_BND: Tensor, there_BN: Tensor, degree_BN: Tensor, bias: float, grid: tuple[int, int], patches: int
) -> Found:
    """Seed, what extends it, and the box of both."""
    far = there_BN.shape[1]  # more than any degree: such patches come last
    candidates_BM = degree_BN.masked_fill(~there_BN, far).argsort(dim=1, stable=True)[:, :patches]
    chosen_BMD = features_BND.gather(1, candidates_BM[..., None].expand(-1, -1, features_BND.shape[2]))
    products_BMN = chosen_BMD @ features_BND.transpose(1, 2) + bias
    extends_BM = (products_BMN[:, 0].gather(1, candidates_BM) > 0) & there_BN.gather(1, candidates_BM)
    map_BN = (products_BMN * extends_BM[..., None]).sum(dim=1).masked_fill(~there_BN, 0.0)
    seed_B = candidates_BM[:, 0]
    return Found(degree_BN, seed_B, map_BN, _cells(map_BN, seed_B, grid))


def _cells(map_BN: Tensor, seed_B: Tensor, grid: tuple[int, int]) -> Tensor:
    """The box of the 4-connected component of map > 0 that holds the seed, int64 [B, 4] in patches."""
    positive_Bhw = (map_BN > 0).cpu().numpy().reshape(-1, *grid)
    labels_Bhw, _ = ndimage.label(positive_Bhw, structure=_TOUCHING)
    label_B = np.take_along_axis(labels_Bhw.reshape(len(labels_Bhw), -1), seed_B.cpu().numpy()[:, None], axis=1)[:, 0]
    object_Bhw = (labels_Bhw == label_B[:, None, None]) & (label_B > 0)[:, None, None]
    (y0_B, y1_B), (x0_B, x1_B) = (_extent(object_Bhw.any(axis=axis)) for axis in (2, 1))
    return torch.from_numpy(np.stack([x0_B, y0_B, x1_B, y1_B], axis=1))


def _extent(occupied_Bn: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last place + 1 of each row that is true; 0 and 0 where none is."""
    first = occupied_Bn.argmax(axis=1)
    last = occupied_Bn.shape[1] - occupied_Bn[:, ::-1].argmax(axis=1)
    return first.astype(np.int64), np.where(occupied_Bn.any(axis=1), last, 0).astype(np.int64)


def boxes(cells_B4: NDArray[np.int64], scale: tuple[float, float], size: tuple[float, float]) -> NDArray[np.float64]:
    """Boxes of patches in px, x0, y0, x1, y1, of which x1 and y1 are clipped to the image (padding is none of it).

    Args:
        cells_B4: of `Found`.
        scale: height and width of a patch in px.
        size: height and width of the image in px.
    """
    scaled = cells_B4.astype(np.float64) * [scale[1], scale[0], scale[1], scale[0]]
    scaled[:, 2:] = np.minimum(scaled[:, 2:], [size[1], size[0]])
    return scaled


def overlap(predicted_B4: NDArray[np.floating], truth_BJ4: NDArray[np.floating]) -> NDArray[np.float64]:
    """The largest intersection over union of each box with any of J true ones, [B]; NaN where an image has none.

    Coordinates have no extent of their own: a box from 0 to 2 is 2 px wide. True boxes that are NaN do not count.
    Source: valeoai/LOST:datasets.py, `bbox_iou`.
    """
    first, other = predicted_B4[:, None].astype(np.float64), truth_BJ4.astype(np.float64)
    sides = np.minimum(first[..., 2:], other[..., 2:]) - np.maximum(first[..., :2], other[..., :2])
    common = sides.clip(min=0).prod(axis=-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1) - common
    shares_BJ = np.where(np.isnan(union), -np.inf, common / np.where(union > 0, union, 1.0))
    best = shares_BJ.max(axis=1, initial=-np.inf)
    return np.where(np.isinf(best), np.nan, best)
