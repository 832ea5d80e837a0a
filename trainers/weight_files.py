"""Files of weights and timm's pretrained models: in come names and paths, out come state dicts; nothing is executed."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from trainers import catalog
from trainers.explain import did_you_mean
from trainers.weight_layouts import Converted, convert

_ALLOWED = "allowed: a .safetensors file, or a .pt, .pth or .bin file with a state dict"
_TORCH = (".pt", ".pth", ".bin")

# Where official training code puts a state dict in a file, first match; `method` is a checkpoint of our own.
_CONTAINERS = ("method", "teacher", "student", "model", "state_dict")


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """The state dict in a file, taken out of the containers of official training code, names as they are there.

    Of teacher and student the teacher is taken, of a trial's own checkpoint the raw backbone.

    Raises:
        ValueError: it is no such file, is damaged, or holds more than tensors; the message has one line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: is {'a folder' if path.is_dir() else 'not there'}; {_ALLOWED}")
    if path.suffix not in (".safetensors", *_TORCH):
        raise ValueError(f"{path}: the type {path.suffix or 'without a suffix'} is not known; {_ALLOWED}")
    loaded = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    try:
        return _state_dict(loaded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {_ALLOWED}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: is no whole safetensors file ({_first_line(error)}); {_ALLOWED}") from error


def _pickled(path: Path) -> Any:
    """What torch.save wrote, if that is tensors, numbers, strings and containers of them.

    Official checkpoints of deit and dino hold their command line too, as a Namespace, which holds no code.
    """
    if zipfile.is_zipfile(path) and (part := _damaged(path)) is not None:  # which torch.load would not notice
        raise ValueError(f"{path}: is damaged (checksum of {part}); {_ALLOWED}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds code or objects ({named[1]})" if named else "is damaged or holds code"
        raise ValueError(f"{path}: {what}, which is not loaded; {_ALLOWED}") from error
    except Exception as error:  # whatever a parser makes of a damaged file
        raise ValueError(f"{path}: is no file of torch.save's ({_first_line(error)}); {_ALLOWED}") from error


def _damaged(path: Path) -> str | None:
    """The first part of a zip file whose checksum is wrong; None where all are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
        return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors inside of what a file holds."""
    while isinstance(loaded, Mapping):
        name = next((name for name in _CONTAINERS if isinstance(loaded.get(name), Mapping)), None)
        if name is None:
            break
        loaded = loaded[name]
        if name == "method":
            loaded = {key: value for key, value in loaded.items() if str(key).startswith("backbone.")}
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"holds {'nothing' if isinstance(loaded, Mapping) else type(loaded).__name__}, no state dict")
    for key, value in loaded.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise ValueError(f"holds {type(value).__name__} under {key!r}, no state dict")
    return dict(loaded)


def read_timm(name: str) -> Converted:
    """Pretrained weights of one of timm's ViTs, with what the tensors do not show: heads, epsilon, activation.

    Raises:
        ValueError: there is no such model, its weights cannot be had here, or it is no ViT of the kind that ours is;
            the message has one line.
    """
    bare = name.partition(".")[0]
    if ":" not in name and not timm.is_model(bare):
        raise ValueError(f"timm has no model {bare!r}{did_you_mean(bare, timm.list_models('*vit*'))}")
    try:
        with torch.random.fork_rng(devices=[]), _quiet_hub():  # timm initialises before it loads
            model = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"timm's {name} cannot be had: {_first_line(error)}") from error
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"timm's {name} is a {type(model).__name__}; allowed: models that are timm VisionTransformers")
    try:
        found = convert(model.state_dict(), model.patch_embed.num_patches)
    except ValueError as error:
        raise ValueError(f"timm's {name}: {error}") from error
    block: Any = model.blocks[0]
    norm: Any = model.norm
    return replace(
        found,
        norm_eps=norm.eps,
        heads=block.attn.num_heads,
        activation=_activation(block.mlp.act),
        normalization=_normalization(cast(Mapping[str, Any], model.pretrained_cfg)),
    )


def _normalization(cfg: Mapping[str, Any]) -> str:
    """The name in `model.normalization` of what a timm model expects, else its numbers."""
    given = tuple(tuple(round(float(value), 6) for value in cfg[key]) for key in ("mean", "std"))
    known = {
        name: tuple(tuple(round(value, 6) for value in part) for part in parts)
        for name, parts in catalog.NORMALIZATIONS.items()
    }
    return next((name for name, parts in known.items() if parts == given), f"mean {given[0]}, std {given[1]}")


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the hub's warnings of every retry; the error at the end says all."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _activation(layer: nn.Module) -> str:
    """The name in `model.mlp` of an activation, by what it computes; else the name of its class."""
    x = torch.linspace(-4.0, 4.0, 33)
    known = {"gelu": functional.gelu(x), "quick_gelu": x * torch.sigmoid(1.702 * x), "swiglu": functional.silu(x)}
    y = layer(x)
    return next((name for name, at in known.items() if torch.allclose(y, at, atol=1e-6)), type(layer).__name__)
