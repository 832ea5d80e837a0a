"""The trials that benchmarks train: settings of the sweeps that ship, cut short, as resolved configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainers.config import TrialConfig, resolve

# The official vitl16_short but for the model, which is also what lightly implements: centring by a running mean, one
# head. Of every 10 images 3 are dropped: exactly the rate, which 0.3 of another number would not be.
_DINOV2: dict[str, Any] = {
    "method": "dinov2",
    "preset": "imagenet1k",
    "model.image_size": "auto",
    "model.num_registers": 4,
    "model.drop_path_group": 10,
    "dinov2.mask_group_size": None,  # the masks of a batch, as lightly draws them
    "optim.lr": 1e-3,  # for a batch that is a hundredth of the recipe's
    "optim.warmup_steps": "auto",
}

# Heads as small as in the preset `short`: with 65,536 prototypes they would be a third of the step of a small model.
_SMALL_HEAD: dict[str, Any] = {
    "dinov2.head.prototypes": 4_096,
    "dinov2.head.hidden": 512,
    "dinov2.head.bottleneck": 128,
}

_224PX: dict[str, Any] = {
    "model.size": "small",
    "model.patch_size": 16,
    "model.image_size": 224,
    "data.decode_size": 256,
    "data.scenes.num_train": 512,
    "data.scenes.num_validation": 64,
}

# Shapes by name: the models of sweeps/quickstart.yaml and of sweeps/num_registers.yaml, and some that fill the cores.
SHAPES: dict[str, dict[str, Any]] = {
    "nano/8 32px": {
        "model.size": "nano",
        "data.decode_size": 32,
        "optim.batch_size": 32,
        "deit3.cutmix": 0.0,
        "deit3.flip": False,
        "deit3.color_jitter": 0.0,
        "deit3.three_augment": False,
    },
    "nano/8 64px": {"model.size": "nano", "data.decode_size": 64, "optim.batch_size": 64},
    "tiny/8 64px": {"model.size": "tiny", "data.decode_size": 64, "optim.batch_size": 32},
    "small/16 224px": {**_224PX, "optim.batch_size": 16},
    "dinov2 nano/8 32px": {
        **_DINOV2,
        **_SMALL_HEAD,
        "model.size": "nano",
        "data.decode_size": 32,
        "optim.batch_size": 10,
        "dinov2.koleo.group_size": 10,
    },
    "dinov2 tiny/8 64px": {
        **_DINOV2,
        **_SMALL_HEAD,
        "model.size": "tiny",
        "data.decode_size": 64,
        "optim.batch_size": 30,
        "dinov2.koleo.group_size": 30,
    },
    "dinov2 small/16 224px": {**_DINOV2, **_224PX, "optim.batch_size": 10, "dinov2.koleo.group_size": 10},
}

# As many steps as sweeps/num_registers.yaml has, of which only the first are taken; nothing else within reach.
_LONG: dict[str, Any] = {
    "method": "deit3",
    "preset": "short",
    "model.patch_size": 8,
    "precision": "fp32",
    "data.train": "scenes",
    "data.scenes.num_train": 2_000,
    "data.scenes.num_validation": 256,
    "data.scenes.num_test": 16,
    "optim.optimizer": "adamw",
    "optim.steps": 3_000,
    "evaluation.points": 1,
    "execution.device": "cpu",
    "execution.checkpoint_seconds": 3_600.0,
}


def trial(shape: str, threads: int, **settings: Any) -> TrialConfig:
    """A long trial of a shape by name; `settings` are dotted names with `__` for the dot."""
    own = {name.replace("__", "."): value for name, value in settings.items()}
    return resolve({**_LONG, **SHAPES[shape], "execution.threads": threads, **own})


def decoded(config: TrialConfig, folder: Path) -> Any:
    """The data set of a trial, decoded into the cache that `train_in_turns` uses in `folder`."""
    from trainers.data import open_data

    assert isinstance(config.model.image_size, int)
    return open_data(config.data, config.execution, config.model.image_size, folder / "cache")


def described(shape: str, config: TrialConfig) -> str:
    """Our side of a comparison, in words."""
    method = "" if shape.startswith(config.method) else f"{config.method} "
    return f"trainers.train.train, {method}{shape} {config.precision}, batch {config.optim.batch_size}"
