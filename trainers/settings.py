"""Looks up single settings of TrialConfig by dotted name: whether they exist, and whether a value is allowed."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ValidationError

from trainers.config import TrialConfig, fields, section_of
from trainers.explain import Fault, did_you_mean, explain, shown
from trainers.program_settings import ALLOWED, PREFIX, is_program_setting

# What other projects call a setting, where no spelling is near.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "epochs": "optim.steps",
    "iterations": "optim.steps",
    "dataset": "data.train",
    "arch": "model.size",
    "resolution": "model.image_size",
    "workers": "execution.threads",
    "gradient_accumulation": "optim.micro_batch_size",
    "registers": "model.num_registers",
    "num_register_tokens": "model.num_registers",
    "reg_tokens": "model.num_registers",
    "drop_path_rate": "model.drop_path",
    "layerwise_decay": "optim.layer_decay",
    "patch_embed_lr_mult": "optim.patch_embed_lr_scale",
    "warmup": "optim.warmup_steps",
}


def check(name: str, value: object) -> tuple[object, list[Fault]]:
    """The value of one setting as a configuration would hold it, and what is wrong with the setting by itself.

    `name` is dotted. What only shows together with other settings is left to `resolve`.
    """
    if is_program_setting(name):
        return _check_program(name, value)
    *parents, last = name.split(".")
    section: type[BaseModel] = TrialConfig
    for parent in parents:
        inner = section_of(section, parent)
        if inner is None:
            return value, [Fault((), unknown_setting(name), (name,))]
        section = inner
    if last not in section.model_fields or section_of(section, last) is not None:
        return value, [Fault((), unknown_setting(name), (name,))]
    try:
        return getattr(section.model_validate({last: value}), last), []
    except ValidationError as error:
        faults = [fault for fault in explain(error, section) if fault.path[:1] == (last,)]
        prefix = "".join(f"{parent}." for parent in parents)
        return value, [Fault((), prefix + fault.message, (name,)) for fault in faults]


def _check_program(name: str, value: object) -> tuple[object, list[Fault]]:
    """`check` for a free setting of a program."""
    own = name.removeprefix(PREFIX)
    if isinstance(value, dict):  # nested settings come one by one
        return value, [Fault((), f"{name} is {shown(value)}; allowed: {ALLOWED}", (name,))]
    try:
        config = TrialConfig.model_validate({"command": ["program"], "program": {own: value}})
    except ValidationError as error:
        said = error.errors(include_url=False)[0]
        reason = said.get("ctx", {}).get("error", f"is {shown(value)}: {said['msg']}")
        return value, [Fault((), f"{name} {reason}", (name,))]
    assert config.program is not None, "one setting was given"
    return config.program[own], []


def unknown_setting(name: str) -> str:
    """That `name` is not a setting, with the nearest one or, for a section, its fields."""
    if name == "program" or name.startswith(PREFIX):
        return f"{name} is not a setting; those of a program are program.NAME, of letters, digits, _ and -"
    section: type[BaseModel] = TrialConfig
    path: list[str] = []
    for part in name.split("."):
        if part not in section.model_fields:
            break
        path.append(part)
        inner = section_of(section, part)
        if inner is None:
            if ".".join(path) == name:
                return f"{name} is a setting"
            return f"{name} does not exist; {'.'.join(path)} is a setting without fields of its own"
        section = inner
    else:
        return f"{name} is a section; its settings are {', '.join(fields(section, f'{name}.'))}"
    names = list(fields())
    leaf = name.rsplit(".", maxsplit=1)[-1]
    same_leaf = [field for field in names if field.rsplit(".", maxsplit=1)[-1] == leaf]
    known = [*same_leaf, *([_ELSEWHERE[leaf]] if leaf in _ELSEWHERE else [])]
    place = ".".join(path)
    known = [field for field in known if place and field.startswith(f"{place}.")] or known
    guess = f"; did you mean {' or '.join(known)}?" if known else did_you_mean(name, [*names, *_sections()])
    if not guess:
        near = did_you_mean(leaf, [field.rsplit(".", maxsplit=1)[-1] for field in fields(section)])
        guess = near or f"; allowed: {', '.join(section.model_fields)}"
    return f"{name} is not a setting{f' of {place}' if place else ''}{guess}"


def _sections(section: type[BaseModel] = TrialConfig, prefix: str = "") -> Iterator[str]:
    for name in section.model_fields:
        if (inner := section_of(section, name)) is not None:
            yield f"{prefix}{name}"
            yield from _sections(inner, f"{prefix}{name}.")


def is_section(name: str) -> bool:
    """Whether the dotted `name` is a section of the configuration, so that a mapping belongs there."""
    return name == "program" or is_program_setting(name) or name in _sections()
