"""Puts into words what is wrong with a setting: its name, what was given, what is allowed, the nearest known name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_SHOWN = 60  # characters of a given value that a message repeats


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the whole sentence, where it is, and which fields together make it wrong."""

    path: tuple[str | int, ...]  # as pydantic counts: fields by alias, positions in lists
    message: str
    fields: tuple[str, ...] = ()  # dotted names; more than one where a combination is impossible


class ConfigError(ValueError):
    """All faults of a configuration at once; `str` has one per line."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(fault.message for fault in self.faults))


class ImpossibleError(ValueError):
    """Raised by validators: settings that are allowed one by one but not together."""

    def __init__(self, conflicts: Iterable[tuple[str, tuple[str, ...]]]) -> None:
        self.conflicts = tuple(conflicts)
        super().__init__("; ".join(message for message, _ in self.conflicts))


def explain(error: ValidationError, model: type[BaseModel], inside: str = "") -> list[Fault]:
    """The faults behind pydantic's `error` on `model`, one per setting, in the order of the model.

    `inside` is the dotted name of the section that `model` stands for, put before every name.
    """
    faults: dict[tuple[str | int, ...], list[Fault]] = {}
    for detail in error.errors(include_url=False):
        raised = detail.get("ctx", {}).get("error")
        if isinstance(raised, ImpossibleError):
            together = [Fault(detail["loc"], message, fields) for message, fields in raised.conflicts]
            faults.setdefault(detail["loc"], []).extend(together)
            continue
        path, owner, info = _locate(detail["loc"], model)
        name = dotted((inside, *path)) if inside else dotted(path)
        if path not in faults:  # a union reports each of its members
            faults[path] = [Fault(detail["loc"], _sentence(name, path, detail, owner, info), (name,))]
    return [fault for found in faults.values() for fault in found]


def _locate(
    loc: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[tuple[str | int, ...], type[BaseModel], FieldInfo | None]:
    """Path of the setting that `loc` is in, without union tags and positions of plain values; its section and field."""
    path: list[str | int] = []
    owner: type[BaseModel] = model
    info: FieldInfo | None = None
    current: Any = model
    for part in loc:
        members = [member for member, _ in _members(current, ())]
        section = next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)
        if section is not None and isinstance(part, str):
            owner = section
            info = next((i for n, i in section.model_fields.items() if part in (n, i.alias)), None)
            path.append(part)
            if info is None:
                break
            current = info.annotation
            continue
        inner = next(
            (get_args(m)[0 if get_origin(m) is tuple else 1] for m in members if get_origin(m) in (tuple, dict)), None
        )
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        path.append(part)
        current = inner
    return tuple(path), owner, info


def _sentence(
    name: str, path: tuple[str | int, ...], detail: Any, owner: type[BaseModel], info: FieldInfo | None
) -> str:
    raised = detail.get("ctx", {}).get("error")
    if detail["type"] == "extra_forbidden":
        return unknown(name, owner)
    if detail["type"] == "missing":
        return f"{name} is missing; give {allowed_values(info)}"
    if raised is not None:
        return f"{name} {raised}"
    given = detail["input"]
    if info is None:
        return f"{name} is {shown(given)}: {detail['msg']}"
    inside = path[len(path) - 1 :] != detail["loc"][-1:] and isinstance(detail["loc"][-1], int)
    where = f"{name} has {shown(given)} in it" if inside else f"{name} is {shown(given)}"
    return f"{where}; allowed: {allowed_values(info)}{_hint(given, info)}"


def _hint(given: object, info: FieldInfo) -> str:
    """What is likely meant, where the type is wrong but the intention is clear."""
    kinds = {member for member, _ in _members(info.annotation, tuple(info.metadata))}
    if isinstance(given, str):
        if bool in kinds and given.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f"; did you mean {'true' if given.lower() in ('yes', 'on', 'y') else 'false'}?"
        if kinds & {int, float} and _is_number(given):
            return "; write it without quotes" if "_" not in given else "; write it without underscores"
        words = [str(value) for member, _ in _members(info.annotation, ()) for value in _literals(member)]
        return did_you_mean(given, words)
    if isinstance(given, bool) and kinds & {int, float}:
        return ""
    if isinstance(given, float) and int in kinds and float not in kinds and given.is_integer():
        return f"; did you mean {int(given)}?"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def unknown(name: str, owner: type[BaseModel]) -> str:
    """`name` is not a field of its section `owner`."""
    *parents, last = name.split(".")
    section = ".".join(parents) or "the settings"
    names = [info.alias or field for field, info in owner.model_fields.items()]
    guess = did_you_mean(last, names)
    return f"{name} is not a field of {section}{guess or '; allowed: ' + ', '.join(names)}"


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest of `known`, or nothing where none is near."""
    names = list(known)
    lowered = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(given.lower(), lowered, n=1, cutoff=0.7)
    if not near and len(given) >= 3:  # a part of the name, as in lr or registers
        near = [name for name in lowered if name.endswith(given.lower()) or name.startswith(given.lower())]
        near = near[:1] if len(near) == 1 else []
    return f"; did you mean {lowered[near[0]]}?" if near else ""


