"""Presets: which one is taken, that each is complete and allowed, and the official recipes' values."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainers import catalog
from trainers.config import TrialConfig, fields, flatten, resolve
from trainers.presets import PRESETS, recipe

ALL = [(method, name) for method, recipes in PRESETS.items() for name in recipes]
OFFICIAL = [(method, name) for method, name in ALL if name not in ("short", "nano")]

# What makes a backbone and an optimiser those of a method, whatever the length of training.
STRUCTURE: dict[str, dict[str, Any]] = {
    "deit3": {
        "model.pre_norm": False,
        "model.norm_eps": 1e-6,
        "optim.schedule": "timm",
        "optim.decay_tokens": "none",
        "optim.weight_decay_end": None,
    },
    "openclip": {
        "model.pre_norm": True,
        "model.norm_eps": 1e-5,
        "model.layer_scale": None,
        "optim.schedule": "open_clip",
        "optim.decay_tokens": "position",
        "optim.weight_decay": 0.2,
        "optim.weight_decay_end": None,
        "optim.eps": 1e-6,
    },
    "dino": {
        "model.pre_norm": False,
        "model.norm_eps": 1e-6,
        "model.layer_scale": None,
        "model.pos_antialias": False,
        "model.pos_offset": 0.1,
        "optim.schedule": "dino",
        "optim.warmup_lr": 0.0,
        "optim.decay_tokens": "all",
        "optim.weight_decay": 0.04,
        "optim.weight_decay_end": 0.4,
        "optim.clip_grad": 3.0,
    },
    "dinov2": {
        "model.pre_norm": False,
        "model.norm_eps": 1e-6,
        "model.pos_antialias": True,
        "model.pos_offset": 0.0,
        "optim.schedule": "dino",
        "optim.warmup_lr": 0.0,
        "optim.decay_tokens": "all",
        "optim.decay_registers": True,
        "optim.weight_decay": 0.04,
        "optim.clip_grad": 3.0,
        "dinov2.koleo.weight": 0.1,
        "dinov2.mask_probability": 0.5,
        "dinov2.mask_ratio": (0.1, 0.5),
    },
}


def resolved(method: str, preset: str) -> TrialConfig:
    return resolve({"method": method, "preset": preset, "model.num_registers": 4})


def values(method: str, preset: str) -> dict[str, Any]:
    return flatten(resolved(method, preset).model_dump())


def test_every_method_has_a_preset_of_minutes_and_one_of_a_minute() -> None:
    assert set(PRESETS) == set(catalog.TRAINING_METHODS)
    assert all({"short", "nano"} < set(recipes) for recipes in PRESETS.values())


def test_nano_is_taken_for_the_model_size_nano_alone() -> None:
    for method in PRESETS:
        assert recipe({"method": method, "model.size": "nano"})[0] == "nano"
        assert recipe({"method": method, "model.size": "nano", "preset": "short"})[0] == "short"
        assert recipe({"method": method, "model.size": "tiny"})[0] == recipe({"method": method})[0] == "short"
        assert resolve({"method": method, "preset": "nano"}).model.size == "nano"
    assert recipe({}) == ("short", PRESETS["deit3"]["short"])
    assert recipe({"method": "my.own:Method", "model.size": "nano"}) == ("short", {})


def test_a_preset_that_a_method_lacks() -> None:
    with pytest.raises(ValueError, match="'imagenet21k' does not exist for method 'dino'; allowed: short, nano, im"):
        recipe({"method": "dino", "preset": "imagenet21k"})


@pytest.mark.parametrize(("method", "name"), ALL)
def test_presets_hold_settings_of_their_method_in_its_structure(method: str, name: str) -> None:
    others = tuple(f"{other}." for other in PRESETS if other != method)
    assert set(PRESETS[method][name]) <= {field for field in fields() if not field.startswith(others)}
    assert resolve(resolved(method, name).model_dump()) == resolved(method, name)
    found = values(method, name)
    lengths = ("optim.min_lr", "optim.weight_decay_end", "dino.teacher_momentum_end") if name == "nano" else ()
    structure = {setting: value for setting, value in STRUCTURE[method].items() if setting not in lengths}
    assert {setting: found[setting] for setting in structure} == structure


@pytest.mark.parametrize(("method", "name"), OFFICIAL)
def test_official_recipes_leave_no_length_to_defaults(method: str, name: str) -> None:
    settled = {"model.size", "model.image_size", "model.patch_size", "optim.lr", "optim.steps", "optim.batch_size"}
    settled |= {"optim.warmup_steps", "data.decode_size", "model.reg_init_std"}
    if method in ("dino", "dinov2"):
        settled |= {f"{method}.teacher_momentum", f"{method}.freeze_last_layer_steps", f"{method}.head.prototypes"}
        settled |= {f"{method}.warmup_teacher_temp_steps", f"{method}.warmup_teacher_temp", f"{method}.teacher_temp"}
    assert settled <= set(PRESETS[method][name])


@pytest.mark.parametrize("method", PRESETS)
def test_nano_is_small(method: str) -> None:
    nano = resolved(method, "nano")
    assert (nano.model.image_size, nano.model.patch_size, nano.data.decode_size) == (32, 8, 32)
    assert (nano.optim.steps, nano.precision) == (300, "fp32") and nano.optim.batch_size <= 128
    flips = nano.dino or nano.dinov2
    assert not (flips.crops.flip if flips is not None else nano.deit3 is not None and nano.deit3.flip)


def test_deit3_on_imagenet_1k_and_21k() -> None:
    small, large = values("deit3", "imagenet1k"), values("deit3", "imagenet21k")
    both = {"model.size": "base", "optim.optimizer": "lamb", "optim.batch_size": 2048, "optim.warmup_lr": 1e-6}
    both |= {"optim.ema_decay": 0.99996, "model.layer_scale": 1e-4, "deit3.cutmix": 1.0, "deit3.color_jitter": 0.3}
    for found in (small, large):
        assert {setting: found[setting] for setting in both} == both
    expected = {
        "model.image_size": 192,
        "model.drop_path": 0.2,
        "optim.lr": 3e-3,
        "optim.weight_decay": 0.05,
        "optim.steps": 800 * (1_281_167 // 256 * 256 // 8 // 256),
        "deit3.loss": "bce",
        "deit3.smoothing": 0.0,
        "deit3.mixup": 0.8,
        "deit3.mix_group_size": 256,
        "deit3.crop": "resized",
        "deit3.repeats": 3,
    }
    assert {setting: small[setting] for setting in expected} == expected
    assert small["optim.warmup_steps"] / small["optim.steps"] == 5 / 800
    expected = {
        "model.image_size": 224,
        "model.drop_path": 0.1,
        "optim.lr": 1e-3,
        "optim.weight_decay": 0.02,
        "optim.steps": 240 * (14_197_122 // 2048),
        "deit3.loss": "soft_ce",
        "deit3.smoothing": 0.1,
        "deit3.mixup": 0.0,
        "deit3.mix_group_size": 64,
        "deit3.crop": "simple",
        "deit3.repeats": 1,
    }
    assert {setting: large[setting] for setting in expected} == expected
    assert large["optim.warmup_steps"] / large["optim.steps"] == 5 / 240


def test_openclip_on_laion400m() -> None:
    found = values("openclip", "laion400m")
    expected = {
        "model.size": "base",
        "model.patch_size": 16,
        "optim.lr": 5e-4,
        "optim.beta1": 0.9,
        "optim.beta2": 0.98,
        "optim.batch_size": 192 * 176,
        "optim.steps": 32 * math.ceil(407_332_084 / 33_792),
        "optim.warmup_steps": 2000,
        "openclip.embed_dim": 512,
        "openclip.text_width": 512,
        "openclip.text_layers": 12,
        "openclip.text_heads": 8,
        "openclip.context_length": 77,
        "openclip.crop_scale": (0.9, 1.0),
        "openclip.max_logit_scale": 100.0,
    }
    assert {setting: found[setting] for setting in expected} == expected


def test_dino_on_imagenet_1k() -> None:
    found = values("dino", "imagenet1k")
    expected = {
        "model.size": "base",
        "model.patch_size": 16,
        "model.drop_path": 0.1,
        "optim.batch_size": 64 * 16,
        "optim.steps": 100 * (1_281_167 // 1024),
        "optim.warmup_steps": 10 * 1251,
        "optim.min_lr": 1e-6,
        "dino.head.prototypes": 65_536,
        "dino.head.hidden": 2048,
        "dino.head.bottleneck": 256,
        "dino.crops.global_scale": (0.4, 1.0),
        "dino.crops.local_scale": (0.05, 0.4),
        "dino.crops.num_local": 8,
        "dino.crops.local_size": 96,
        "dino.student_temp": 0.1,
        "dino.teacher_temp": 0.04,
        "dino.warmup_teacher_temp_steps": 0,
        "dino.teacher_momentum": 0.996,
        "dino.teacher_momentum_end": 1.0,
        "dino.center_momentum": 0.9,
        "dino.freeze_last_layer_steps": 1251,
    }
    assert {setting: found[setting] for setting in expected} == expected
    assert found["optim.lr"] == pytest.approx(5e-4 * 1024 / 256)


@pytest.mark.parametrize("name", ["imagenet1k", "imagenet22k"])
def test_dinov2_on_imagenet(name: str) -> None:
    found = values("dinov2", name)
    expected = {
        "model.size": "large",
        "model.image_size": 224,
        "model.layer_scale": 1e-5,
        "optim.min_lr": 1e-6,
        "optim.patch_embed_lr_scale": 0.2,
        "dinov2.head.hidden": 2048,
        "dinov2.crops.global_scale": (0.32, 1.0),
        "dinov2.crops.local_scale": (0.05, 0.32),
        "dinov2.crops.num_local": 8,
        "dinov2.teacher_temp": 0.07,
        "dinov2.warmup_teacher_temp": 0.04,
        "dinov2.warmup_teacher_temp_steps": 30 * 1250,
        "dinov2.freeze_last_layer_steps": 1250,
        "dinov2.dino_weight": 1.0,
        "dinov2.ibot_weight": 1.0,
    }
    assert {setting: found[setting] for setting in expected} == expected


def test_dinov2_on_imagenet_1k() -> None:
    short = values("dinov2", "imagenet1k")
    expected = {
        "model.patch_size": 16,
        "model.drop_path": 0.3,
        "model.mlp": "gelu",
        "optim.batch_size": 64 * 32,
        "optim.steps": 100 * 1250,
        "optim.warmup_steps": 10 * 1250,
        "optim.layer_decay": 0.9,
        "optim.weight_decay_end": 0.4,
        "dinov2.head.prototypes": 65_536,
        "dinov2.head.bottleneck": 256,
        "dinov2.separate_heads": False,
        "dinov2.ibot_head": None,
        "dinov2.crops.local_size": 96,
        "dinov2.koleo.group_size": 64,
        "dinov2.mask_group_size": 64,
        "dinov2.centering": "softmax",
        "dinov2.teacher_momentum": 0.992,
    }
    assert {setting: short[setting] for setting in expected} == expected
    assert short["optim.lr"] == pytest.approx(4e-3 * math.sqrt(2048 / 1024), rel=1e-4)


def test_dinov2_on_imagenet_22k() -> None:
    long = values("dinov2", "imagenet22k")
    expected = {
        "model.patch_size": 14,
        "model.drop_path": 0.4,
        "model.mlp": "swiglu",
        "optim.batch_size": 32 * 96,
        "optim.steps": 500 * 1250,
        "optim.warmup_steps": 80 * 1250,
        "optim.layer_decay": 1.0,
        "optim.weight_decay_end": 0.2,
        "dinov2.head.prototypes": 131_072,
        "dinov2.head.bottleneck": 384,
        "dinov2.ibot_head.prototypes": 131_072,
        "dinov2.ibot_head.bottleneck": 256,
        "dinov2.crops.local_size": 98,
        "dinov2.koleo.group_size": 32,
        "dinov2.mask_group_size": 32,
        "dinov2.centering": "sinkhorn",
        "dinov2.sinkhorn_iterations": 3,
        "dinov2.teacher_momentum": 0.994,
    }
    assert {setting: long[setting] for setting in expected} == expected
    assert long["optim.lr"] == pytest.approx(2e-4 * math.sqrt(3072 / 1024), rel=1e-4)
