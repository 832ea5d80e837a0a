"""FLOPs that one image costs in a training step of deit3 and of dinov2, two for each multiply-add.

A backward pass is counted as twice its forward pass; optimiser, augmentation, norms and softmaxes are not counted.
"""

from __future__ import annotations

import itertools

from orchestrator.estimate import forward_flops
from trainers.catalog import MODEL_SIZES
from trainers.config import TrialConfig
from trainers.method_settings import HeadConfig

TRAINING = 3  # forward, and backward at twice its cost
GLOBAL_CROPS = 2


def per_image(config: TrialConfig, num_classes: int) -> float:
    """FLOPs of one image in a training step of a resolved configuration.

    Raises:
        ValueError: there is no formula for the method.
    """
    if config.method == "deit3":
        return TRAINING * _forward(config, _image_size(config), num_classes)
    if config.method == "dinov2":
        return dinov2_backbones(config) + dinov2_heads(config)
    raise ValueError(f"FLOPs of method {config.method} are not known; allowed: deit3, dinov2")


def dinov2_backbones(config: TrialConfig) -> float:
    """The student on all crops, where images that drop path leaves out cost nothing, and the teacher on global ones."""
    assert config.dinov2 is not None
    crops, image_size = config.dinov2.crops, _image_size(config)
    assert isinstance(crops.local_size, int)
    student = GLOBAL_CROPS * _trained(config, image_size) + crops.num_local * _trained(config, crops.local_size)
    return student + GLOBAL_CROPS * _forward(config, image_size)


def dinov2_heads(config: TrialConfig) -> float:
    """Class tokens of all crops, the masked patches that are expected, and both of the teacher's global crops."""
    settings = config.dinov2
    assert settings is not None
    patches = (_image_size(config) // config.model.patch_size) ** 2
    masked = GLOBAL_CROPS * settings.mask_probability * sum(settings.mask_ratio) / 2 * patches
    tokens = TRAINING * (GLOBAL_CROPS + settings.crops.num_local) + GLOBAL_CROPS
    ibot = settings.ibot_head or settings.head
    return tokens * _head(config, settings.head) + (TRAINING + 1) * masked * _head(config, ibot)


def _image_size(config: TrialConfig) -> int:
    assert isinstance(config.model.image_size, int), "the configuration is not resolved"
    return config.model.image_size


def _forward(config: TrialConfig, side: int, num_classes: int = 0) -> float:
    model = config.model
    patches = (side // model.patch_size) ** 2
    return forward_flops(MODEL_SIZES[model.size], patches, model.num_registers, model.patch_size, num_classes)


def _trained(config: TrialConfig, side: int) -> float:
    """A student's forward and backward pass on a crop; drop path by groups computes only the images that it keeps."""
    model = config.model
    embedding = 6 * side**2 * MODEL_SIZES[model.size].width  # of whole patches
    kept, group = 1.0, model.drop_path_group
    if group is not None:
        kept = max(int(group * (1 - model.drop_path)), 1) / group
    return TRAINING * (embedding + kept * (_forward(config, side) - embedding))


def _head(config: TrialConfig, head: HeadConfig) -> float:
    """A row through the MLP and the prototypes."""
    inner = [head.hidden] * (head.layers - 1)
    sizes = [MODEL_SIZES[config.model.size].width, *inner, head.bottleneck, head.prototypes]
    return 2.0 * sum(one * other for one, other in itertools.pairwise(sizes))
