"""Named recipes per method: dotted settings that replace defaults before a user's own settings; no torch.

`short` is for runs of minutes to hours, `nano` for about a minute on two cores; the others follow the recipes that the
paper's models were trained with, value by value from the official repositories. Lengths are in optimiser steps.
"""

from __future__ import annotations

from collections.abc import Mapping

Settings = dict[str, object]

# 300 steps on scenes of 32 px that are easier than the default ones: white digits as large as the image, on faint grey
# photographs. With colours, what is learned without labels in so few steps is colours, and probes find less than in
# random weights. LayerScale hardly opens in so few steps, and mirrored digits are other shapes.
_NANO: Settings = {
    "model.size": "nano",
    "model.patch_size": 8,
    "model.layer_scale": None,
    "data.decode_size": 32,
    "data.scenes.colored": False,
    "data.scenes.contrast": 0.2,
    "data.scenes.main_size": (0.9, 1.0),
    "optim.optimizer": "adamw",
    "optim.lr": 2e-3,
    "optim.steps": 300,
    "optim.batch_size": 64,
    "evaluation.points": 3,
    "evaluation.train_images": 2000,
}

# DeiT-III: facebookresearch/deit README_revenge.md (commands), main.py (their defaults), models_v2.py.
_DEIT3: Settings = {
    "model.size": "base",  # deit_base_patch16_LS
    "model.patch_size": 16,
    "model.reg_init_std": 1e-6,  # the paper gives none for DeiT-III; as in DINOv2. LAMB moves registers by a factor of
    # 1 + lr a step, so that in runs much shorter than this they stay nothing
    "precision": "fp16",  # torch.cuda.amp
    "model.layer_scale": 1e-4,  # init_scale of models_v2.py
    "data.decode_size": "original",
    "optim.optimizer": "lamb",  # --opt fusedlamb
    "optim.schedule": "timm",
    "optim.warmup_lr": 1e-6,
    "optim.min_lr": 1e-5,
    "optim.eps": 1e-8,  # --opt-eps
    "optim.decay_tokens": "none",  # no_weight_decay of models_v2.py
    "optim.ema_decay": 0.99996,  # kept, not evaluated
    "deit3.cutmix": 1.0,
    "deit3.three_augment": True,
    "deit3.color_jitter": 0.3,
    "deit3.flip": True,
}

_DEIT3_NANO: Settings = {
    **_NANO,
    "deit3.crop": "none",
    "deit3.flip": False,
    "deit3.three_augment": False,
    "deit3.color_jitter": 0.0,
    "deit3.cutmix": 0.0,
}

_DEIT3_IMAGENET1K: Settings = {
    **_DEIT3,
    "model.image_size": 192,  # then fine-tuned at 224 for 20 epochs, which is not part of this recipe
    "model.drop_path": 0.2,
    "optim.lr": 3e-3,  # --unscale-lr: not scaled with the batch
    "optim.weight_decay": 0.05,
    "optim.batch_size": 2048,  # 256 × 8 GPUs
    "optim.steps": 500_000,  # 800 epochs of 625: 1,281,167 // 256 · 256 / 8 GPUs is 160,128 images each, // 256
    "optim.warmup_steps": 3_125,  # 5 epochs
    "deit3.loss": "bce",
    "deit3.smoothing": 0.0,
    "deit3.mixup": 0.8,
    "deit3.mix_group_size": 256,  # a GPU's batch
    "deit3.crop": "resized",  # no --src
    "deit3.repeats": 3,  # --repeated-aug
}

_DEIT3_IMAGENET21K: Settings = {
    **_DEIT3,
    "model.image_size": 224,
    "model.drop_path": 0.1,  # 0.15 when fine-tuned
    "optim.lr": 1e-3,  # --unscale-lr
    "optim.weight_decay": 0.02,
    "optim.batch_size": 2048,  # 64 × 32 GPUs
    "optim.steps": 1_663_680,  # 240 epochs of 6,932: 14,197,122 images // 2048
    "optim.warmup_steps": 34_660,  # 5 epochs
    "deit3.loss": "soft_ce",  # BCE is the ImageNet-1k recipe's
    "deit3.smoothing": 0.1,
    "deit3.mixup": 0.0,
    "deit3.mix_group_size": 64,  # a GPU's batch
    "deit3.crop": "simple",  # --src
    "deit3.repeats": 1,  # --no-repeated-aug
}

