"""What has changed in a sweep file since the sweep was last run: settings, axes, seeds, trials; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.ledger_schema import TrialRow
from orchestrator.plan import Plan
from orchestrator.sweep import Sweep

_LISTED = ("axes", "seeds", "trial", "name")  # parts with a comparison of their own


def changes(before: Sweep, after: Sweep) -> list[str]:
    """One line for each part of the sweep that differs; none where both are equal."""
    old, new = (sweep.model_dump(mode="json", by_alias=True) for sweep in (before, after))
    lines = [*_of_settings(old["trial"], new["trial"]), *_of_axes(old["axes"], new["axes"])]
    lines += [f"seeds: {change}" for change in _of_lists(old["seeds"], new["seeds"])]
    others = [part for part in new if part not in _LISTED and old[part] != new[part]]
    return lines + [f"{part.replace('_', ' ')}: {_shown(old[part])} → {_shown(new[part])}" for part in others]


def _of_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [*new, *(name for name in old if name not in new)]
    given = {name: tuple(_shown(part[name]) if name in part else "not given" for part in (old, new)) for name in names}
    return [f"trial.{name}: {was} → {is_now}" for name, (was, is_now) in given.items() if was != is_now]


def _of_axes(old: Mapping[str, Sequence[Any]], new: Mapping[str, Sequence[Any]]) -> list[str]:
    added = [f"axis {name} is new: {_shown(values)}" for name, values in new.items() if name not in old]
    gone = [f"axis {name} is gone, which had {_shown(values)}" for name, values in old.items() if name not in new]
    both = [name for name in new if name in old]
    return added + gone + [f"axis {name}: {change}" for name in both for change in _of_lists(old[name], new[name])]


def _of_lists(old: Sequence[Any], new: Sequence[Any]) -> list[str]:
    added = [value for value in new if value not in old]
    gone = [value for value in old if value not in new]
    parts = [f"{_shown(added)} added" if added else "", f"{_shown(gone)} removed" if gone else ""]
    said = ", ".join(filter(None, parts)) or ("in another order" if list(old) != list(new) else "")
    return [said] if said else []


def replaced(plan: Plan, rows: Sequence[TrialRow]) -> dict[str, str]:
    """Planned trials that are new though their cell and seed were there: id to the id that stood in their place."""
    before = {_place(row.cell, row.seed): row.trial_id for row in rows}
    known = {row.trial_id for row in rows}
    places = {trial.trial_id: before.get(_place(trial.cell, trial.seed)) for trial in plan.trials}
    return {new: old for new, old in places.items() if old is not None and new not in known}


def _place(cell: Mapping[str, Any], seed: int) -> tuple[str, int]:
    return _shown({name: cell[name] for name in sorted(cell)}), seed


def _shown(value: Any) -> str:
    """As YAML would have it on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_shown(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
