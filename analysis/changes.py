"""What differs between cells of two sweeps besides numbers: settings, code, packages, data and machines; pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.cells import Cell
from analysis.matching import Matched, Trials, comparable

ABSENT = "(no such setting)"
_HOW = ("execution.",)  # settings that say how a trial is executed, of which provenance shows what matters
_PROVENANCE = ("git_commit", "data_fingerprint", "device", "threads")

Values = tuple[str, ...]  # sorted


@dataclass(frozen=True)
class Change:
    """Something that has other values in B than in A.

    Attributes:
        kind: "setting" or "provenance".
        cells: numbers of the cells in `Matched.both` of which it is so.
        everywhere: whether these are all that are known on both sides.
    """

    kind: str
    name: str
    a: Values
    b: Values
    cells: tuple[int, ...]
    everywhere: bool


def changes(a: Trials, b: Trials, matched: Matched) -> tuple[Change, ...]:
    """What differs in matched cells; a cell of which one sweep has configured or finished no trial says nothing."""
    names = sorted({*a.settings, *b.settings} - {"seed"} - set(matched.axes))
    names = [name for name in names if not name.startswith(_HOW)]
    of_settings = [(_settings(a, one, names), _settings(b, other, names)) for _, one, other in matched.both]
    of_runs = [(_provenance(a, one), _provenance(b, other)) for _, one, other in matched.both]
    return (*_changed("setting", of_settings), *_changed("provenance", of_runs))


def _settings(trials: Trials, cell: Cell, names: Sequence[str]) -> dict[str, Values]:
    if not trials.recorded(cell):
        return {}
    known = set(trials.settings)
    return {name: tuple(sorted(trials.values(cell, name))) if name in known else (ABSENT,) for name in names}


def _provenance(trials: Trials, cell: Cell) -> dict[str, Values]:
    """Provenance of a cell's trials that are over: by column of `runs`, packages by `package NAME`."""
    found: dict[str, set[str]] = {}
    for row in trials.recorded(cell):
        for name, value in _recorded(row):
            found.setdefault(name, set()).add(comparable(value))
    return {name: tuple(sorted(values)) for name, values in found.items()}


def _recorded(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, row[name]) for name in _PROVENANCE if row[name] is not None)
    if row["versions"] is not None:
        yield from ((f"package {name}", version) for name, version in json.loads(row["versions"]).items())


def _changed(kind: str, pairs: Sequence[tuple[Mapping[str, Values], Mapping[str, Values]]]) -> list[Change]:
    found: dict[tuple[str, Values, Values], list[int]] = {}
    known: dict[str, int] = {}
    for number, (one, other) in enumerate(pairs):
        if not one or not other:
            continue
        for name in sorted(one.keys() | other.keys()):
            known[name] = known.get(name, 0) + 1
            values = one.get(name, (ABSENT,)), other.get(name, (ABSENT,))
            if values[0] != values[1] and set(values) != {(ABSENT,), ("null",)}:
                found.setdefault((name, *values), []).append(number)
    return [
        Change(kind, name, a, b, tuple(cells), len(cells) == known[name])
        for (name, a, b), cells in sorted(found.items())
    ]