# OpenCLIP: mlfoundations/open_clip src/open_clip_train/params.py (defaults), main.py (weight decay), ViT-B-16.json.
_OPENCLIP: Settings = {
    "model.pre_norm": True,  # ln_pre
    "model.norm_eps": 1e-5,  # torch's LayerNorm
    "model.layer_scale": None,  # ls_init_value
    "model.mlp": "gelu",
    "optim.optimizer": "adamw",
    "optim.schedule": "open_clip",
    "optim.lr": 5e-4,  # get_default_params, as the next three
    "optim.beta1": 0.9,
    "optim.beta2": 0.98,
    "optim.eps": 1e-6,
    "optim.weight_decay": 0.2,  # --wd
    "optim.decay_tokens": "position",
    "openclip.loss": "clip",
    "openclip.crop_scale": (0.9, 1.0),  # AugmentationCfg of src/open_clip/transform.py
}

_OPENCLIP_SHORT: Settings = {
    **_OPENCLIP,
    "openclip.embed_dim": 256,
    "openclip.text_width": 256,
    "openclip.text_layers": 4,
    "openclip.text_heads": 4,
    "openclip.context_length": 32,
}

# Captions name the photograph too, which is learned first: only a larger batch gets to the digits in 300 steps.
_OPENCLIP_NANO: Settings = {
    **_OPENCLIP,
    **_NANO,
    "optim.batch_size": 128,
    "optim.beta2": 0.95,
    "optim.warmup_steps": 5,
    "openclip.embed_dim": 32,
    "openclip.text_width": 64,
    "openclip.text_layers": 2,
    "openclip.text_heads": 2,
    "openclip.context_length": 32,
}

# ViT-B/16 on LAION-400M: docs/PRETRAINED.md, with the hyper-parameters of the SLURM script in README.md, as issue 598
# there says. The paper's own pairs are private.
_OPENCLIP_LAION400M: Settings = {
    **_OPENCLIP,
    "precision": "fp16",  # --precision amp
    "model.size": "base",
    "model.patch_size": 16,
    "model.image_size": 224,
    "model.reg_init_std": 1e-6,  # the paper gives none for OpenCLIP; as in DINOv2
    "data.decode_size": "original",
    "optim.batch_size": 33_792,  # 192 × 176 GPUs
    "optim.steps": 385_760,  # --epochs 32 of 12,055, ⌈407,332,084 pairs / 33,792⌉; pairs: open_clip_train/data.py
    "optim.warmup_steps": 2_000,  # --warmup of the script; 10,000 is the program's default
    "openclip.embed_dim": 512,
    "openclip.text_width": 512,
    "openclip.text_layers": 12,
    "openclip.text_heads": 8,
    "openclip.context_length": 77,
}

# DINO: facebookresearch/dino main_dino.py (defaults), vision_transformer.py, utils.py.
_DINO: Settings = {
    "model.layer_scale": None,
    "model.norm_eps": 1e-6,
    "model.pos_antialias": False,  # interpolate_pos_encoding of vision_transformer.py, as the next one
    "model.pos_offset": 0.1,
    "optim.optimizer": "adamw",
    "optim.schedule": "dino",
    "optim.warmup_lr": 0.0,  # cosine_scheduler's start
    "optim.min_lr": 1e-6,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.decay_tokens": "all",  # get_params_groups leaves out biases and what has one dimension
    "optim.clip_grad": 3.0,  # of each parameter by itself
    "dino.student_temp": 0.1,
    "dino.center_momentum": 0.9,
    "dino.teacher_momentum_end": 1.0,
}

