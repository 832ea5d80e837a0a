"""Where a backbone starts from: files of official and timm weights, and checkpoints of other trials, loaded strictly.

`load_weights(path, backbone)` loads a file; `start_from` does what `model.init_from` says. Files are safetensors or
read with `weights_only=True`: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainers import catalog, checkpoint
from trainers.config import AS_BEFORE, ExecutionConfig, InitFrom, ModelConfig
from trainers.position import interpolate_position
from trainers.vit import ViT
from trainers.weight_files import read_timm, read_weights
from trainers.weight_layouts import Converted, convert

log = logging.getLogger(__name__)

# Parameters of a model that weights without them leave as they were initialised, and what these are.
_OPTIONAL = {
    re.compile(r"^reg_token$"): "registers",
    re.compile(r"^mask_token$"): "mask token",
    re.compile(r"^blocks\.\d+\.attn\.(?!qkv\.|proj\.)"): "attention sinks",
}

# Settings that decide whether a model has parameters of such names.
_DECIDE = {
    r"\.ls[12]\.": "model.layer_scale",
    r"^norm_pre\.|^patch_embed\.proj\.bias$": "model.pre_norm",
    r"\.attn\.(bias_[kv]|value_bias)$": "model.sink",
}
_LISTED = 12  # names that a message lists


# Settings of a model that no tensor shows and that another trial must share. Registers, sinks and masks may be added.
_COMPUTES = ("mlp", "norm_eps", "pre_norm", "pos_antialias", "pos_offset")
_BEFORE = {name.removeprefix("model."): v for name, v in AS_BEFORE.items() if name.startswith("model.")}


@dataclass(frozen=True)
class Report:
    """What became of weights: whose layout they had, how many tensors were loaded, and what did not simply fit."""

    layout: str
    loaded: int
    notes: tuple[str, ...]


def start_from(backbone: ViT, init: InitFrom, execution: ExecutionConfig) -> str:
    """Load what `model.init_from` names into `backbone`; what did not simply fit is logged.

    Returns:
        A fingerprint of the weights as they were found: 16 hexadecimal digits of SHA-256.

    Raises:
        ValueError: they cannot be had or do not fit; the message has one line.
    """
    source, found = _found(backbone, init, execution)
    digest = fingerprint(found.tensors)
    if init.fingerprint not in (None, digest):
        raise ValueError(f"{source}: has the fingerprint {digest}, model.init_from.fingerprint is {init.fingerprint}")
    report = load_into(backbone, found, source)
    log.info("model.init_from: %d tensors of %s (layout %s, %s)", report.loaded, source, report.layout, digest)
    for note in report.notes:
        log.info("model.init_from: %s", note)
    return digest


def _found(backbone: ViT, init: InitFrom, execution: ExecutionConfig) -> tuple[str, Converted]:
    """What `init` names, in words, and its weights."""
    if init.file is not None:
        path = Path(init.file).expanduser()
        return str(path), _converted(path, backbone)
    if init.timm is not None:
        source, found = f"timm's {init.timm}", read_timm(init.timm)
        refuse_other_architecture(found, backbone.settings, source)
        return source, found
    assert init.trial is not None and init.step is not None, "the configuration is not resolved"
    return f"step {init.step} of trial {init.trial}", _trial_weights(init.trial, init.step, execution, backbone)


def load_weights(path: Path, backbone: ViT) -> Report:
    """Load the weights in a file of any known layout into `backbone`.

    Raises:
        ValueError: the file or its layout cannot be used, or the weights do not fit; the message has one line.
    """
    return load_into(backbone, _converted(path, backbone), str(path))


def _converted(path: Path, backbone: ViT) -> Converted:
    state = read_weights(path)
    try:
        return convert(state, backbone.patch_embed.num_patches)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of the SHA-256 of names, types, shapes and contents, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_other_architecture(found: Converted, model: ModelConfig, source: str, *, measured: bool = False) -> None:
    """That weights belong to a model which computes otherwise than `model` in what tensors do not show.

    Where they are `measured`, images must be normalised as they were in training; what is trained may get used to it.

    Raises:
        ValueError: in one line, with both.
    """
    heads = catalog.MODEL_SIZES[model.size].heads
    differences = []
    if found.norm_eps not in (None, model.norm_eps):
        differences.append(f"epsilon of LayerNorm is {found.norm_eps:g} there, model.norm_eps is {model.norm_eps:g}")
    if found.heads not in (None, heads):
        differences.append(f"{found.heads} heads there, {heads} here")
    if found.activation not in (None, model.mlp):
        differences.append(f"activation is {found.activation} there, model.mlp is {model.mlp}")
    if measured and (model.sink == "softmax1" or model.register_mask not in (None, "full")):
        differences.append("a sink or mask without parameters is set, which only a trial's id says of weights")
    if measured and found.normalization not in (None, model.normalization):
        differences.append(
            f"images are normalised with {found.normalization} there, model.normalization is {model.normalization}"
        )
    if differences:
        raise ValueError(f"{source} computes otherwise than the model: {'; '.join(differences)}")


def _trial_weights(trial: str, step: int, execution: ExecutionConfig, backbone: ViT) -> Converted:
    """The raw backbone of another trial's checkpoint, which must be whole and compute as `backbone` does."""
    kept = checkpoints_of(trial, execution, "model.init_from.trial")
    if step not in kept:
        has = ", ".join(map(str, sorted(kept))) or "none"
        advice = "name it in that trial's execution.keep_steps before it trains"
        raise ValueError(f"trial {trial} keeps no checkpoint of step {step} (steps: {has}); {advice}")
    stored = checkpoint.first_whole(kept[step])
    refuse_other_settings(stored["model"], backbone.settings, f"trial {trial}")
    state = stored["method"]
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return Converted("trial", tensors, {name: "not of the backbone" for name in state if not name.startswith(prefix)})


