"""A sweep file that is being read: its values, the place of each of them, and the problems found so far."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrator import overrides, yaml_file
from orchestrator.problems import Problem, SpecError
from orchestrator.sweep import Part
from trainers.config import is_execution
from trainers.explain import did_you_mean, dotted, explain
from trainers.settings import check, is_section

Path = tuple[str | int, ...]


class Draft:
    """Values by key (`raw`), and `report` to say what is wrong at a path in them."""

    def __init__(self, file: str, document: yaml_file.Document) -> None:
        self.file = file
        self.document = document
        self.problems = [Problem(file, finding.line, finding.message) for finding in document.findings]
        self.raw: dict[str, Any] = {}
        self.set_settings: dict[str, Any] = {}  # the trial's settings from --set, by dotted name
        self._options: dict[Path, str] = {}  # what came from the command line, and from which option
        root = document.root.plain()
        if not isinstance(root, dict):
            self.report((), "a sweep file is a mapping that begins with name:, axes: and seeds:")
            raise SpecError(self.problems)
        self.raw = root
        self._file_parts = copy.deepcopy(root)

    def report(self, path: Path, message: str) -> None:
        """Note a problem with what stands at `path`."""
        self.problems.append(self._problem(path, message))

    def _problem(self, path: Path, message: str) -> Problem:
        for length in range(len(path), 0, -1):
            if path[:length] in self._options:
                return Problem(f"--set {self._options[path[:length]]}", None, message)
        return Problem(self.file, self.document.line(path), message)

    def override(self, text: str) -> None:
        """Put `--set text` in the place of what the file says."""
        path, value, problems = overrides.parse(text)
        self.problems += problems
        if problems:
            return
        if path[0] == "trial":
            self.set_settings[str(path[1])] = value
            path = ("--set", path[1])
        elif not overrides.place(self.raw, path, value):
            self.problems.append(Problem(f"--set {text}", None, f"{path[0]} is no mapping in {self.file}"))
            return
        self._options[path] = text

    def set_parts(self) -> dict[str, Any]:
        """Parts of the sweep that the command line has changed, as they are with it."""
        return {name: value for name, value in self.raw.items() if value != self._file_parts.get(name)}

    def from_option(self, path: Path) -> bool:
        """Whether what stands at `path` came from the command line."""
        return path in self._options

    def validated(self, kind: type[Part], raw: object, path: Path) -> Any:
        """`raw` as a `kind`, or None once what is wrong with it has been reported."""
        try:
            return kind.model_validate(raw)
        except ValidationError as error:
            for fault in explain(error, kind, inside=dotted(path)):
                self.report((*path, *fault.path), fault.message)
            return None

    def mapping(self, raw: object, path: Path, name: str) -> Mapping[str, Any]:
        """`raw` if it is a mapping; else a problem and an empty one."""
        if isinstance(raw, dict):
            return raw
        self.report(path, f"{name} wants settings by name, as in {{optim.lr: 1.0e-3}}")
        return {}

    def settings(self, raw: object, path: Path, name: str) -> dict[str, tuple[Any, Path]]:
        """Settings of a trial under `path`, nested or dotted, as dotted name: (checked value, path)."""
        found: dict[str, tuple[Any, Path]] = {}
        seen: dict[str, Path] = {}
        for setting, value, place in flat(self.mapping(raw, path, name), path):
            if setting in seen:
                first = self.document.line(seen[setting])
                self.report(place, f"{setting} is given twice, first on line {first}")
                continue
            seen[setting] = place
            if setting == "seed":
                self.report(place, "seed is not a setting of the file; use seeds: [0, 1, 2]")
            elif (checked := self.checked(setting, value, place)) is not None:
                found[setting] = (checked[0], place)
        return found

    def checked(self, setting: str, value: object, place: Path) -> tuple[Any] | None:
        """The value as a configuration holds it, in a tuple; None once a problem has been reported."""
        held, faults = check(setting, value)
        for fault in faults:
            self.report(place, fault.message)
        return None if faults else (held,)


def flat(raw: Mapping[str, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, Any, Path]]:
    """Dotted names of the settings under `path` with their values and own paths; sections are entered."""
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and is_section(name):
            yield from flat(value, (*path, key), f"{name}.")
        else:
            yield name, value, (*path, key)


def is_execution_setting(name: str) -> bool:
    """Whether `name` says how trials are executed; a preset is not executed, it stands for other settings."""
    return is_execution(name) and name.rpartition(".")[2] != "preset"


def nearest(given: str, known: Mapping[str, object] | list[str]) -> str:
    """`; did you mean X?`, or else what is allowed."""
    return did_you_mean(given, known) or f"; allowed: {', '.join(known)}"
