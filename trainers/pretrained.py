"""Weights that are measured as they are: opened at their own resolution, and described so that a model fits them.

Shapes: N patches, D width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainers import catalog, checkpoint, export, released, weight_files, weights
from trainers.config import ExecutionConfig, ModelConfig
from trainers.streams import Streams
from trainers.vit import ViT
from trainers.weight_layouts import Converted, convert

log = logging.getLogger(__name__)

# What a trial's own settings say that tensors do not show, and what they show: everything that decides what a ViT is.
_OF_A_TRIAL = (
    *("size", "patch_size", "image_size", "num_registers", "layer_scale", "pre_norm", "norm_eps", "mlp"),
    *("pos_antialias", "pos_offset", "sink", "register_mask", "normalization"),
)

# Of these, what must be as in the trial: what has no tensor by which a mismatch would show, and what explains others.
_UNSEEN = (
    *("size", "patch_size", "num_registers"),
    *("mlp", "norm_eps", "pre_norm", "pos_antialias", "pos_offset", "sink", "register_mask", "normalization"),
)

# What tensors do not show, and a name may say.
_BY_NAME = ("model.pos_antialias", "model.pos_offset", "model.normalization")


_KNOWN_NORMALIZATIONS = f"known: {', '.join(catalog.NORMALIZATIONS)}"


def open_backbone(model: ModelConfig, execution: ExecutionConfig, streams: Streams) -> tuple[ViT, str]:
    """The ViT of `model.weights` in eval mode, and the fingerprint of its weights.

    It is built on the grid that its position embedding was learned on and resamples it for images of any other size,
    as `model` says; resampling it once for all would change what it computes at further resolutions.

    Raises:
        ValueError: the weights cannot be had, are not those of `model.weights_fingerprint`, or do not fit `model`; one
            line that says what they are.
    """
    assert model.weights is not None, "the configuration has no model.weights"
    source, found = _found(model.weights, execution, model)
    digest = weights.fingerprint(found.tensors)
    if model.weights_fingerprint not in (None, digest):
        raise ValueError(
            f"{source}: has the fingerprint {digest}, model.weights_fingerprint {model.weights_fingerprint}"
        )
    backbone = ViT(model.model_copy(update={"image_size": _native_size(found, model.patch_size)}), streams)
    report = weights.load_into(backbone, found, source)
    _refuse_missing(backbone, found, source)
    log.info("model.weights: %d tensors of %s (layout %s, %s)", report.loaded, source, report.layout, digest)
    for note in report.notes:
        log.info("model.weights: %s", note)
    return backbone.eval(), digest


def describe(name: str, execution: ExecutionConfig) -> dict[str, Any]:
    """Dotted settings of the model that weights belong to, read from the tensors themselves, and their fingerprint.

    Epsilon and kind of activation come from timm's model, a trial's settings, or else the layout's convention;
    `model.image_size` is there for trials alone, since released weights are seen at any resolution.

    Raises:
        ValueError: the weights cannot be had, or are no ViT of a size that trainers.catalog lists; one line.
    """
    source, found, of_trial = _read(name, execution)
    settings = {"model.weights_fingerprint": weights.fingerprint(found.tensors)}
    if of_trial is not None:
        return settings | {f"model.{key}": of_trial[key] for key in _OF_A_TRIAL if key in of_trial}
    said = released.settings(name)
    by_name = {key: said[key] for key in _BY_NAME if key in said}
    return {**settings, **by_name, **_settings_of(source, found, said)}


def _settings_of(source: str, found: Converted, said: Mapping[str, object]) -> dict[str, Any]:
    """Settings that tensors show, or timm's model; of activation and epsilon else what the name says or is usual.

    CLIP's towers, which have a norm before the first block, come with either activation, and under timm's names with
    another epsilon than other ViTs: what neither model nor name says of them is left out.
    """
    tensors = found.tensors
    patches = tensors["patch_embed.proj.weight"]
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    fitting = [n for n, size in catalog.MODEL_SIZES.items() if (size.width, size.depth) == (patches.shape[0], depth)]
    if not fitting:
        known = ", ".join(f"{n} ({size.width}, {size.depth})" for n, size in catalog.MODEL_SIZES.items())
        raise ValueError(f"{source}: has width {patches.shape[0]} and {depth} blocks; known (width, blocks): {known}")
    gated = tensors["blocks.0.mlp.fc1.weight"].shape[0] == 2 * tensors["blocks.0.mlp.fc2.weight"].shape[1]
    settings: dict[str, Any] = {
        "model.size": fitting[0],
        "model.patch_size": patches.shape[-1],
        "model.num_registers": found.num_registers,
        "model.layer_scale": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "model.pre_norm": "norm_pre.weight" in tensors,
    }
    mlp = "swiglu" if gated else found.activation or said.get("model.mlp")
    eps = found.norm_eps or said.get("model.norm_eps")
    if settings["model.pre_norm"] and not said:
        settings |= {} if mlp is None else {"model.mlp": mlp}
        settings |= {} if eps is None else {"model.norm_eps": eps}
    else:
        settings |= {"model.mlp": mlp or "gelu", "model.norm_eps": eps or 1e-6}
    normalization = found.normalization or ("clip" if found.layout == "open_clip" else None)
    if normalization in catalog.NORMALIZATIONS:
        settings["model.normalization"] = normalization
    elif normalization is not None:
        raise ValueError(f"{source}: images are normalised with {normalization}; {_KNOWN_NORMALIZATIONS}")
    if found.layout == "dinov2" and not found.num_registers:  # its configurations' defaults
        settings |= {"model.pos_antialias": False, "model.pos_offset": 0.1}
    return settings


def _found(name: str, execution: ExecutionConfig, model: ModelConfig) -> tuple[str, Converted]:
    source, found, of_trial = _read(name, execution)
    if of_trial is not None:
        weights.refuse_other_settings(of_trial, model, source, _UNSEEN)
    else:
        weights.refuse_other_architecture(found, model, source, measured=True)
    return source, found


def _read(name: str, execution: ExecutionConfig) -> tuple[str, Converted, Mapping[str, Any] | None]:
    """What `name` names in words, its weights, and the settings of the model where it is a trial's."""
    source = released.source(name)
    if source.trial is not None:
        return _read_trial(source, execution)
    if source.timm is not None:
        return f"timm's {source.timm}", weight_files.read_timm(source.timm), None
    assert source.file is not None
    path = Path(execution.weights_root or ".").expanduser() / Path(source.file).expanduser()
    try:
        return str(path), convert(weight_files.read_weights(path)), None
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def _read_trial(source: released.Source, execution: ExecutionConfig) -> tuple[str, Converted, Mapping[str, Any]]:
    assert source.trial is not None
    kept = weights.checkpoints_of(source.trial, execution, "model.weights")
    step = max(kept) if source.step is None else source.step
    if step not in kept:
        has = ", ".join(map(str, sorted(kept)))
        raise ValueError(f"model.weights: trial {source.trial} keeps no checkpoint of step {step} (steps: {has})")
    stored = checkpoint.first_whole(kept[step])
    if source.step is None and stored.get("scoring") is not None:
        stored = export.scored(stored)
        step = stored["step"]
    kinds = export.weights_in(stored)
    kind = source.kind or ("teacher" if "teacher" in kinds else "raw")
    if kind not in kinds:
        raise ValueError(f"model.weights: trial {source.trial} has no {kind} weights; it has {', '.join(kinds)}")
    words = f"{kind} weights of step {step} of trial {source.trial}"
    return words, Converted("trial", dict(kinds[kind])), stored["model"]


def _native_size(found: Converted, patch_size: int) -> int:
    """Side in px of the images that the position embedding was learned on."""
    return math.isqrt(found.tensors["pos_embed"].shape[1] - 1) * patch_size


def _refuse_missing(backbone: ViT, found: Converted, source: str) -> None:
    """Registers and sinks that weights lack may be trained anew, but not measured."""
    lacking = sorted(_parameters(backbone) - found.tensors.keys())
    if lacking:
        what = "registers" if "reg_token" in lacking else lacking[0]
        given = f"model.num_registers is {backbone.num_registers}" if "reg_token" in lacking else "the model has them"
        raise ValueError(f"{source}: have no {what}, and {given}; what was never trained is not measured")


def _parameters(backbone: ViT) -> set[str]:
    named: dict[str, Tensor] = dict(backbone.named_parameters())
    return set(named)
