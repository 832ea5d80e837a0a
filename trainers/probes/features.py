"""Features of images from the frozen backbone, extracted once and shared by all probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers.vit import Backbone

_SUBSET_SEED = 20_230_928  # any fixed number: all trials' probes learn from the same images


@dataclass(frozen=True)
class Features:
    """What probes read of n images, all on one device; tokens are final-norm'ed, registers never enter."""

    cls: Tensor | None  # float32 [n, D], None for a backbone without class token
    mean_patch: Tensor  # float32 [n, D], mean over the patch tokens
    classes: Tensor  # int64 [n]

    def __len__(self) -> int:
        return len(self.classes)

    def at(self, indices: Tensor) -> Features:
        """The features of some of the images."""
        return Features(
            None if self.cls is None else self.cls[indices], self.mean_patch[indices], self.classes[indices]
        )


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
    backbone: nn.Module,
    images: NDArray[np.uint8],
    classes: NDArray[np.int64],
    view: Callable[[Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    indices: NDArray[np.int64] | None = None,
    chunk: int = 256,
) -> Features:
    """Features of images (all, or those at `indices`) in eval mode; the modules' modes are restored afterwards.

    Args:
        backbone: a Backbone.
        images: uint8 [n, H, W, 3], for example a memory map; read chunk by chunk.
        classes: int64 [n].
        view: from uint8 [B, H, W, 3] on the device to what the backbone takes, float32 [B, 3, S, S] normalised.
        device: where the backbone is and the features stay.
        indices: which images, in the order of the result.
        chunk: images at a time.

    Raises:
        ValueError: there are no images.
        FloatingPointError: features are NaN or infinite, because the weights are.
    """
    chosen = np.arange(len(images)) if indices is None else indices
    if not len(chosen):
        raise ValueError("there are no images to extract features of")
    model = cast(Backbone, backbone)
    cls, mean_patch = [], []
    with evaluating(backbone):
        for start in range(0, len(chosen), chunk):
            pixels = torch.from_numpy(images[chosen[start : start + chunk]]).to(device)
            tokens = model.tokens(view(pixels), normed=True)
            mean_patch.append(tokens.patches_BND.mean(dim=1, dtype=torch.float32))
            if tokens.cls_BD is not None:
                cls.append(tokens.cls_BD.float())
    features = Features(
        torch.cat(cls) if cls else None,
        torch.cat(mean_patch),
        torch.from_numpy(np.asarray(classes[chosen], dtype=np.int64)).to(device),
    )
    if not all(bool(part.isfinite().all()) for part in (features.cls, features.mean_patch) if part is not None):
        raise FloatingPointError("features are not finite: the weights have diverged")
    return features


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
