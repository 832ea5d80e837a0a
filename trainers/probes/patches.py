"""Reads the tokens of a split's images once, with which patches are outliers and which are padding.

Shapes: B images, N patches, R registers, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers import vit
from trainers.data import Split
from trainers.measurement import CHUNK, Subject
from trainers.probes.features import evaluating
from trainers.vit import Tokens


class Seen(NamedTuple):
    """Some images as the backbone saw them, on its device."""

    indices: NDArray[np.int64]  # [B], of the split
    views: Tensor  # float32 [B, 3, S, S], normalised
    tokens: Tokens  # float32, after the final norm
    outlier_BN: Tensor  # bool; padding is none
    content_BN: NDArray[np.bool_]  # false where a patch consists of padding alone


def read(subject: Subject, split: str, indices: NDArray[np.int64], chunk: int = CHUNK) -> Iterator[Seen]:
    """Tokens of the images at `indices` of "train", "validation" or "test", in one forward pass each.

    A patch is an outlier whose norm at `tokens.outlier_layer`, before the final norm, exceeds `subject.threshold`;
    the probe images alone decide on that.

    Raises:
        FloatingPointError: after the last image, where tokens of any were NaN or infinite.
    """
    part = cast(Split, getattr(subject.data, split))
    layer = subject.tokens.outlier_layer % len(subject.norms[0])
    finite = torch.ones((), dtype=torch.bool, device=subject.device)
    for some in np.array_split(indices, max(1, -(-len(indices) // chunk))):
        with torch.no_grad(), evaluating(subject.backbone):
            views = subject.view(part.images[some])
            tokens, norms_BN = _tokens(cast(vit.Backbone, subject.backbone), views, layer)
        finite &= vit.together(tokens).isfinite().all()
        padding_BN = subject.padding(part, some)
        content_BN = np.ones(norms_BN.shape, bool) if padding_BN is None else ~padding_BN
        outlier_BN = (norms_BN > subject.threshold) & torch.from_numpy(content_BN).to(subject.device)
        yield Seen(some, views, tokens, outlier_BN, content_BN)
    if not bool(finite):
        raise FloatingPointError("tokens are not finite: the weights have diverged")


def _tokens(backbone: vit.Backbone, views: Tensor, layer: int) -> tuple[Tokens, Tensor]:
    """Tokens after the final norm, and norms [B, N] of the patches at a layer before it."""
    if isinstance(backbone, vit.ViT):
        at_layer, last = backbone.intermediate(views, [layer, backbone.depth], normed=False)
        tokens = Tokens(*map(backbone.norm, last))
    else:
        tokens = backbone.tokens(views, normed=True)
        at_layer = next(islice(backbone.residuals(views), layer, None))
    cls_BD = None if tokens.cls_BD is None else tokens.cls_BD.float()
    tokens = Tokens(cls_BD, tokens.registers_BRD.float(), tokens.patches_BND.float())
    return tokens, torch.linalg.vector_norm(at_layer.patches_BND, dim=-1, dtype=torch.float32)
