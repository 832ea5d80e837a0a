"""What is wrong with a sweep file: one problem per line, each with the place it stands at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """`file` is a path or a command-line option such as `--set KEY=VALUE`; `line` counts from 1."""

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line is not None else f"{self.file}: {self.message}"


class SpecError(ValueError):
    """Everything that is wrong with a sweep file, sorted by line, without repetitions."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        distinct = dict.fromkeys(problems)
        self.problems = sorted(distinct, key=lambda problem: (problem.line is None, problem.line or 0))
        super().__init__("\n".join(str(problem) for problem in self.problems))
