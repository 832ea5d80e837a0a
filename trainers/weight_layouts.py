"""Names and shapes of other projects' ViT weights, turned into those of our ViT.

Ours are timm's names, with a position embedding [1, 1 + N, D] that has an entry for the class and none for registers.
Shapes: N patches, R registers, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]  # a pattern in a name, and what takes its place

KNOWN = "dinov2, dino, deit, deit3, open_clip and timm ViTs"

# Where a backbone lies inside a larger module, first match: official training code, open_clip with and without timm.
_INSIDE = {
    "teacher.backbone.": "not of the teacher's backbone",
    "student.backbone.": "not of the student's backbone",
    "backbone.": "not of the backbone",
    "visual.trunk.": "not of the image tower",
    "visual.": "not of the image tower",
}

_OPEN_CLIP: Rules = (  # old, new; mlfoundations/open_clip:src/open_clip/transformer.py (`VisionTransformer`)
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
)
_DINOV2: Rules = (  # facebookresearch/dinov2:dinov2/models/vision_transformer.py, dinov2/layers/swiglu_ffn.py
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks keep the index of a block in the whole
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_DEIT3: Rules = ((r"\.gamma_([12])$", r".ls\1.gamma"),)  # facebookresearch/deit:models_v2.py (`Layer_scale_init_Block`)

_RULES: dict[str, Rules] = {"open_clip": _OPEN_CLIP, "dinov2": _DINOV2, "deit3": _DEIT3, "timm": ()}
_PLAIN_HEAD = re.compile(r"(head|pre_logits|attn_pool)\.")  # timm pools normed tokens
_HEADS = {"open_clip": re.compile(r"proj$"), "dinov2": _PLAIN_HEAD, "deit3": _PLAIN_HEAD, "timm": _PLAIN_HEAD}
_NORM_EPS = {"open_clip": 1e-5, "dinov2": 1e-6, "deit3": 1e-6}

# What our ViT has no counterpart for, and what that is in words.
_UNSUPPORTED = {
    r"^dist_token$": "a distillation token",
    r"\.attn\.[qk]_norm\.|\.attn\.ln_[qk]\.": "normalised queries and keys",
    r"^fc_norm\.": "a final norm after pooling instead of one of all tokens",
    r"\.(attn|mlp)\.norm\.|\.ln_attn\.": "norms inside attention or MLP",
    r"rel_pos|relative_position|rope": "relative or rotary positions",
    r"\.[qv]_bias$": "biases of queries and values without keys",
    r"^patch_embed\.proj\.\d": "a stem of several convolutions",
    r"^attn_pool": "attention pooling before the final norm",
}


@dataclass(frozen=True)
class Converted:
    """Weights under our names.

    Attributes:
        layout: whose names they had: dinov2, deit3, open_clip, timm (also dino and deit), or trial.
        tensors: by our names.
        left_out: what has no place in a backbone, by its former name, and why.
        norm_eps: epsilon of LayerNorm that this layout's models have; None where that varies.
        heads: of attention; None where only the user knows.
        activation: of the MLP, as `model.mlp` names it; None where only the user knows.
        normalization: of images, as `model.normalization` names it; None where only the user knows.
    """

    layout: str
    tensors: dict[str, Tensor]
    left_out: Mapping[str, str] = field(default_factory=dict)
    norm_eps: float | None = None
    heads: int | None = None
    activation: str | None = None
    normalization: str | None = None

    @property
    def num_registers(self) -> int:
        """R, 0 where there are none."""
        return self.tensors["reg_token"].shape[1] if "reg_token" in self.tensors else 0


def convert(state: Mapping[str, Tensor], num_patches: int | None = None) -> Converted:
    """Our names for a state dict of a known layout, found out by its names.

    Position embeddings that registers or, in deit3, only patches have are folded: registers take theirs up, a class
    without one gets zero.

    Args:
        state: as the other project saves it, wrappers (`module.`, `backbone.`, `visual.`) included.
        num_patches: N; decides where the length of the position embedding alone allows two readings.

    Raises:
        ValueError: the layout is not known, or has parts that our ViT has no counterpart for.
    """
    state, left_out = _backbone_of({_unwrapped(name): tensor for name, tensor in state.items()})
    layout = _layout_of(state)
    heads = {name for name in state if _HEADS[layout].match(name)}
    tensors = _renamed({name: tensor for name, tensor in state.items() if name not in heads}, _RULES[layout])
    _refuse_unsupported(tensors)
    if layout == "open_clip":
        tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
        tensors["pos_embed"] = tensors["pos_embed"].unsqueeze(0)
    _check_numbers(tensors)
    _fold_positions_(tensors, layout, num_patches)
    return Converted(layout, tensors, {**left_out, **dict.fromkeys(sorted(heads), "a head")}, _NORM_EPS.get(layout))


def _unwrapped(name: str) -> str:
    """Without what DistributedDataParallel and torch.compile put into names."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _backbone_of(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The backbone's part of a larger module, its prefix removed, and what is outside of it."""
    for prefix, why in _INSIDE.items():
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if inside:
            return inside, {name: why for name in state if not name.startswith(prefix)}
    return dict(state), {}