_DINO_SHORT: Settings = {
    **_DINO,
    "optim.lr": 5e-4,
    "dino.head.prototypes": 4096,
    "dino.head.hidden": 512,
    "dino.head.bottleneck": 128,
    "dino.crops.num_local": 4,
    "dino.teacher_momentum": 0.99,  # a teacher of 100 steps: 0.996 and more are for runs of 100,000 steps
    "dino.freeze_last_layer_steps": 20,
}

# Digits fill the image, so that smaller crops than officially show no digit; and they are colours on a photograph.
_NANO_CROPS: Settings = {
    "global_scale": (0.6, 1.0),
    "local_scale": (0.25, 0.6),
    "num_local": 4,
    "flip": False,
    "solarize": 0.0,
    "blur": False,
}

# In 300 steps DINO learns only while its rates stay high, so that they hardly fall here; with smaller crops, stronger
# colours or a faster teacher the outputs become uniform instead.
_DINO_NANO: Settings = {
    **_DINO,
    **_NANO,
    "optim.lr": 3e-3,
    "optim.min_lr": 2e-3,
    "optim.warmup_steps": 50,
    "optim.batch_size": 128,
    "optim.weight_decay_end": 0.04,
    "dino.head.prototypes": 1024,
    "dino.head.hidden": 256,
    "dino.head.bottleneck": 64,
    **{f"dino.crops.{name}": value for name, value in _NANO_CROPS.items()},
    "dino.crops.global_scale": (0.7, 1.0),
    "dino.crops.local_scale": (0.4, 0.8),
    "dino.crops.num_local": 2,
    "dino.crops.color_jitter": 0.1,
    "dino.crops.grayscale": 0.0,
    "dino.teacher_momentum": 0.985,  # a teacher of 70 steps, to the end
    "dino.teacher_momentum_end": 0.985,
    "dino.freeze_last_layer_steps": 10,
}

# ViT-B/16 on ImageNet-1k by the command of README.md (2 nodes of 8 GPUs); the released one was trained for longer.
_DINO_IMAGENET1K: Settings = {
    **_DINO,
    "precision": "fp16",  # --use_fp16
    "model.size": "base",
    "model.patch_size": 16,
    "model.image_size": 224,
    "model.reg_init_std": 1e-6,  # the paper trains no DINO; as in DINOv2
    "model.drop_path": 0.1,  # rises from 0 along the blocks there, constant here
    "data.decode_size": "original",
    "optim.lr": 2e-3,  # 0.0005 · 1024 / 256
    "optim.batch_size": 1024,  # 64 × 16 GPUs
    "optim.steps": 125_100,  # 100 epochs of 1,251: 1,281,167 // 1024
    "optim.warmup_steps": 12_510,  # 10 epochs
    "dino.head.prototypes": 65_536,
    "dino.head.hidden": 2048,
    "dino.head.bottleneck": 256,
    "dino.head.layers": 3,
    "dino.crops.global_scale": (0.4, 1.0),
    "dino.crops.local_scale": (0.05, 0.4),
    "dino.crops.num_local": 8,
    "dino.crops.local_size": "auto",  # 96
    "dino.teacher_momentum": 0.996,
    "dino.teacher_temp": 0.04,
    "dino.warmup_teacher_temp": 0.04,
    "dino.warmup_teacher_temp_steps": 0,
    "dino.freeze_last_layer_steps": 1_251,  # 1 epoch
}

