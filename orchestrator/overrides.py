"""`--set KEY=VALUE`: puts settings from the command line in the place of those in a sweep file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from orchestrator import yaml_file
from orchestrator.problems import Problem
from trainers.config import TrialConfig, is_execution
from trainers.explain import did_you_mean

# Parts of a sweep that can be replaced; the others decide what is compared and are edited in the file.
_PARTS = (
    *("seeds", "question", "baseline", "primary", "resources", "scheduler", "search", "budget"),
    *("match", "score", "outlier_limit"),
)
_DECISIVE = ("match", "score")  # of these, what decides what trials compute


def parse(override: str) -> tuple[tuple[str, ...], Any, list[Problem]]:
    """Where in the sweep file an override belongs, its value, and what is wrong with it.

    A setting of the trial is at ("trial", its dotted name), an axis at ("axes", its dotted name).
    """
    label = f"--set {override}"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        return (), None, [Problem(label, None, "write KEY=VALUE, as in --set optim.lr=1e-3")]
    path, complaint = _place(key)
    if complaint:
        return (), None, [Problem(label, None, complaint)]
    if not text.strip():
        return (), None, [Problem(label, None, f"{key} is given no value; write {key}=null for none")]
    try:
        document = yaml_file.parse(text)
    except yaml_file.YamlError as error:
        return (), None, [Problem(label, None, error.finding.message)]
    return path, document.root.plain(), [Problem(label, None, finding.message) for finding in document.findings]


def _place(key: str) -> tuple[tuple[str, ...], str]:
    """The path of `key` in the file, or why it cannot be set."""
    first, _, rest = key.partition(".")
    if key == "name":
        return (), "a sweep's name is given by --name"
    if key in ("seed", "trial.seed"):
        return (), "seed is not set by itself; write --set seeds=[0]"
    if first in ("when", "exclude") or key in ("axes", "trial"):
        hint = "; one axis is replaced by --set axes.NAME=[…]" if key == "axes" else ""
        return (), f"{key} can only be changed in the file{hint}"
    if first in ("axes", "trial") and rest:
        return (first, rest), ""
    if first in _PARTS:
        return tuple(key.split(".")), ""
    if key not in TrialConfig.model_fields and did_you_mean(key, _PARTS):
        return (), f"{key} cannot be set{did_you_mean(key, _PARTS)}"
    return ("trial", key), ""


def place(raw: dict[str, Any], path: tuple[str, ...], value: object) -> bool:
    """Put `value` at `path` into the sweep as read; False where something that is no mapping is in the way."""
    inner: Any = raw
    for part in path[:-1]:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
        if not isinstance(inner, dict):
            return False
    inner[path[-1]] = value
    return True


def renamed(name: str, settings: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """`name`, or NAME@HASH where `settings` and `parts` from the command line make it another experiment."""
    decisive = {key: value for key, value in settings.items() if key == "preset" or not is_execution(key)}
    decisive |= {key: value for key, value in parts.items() if key in _DECISIVE}
    if not decisive:
        return name
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
    return f"{name}@{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"