def shown(value: object) -> str:
    """A given value as YAML would show it, cut where it is long; text stands in quotes."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, float):
        text = (
            repr(value) if math.isfinite(value) else f"{'-' if value < 0 else ''}.{'nan' if value != value else 'inf'}"
        )
    elif isinstance(value, str):
        text = repr(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {shown(inner)}" for key, inner in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(str(inner) if isinstance(inner, str) else shown(inner) for inner in value) + "]"
    else:
        text = str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def dotted(path: Iterable[str | int]) -> str:
    """The names along `path`; positions in lists are left out, since a line says more."""
    return ".".join(part for part in path if isinstance(part, str))


def allowed_values(info: FieldInfo | None) -> str:
    """What a field accepts: types, ranges and units of measure of its annotation, in words."""
    if info is None:
        return "a value"
    return " or ".join(_words(member, metadata) for member, metadata in _members(info.annotation, tuple(info.metadata)))


def _members(annotation: Any, metadata: tuple[Any, ...]) -> list[tuple[Any, tuple[Any, ...]]]:
    """The members of a union with the constraints of each; the constraints of a field belong to all of them."""
    if get_origin(annotation) in (Union, UnionType):
        return [inner for member in get_args(annotation) for inner in _members(member, metadata)]
    if get_origin(annotation) is Annotated:
        base, *notes = get_args(annotation)
        own = [c for note in notes for c in (note.metadata if isinstance(note, FieldInfo) else [note])]
        return _members(base, (*metadata, *own))
    return [(annotation, metadata)]


def _literals(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _words(annotation: Any, metadata: tuple[Any, ...]) -> str:
    """One member of a union in words."""
    if annotation in (int, float):
        return f"a {'whole number' if annotation is int else 'number'}{_range(metadata)}"
    if get_origin(annotation) is Literal:
        return " or ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) is tuple:
        return _list_words(get_args(annotation), metadata)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section with {', '.join(info.alias or name for name, info in annotation.model_fields.items())}"
    pattern = next((p for note in metadata if (p := getattr(note, "pattern", None))), None)
    simple = {bool: "true or false", str: "a text", type(None): "null"}
    words = simple.get(annotation, "a mapping" if get_origin(annotation) is dict else "a value")
    return f"{words} that matches {pattern}" if pattern and annotation is str else words


def _list_words(members: tuple[Any, ...], metadata: tuple[Any, ...]) -> str:
    least = next((note.min_length for note in metadata if getattr(note, "min_length", None)), 0)
    if members[-1] is Ellipsis:
        count = {0: "", 1: "one or more "}.get(least, f"at least {least} ")
        inner, notes = _members(members[0], ())[0]
    else:
        count, (inner, notes) = f"{len(members)} ", _members(members[0], ())[0]
    kinds = {int: "whole numbers", float: "numbers", str: "names"}
    return f"a list of {count}{kinds.get(inner, 'values')}{_range(notes)}"


def _range(metadata: tuple[Any, ...]) -> str:
    """The limits of a number in words, as in ` from 0 to 16` or ` above 0, at most 10`."""
    limits = {
        key: bound for note in metadata for key in ("gt", "ge", "lt", "le") if (bound := _bound(note, key)) is not None
    }
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']} to {limits['le']}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
    return "".join(f" {words[key]} {limits[key]}," for key in words if key in limits).rstrip(",")


def _bound(note: object, key: str) -> object:
    return getattr(note, key, None)
