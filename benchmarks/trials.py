"""The trials that benchmarks train: settings of the sweeps that ship, cut short, as resolved configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainers.config import TrialConfig, resolve

# Shapes by name: the model of sweeps/quickstart.yaml, of sweeps/num_registers.yaml, and one that fills the cores.
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
}

# As many steps as sweeps/num_registers.yaml has, of which only the first are taken; nothing else within reach.
_LONG: dict[str, Any] = {
    "method": "deit3",
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
