"""The JSON Schema of a sweep file, with which editors complete and check one while it is written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from orchestrator.draft import is_execution_setting
from orchestrator.sweep import Budget, MoreSeeds, Resources, Scheduler, Search, Sweep
from trainers.catalog import MODEL_SIZES
from trainers.config import PROGRAM_SETTING, ScoreConfig, TrialConfig, fields, section_of

Schema = dict[str, Any]


def sweep_schema() -> Schema:
    """The schema of a sweep file (draft 2020-12): settings of a trial nested or dotted, axes by dotted name.

    It knows names, types and ranges; what only shows in combinations is found by `read_sweep`.
    """
    sweep = Sweep.model_json_schema()["properties"]
    leaves = _leaves()
    axes = {name: leaf for name, leaf in leaves.items() if name != "seed" and not is_execution_setting(name)}
    settings = _section(TrialConfig, "", leaves)
    settings["properties"].pop("seed")
    properties: Schema = {key: sweep[key] for key in ("question", "primary", "match", "outlier_limit")}
    properties |= {
        "name": {**sweep["name"], "pattern": r"^[A-Za-z0-9_][A-Za-z0-9_.@-]*$"},
        "seeds": _described({"anyOf": [sweep["seeds"], _part(MoreSeeds)]}, "seeds"),
        "trial": _described(_or_null(settings), "trial"),
        "axes": _described(_free(_object({n: _axis(leaf) for n, leaf in axes.items()}, least=1), _axis), "axes"),
        "when": _described(_or_null(_when(settings, leaves)), "when"),
        "exclude": _described(_or_null(_list(_free(_object(_choices(axes), least=1), _choice))), "exclude"),
        "baseline": _described(_or_null(_free(_object(axes, least=1))), "baseline"),
        "resources": _described(_resources(), "resources"),
        "score": _described(_or_null(_part(ScoreConfig)), "score"),
        "scheduler": _or_null(_part(Scheduler)),
        "search": _or_null(_search(axes)),
        "budget": _or_null(_part(Budget)),
    }
    properties = {key: properties[key] for key in Sweep.model_fields if key in properties}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Sweep",
        "description": "One question: every combination of the axes is a cell, every seed in a cell a trial.",
        **_object(properties),
        "required": ["name", "axes"],
    }


def _leaves() -> dict[str, Schema]:
    """The schema of every setting by dotted name."""
    found: dict[str, Schema] = {}
    properties: dict[type[BaseModel], Schema] = {}  # of each section, made once
    for name in fields():
        *parents, last = name.split(".")
        section: type[BaseModel] = TrialConfig
        for parent in parents:
            section = section_of(section, parent) or section
        if section not in properties:
            properties[section] = section.model_json_schema()["properties"]
        found[name] = properties[section][last]
    return found


def _section(section: type[BaseModel], prefix: str, leaves: dict[str, Schema]) -> Schema:
    """A section with its fields, and with everything below it by dotted name as well."""
    properties: Schema = {}
    for name in section.model_fields:
        inner = section_of(section, name)
        leaf = leaves.get(f"{prefix}{name}", _program())  # whose settings are free
        properties[name] = leaf if inner is None else _section(inner, f"{prefix}{name}.", leaves)
    properties |= {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
    return _object(properties) if prefix else _free(_object(properties))


@functools.cache
def _program() -> Schema:
    """The mapping of a program's own settings."""
    schema: Schema = TrialConfig.model_json_schema()["properties"]["program"]
    return schema


def _free(schema: Schema, of: Callable[[Schema], Schema] = lambda leaf: leaf) -> Schema:
    """`schema`, an object, with a program's own settings by dotted name as well; `of` makes their values' schema."""
    value = _program()["anyOf"][0]["additionalProperties"]
    return schema | {"patternProperties": {PROGRAM_SETTING: of(value)}}


def _when(settings: Schema, leaves: dict[str, Schema]) -> Schema:
    conditions = {name: leaf for name, leaf in leaves.items() if name != "seed"}
    entry = _object({"if": _free(_object(_choices(conditions)), _choice), "set": settings})
    return _list({**entry, "required": ["if", "set"]})


def _choices(leaves: dict[str, Schema]) -> dict[str, Schema]:
    """A value of each setting, or a list of values of which any will do."""
    return {name: _choice(leaf) for name, leaf in leaves.items()}


def _choice(leaf: Schema) -> Schema:
    return {"anyOf": [leaf, {"type": "array", "items": leaf, "minItems": 1}]}


def _axis(leaf: Schema) -> Schema:
    values = {"type": "array", "items": leaf, "minItems": 1, "uniqueItems": True}
    return values | ({"description": leaf["description"]} if "description" in leaf else {})


def _resources() -> Schema:
    one = _part(Resources)
    return {"anyOf": [one, _object(dict.fromkeys(MODEL_SIZES, one), least=1)]}


def _search(settings: dict[str, Schema]) -> Schema:
    """A search with the settings that it may be over as the keys of its space."""
    search = _part(Search)
    space = search["properties"]["space"]
    entry = space["additionalProperties"]
    space |= _free(_object(dict.fromkeys(settings, entry), least=1), lambda _: entry)
    return search


def _part(part: type[BaseModel]) -> Schema:
    schema = part.model_json_schema()
    schema.pop("title", None)
    definitions = schema.pop("$defs", {})
    inlined: Schema = _inlined(schema, definitions)
    return inlined


def _inlined(schema: Any, definitions: Schema) -> Any:
    """`schema` with every reference replaced by what it refers to; parts of a sweep are not recursive."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in schema.items()}
    return [_inlined(item, definitions) for item in schema] if isinstance(schema, list) else schema


def _object(properties: Schema, least: int = 0) -> Schema:
    schema: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return schema | ({"minProperties": least} if least else {})


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _described(schema: Schema, part: str) -> Schema:
    return {**schema, "description": Sweep.model_fields[part].description}
