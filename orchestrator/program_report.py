"""The lines that a program appends to its report: read while it runs, checked one by one, wrong ones counted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.sweep import is_metric
from trainers.explain import shown

MOST_WRONG = 100  # lines, after which a trial fails
MOST_BYTES = 2**20  # of a line
MOST_REPORT_BYTES = 64 * 2**20  # about a million lines
_AT_ONCE = 2**16  # bytes of one look, so that a flood does not keep a trial from being stopped
_STATUSES = ("diverged", "finished")
_MOST_STEP = 2**63 - 1  # what the ledger's and the tables' columns hold


class WrongReports(ValueError):
    """Too many lines of a report are wrong, or there are too many."""


@dataclass
class ProgramReport:
    """The report of one attempt.

    Attributes:
        path: the file, which exists; only what is appended to it counts.
        steps: the highest step so far; null before the first.
        status: what a line said of the end, `diverged` or `finished`, and its message.
        wrong: lines that could not be taken, and what is wrong with the first.
        behind: there was more to read than one look takes.
    """

    path: Path
    steps: int | None = None
    status: str | None = None
    message: str = ""
    wrong: int = 0
    first_wrong: str = ""
    behind: bool = False
    _read: int = field(default=0, repr=False)  # bytes
    _line: int = field(default=0, repr=False)
    _rest: bytes = field(default=b"", repr=False)  # of a line whose end is not written yet
    _skipping: bool = field(default=False, repr=False)  # the rest of a line that is too long

    def __post_init__(self) -> None:
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CREAT, 0o644)

    def close(self) -> None:
        """Stop reading."""
        os.close(self._descriptor)

    def new(self, *, at_end: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, {name: value}) of each line that was completed since the last call; `at_end` also of the last one
        where its line break is missing, and of all that is there.

        Raises:
            WrongReports: a hundred lines are wrong, or there are more than a trial can have.
        """
        size = os.fstat(self._descriptor).st_size
        if size > MOST_REPORT_BYTES:
            raise WrongReports(f"the report has more than {MOST_REPORT_BYTES:,} bytes")
        if size < self._read:  # written anew instead of appended to
            self._read, self._rest, self._skipping = 0, b"", False
        while chunk := os.pread(self._descriptor, _AT_ONCE, self._read):
            self._read += len(chunk)
            self.behind = len(chunk) == _AT_ONCE
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            for line in whole:
                yield from self._taken(line)
            if len(self._rest) > MOST_BYTES:
                if not self._skipping:
                    self._line += 1
                    self._refuse(f"it has more than {MOST_BYTES:,} bytes")
                self._rest, self._skipping = b"", True
            if not at_end:
                break
        if at_end and self._rest:
            rest, self._rest = self._rest, b""
            yield from self._taken(rest)

    def _taken(self, line: bytes) -> Iterator[tuple[int, dict[str, float]]]:
        if self._skipping:  # the end of a line that was refused
            self._skipping = False
            return
        self._line += 1
        if not line.strip():
            return
        try:
            said = _parsed(line)
            if said.get("status") is not None:
                self._end(said)
            found = _metrics(said)
        except ValueError as error:
            self._refuse(str(error))
            return
        if found is not None:
            self.steps = max(found[0], self.steps or 0)
            yield found

    def _end(self, said: Mapping[str, Any]) -> None:
        if said["status"] not in _STATUSES:
            raise ValueError(f"its status is {shown(said['status'])}; allowed: {' or '.join(_STATUSES)}")
        self.status, self.message = said["status"], str(said.get("message") or "")[:4000]

    def _refuse(self, reason: str) -> None:
        self.wrong += 1
        if self.wrong == 1:
            self.first_wrong = f"{self.path.name}:{self._line}: {reason}"
        if self.wrong >= MOST_WRONG:
            raise WrongReports(f"{self.wrong} lines of the report are wrong, the first is {self.first_wrong}")


def _parsed(line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises ValueError with what is wrong."""
    try:
        said = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # the first also of text that is no UTF-8
        text = line[:60].decode("utf-8", "replace")
        raise ValueError(f"{text!r} is no JSON ({type(error).__name__})") from error
    if not isinstance(said, dict):
        raise ValueError(f'it is {shown(said)}; allowed: {{"step": 10, "metrics": {{"val/top1": 0.5}}}}')
    return said


def _metrics(said: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None:
    """What a line reports; None where it only says a status. Null values are absent ones. Raises ValueError."""
    if "metrics" not in said and said.get("status") is not None:
        return None
    step, metrics = said.get("step"), said.get("metrics")
    if type(step) is not int or not 0 <= step <= _MOST_STEP:
        raise ValueError(f"its step is {shown(step)}; allowed: a whole number from 0")
    if not isinstance(metrics, dict):
        raise ValueError(f'its metrics are {shown(metrics)}; allowed: names and numbers, as in {{"val/top1": 0.5}}')
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not is_metric(name):
            raise ValueError(
                f"it has the metric {shown(name)}; allowed: small letters, digits and _ with / between, as in val/top1"
            )
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"its {name} is {shown(value)}; allowed: a number")
        try:
            found[name] = float(value)
        except OverflowError as error:
            raise ValueError(f"its {name} is larger than any number that can be kept") from error
    return step, found
