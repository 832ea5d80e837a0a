"""Checks the parts of a sweep file one by one and against each other, and reports everything that is wrong."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from orchestrator.cells import Grid
from orchestrator.draft import Draft, Path, flat, is_execution_setting, nearest
from orchestrator.sweep import When
from trainers.config import is_setting
from trainers.explain import did_you_mean, shown
from trainers.settings import check


@dataclass
class Parts:
    """The checked parts of a sweep with the place of each value; what was wrong is left out."""

    trial: dict[str, Any] = field(default_factory=dict)
    trial_paths: dict[str, Path] = field(default_factory=dict)
    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    axis_paths: dict[str, Path] = field(default_factory=dict)  # of every declared axis, also of wrong ones
    value_paths: dict[tuple[str, Any], Path] = field(default_factory=dict)
    refused: set[tuple[str, str]] = field(default_factory=set)  # axis and value, reported already
    when: list[When] = field(default_factory=list)
    when_paths: list[dict[str, Path]] = field(default_factory=list)
    exclude: list[dict[str, tuple[Any, ...]]] = field(default_factory=list)
    score: dict[str, Any] = field(default_factory=dict)  # settings of every cell by the sweep's scoring rule

    def grid(self) -> Grid:
        """What the cells follow from."""
        return Grid({**self.trial, **self.score}, self.axes, self.when, self.exclude)


def check_trial(draft: Draft, parts: Parts) -> None:
    """The base configuration, `--set` included."""
    raw = draft.raw.get("trial")
    if isinstance(raw, dict) and _is_shell_line(draft, raw.get("command"), ("trial", "command")):
        raw = {name: value for name, value in raw.items() if name != "command"}
    settings = draft.settings(raw, ("trial",), "trial") if raw is not None else {}
    for name, value in draft.set_settings.items():
        place: Path = ("--set", name)
        if name == "command" and _is_shell_line(draft, value, place):
            continue
        checked = draft.checked(name, value, place)
        if checked is not None:
            settings[name] = (checked[0], place)
            draft.set_settings[name] = checked[0]
    parts.trial = {name: value for name, (value, _) in settings.items()}
    parts.trial_paths = {name: place for name, (_, place) in settings.items()}


def _is_shell_line(draft: Draft, command: object, place: Path) -> bool:
    """Whether a command is given as one text, as to a shell, which is reported with the list that is meant."""
    if not isinstance(command, str):
        return False
    try:
        words = shlex.split(command)
    except ValueError:  # a quote is not closed
        words = command.split()
    draft.report(place, f"command is {shown(command)}; allowed: a list of its words, as in {shown(words or ['sh'])}")
    return True


def check_axes(draft: Draft, parts: Parts) -> None:
    """Names and values of the axes; an axis may not stand in the base configuration as well."""
    raw = draft.raw.get("axes")
    if raw is None or raw == {}:
        word = "missing" if "axes" not in draft.raw else "empty"
        draft.report(("axes",), f"axes is {word}; name at least one setting, as in model.num_registers: [0, 4]")
        return
    if not isinstance(raw, dict):
        draft.report(("axes",), f"axes is {shown(raw)}; allowed: lists by setting, as in model.num_registers: [0, 4]")
        return
    for name, values, place in flat(raw, ("axes",)):
        if name in parts.axis_paths:
            first = draft.document.line(parts.axis_paths[name])
            draft.report(place, f"{name} is given twice, first on line {first}")
            continue
        parts.axis_paths[name] = place
        if _is_axis_name(draft, name, place) and _is_list(draft, name, values, place):
            kept = _axis_values(draft, parts, name, values, place)
            if kept:
                parts.axes[name] = tuple(kept)
        if name in parts.trial:
            where = parts.trial_paths[name]
            draft.report(where, f"{name} is an axis as well; set it in one place")
            parts.trial.pop(name)


def _is_axis_name(draft: Draft, name: str, place: Path) -> bool:
    if name in ("seed", "seeds"):
        draft.report(place, f"{name} is not an axis; use seeds: [0, 1, 2] beside axes")
    elif is_execution_setting(name):
        draft.report(place, f"{name} is not an axis: execution changes nothing that a trial computes; set it in trial")
    elif not is_setting(name):
        draft.checked(name, None, place)
    else:
        return True
    return False


def _is_list(draft: Draft, name: str, values: object, place: Path) -> bool:
    if not isinstance(values, list):
        example = "[0, 4]" if values is None else shown([values])
        draft.report(place, f"{name} is {shown(values)}; allowed: a list of values, as in {example}")
    elif not values:
        draft.report(place, f"{name} is empty; give it at least one value")
    return isinstance(values, list) and bool(values)


def _axis_values(draft: Draft, parts: Parts, name: str, values: list[Any], place: Path) -> list[Any]:
    kept: list[Any] = []
    for index, value in enumerate(values):
        here = (*place, index)
        checked = draft.checked(name, value, here)
        if checked is None:
            parts.refused.add((name, repr(value)))
            continue
        if (name, checked[0]) in parts.value_paths:
            draft.report(here, f"{name} has {shown(value)} twice")
            continue
        kept.append(checked[0])
        parts.value_paths[name, checked[0]] = here
    return kept


def check_when(draft: Draft, parts: Parts) -> None:
    """Settings of some cells: what they depend on exists, and they set no axis. `--set` goes before them."""
    raw = draft.raw.get("when")
    for index, entry in enumerate(_entries(draft, raw, "when", "- {if: {…}, set: {…}}")):
        path: Path = ("when", index)
        if not isinstance(entry, dict):
            draft.report(path, f"when has {shown(entry)} in it; allowed: {{if: {{…}}, set: {{…}}}}")
            continue
        for key in entry:
            if key not in ("if", "set"):
                draft.report((*path, key), f"{key} is not a part of when; allowed: if, set")
        for key in ("if", "set"):
            if key not in entry:
                draft.report(path, f"{key} is missing; an entry of when is {{if: {{…}}, set: {{…}}}}")
        condition = _condition(draft, parts, entry.get("if", {}), (*path, "if"), "if", axes_only=False)
        settings = draft.settings(entry.get("set", {}), (*path, "set"), "set")
        for name in [name for name in settings if name in parts.axis_paths]:
            draft.report(settings.pop(name)[1], f"{name} is an axis, which when may not set; use exclude")
        kept = {name: value for name, (value, _) in settings.items() if name not in draft.set_settings}
        if condition is not None and kept:
            parts.when.append(When(condition=condition, settings=kept))
            parts.when_paths.append({name: place for name, (_, place) in settings.items()})


def check_exclude(draft: Draft, parts: Parts) -> None:
    """Cells that are left out, by values that their axes have."""
    for index, entry in enumerate(_entries(draft, draft.raw.get("exclude"), "exclude", "- {AXIS: VALUE}")):
        condition = _condition(draft, parts, entry, ("exclude", index), "exclude", axes_only=True)
        if condition:
            parts.exclude.append(condition)
        elif entry in ({}, None):
            draft.report(("exclude", index), "an entry of exclude is empty; it would leave out every cell")


def check_baseline(draft: Draft, parts: Parts) -> dict[str, Any] | None:
    """The baseline, if there is one and it is right."""
    raw = draft.raw.get("baseline")
    if raw is None:
        return None
    if raw == {}:
        draft.report(("baseline",), "baseline is empty; name a value of at least one axis, or leave it out")
        return None
    condition = _condition(draft, parts, raw, ("baseline",), "baseline", axes_only=True)
    return None if condition is None else {name: values[0] for name, values in condition.items()}


def _entries(draft: Draft, raw: object, name: str, example: str) -> list[Any]:
    if raw is None or isinstance(raw, list):
        return raw or []
    draft.report((name,), f"{name} is {shown(raw)}; allowed: a list of entries, each {example}")
    return []


def _condition(
    draft: Draft, parts: Parts, raw: object, path: Path, part: str, *, axes_only: bool
) -> dict[str, tuple[Any, ...]] | None:
    """`raw` as setting: allowed values; None where a problem was reported. A list means any of its values."""
    condition: dict[str, tuple[Any, ...]] = {}
    before = len(draft.problems)
    for name, value, place in flat(draft.mapping(raw, path, part), path):
        if name in parts.axis_paths:
            if name in parts.axes:
                chosen = _axis_choices(draft, parts, name, value, place, part)
                condition |= {name: chosen} if chosen else {}
        elif axes_only or not is_setting(name):
            _report_no_axis(draft, parts, name, place, part, axes_only)
        elif (checked := _values(draft, name, value, place)) is not None:
            condition[name] = checked
    wrong = len(draft.problems) > before or len(condition) < len(list(flat(raw if isinstance(raw, dict) else {}, path)))
    return None if wrong else condition


def _report_no_axis(draft: Draft, parts: Parts, name: str, place: Path, part: str, axes_only: bool) -> None:
    misspelt = {axis for axis in parts.axis_paths if not is_setting(axis)}
    if misspelt and is_setting(name):  # the misspelt axis has been reported; this would only repeat it
        return
    if name in ("seed", "seeds"):
        draft.report(place, f"{part} names {name}; cells are compared seed by seed, so it cannot")
    elif axes_only:
        draft.report(place, f"{part} names {name}, which is not an axis{nearest(name, parts.axis_paths)}")
    else:
        draft.checked(name, None, place)


def _values(draft: Draft, name: str, value: object, place: Path) -> tuple[Any, ...] | None:
    """The values that `value` stands for: itself or, where that is no value of the setting, each of a list."""
    held, faults = check(name, value)
    if not faults:
        return (held,)
    checked = [draft.checked(name, item, place) for item in (value if isinstance(value, list) and value else [value])]
    return tuple(item[0] for item in checked if item is not None) if None not in checked else None


def _axis_choices(draft: Draft, parts: Parts, name: str, value: object, place: Path, part: str) -> tuple[Any, ...]:
    """Those values of an axis that are named; a problem for each that the axis lacks."""
    whole = [known for known in parts.axes[name] if _same(known, value)]
    if whole:
        return tuple(whole)
    chosen: list[Any] = []
    for item in value if isinstance(value, list) and part != "baseline" else [value]:
        matches = [known for known in parts.axes[name] if _same(known, item)]
        chosen += matches
        if matches or (name, repr(item)) in parts.refused:
            continue
        if draft.from_option(parts.axis_paths[name]) and part != "baseline":
            checked = draft.checked(name, item, place)  # of the file's own axis: it holds for no cell now
            chosen += checked or ()
        else:
            known = ", ".join(shown(value).strip("'") for value in parts.axes[name])
            texts = [value for value in parts.axes[name] if isinstance(value, str)]
            guess = did_you_mean(item, texts) if isinstance(item, str) else ""
            draft.report(
                place, f"{part} names {name} {shown(item)}, a value that its axis lacks{guess}; it has {known}"
            )
    return tuple(chosen)


def _same(known: object, given: Any) -> bool:
    """Equal as settings: 1 is 1.0, a list is a tuple, but true is not 1."""
    if isinstance(known, tuple) and isinstance(given, list):
        return len(known) == len(given) and all(map(_same, known, given))
    return known == given and isinstance(known, bool) == isinstance(given, bool)
