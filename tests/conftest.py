"""What all tests share: one thread of torch, a tiny trial, and a cache of decoded data for the session."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two busy threads on two cores crawl

import pytest

TINY: dict[str, Any] = {
    "preset": "short",
    "model.size": "nano",
    "model.patch_size": 8,
    "data.decode_size": 16,
    "data.scenes.num_train": 128,
    "data.scenes.num_validation": 32,
    "data.scenes.num_test": 32,
    "optim.steps": 12,
    "optim.batch_size": 16,
    "evaluation.points": 3,
    "evaluation.train_images": 64,
    "evaluation.linear.steps": 20,
    "evaluation.linear.batch_size": 16,
    "evaluation.knn.k": [10, 20],
    "tokens.probe_images": 16,
    "execution.threads": 1,
    "execution.device": "cpu",
    "execution.checkpoint_seconds": 0.0,
}

_HEAD = {"prototypes": 64, "hidden": 32, "bottleneck": 16}
_CROPS = {"num_local": 2, "local_size": 16}

# What a tiny trial of each method needs besides: small heads, few crops, a short text tower; and, so that they are
# tested together, drop path and all that a method may keep from step to step.
TINY_METHODS: dict[str, dict[str, Any]] = {
    "deit3": {"model.drop_path": 0.2, "deit3.mixup": 0.4, "deit3.mix_group_size": 8, "optim.ema_decay": "auto"},
    "openclip": {
        "openclip.embed_dim": 16,
        "openclip.text_width": 16,
        "openclip.text_layers": 1,
        "openclip.text_heads": 2,
        "openclip.context_length": 16,
    },
    "dino": {
        "data.decode_size": 32,
        "model.drop_path": 0.1,
        **{f"dino.head.{name}": value for name, value in _HEAD.items()},
        **{f"dino.crops.{name}": value for name, value in _CROPS.items()},
        "dino.freeze_last_layer_steps": 2,
        "dino.warmup_teacher_temp": 0.03,
        "dino.warmup_teacher_temp_steps": 4,
    },
    "dinov2": {
        "data.decode_size": 32,
        "model.drop_path": 0.3,
        "model.drop_path_group": 4,
        **{f"dinov2.{head}.{name}": value for head in ("head", "ibot_head") for name, value in _HEAD.items()},
        **{f"dinov2.crops.{name}": value for name, value in _CROPS.items()},
        "dinov2.koleo.group_size": 4,
        "dinov2.freeze_last_layer_steps": 2,
        "dinov2.warmup_teacher_temp_steps": 4,
        "dinov2.centering": "softmax",
        "optim.weight_decay_end": 0.2,
    },
}


def tiny_trial(method: str, **settings: Any) -> dict[str, Any]:
    """Dotted settings of a tiny trial of `method`, with `settings` (`__` for a dot) besides."""
    own = {name.replace("__", "."): value for name, value in settings.items()}
    return {**TINY, "method": method, **TINY_METHODS[method], **own}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Dotted settings of a trial that trains in about a second."""
    return dict(TINY)


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of decoded data sets that all tests share."""
    return tmp_path_factory.mktemp("cache")