def checkpoints_of(trial: str, execution: ExecutionConfig, setting: str) -> dict[int, list[Path]]:
    """Checkpoint files of another trial by step, newest first; `setting` is the one that names it.

    Raises:
        ValueError: it is not known where to look, or there is no such trial with checkpoints.
    """
    if execution.trials_root is None:
        raise ValueError(f"execution.trials_root is null; it says where trial {trial} of {setting} is looked for")
    root = Path(execution.trials_root)
    kept = checkpoint.steps([path for folder in _trial_folders(root, trial) for path in checkpoint.folders_of(folder)])
    if not kept:
        raise ValueError(f"{setting}: there is no trial {trial} with checkpoints under {root}")
    return kept


def refuse_other_settings(
    then: Mapping[str, Any], model: ModelConfig, source: str, names: Sequence[str] = _COMPUTES
) -> None:
    """That a trial's model, whose settings are `then`, computes otherwise than `model` in one of the settings `names`.

    Raises:
        ValueError: in one line, with all settings that differ.
    """
    now = model.model_dump(mode="json")
    then = {**_BEFORE, **then}  # a trial of an earlier version lacks what is new
    if then["num_registers"] == 0:
        now["register_mask"] = then["register_mask"]  # of no effect
    if differ := [f"{name} {then[name]!r}, not {now[name]!r}" for name in names if then[name] != now[name]]:
        raise ValueError(f"{source} computes otherwise than the model: model.{'; model.'.join(differ)}")


def _trial_folders(root: Path, trial: str) -> list[Path]:
    """Folders of one trial in the sweeps of a storage folder, or at any depth where it is no such folder."""
    return sorted(root.glob(f"*/trials/{trial}")) or sorted(root.glob(f"**/trials/{trial}"))


