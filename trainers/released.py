"""What the name of released weights says: where they come from, and the settings of the model that they belong to.

Names of timm's models and of the official files follow conventions; weights with other names need their settings
stated. Whatever a name says is checked against the tensors when a trial loads them. Needs no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Settings = dict[str, object]

SUFFIXES = "allowed: .safetensors, .pt, .pth, .bin, or a folder that timm loads, which has a config.json"

_TRIAL = re.compile(r"(?P<id>[0-9a-f]{16})(@(?P<step>\d+))?(:(?P<kind>raw|ema|teacher))?")
_FILE = re.compile(r".*\.(safetensors|pt|pth|bin)")
_TIMM_PREFIXES = ("local-dir:", "hf-hub:", "hf_hub:", "timm/")

_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}

# Position embeddings as the official code resamples them: the configurations without registers keep its defaults.
_OLD_POSITIONS: Settings = {"model.pos_antialias": False, "model.pos_offset": 0.1}
_CLIP: Settings = {
    "model.pre_norm": True,
    "model.norm_eps": 1e-5,
    "model.layer_scale": None,
    "model.normalization": "clip",
}
_LAYER_SCALE: Settings = {"model.layer_scale": 1e-5}  # that there is one; its values come with the weights
_NO_LAYER_SCALE: Settings = {"model.layer_scale": None}

# Names as they begin, first match, and what all models of that family share.
_FAMILIES: tuple[tuple[str, Settings], ...] = (
    (r"vit_\w+_dinov2\b|dinov2_vit", _LAYER_SCALE),
    (r"dino_(vit|deit)", {**_NO_LAYER_SCALE, **_OLD_POSITIONS}),
    (r"vit_\w+\.dino\b", {**_NO_LAYER_SCALE, **_OLD_POSITIONS}),
    (r"deit3_|deit_3_", _LAYER_SCALE),
    (r"vit_\w+_clip_quickgelu_", {**_CLIP, "model.mlp": "quick_gelu"}),
    (r"vit_\w+_clip_", _CLIP),
    (r"vit_\w+\.(augreg|orig)", {**_NO_LAYER_SCALE, "model.normalization": "inception"}),
    (r"deit_(tiny|small|base)_|vit_(tiny|small|base|large|huge)_patch", _NO_LAYER_SCALE),
)
_SHAPES = (
    r"(?:vit|deit3|deit)_(?P<size>tiny|small|base|large|huge|giant)_patch(?P<patch>\d+)(?:_reg(?P<registers>\d+))?_",
    r"dinov2_vit(?P<letter>[sblg])(?P<patch>\d+)(?:_reg(?P<registers>\d+))?",
    r"dino_(?:vit|deit)(?P<size>small|base)(?P<patch>\d+)_",
    r"deit_3_(?P<size>small|base|large|huge)_(?P<pixels>\d+)_",
)


@dataclass(frozen=True)
class Source:
    """Where weights come from: exactly one of a file, a name of timm's, and a trial.

    Attributes:
        step: of the trial; None for its newest checkpoint.
        kind: of the trial: raw, ema or teacher; None for what its method evaluates.
    """

    file: str | None = None
    timm: str | None = None
    trial: str | None = None
    step: int | None = None
    kind: str | None = None


def source(weights: str) -> Source:
    """What `model.weights` names: ID[@STEP][:raw, ema or teacher] of a trial, a path, else one of timm's names."""
    if match := _TRIAL.fullmatch(weights):
        return Source(trial=match["id"], step=None if match["step"] is None else int(match["step"]), kind=match["kind"])
    if weights.startswith(_TIMM_PREFIXES):
        return Source(timm=weights.removeprefix("timm/"))
    if _FILE.fullmatch(weights) or "/" in weights or weights.startswith(("~", ".")):
        return Source(file=weights)
    return Source(timm=weights)


def settings(weights: str) -> Settings:
    """Dotted settings of the model that the name says; empty where it says nothing.

    A name says the size, and so at least patch size and registers, or nothing at all.
    """
    name = weights.removeprefix("timm/").rpartition("/")[2]
    shape = next((match for pattern in _SHAPES if (match := re.match(pattern, name))), None)
    if shape is None or source(weights).trial is not None:
        return {}
    groups = shape.groupdict()
    registers = int(groups.get("registers") or 0)
    size = _SIZES[groups["letter"]] if "letter" in groups else groups["size"]
    found: Settings = {"model.size": size, "model.num_registers": registers}
    found["model.patch_size"] = int(groups.get("patch") or (14 if size == "huge" else 16))  # DeiT-III names none
    found |= next((shared for pattern, shared in _FAMILIES if re.match(pattern, name)), {})
    if "dinov2" in name:
        found |= {} if registers else _OLD_POSITIONS
        found |= {"model.mlp": "swiglu"} if size == "giant" else {}
    return found
