"""Subjects whose images have two classes by chance, so that small changes of features show in their fitted probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.trainers.planted import subject
from trainers.config import EvaluationConfig
from trainers.measurement import Subject
from trainers.probes import Context
from trainers.probes.fitted import Probes
from trainers.streams import Streams
from trainers.vit import ViT

IMAGES, PATCHES = 24, 16  # patches of 8 px


def pixels() -> NDArray[np.uint8]:
    """Noise on 32 × 32 px, light in every other image."""
    rng = np.random.Generator(np.random.PCG64(3))
    drawn = rng.integers(0, 120, (IMAGES, 32, 32, 3), dtype=np.uint8)
    drawn[::2] += 130
    return drawn


def labelled(
    change: Callable[[ViT], nn.Module] = lambda backbone: backbone,
    images: NDArray[np.uint8] | None = None,
    registers: int = 0,
    **settings: Any,
) -> Subject:
    """A random ViT of 4 blocks, or what `change` makes of it, on `pixels` or other images; `__` for a dot."""
    model = {"layer_scale": None, "reg_init_std": 0.5 if registers else None, "num_registers": registers}
    shown = pixels() if images is None else images
    given = subject(nn.Identity(), shown, **{f"model__{name}": value for name, value in model.items()} | settings)
    classes = np.random.Generator(np.random.PCG64(4)).permutation(np.arange(len(shown)) % 2)
    split = replace(given.data.train, targets={"classes": classes})
    data = replace(given.data, class_names=("heads", "tails"), train=split, validation=split, test=split)
    evaluation = EvaluationConfig(probes=("knn",), knn={"k": (3, 20)}, train_images=len(shown))
    probes = Probes(evaluation, data, given.model, Context(Streams(0), None, "deit3"), torch.device("cpu"))
    backbone = change(ViT(given.model, Streams(1)).eval().requires_grad_(False))
    return replace(given, backbone=backbone, data=data, probes=probes, fitted=probes.fit(backbone))
