"""Trained backbones as folders that timm loads: safetensors under timm's names and a config.json that rebuilds the ViT.

`timm.create_model("local-dir:FOLDER", pretrained=True)` gives a model whose `forward_features` is that of ours.
Shapes: N patches, R registers, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from trainers import catalog
from trainers.augment import IMAGENET_MEAN, IMAGENET_STD
from trainers.config import ModelConfig
from trainers.files import write_whole

WEIGHTS = ("raw", "ema", "teacher")

# timm's models, of which one gives what its arguments cannot be given as text: epsilon of LayerNorm and kind of MLP.
_ARCHITECTURES = {
    (1e-6, "gelu"): "vit_base_patch16_224",
    (1e-6, "quick_gelu"): "vit_base_patch16_224",
    (1e-5, "gelu"): "vit_base_patch16_clip_224",
    (1e-5, "quick_gelu"): "vit_base_patch16_clip_224",
    (1e-6, "swiglu"): "vit_giant_patch14_dinov2",
}


def weights_in(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The backbones in a trial's checkpoint by the name of their weights, of raw, ema and teacher those that there are.

    A teacher's backbone is found by its name, whatever the method calls it: it is under a name with "teacher" in it.
    """
    end = "patch_embed.proj.weight"
    method, averaged = state["method"], state.get("ema")
    prefixes = [name.removesuffix(end) for name in method if name.endswith(end)]
    named = {"raw": "backbone.", "teacher": next((prefix for prefix in prefixes if "teacher" in prefix), None)}
    found = {
        kind: {name.removeprefix(prefix): tensor for name, tensor in method.items() if name.startswith(prefix)}
        for kind, prefix in named.items()
        if prefix in prefixes
    }
    return found if averaged is None else {**found, "ema": dict(averaged)}


def scored(state: dict[str, Any]) -> dict[str, Any]:
    """A trial's checkpoint with the step and the weights that the trial is scored with in the place of its last ones.

    They differ where `evaluation.score` chooses another step; of a trial that still trains they are those so far.
    """
    kept = state.get("scoring")
    return state if kept is None else {**state, **{name: kept[name] for name in ("step", "method", "ema")}}


def to_timm(
    state: Mapping[str, Tensor], model: ModelConfig, shape: catalog.ModelSize | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of a timm VisionTransformer that computes what our ViT does.

    With registers the class token takes up its position, and the position embedding is left with the N patches, since
    timm knows position embeddings for all of the tokens or for patches alone. A mask token is left out.

    Args:
        state: of our ViT.
        model: the configuration that it was built with.
        shape: in place of that of `model.size`.

    Raises:
        ValueError: timm has no such model.
    """
    architecture = _architecture(model)
    shape = shape or catalog.MODEL_SIZES[model.size]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name != "mask_token"}
    if model.num_registers:
        position = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + position[:, :1]
        tensors["pos_embed"] = position[:, 1:].contiguous()
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    arguments: dict[str, Any] = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": (hidden + 0.5) / shape.width,  # timm rounds down
        "init_values": model.layer_scale or 0.0,
        "pre_norm": model.pre_norm,
        "reg_tokens": model.num_registers,
        "no_embed_class": model.num_registers > 0,
        "dynamic_img_size": resizes_alike(model),
    }
    if model.mlp == "quick_gelu":
        arguments["act_layer"] = "quick_gelu"
    return tensors, _configuration(architecture, arguments)


def resizes_alike(model: ModelConfig) -> bool:
    """Whether timm resamples the position embedding for other image sizes as `model` does."""
    return model.pos_antialias and model.pos_offset == 0.0


def _architecture(model: ModelConfig) -> str:
    if model.factory is not None:
        raise ValueError(f"only the built-in ViT can be exported; model.factory names {model.factory}")
    if model.sink != "none":
        raise ValueError(f"timm's ViT has no attention sinks; model.sink is {model.sink}")
    if model.register_mask not in (None, "full"):
        raise ValueError(f"timm's ViT has no masks of registers; model.register_mask is {model.register_mask}")
    found = _ARCHITECTURES.get((model.norm_eps, model.mlp))
    if found is None:
        known = "; ".join(f"{eps:g} and {mlp}" for eps, mlp in _ARCHITECTURES)
        given = f"model.norm_eps {model.norm_eps:g} and model.mlp {model.mlp}"
        raise ValueError(f"timm builds no ViT with {given} from a configuration file; allowed: {known}")
    return found


def _configuration(architecture: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json, as timm's `save_for_hf` writes it; images as our evaluation prepares them."""
    size = arguments["img_size"]
    pretrained = {
        "custom_load": False,
        "input_size": [3, size, size],
        "fixed_input_size": not arguments["dynamic_img_size"],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "num_classes": 0,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "global_pool": "token",
        "model_args": dict(arguments),
        "pretrained_cfg": pretrained,
    }


def write(folder: Path, tensors: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> None:
    """Write model.safetensors and config.json of `to_timm` into `folder`, which may exist."""
    write_whole(folder / "model.safetensors", save(dict(tensors), metadata={"format": "pt"}))
    write_whole(folder / "config.json", (json.dumps(configuration, indent=1) + "\n").encode())