# DINOv2: facebookresearch/dinov2 dinov2/configs/ssl_default_config.yaml (its "epochs" are 1,250 steps).
_DINOV2: Settings = {
    "model.layer_scale": 1e-5,
    "model.norm_eps": 1e-6,
    "model.pos_antialias": True,  # false and 0.1 by default; configs/eval/*_reg4_pretrain.yaml, and the paper
    "model.pos_offset": 0.0,
    "optim.optimizer": "adamw",
    "optim.schedule": "dino",
    "optim.warmup_lr": 0.0,  # start_warmup_value of dinov2/train/train.py
    "optim.min_lr": 1e-6,
    "optim.weight_decay": 0.04,
    "optim.weight_decay_end": 0.4,
    "optim.decay_tokens": "all",  # dinov2/utils/param_groups.py leaves out biases, norms and LayerScale
    "optim.decay_registers": True,
    "optim.patch_embed_lr_scale": 0.2,
    "optim.clip_grad": 3.0,  # of backbone and heads, each by itself
    "dinov2.dino_weight": 1.0,
    "dinov2.ibot_weight": 1.0,
    "dinov2.koleo.weight": 0.1,
    "dinov2.sinkhorn_iterations": 3,
    "dinov2.center_momentum": 0.9,
    "dinov2.student_temp": 0.1,
    "dinov2.teacher_temp": 0.07,
    "dinov2.warmup_teacher_temp": 0.04,
    "dinov2.teacher_momentum_end": 1.0,
    "dinov2.mask_probability": 0.5,
    "dinov2.mask_ratio": (0.1, 0.5),
}

_DINOV2_SHORT: Settings = {
    **_DINOV2,
    "optim.lr": 1e-3,
    "dinov2.head.prototypes": 4096,
    "dinov2.head.hidden": 512,
    "dinov2.head.bottleneck": 128,
    "dinov2.ibot_head.prototypes": 4096,
    "dinov2.ibot_head.hidden": 512,
    "dinov2.ibot_head.bottleneck": 128,
    "dinov2.crops.num_local": 4,
    "dinov2.centering": "sinkhorn",
    "dinov2.warmup_teacher_temp_steps": 300,
    "dinov2.teacher_momentum": 0.99,  # a teacher of 100 steps, as in DINO's `short`
    "dinov2.freeze_last_layer_steps": 20,
}

_DINOV2_NANO: Settings = {
    **_DINOV2,
    **_NANO,
    "optim.patch_embed_lr_scale": 1.0,
    "dinov2.head.prototypes": 1024,
    "dinov2.head.hidden": 256,
    "dinov2.head.bottleneck": 64,
    "dinov2.ibot_head.prototypes": 1024,
    "dinov2.ibot_head.hidden": 256,
    "dinov2.ibot_head.bottleneck": 64,
    **{f"dinov2.crops.{name}": value for name, value in _NANO_CROPS.items()},
    "dinov2.koleo.group_size": 16,
    "dinov2.centering": "sinkhorn",
    "dinov2.warmup_teacher_temp_steps": 100,
    "dinov2.teacher_momentum": 0.95,  # a teacher of 20 steps
    "dinov2.freeze_last_layer_steps": 10,
}

_DINOV2_LARGE: Settings = {
    **_DINOV2,
    "precision": "fp16",  # mixed_precision of compute_precision
    "model.cls_init_std": 1e-6,  # dinov2/models/vision_transformer.py
    "model.size": "large",
    "model.image_size": 224,
    "model.reg_init_std": 1e-6,  # dinov2/models/vision_transformer.py
    "data.decode_size": "original",
    "dinov2.head.hidden": 2048,
    "dinov2.head.layers": 3,
    "dinov2.crops.global_scale": (0.32, 1.0),
    "dinov2.crops.local_scale": (0.05, 0.32),
    "dinov2.crops.num_local": 8,
    "dinov2.crops.local_size": "auto",  # 96 with patches of 16 px, 98 with patches of 14
    "dinov2.warmup_teacher_temp_steps": 37_500,  # 30 epochs
    "dinov2.freeze_last_layer_steps": 1_250,  # 1 epoch
}