def _layout_of(state: Mapping[str, Tensor]) -> str:
    """Whose names these are.

    Raises:
        ValueError: nobody's that is known, or there is no class token.
    """
    if {"class_embedding", "positional_embedding", "conv1.weight"} <= state.keys():
        return "open_clip"
    if "patch_embed.proj.weight" not in state or not any(name.startswith("blocks.") for name in state):
        shown = ", ".join(sorted(state)[:4])
        raise ValueError(
            f"the layout of the weights is not known ({len(state)} names, such as {shown}); known: {KNOWN}"
        )
    if "cls_token" not in state or "pos_embed" not in state:
        lacking = " and ".join(name for name in ("cls_token", "pos_embed") if name not in state)
        raise ValueError(f"the weights have no {lacking}, which the ViT here always has")
    if {"register_tokens", "mask_token"} & state.keys() or _any(r"^blocks\.\d+\.\d+\.|\.mlp\.w12\.", state):
        return "dinov2"
    return "deit3" if _any(r"\.gamma_1$", state) else "timm"


def _any(pattern: str, names: Mapping[str, Tensor]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _renamed(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """The tensors under new names.

    Raises:
        ValueError: two get the same one.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for old, ours in rules:
            new = re.sub(old, ours, new)
        if new in renamed:
            raise ValueError(f"the weights hold {new} twice, once as {name}")
        renamed[new] = tensor.detach()
    return renamed


def _refuse_unsupported(names: Mapping[str, Tensor]) -> None:
    found = {what: name for name in sorted(names) for pattern, what in _UNSUPPORTED.items() if re.search(pattern, name)}
    if found:
        listed = "; ".join(f"{what} ({name})" for what, name in found.items())
        raise ValueError(f"the weights have what the ViT here has not: {listed}")


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"the weights' {name} is {tensor.dtype}; allowed: floating-point numbers")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the weights' {name} holds numbers that are not finite")


def _fold_positions_(tensors: dict[str, Tensor], layout: str, num_patches: int | None) -> None:
    """Give `pos_embed` one entry for the class and none for registers, in place.

    Raises:
        ValueError: its length fits no square grid, or two; tokens and positions are not of one width.
    """
    position = tensors["pos_embed"]
    for name in sorted({"cls_token", "reg_token"} & tensors.keys() | {"pos_embed"}):
        if tensors[name].ndim != 3 or tensors[name].shape[::2] != (1, position.shape[-1]):
            raise ValueError(f"the weights' {name} is {tuple(tensors[name].shape)}; allowed: (1, entries, width)")
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    allowed = {"open_clip": {1}, "dinov2": {1}, "deit3": {0}, "timm": {0, 1, 1 + registers}}[layout]
    prefix = _prefix_entries(position.shape[1], sorted(allowed), num_patches)
    if prefix == 0:
        tensors["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    elif prefix > 1:
        tensors["reg_token"] = tensors["reg_token"] + position[:, 1:prefix]
        tensors["pos_embed"] = torch.cat([position[:, :1], position[:, prefix:]], dim=1)


def _prefix_entries(entries: int, allowed: list[int], num_patches: int | None) -> int:
    """How many of the position embedding's entries belong to class and registers."""
    fitting = [count for count in allowed if entries > count and math.isqrt(entries - count) ** 2 == entries - count]
    if not fitting:
        counts = " or ".join(map(str, allowed))
        raise ValueError(f"the weights' pos_embed has {entries} entries; allowed: a square grid and {counts} besides")
    if len(fitting) > 1:
        fitting = [count for count in fitting if entries - count == num_patches]
    if not fitting:
        raise ValueError(f"the weights' pos_embed with {entries} entries may stand for grids of different sizes")
    return fitting[0]
