"""What all sections of a configuration share: their base class, and annotations of lists, ranges and known names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

from trainers import catalog
from trainers.explain import did_you_mean, shown


class Section(BaseModel):
    """Base of all parts of a configuration: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


def known(names: Mapping[str, object], own: str | None = None) -> tuple[AfterValidator, WithJsonSchema]:
    """Annotations of a name that the catalog must have or, with `own`, that may be a dotted path such as `own`."""

    def check(name: str) -> str:
        if name in names or (own is not None and catalog.is_dotted_path(name)):
            return name
        choices = [*names, *([f"{own} of your own"] if own else [])]
        raise ValueError(
            f"is {shown(name)}, which does not exist{did_you_mean(name, names)}; allowed: {', '.join(choices)}"
        )

    choice: dict[str, Any] = {"enum": list(names)}
    path = {"type": "string", "pattern": r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"}
    return AfterValidator(check), WithJsonSchema({"anyOf": [choice, path]} if own else choice)


def rising(lowest: float, highest: float) -> AfterValidator:
    """Annotation of two numbers, the first not above the second, both within the limits."""

    def check(pair: tuple[float, float]) -> tuple[float, float]:
        if not lowest <= pair[0] <= pair[1] <= highest:
            raise ValueError(f"is {shown(pair)}; allowed: two rising numbers from {lowest} to {highest}")
        return pair

    return AfterValidator(check)


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _distinct(names: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(names)) != len(names):
        raise ValueError(f"is {shown(names)}; each may be named once")
    return names


LISTED = BeforeValidator(_listed)  # lists of a file are tuples here
ONCE = AfterValidator(_distinct)  # of a tuple: no value twice