# dinov2/configs/train/vitl16_short.yaml, which changes nothing of the defaults but the data and block chunks.
_DINOV2_IMAGENET1K: Settings = {
    **_DINOV2_LARGE,
    "model.patch_size": 16,
    "model.drop_path": 0.3,
    "model.drop_path_group": 64,  # a GPU's batch; there two to eight times that, as a GPU holds 2 or 8 crops of each
    "model.mlp": "gelu",
    "optim.lr": 5.657e-3,  # 4e-3 · √(2048 / 1024)
    "optim.batch_size": 2048,  # 64 × 32 GPUs (README.md: 4 nodes)
    "optim.steps": 125_000,  # 100 epochs
    "optim.warmup_steps": 12_500,  # 10 epochs
    "optim.layer_decay": 0.9,
    "dinov2.separate_heads": False,
    "dinov2.head.prototypes": 65_536,
    "dinov2.head.bottleneck": 256,
    "dinov2.koleo.group_size": 64,  # a GPU's batch
    "dinov2.mask_group_size": 64,
    "dinov2.centering": "softmax",
    "dinov2.teacher_momentum": 0.992,
}

# dinov2/configs/train/vitl14.yaml, the recipe of the paper's DINOv2 with registers.
_DINOV2_IMAGENET22K: Settings = {
    **_DINOV2_LARGE,
    "model.patch_size": 14,
    "model.drop_path": 0.4,
    "model.drop_path_group": 32,  # a GPU's batch, as in imagenet1k
    "model.mlp": "swiglu",  # swiglufused; the released ViT-L has a plain MLP
    "optim.lr": 3.4641e-4,  # 2e-4 · √(3072 / 1024)
    "optim.weight_decay_end": 0.2,
    "optim.batch_size": 3072,  # 32 × 96 GPUs (README.md: 12 nodes)
    "optim.steps": 625_000,  # 500 epochs
    "optim.warmup_steps": 100_000,  # 80 epochs
    "optim.layer_decay": 1.0,
    "dinov2.separate_heads": True,
    "dinov2.head.prototypes": 131_072,
    "dinov2.head.bottleneck": 384,
    "dinov2.ibot_head.prototypes": 131_072,
    "dinov2.ibot_head.hidden": 2048,
    "dinov2.ibot_head.bottleneck": 256,
    "dinov2.ibot_head.layers": 3,
    "dinov2.koleo.group_size": 32,  # a GPU's batch
    "dinov2.mask_group_size": 32,
    "dinov2.centering": "sinkhorn",
    "dinov2.teacher_momentum": 0.994,
}

PRESETS: dict[str, dict[str, Settings]] = {
    "deit3": {
        "short": {},
        "nano": _DEIT3_NANO,
        "imagenet1k": _DEIT3_IMAGENET1K,
        "imagenet21k": _DEIT3_IMAGENET21K,
    },
    "openclip": {"short": _OPENCLIP_SHORT, "nano": _OPENCLIP_NANO, "laion400m": _OPENCLIP_LAION400M},
    "dino": {"short": _DINO_SHORT, "nano": _DINO_NANO, "imagenet1k": _DINO_IMAGENET1K},
    "dinov2": {
        "short": _DINOV2_SHORT,
        "nano": _DINOV2_NANO,
        "imagenet1k": _DINOV2_IMAGENET1K,
        "imagenet22k": _DINOV2_IMAGENET22K,
    },
}

_UNTRAINED: dict[str, dict[str, Settings]] = {"pretrained": {"short": {"optim.steps": 0}}}


def recipe(given: Mapping[str, object]) -> tuple[str, Settings]:
    """The name and the settings of the recipe that the dotted settings `given` ask for, by method, preset and size.

    `auto` is the method's `nano` for the model size nano, else `short`. A user's own method has only `short`, which is
    empty.

    Raises:
        ValueError: the method has no recipe of that name.
    """
    method, name = str(given.get("method", "deit3")), str(given.get("preset", "auto"))
    recipes = {**PRESETS, **_UNTRAINED}.get(method, {"short": {}})
    if name == "auto":
        name = "nano" if given.get("model.size") == "nano" and "nano" in recipes else "short"
    if name not in recipes:
        raise ValueError(f"preset {name!r} does not exist for method {method!r}; allowed: {', '.join(recipes)}")
    return name, recipes[name]
