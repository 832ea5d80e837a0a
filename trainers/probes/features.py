"""Features of images from the frozen backbone, extracted in one pass and shared by all probes; registers never enter.

Shapes: n images, B of them, N patches, R registers, D width, L blocks (layers 0 … L).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers import vit
from trainers.vit import Backbone, Tokens

# What can be read of an image, float32; a backbone without class token has none of those named cls.
READS = {
    "cls": "[D], class token after the final norm",
    "mean_patch": "[D], mean over the patch tokens after the final norm",
    "cls_blocks": "[K, D], class tokens of the last K = min(4, L) blocks, each after the final norm, the last one last",
    "patches": "[N, D], patch tokens after the final norm",
    "raw_cls": "[D], class token before the final norm",
    "raw_patches": "[N, D], patch tokens before the final norm",
    "raw_blocks": "[K, 1 + N, D], class token and patches before the final norm of K = min(4, L) evenly spaced blocks",
    "queries": "[N, D], of the patches in the last block, heads side by side",
    "keys": "[N, D]",
    "values": "[N, D]",
    "norms": "[N], norms of the patches before the final norm",
}
LAST_BLOCKS = 4  # of DINOv2's linear evaluation

_QKV = ("queries", "keys", "values")
_FINITE = ("cls", "mean_patch", "cls_blocks", "patches")  # the others may be NaN where patches were deleted
_LARGE = 2**30  # bytes; a feature with more is kept in a file
_SUBSET_SEED = 20_230_928  # any fixed number: all trials' probes learn from the same images


def training_subset(num_images: int, most: int) -> NDArray[np.int64]:
    """Indices, in rising order, of at most `most` of `num_images` training images for probes to learn from.

    Drawn without regard to order, since sets often repeat their classes at even intervals, and from a fixed seed: the
    choice depends on the two numbers alone, never on a trial.
    """
    if num_images <= most:
        return np.arange(num_images)
    return np.sort(np.random.Generator(np.random.PCG64(_SUBSET_SEED)).permutation(num_images)[:most])


@torch.no_grad()
def extract(
    backbone: nn.Module | Backbone,
    batches: Iterable[Tensor],
    count: int,
    reads: Collection[str],
    norm_layer: int = -1,
    *,
    device: torch.device | str = "cpu",
    scratch: Path | None = None,
) -> dict[str, Tensor]:
    """What `reads` names of all images, in eval mode; the modules' modes are restored afterwards.

    Args:
        backbone: a Backbone.
        batches: normalised images [B, 3, S, S] on the device, n in all.
        count: n.
        reads: names in READS; those that the backbone does not have are left out.
        norm_layer: whose norms "norms" are.
        device: where features stay, unless they are larger than a GiB: these are memory-mapped from `scratch`.
        scratch: a folder; the file in it has no name and vanishes with the tensor.

    Returns:
        Tensors [n, …] by name.

    Raises:
        ValueError: there are no images, or the backbone cannot give what is asked.
        FloatingPointError: features are NaN or infinite, because the weights are.
    """
    if not count:
        raise ValueError("there are no images to extract features of")
    assert isinstance(backbone, nn.Module)
    kept: dict[str, Tensor] = {}
    finite = torch.ones((), dtype=torch.bool, device=device)
    done = 0
    with evaluating(backbone):
        for images in batches:
            for name, rows in taps(backbone, images, reads, norm_layer).items():
                if name in _FINITE:
                    finite &= rows.isfinite().all()
                if name not in kept:
                    kept[name] = _room((count, *rows.shape[1:]), device, scratch)
                kept[name][done : done + len(rows)] = rows
            done += len(images)
    assert done == count, "the batches hold another number of images"
    if not bool(finite):
        raise FloatingPointError("features are not finite: the weights have diverged")
    return kept


def _room(shape: tuple[int, ...], device: torch.device | str, scratch: Path | None) -> Tensor:
    """An empty float32 tensor, mapped from a nameless file where it is large."""
    if 4 * int(np.prod(shape)) <= _LARGE:
        return torch.empty(shape, device=device)
    with tempfile.TemporaryFile(dir=scratch) as file:
        try:  # on a full disk writing to a map kills the process
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
        except OSError as error:
            raise ValueError(
                f"features of {4 * math.prod(shape):,} bytes cannot be kept in {scratch or tempfile.gettempdir()}: "
                f"{error.strerror}; evaluation.train_images takes fewer images"
            ) from error
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))


def taps(backbone: nn.Module, images: Tensor, reads: Collection[str], norm_layer: int = -1) -> dict[str, Tensor]:
    """What `reads` names of a batch, float32 [B, …], from one pass of the built-in ViT; others are asked twice.

    Raises:
        ValueError: another backbone cannot give it.
    """
    passed = _Pass(backbone, images, reads, norm_layer)
    return {name: rows.float() for name in READS if name in reads for rows in passed.read(name)}


class _Pass:
    """One batch on its way through a backbone."""

    def __init__(self, backbone: nn.Module, images: Tensor, reads: Collection[str], norm_layer: int) -> None:
        self._backbone, self._images = backbone, images
        self._wanted = set(reads)
        plain = self._wanted <= {"cls", "mean_patch", "patches"}
        self._raw: dict[int, Tokens] = {}
        self._normed: dict[int, Tokens] = {}
        if isinstance(backbone, vit.ViT) and not plain:
            self._depth: int = backbone.depth
            self._norm_layer = norm_layer % (self._depth + 1)
            reached = backbone.raw_and_normed(images, sorted(self._layers()))
            self._raw = {layer: raw for layer, (raw, _) in reached.items()}
            self._normed = {layer: normed for layer, (_, normed) in reached.items()}
            self._last = self._normed[self._depth]
            return
        self._last = _model(backbone).tokens(images, normed=True)
        if not plain:
            self._raw = dict(enumerate(_model(backbone).residuals(images)))
            self._depth = len(self._raw) - 1
            self._norm_layer = norm_layer % (self._depth + 1)

    def _layers(self) -> set[int]:
        layers = {self._depth}
        if self._wanted & set(_QKV):
            layers.add(self._depth - 1)
        if "cls_blocks" in self._wanted:
            layers |= set(last_blocks(self._depth))
        if "raw_blocks" in self._wanted:
            layers |= set(even_blocks(self._depth))
        if "norms" in self._wanted:
            layers.add(self._norm_layer)
        return layers

    def read(self, name: str) -> Iterator[Tensor]:
        """The rows of `name`, once, or never where the backbone has none."""
        if name in _QKV:
            yield self._projections[_QKV.index(name)]
        elif name == "mean_patch":
            yield self._last.patches_BND.mean(dim=1, dtype=torch.float32)
        elif name == "patches":
            yield self._last.patches_BND
        elif name == "raw_patches":
            yield self._raw[self._depth].patches_BND
        elif name == "norms":
            yield torch.linalg.vector_norm(self._raw[self._norm_layer].patches_BND, dim=-1, dtype=torch.float32)
        elif name == "raw_blocks":
            yield torch.stack([_with_class(self._raw[layer]) for layer in even_blocks(self._depth)], dim=1)
        elif self._last.cls_BD is not None:
            if name == "cls":
                yield self._last.cls_BD
            elif name == "raw_cls":
                assert self._raw[self._depth].cls_BD is not None
                yield self._raw[self._depth].cls_BD  # type: ignore[misc]
            else:
                yield torch.stack([self._normed_class(layer) for layer in last_blocks(self._depth)], dim=1)

    def _normed_class(self, layer: int) -> Tensor:
        if layer in self._normed:
            assert self._normed[layer].cls_BD is not None
            return self._normed[layer].cls_BD  # type: ignore[return-value]
        norm: Any = getattr(self._backbone, "norm", None)
        if norm is None:
            raise ValueError("class tokens of several blocks need a backbone with a final norm under the name norm")
        cls_BD: Tensor = norm(self._raw[layer].cls_BD)
        return cls_BD

    @property
    def _projections(self) -> tuple[Tensor, ...]:
        """Queries, keys and values of the patches, [B, N, D] each."""
        if isinstance(self._backbone, vit.ViT):
            projected = self._backbone.project(self._raw[self._depth - 1], self._depth)
        else:
            projected = _model(self._backbone).qkv(self._images, self._depth)
        patches = self._last.patches_BND.shape[1]
        return tuple(part_BHTC[:, :, -patches:].transpose(1, 2).flatten(2) for part_BHTC in projected)


def last_blocks(depth: int) -> list[int]:
    """The last four layers, or all after the first."""
    return list(range(max(1, depth - LAST_BLOCKS + 1), depth + 1))


def even_blocks(depth: int) -> list[int]:
    """Four layers that divide the depth evenly, the last one last, as DINOv2's dense heads have them."""
    if depth == 24:
        return [5, 12, 18, 24]  # [4, 11, 17, 23] there, counted from 0, though a quarter of 24 is 6
    count = min(LAST_BLOCKS, depth)
    return [round(depth * (i + 1) / count) for i in range(count)]


def _with_class(tokens: Tokens) -> Tensor:
    """The class token, zeros where there is none, and the patches."""
    patches_BND = tokens.patches_BND
    cls_BD = patches_BND.new_zeros(patches_BND.shape[::2]) if tokens.cls_BD is None else tokens.cls_BD
    return torch.cat([cls_BD[:, None], patches_BND], dim=1)


def _model(backbone: nn.Module) -> Backbone:
    return backbone  # type: ignore[return-value]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode and convolutions in full float32; each of its parts gets its own mode back.

    On GPUs PyTorch lets convolutions, and so the patch embedding, round to TF32 unless told otherwise.
    """
    modes = [(part, part.training) for part in module.modules()]
    rounds = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    module.eval()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = rounds
        for part, training in modes:
            part.training = training
