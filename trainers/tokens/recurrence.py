"""Whether outliers follow the content of an image or the place on the grid: images are shifted, flipped and resized.

An outlier that follows content recurs where the same part of the picture is afterwards; one that follows the place
recurs in the same row and column. Only a shift and a flip tell the two apart: at another resolution the position
embedding is resampled, so that a place moves along with the content. What chance alone gives is the base rate: the
share of outliers afterwards.
Shapes: B images, patches on a grid of h × w cells before and h' × w' after.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers import vit
from trainers.measurement import CHUNK, Finding, Metric, Statistic, Subject
from trainers.probes.features import evaluating
from trainers.token_settings import RecurrenceConfig
from trainers.tokens.location import on_grid

logger = logging.getLogger(__name__)

Mask = NDArray[np.bool_]
Cells = NDArray[np.int64]  # rows and columns, [2, h, w]


class View(NamedTuple):
    """How images are seen: resized to a side of `side` patches, of which a window of `length` is shown, or mirrored."""

    side: int
    length: int
    first: int = 0  # patches above and to the left of the window
    flip: bool = False

    def show(self, x: Tensor, unit: int) -> Tensor:
        """The window of the last two axes, on which a patch is `unit` long."""
        window = slice(self.first * unit, (self.first + self.length) * unit)
        shown = x[..., window, window]
        return shown.flip(-1) if self.flip else shown


class Marks(NamedTuple):
    """Which patches of the same images are outliers, and which are more than padding, both [B, h, w]."""

    outliers: Mask
    patches: Mask


def shifted(grid: tuple[int, int], shift: int) -> Cells:
    """Where the content of each cell is after a shift by whole patches up and to the left; outside where it is cut."""
    return np.indices(grid) - shift


def flipped(grid: tuple[int, int]) -> Cells:
    """Where the content of each cell is after a horizontal flip."""
    rows, columns = np.indices(grid)
    return np.stack([rows, grid[1] - 1 - columns])


def resized(grid: tuple[int, int], after: tuple[int, int]) -> Cells:
    """Which cell of another grid holds the centre of each cell."""
    sizes, new = (np.array(shape)[:, None, None] for shape in (grid, after))
    return np.asarray((2 * np.indices(grid) + 1) * new // (2 * sizes))


def recurrence(before: Marks, after: Marks, content: Cells) -> dict[str, float]:
    """How often outliers recur; nothing but the number of pairs where there are no pairs.

    A pair is an outlier before and its two counterparts after, at its content and at its place. It counts where both
    exist, neither is padding, and they are not the same cell, which would tell nothing.

    Args:
        before, after: of the same images.
        content: where the content of each cell is after.

    Returns:
        `pairs`: their number; `content`, `place`: the share of pairs whose counterpart is an outlier too; `base_rate`:
        the share of outliers among all patches after.
    """
    place = np.indices(before.outliers.shape[1:])
    height, width = after.outliers.shape[1:]
    row, column = content
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    exists &= (place[0] < height) & (place[1] < width) & (content != place).any(axis=0)
    at = {"content": np.where(exists, content, 0), "place": np.where(exists, place, 0)}
    pairs = before.outliers & exists
    for rows, columns in at.values():
        pairs &= after.patches[:, rows, columns]
    return _shares(pairs, after, at)


def recurrence_when_resized(before: Marks, after: Marks) -> dict[str, float]:
    """How often outliers recur at the same relative position of another grid; nothing but `pairs` where there are none.

    Content and what is tied to the position embedding are both there, so that this does not tell them apart.

    Returns:
        `pairs`: the number of outliers before whose counterpart after is no padding; `recurs`: the share of these whose
        counterpart is an outlier too; `base_rate`: the share of outliers among all patches after.
    """
    at = resized(before.outliers.shape[1:], after.outliers.shape[1:])
    return _shares(before.outliers & after.patches[:, *at], after, {"recurs": at})


def _shares(pairs: Mask, after: Marks, counterparts: Mapping[str, Cells]) -> dict[str, float]:
    """The share of pairs [B, h, w] whose counterpart, by name, is an outlier."""
    count = int(pairs.sum())
    if not count:
        return {"pairs": 0.0}
    recurring = {name: int((pairs & after.outliers[:, *at]).sum()) / count for name, at in counterparts.items()}
    return {"pairs": float(count), **recurring, "base_rate": int(after.outliers.sum()) / int(after.patches.sum())}


def measure(subject: Subject, settings: RecurrenceConfig) -> Iterator[Finding]:
    """`recurrence/shift/…` and `recurrence/flip/…` as in `recurrence`; at other resolutions only whether they recur.

    These are `recurrence/scale_1_5/antialias/…` and `…/plain/…` as in `recurrence_when_resized`: the built-in ViT's
    position embedding is resampled both with and without antialiasing, whatever `model.pos_antialias` says. That of a
    user's own backbone is its own affair, and its numbers are named `recurrence/scale_1_5/…`.
    Outliers of all views are found by the threshold of the probe images as they are. A shift is seen in two windows of
    a picture that is `shift` patches larger. Statistics `…/pairs` say of how many pairs these are.

    Raises:
        ValueError: the backbone does not take images of another resolution.
    """
    grid, backbone = subject.grid, subject.backbone
    side = grid[0]
    patches_BN = ~np.isnan(subject.patch_norms(subject.tokens.outlier_layer))
    standing = Marks(on_grid(subject.outliers, grid), on_grid(patches_BN, grid))
    if settings.shift < side:
        windows = [View(side + settings.shift, side, corner) for corner in (0, settings.shift)]
        before, after = (_look(subject, backbone, window) for window in windows)
        yield from _findings("shift", recurrence(before, after, shifted(grid, settings.shift)))
    else:
        logger.warning("a shift by %d patches leaves nothing of %d: it is not measured", settings.shift, side)
    mirrored = _look(subject, backbone, View(side, side, flip=True))
    yield from _findings("flip", recurrence(standing, mirrored, flipped(grid)))
    for scale in settings.scales:
        name, length = f"scale_{scale:.10g}".replace(".", "_"), max(1, round(side * scale))
        if length == side:
            logger.warning("a scale of %g gives the same %d patches: it is not measured", scale, side)
            continue
        for suffix, variant in _variants(backbone):
            after = _look(subject, variant, View(length, length))
            yield from _findings(name + suffix, recurrence_when_resized(standing, after))


def _findings(name: str, found: Mapping[str, float]) -> Iterator[Finding]:
    for key, value in found.items():
        kind = Statistic if key == "pairs" else Metric
        yield kind(f"recurrence/{name}/{key}", value)


def _variants(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The backbone with either way of resampling its position embedding, and what its numbers are called.

    Variants share all parameters and blocks with the backbone, whose own settings stay.
    """
    if not isinstance(backbone, vit.ViT):
        yield "", backbone
        return
    for antialias in (True, False):
        variant = copy.copy(backbone)
        variant.settings = backbone.settings.model_copy(update={"pos_antialias": antialias})
        yield "/antialias" if antialias else "/plain", variant


