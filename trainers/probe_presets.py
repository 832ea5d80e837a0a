"""Named recipes of single probes: settings that replace the defaults of a probe's section; no torch.

`fast` is the default: features extracted once, in minutes at most. `paper` follows the protocol that the paper's tables
were made with, value by value from the official repositories.
"""

from __future__ import annotations

from collections.abc import Mapping

Settings = dict[str, object]

# dinov2/eval/linear.py: --learning-rates, n_last_blocks_list, run_eval_linear.
_LINEAR_GRID: Settings = {
    "learning_rates": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
    "blocks": (1, 4),
}
_LINEAR_PAPER: Settings = {
    **_LINEAR_GRID,
    "at": "end",
    "steps": 12_500,  # 10 "epochs" of 1,250
    "batch_size": 1_024,  # 128 × 8 GPUs
    "crops": True,
    "select_on": "val",  # there the evaluated split itself; here validation, so that test stays unseen
}

# dinov2's linear configuration for ADE20k.
_SEGMENTATION_PAPER: Settings = {
    "at": "end",
    "steps": 40_000,
    "batch_size": 16,  # 2 × 8 GPUs
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "warmup_steps": 1_500,
    "whole": True,
    "side": 512,
    "stride": 341,
}

# dinov2's configuration for NYU depth; facebookresearch/dinov2:dinov2/hub/depthers.py for the linear head.
_DEPTH_PAPER: Settings = {
    "at": "end",
    "steps": 38_400,
    "batch_size": 16,  # 2 × 8 GPUs
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "warmup_steps": 12_800,
    "blocks": 4,
    "max_depth": 10.0,
    "gradient_axes": "batch",  # a mistake there, which makes the gradient loss 0
    "group_size": 2,  # of a GPU
    "whole": True,
    "crop": "nyu",
    "height": 416,
    "width": 544,
    "flip": True,
}

# valeoai/LOST main_lost.py. The paper's biases are not published, hence a curve over the size that products of features
# which are not normalised can have, from none to more than that of all.
_OBJECT_DISCOVERY_PAPER: Settings = {
    "at": "end",
    "normalize": False,
    "biases": (-3e3, -1e3, -300.0, -100.0, -30.0, -10.0, -3.0, -1.0, 0.0, 1.0, 10.0),
    "patches": 100,
    "images": 100_000_000,
    "whole": True,
    "protocol_splits": True,
}

_AT_END: Settings = {"at": "end"}  # of probes that are in both ways what the official code does

PRESETS: dict[str, dict[str, Settings]] = {
    "linear": {"fast": {}, "grid": _LINEAR_GRID, "paper": _LINEAR_PAPER},
    "knn": {"fast": {}, "paper": _AT_END},
    "zero_shot": {"fast": {}, "paper": _AT_END},
    "segmentation": {"fast": {}, "paper": _SEGMENTATION_PAPER},
    "depth": {"fast": {}, "paper": _DEPTH_PAPER},
    "object_discovery": {"fast": {}, "paper": _OBJECT_DISCOVERY_PAPER},
}


def recipes(given: Mapping[str, object]) -> Settings:
    """Dotted settings of the recipes that the dotted settings `given` name as `evaluation.PROBE.preset`.

    A name that does not exist gives nothing here; the section says so.
    """
    return {
        f"evaluation.{probe}.{name}": value
        for probe, named in PRESETS.items()
        for name, value in named.get(str(given.get(f"evaluation.{probe}.preset", "fast")), {}).items()
    }
