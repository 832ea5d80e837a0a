"""Named recipes per method: dotted settings that replace defaults before a user's own settings; no torch.

`short` is for runs of minutes to hours; the others follow the recipes that the paper's models were trained with
(paper section "Training", official repositories named beside the values).
"""

from __future__ import annotations

Settings = dict[str, object]

# DeiT-III on ImageNet-21k: facebookresearch/deit README_revenge.md, main.py, models_v2.py.
_DEIT3_IMAGENET21K: Settings = {
    "model.image_size": 224,
    "model.patch_size": 16,
    "model.reg_init_std": 1e-6,
    "model.layer_scale": 1e-4,
    "model.drop_path": 0.1,  # 0.15 when fine-tuned
    "data.decode_size": "original",
    "optim.optimizer": "lamb",
    "optim.lr": 1e-3,  # not scaled with the batch
    "optim.weight_decay": 0.02,
    "optim.batch_size": 2048,  # 64 × 32 GPUs
    "optim.steps": 1_660_000,  # 240 epochs of 14.2 M images
    "optim.warmup_steps": 34_600,  # 5 epochs
    "optim.warmup_lr": 1e-6,
    "optim.ema_decay": 0.99996,
    "deit3.loss": "soft_ce",  # BCE is the ImageNet-1k recipe's
    "deit3.smoothing": 0.1,
    "deit3.mixup": 0.0,
    "deit3.cutmix": 1.0,
    "deit3.crop": "simple",
    "deit3.color_jitter": 0.3,
}

PRESETS: dict[str, dict[str, Settings]] = {
    "deit3": {"short": {}, "imagenet21k": _DEIT3_IMAGENET21K},
}


def preset(method: str, name: str) -> Settings:
    """The settings of recipe `name` of `method`; a user's own method has only `short`, which is empty.

    Raises:
        ValueError: the method has no recipe of that name.
    """
    known = PRESETS.get(method, {"short": {}})
    if name not in known:
        raise ValueError(f"preset {name!r} does not exist for method {method!r}; allowed: {', '.join(known)}")
    return known[name]
