"""Settings of trials that are programs of others: free values by name, and what such a program is handed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, WithJsonSchema

from trainers.explain import shown

PREFIX = "program."
_NAME = r"[A-Za-z_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*"
NAME = re.compile(_NAME)
PROGRAM_SETTING = rf"^program\.{_NAME}$"
PLACEHOLDERS = ("config", "directory", "seed")  # in a command, besides settings by dotted name
NOT_HANDED = ("command", "execution", "preset")  # what a program is not told
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.-]*)\}")
ALLOWED = "true or false, a number, a text, null, or a list of these"


def _flat(value: object) -> object:
    """Nested mappings by dotted name, lists as tuples; anything else as it is, for the check of types to refuse."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[object, object] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            below = _flat(inner)
            assert isinstance(below, dict)
            flat |= {f"{key}.{name}": held for name, held in below.items()}
        else:
            flat[key] = inner
    return flat


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _value(value: object) -> object:
    items = value if isinstance(value, list | tuple) else (value,)
    if not all(item is None or isinstance(item, bool | int | str) or _is_finite(item) for item in items):
        raise ValueError(f"is {shown(value)}; allowed: {ALLOWED}")
    return tuple(value) if isinstance(value, list) else value


def _named(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in settings:
        if not NAME.fullmatch(name):
            raise ValueError(f"has {shown(name)}; allowed are names of letters, digits, _ and -, with dots between")
    return settings


_SCALAR_SCHEMA: dict[str, Any] = {"type": ["boolean", "number", "string", "null"]}
VALUE_SCHEMA: dict[str, Any] = {"anyOf": [_SCALAR_SCHEMA, {"type": "array", "items": _SCALAR_SCHEMA}]}

ProgramSettings = Annotated[
    dict[str, Annotated[Any, BeforeValidator(_value), WithJsonSchema(VALUE_SCHEMA)]],
    Field(min_length=1),
    BeforeValidator(_flat),
    AfterValidator(_named),
]


def is_program_setting(name: str) -> bool:
    """Whether the dotted `name` can be one of a program's own settings."""
    return name.startswith(PREFIX) and NAME.fullmatch(name.removeprefix(PREFIX)) is not None


def only_given(section: BaseModel, dumped: Mapping[str, Any]) -> dict[str, Any]:
    """Of the dumped `section` what was given rather than left at its default, in the order of declaration."""
    kept: dict[str, Any] = {}
    for name in type(section).model_fields:
        if name not in section.model_fields_set or name not in dumped:
            continue
        held = getattr(section, name)
        kept[name] = only_given(held, dumped[name]) if isinstance(held, BaseModel) else dumped[name]
    return kept


def names_given(section: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted names of the settings of `section` that were given, those of a program included."""
    for name in type(section).model_fields:
        held = getattr(section, name)
        if name not in section.model_fields_set or (not prefix and name in NOT_HANDED):
            continue
        if isinstance(held, BaseModel):
            yield from names_given(held, f"{prefix}{name}.")
        elif not prefix and name == "program":
            yield from (f"{PREFIX}{own}" for own in held or ())
        else:
            yield f"{prefix}{name}"


def placeholders(command: tuple[str, ...]) -> list[str]:
    """What stands in braces in the words of a command and looks like a setting, each once."""
    return list(dict.fromkeys(name for word in command for name in _PLACEHOLDER.findall(word)))


def filled(command: tuple[str, ...], values: Mapping[str, str]) -> list[str]:
    """The words of a command with `{name}` replaced where `values` has the name; other braces stay."""
    return [_PLACEHOLDER.sub(lambda found: values.get(found.group(1), found.group(0)), word) for word in command]
