"""Loads what a dotted path `package.module:attribute` names: the catalog's parts and users' own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

Loaded = Callable[..., object]


def load(path: str) -> Loaded:
    """The attribute that `path` names.

    Raises:
        ValueError: there is no such module or attribute, or it cannot be called.
    """
    module, _, attribute = path.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be loaded: {error}") from error
    if not callable(loaded):
        raise ValueError(f"{path!r} is {type(loaded).__name__}, which cannot be called")
    return cast(Loaded, loaded)