def _look(subject: Subject, backbone: nn.Module, view: View) -> Marks:
    """The outliers of the probe images in a view, brought from the device at once."""
    pixels, patch_size = subject.probe_images(), subject.model.patch_size
    size, layer = view.side * patch_size, range(len(subject.norms[0]))[subject.tokens.outlier_layer]
    chunk = max(1, CHUNK * subject.grid[0] ** 2 // max(subject.grid[0], view.length) ** 2)
    norms = []
    with torch.no_grad(), evaluating(backbone):
        for start in range(0, len(pixels), chunk):
            images = view.show(subject.view(pixels[start : start + chunk], size), patch_size)
            norms.append(_patch_norms(backbone, images, layer))
    norms_Bhw = on_grid(torch.cat(norms).cpu().numpy(), (view.length, view.length))
    patches = np.ones(norms_Bhw.shape, bool)
    padded_BN = subject.padding(subject.data.validation, np.arange(len(pixels)), size)
    if padded_BN is not None:
        patches = view.show(torch.from_numpy(on_grid(~padded_BN, (view.side, view.side))), 1).numpy()
    return Marks((norms_Bhw > subject.threshold) & patches, patches)


def _patch_norms(backbone: nn.Module, images: Tensor, layer: int) -> Tensor:
    """Norms [B, N] of patch tokens at a layer, before the final norm.

    Raises:
        ValueError: a user's own backbone does not take images of this size.
    """
    residuals = cast(vit.Backbone, backbone).residuals
    try:
        patches_BND = next(islice(residuals(images), layer, None)).patches_BND
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(backbone, vit.ViT):
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the backbone does not take images of {images.shape[-1]} px ({reason}); if it takes those of one size "
            "alone, set tokens.recurrence.scales to []"
        ) from error
    norms: Tensor = torch.linalg.vector_norm(patches_BND, dim=-1, dtype=torch.float32)
    return norms
