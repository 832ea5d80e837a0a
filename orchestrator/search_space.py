"""The space of a search: the order in which settings are chosen, which of them have effect, and its grid; pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from orchestrator.sweep import Range
from trainers.settings import check

Params = dict[str, Any]  # a suggestion: setting by dotted name to value, without those whose condition does not hold


@dataclass(frozen=True)
class Entry:
    """One setting of the space; `whole` where only whole numbers are meant."""

    name: str
    range: Range
    whole: bool

    def holds(self, params: Params) -> bool:
        """Whether the entry is suggested beside `params`, which has every entry that this one depends on."""
        return all(other in params and among(params[other], allowed) for other, allowed in self.range.condition.items())

    @cached_property
    def listed(self) -> list[Any] | None:
        """All values of choices and steps; None where any value between low and high can be suggested."""
        bounds = self.range
        if bounds.choices is not None:
            return list(bounds.choices)
        if bounds.step is None or bounds.low is None or bounds.high is None:
            return None
        count = int((Decimal(str(bounds.high)) - Decimal(str(bounds.low))) / Decimal(str(bounds.step))) + 1
        return [self.stepped(index) for index in range(count)]

    def stepped(self, index: int) -> float:
        """The value `index` steps above low, without the rounding that repeated additions leave."""
        value = Decimal(str(self.range.low)) + index * Decimal(str(self.range.step))
        return int(value) if self.whole else float(value)

    def has(self, value: Any) -> bool:
        """Whether `value` could have been suggested."""
        if self.listed is not None:
            return any(same(value, item) for item in self.listed)
        low, high = self.range.low, self.range.high
        number = isinstance(value, int) or (isinstance(value, float) and not self.whole)
        return number and not isinstance(value, bool) and low is not None and high is not None and low <= value <= high


class Space:
    """The entries of a search by what they depend on: none comes before another that its condition names."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        """Raises:
        ValueError: conditions go round in a circle, or name something that is no entry; `read_sweep` finds that
            earlier, with the line.
        """
        self.names = tuple(ranges)
        self.entries = tuple(Entry(name, ranges[name], is_whole(name, ranges[name])) for name in in_order(ranges))
        self.conditional = any(entry.range.condition for entry in self.entries)

    def restricted(self, values: Mapping[str, Any]) -> Params | None:
        """The suggestion that `values` of settings amount to; None where it could not have been made here."""
        params: Params = {}
        for entry in self.entries:
            if entry.holds(params):
                if entry.name not in values or not entry.has(values[entry.name]):
                    return None
                params[entry.name] = values[entry.name]
        return params

    @cached_property
    def grid(self) -> list[Params]:
        """Every suggestion of a space of choices and steps, the last entry varying fastest."""
        return [self.in_file_order(params) for params in self._combinations({}, 0)]

    def size(self, most: int) -> int:
        """The number of suggestions in the grid, counted no further than one above `most`."""
        return sum(1 for _ in itertools.islice(self._combinations({}, 0), most + 1))

    def _combinations(self, params: Params, position: int) -> Iterator[Params]:
        if position == len(self.entries):
            yield params
            return
        entry = self.entries[position]
        if not entry.holds(params):
            yield from self._combinations(params, position + 1)
            return
        for value in entry.listed or ():
            yield from self._combinations({**params, entry.name: value}, position + 1)

    def in_file_order(self, params: Params) -> Params:
        """`params` in the order of the sweep file."""
        return {name: params[name] for name in self.names if name in params}


def in_order(ranges: Mapping[str, Range]) -> list[str]:
    """The names of `ranges`, each behind those that its condition names, otherwise as they come.

    Raises:
        ValueError: there is no such order; `.args[1]` are the names that are left.
    """
    ordered: list[str] = []
    left = list(ranges)
    while left:
        free = next((name for name in left if all(other in ordered for other in ranges[name].condition)), None)
        if free is None:
            raise ValueError("conditions go round in a circle or name no entry", tuple(left))
        ordered.append(free)
        left.remove(free)
    return ordered


def is_whole(name: str, bounds: Range) -> bool:
    """Whether only whole numbers are meant: by the setting or, where it takes any number, by how the range is written.

    A setting that is kept as a fraction (`optim.lr`) never is; a free one is where low, high and step have no point.
    """
    numbers = [number for number in (bounds.low, bounds.high, bounds.step) if number is not None]
    if bounds.low is None or not all(float(number).is_integer() for number in numbers):
        return False
    held, faults = check(name, int(bounds.low))
    if faults or type(held) is not int:
        return False
    return all(isinstance(number, int) for number in numbers) or bool(check(name, float(bounds.low))[1])


def among(value: Any, allowed: object) -> bool:
    """Whether `value` is one of `allowed`, or is the whole list."""
    listed = list(allowed) if isinstance(allowed, list | tuple) else [allowed]
    return same(value, listed) or any(same(value, item) for item in listed)


def same(one: Any, other: Any) -> bool:
    """Equal as settings: 1 is 1.0, a list is a tuple, but true is not 1."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
