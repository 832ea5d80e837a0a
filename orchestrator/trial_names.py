"""Names of trials by which people tell them apart: `deit3 small reg4 seed0`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from trainers.config import TrialConfig, trial_id

# Settings that every name begins with, and settings with a short name of their own.
_LEADING = ("method", "model.size", "model.num_registers", "seed")
_SHORT = {
    "model.patch_size": "patch",
    "model.image_size": "px",
    "model.num_registers": "reg",
    **dict.fromkeys(("data.train", "precision", "preset", "method", "model.size"), ""),
}

NamedTrial = tuple[Mapping[str, Any], TrialConfig]  # axis values, resolved configuration


def trial_names(trials: Sequence[NamedTrial]) -> list[str]:
    """One name for each trial, all different: short, else with whole dotted names, else with the id's beginning."""
    names = [_name(values, config, whole=False) for values, config in trials]
    if len(set(names)) == len(names):
        return names
    names = [_name(values, config, whole=True) for values, config in trials]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else f"{name} {trial_id(config)[:8]}"
        for name, (_, config) in zip(names, trials, strict=True)
    ]


def _name(values: Mapping[str, Any], config: TrialConfig, *, whole: bool) -> str:
    if config.command is not None:
        return _program_name(config.command, values, config.seed, whole=whole)
    model = config.model
    words = [config.method.rpartition(":")[2], model.size, f"reg{model.num_registers}"]
    for axis, value in values.items():
        if axis not in _LEADING and value is not None:
            words.append(_word(axis, value, whole=whole))
    return " ".join([*words, f"seed{config.seed}"])


def _program_name(command: Sequence[str], values: Mapping[str, Any], seed: int, *, whole: bool) -> str:
    """The program without the words that only start it, the axes that it is handed, and the seed."""
    code = {after for before, after in pairwise(command) if re.fullmatch(r"-\w*c", before)}  # of `sh -c`, `python -c`
    scripts = [word for word in command if word[:1] not in "-{" and word not in code and PurePath(word).suffix]
    program = PurePath(scripts[0] if scripts else command[0]).stem
    words = [
        _word(axis, value, whole=whole) for axis, value in values.items() if axis != "command" and value is not None
    ]
    return " ".join([program, *words, f"seed{seed}"])


def _word(axis: str, value: Any, *, whole: bool) -> str:
    label = axis if whole else _SHORT.get(axis, axis.rpartition(".")[2])
    if isinstance(value, bool):
        return f"{label}={str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"{label}={_number(value)}" if whole else f"{label}{_number(value)}"
    items = value if isinstance(value, tuple) else (value,)
    text = ",".join(_number(item) if isinstance(item, (int, float)) else str(item) for item in items)
    return f"{label}={text}" if label else text


def _number(value: float) -> str:
    """The shortest decimal that reads back equal, without a padded exponent."""
    mantissa, e, exponent = repr(value).partition("e")
    mantissa = mantissa.removesuffix(".0")
    return f"{mantissa}e{int(exponent)}" if e else mantissa