def load_into(backbone: ViT, converted: Converted, source: str = "the weights") -> Report:
    """Copy weights into `backbone`, all of them or none.

    Registers, mask token and attention sinks that the weights lack stay as they were initialised; a position embedding
    of another grid is resampled; a mask token that the model has no use for yet is set aside for
    `add_mask_token`. Nothing else may differ.

    Raises:
        ValueError: everything that does not fit, in one line.
    """
    own = dict(backbone.named_parameters())
    tensors = dict(converted.tensors)
    notes = _left_out(converted)
    if "mask_token" in tensors and "mask_token" not in own:
        backbone.loaded_mask_token = tensors.pop("mask_token").to(own["cls_token"])
        notes.append("set aside until a method asks for it: mask token")
    notes += _resample_position_(tensors, backbone)
    missing = own.keys() - tensors.keys()
    for pattern, why in _OPTIONAL.items():
        if kept := {name for name in missing if pattern.match(name)}:
            notes.append(f"left as initialised, the weights have none: {why} ({_counted(kept)})")
            missing -= kept
    _refuse_misfits(own, tensors, missing, f"{source} (layout {converted.layout})")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    eps = getattr(backbone.norm, "eps", None)
    if converted.norm_eps not in (None, eps):
        notes.append(f"LayerNorm's epsilon is {converted.norm_eps:g} in {converted.layout}, model.norm_eps is {eps:g}")
    return Report(converted.layout, len(tensors), tuple(notes))


def _left_out(converted: Converted) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, why in converted.left_out.items():
        reasons.setdefault(why, []).append(name)
    return [f"left out, {why}: {_counted(names)}" for why, names in reasons.items()]


def _resample_position_(tensors: dict[str, Tensor], backbone: ViT) -> list[str]:
    """Bring the position embedding to the model's grid as the model itself would, in place; what was done, in words."""
    position, own = tensors.get("pos_embed"), backbone.pos_embed
    if position is None or own is None or position.shape[1] == own.shape[1]:
        return []
    height, width = backbone.patch_embed.grid_size
    side = math.isqrt(position.shape[1])
    antialias, offset = backbone.settings.pos_antialias, backbone.settings.pos_offset
    tensors["pos_embed"] = interpolate_position(position, height, width, antialias=antialias, offset=offset)
    return [f"the position embedding is resampled from {side} × {side} to {height} × {width} patches"]


def _refuse_misfits(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], missing: set[str], source: str) -> None:
    theirs, ours = _shape_of(tensors), _shape_of(own)
    if theirs != ours:  # every single tensor would say the same
        raise ValueError(f"{source}: {theirs} do not fit the model's {ours}; see model.size and model.patch_size")
    unexpected = tensors.keys() - own.keys()
    faults = []
    counts = [group["reg_token"].shape[1] if "reg_token" in group else 0 for group in (tensors, own)]
    if counts[0] not in (0, counts[1]):
        faults.append(f"{counts[0]} registers, model.num_registers is {counts[1]} (allowed: as many, or weights of 0)")
    if missing:
        faults.append(f"missing: {_counted(missing)}")
    if names := unexpected - {"reg_token"}:
        faults.append(f"unexpected: {_counted(names)}")
    for name in sorted(own.keys() & tensors.keys() - {"reg_token"}):
        if own[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)} where the model has {tuple(own[name].shape)}"
            faults.append(f"{_any_block(name)} is {shapes}")
    if faults:
        deciding = {setting for p, setting in _DECIDE.items() for name in {*missing, *unexpected} if re.search(p, name)}
        faults += [f"see {', '.join(sorted(deciding))}"] if deciding else []
        listed = "; ".join(dict.fromkeys(faults))
        raise ValueError(f"{source}: do not fit the model: {listed}")


def _shape_of(tensors: Mapping[str, Tensor]) -> str:
    """Width, depth and patch size in words, as far as the weights show them."""
    patches = tensors.get("patch_embed.proj.weight")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    size = f" of width {patches.shape[0]} and patch size {patches.shape[-1]}" if patches is not None else ""
    return f"{depth} blocks{size}"


def _counted(names: Iterable[str]) -> str:
    """Names, those that all blocks have once with their number, as `blocks.*.ls1.gamma (12)`."""
    counts = Counter(map(_any_block, sorted(names)))
    listed = [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def _any_block(name: str) -> str:
    return re.sub(r"\b(blocks|resblocks)\.\d+\.", r"\1.*.", name)
