"""What a benchmark says: ratios of interleaved pairs with their interval, the goal, and on which machine."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

CONFIDENCE = 0.95
PACKAGES = ("torch", "torchvision", "timm", "ray", "lightly")  # their versions stand beside the numbers


@dataclass(frozen=True)
class Settings:
    """How benchmarks run: CPU threads of a training loop, and how many pairs are measured.

    More than one thread tells something only on a machine that nobody else uses: a thread that has to wait for a core
    holds up all others at the end of every operation, and a step may take twenty times as long.
    """

    threads: int
    pairs: int = 10


@dataclass(frozen=True)
class Goal:
    """The ratio that is wanted: at most, or at least, so much."""

    bound: float
    at_most: bool = True

    def met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Comparison:
    """`first` over `second`, pair by pair, in one unit; the ratio is the median over the pairs.

    Args:
        name: what is compared.
        sides: what `first` and `second` are, in words.
        first: one number per pair, taken in turns with `second`.
        second: the same of the other side.
        unit: of the numbers of both sides.
        goal: of the ratio, or None for a number that is only reported.
    """

    name: str
    sides: tuple[str, str]
    first: Sequence[float]
    second: Sequence[float]
    unit: str
    goal: Goal | None

    @property
    def ratios(self) -> list[float]:
        return [one / other for one, other in zip(self.first, self.second, strict=True)]

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.goal.met(statistics.median(self.ratios))

    def to_json(self) -> dict[str, Any]:
        ratios = self.ratios
        interval = median_interval(ratios)
        return {
            "name": self.name,
            "ratio": rounded(statistics.median(ratios)),
            "interval_95": None if interval is None else [rounded(end) for end in interval],
            "goal": None if self.goal is None else str(self.goal),
            "met": self.met,
            "sides": list(self.sides),
            "median": [rounded(statistics.median(side)) for side in (self.first, self.second)],
            "unit": self.unit,
            "pairs": len(ratios),
        }


@dataclass(frozen=True)
class Report:
    """A benchmark's comparisons, the first of them its headline, and what was counted."""

    comparisons: Sequence[Comparison]
    counts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The headline's fields; `met` speaks for all goals, the other comparisons stand under `also`."""
        first, *others = (comparison.to_json() for comparison in self.comparisons)
        met = all(comparison.met is not False for comparison in self.comparisons)
        return {**first, "met": met, "headline_met": first["met"], "also": others, "counts": dict(self.counts)}


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Order statistics between which the median lies with at least `confidence`; None where there are too few.

    Free of assumptions on the distribution: the interval from the k-th smallest to the k-th largest of n values misses
    the median with probability 2 · P(Binomial(n, 1/2) < k).
    """
    ordered, n = sorted(values), len(values)
    below = 0.0  # P(Binomial(n, 1/2) < k)
    k = 0
    while k < n / 2 and below + math.comb(n, k) / 2**n <= (1 - confidence) / 2:
        below += math.comb(n, k) / 2**n
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None


def rounded(value: float, digits: int = 4) -> float:
    """`value` to so many significant digits."""
    return float(f"{value:.{digits}g}")


def machine(threads: int, device: str | None = None, commit: str | None = None) -> dict[str, Any]:
    """What the numbers depend on; the load average tells whether others used the machine.

    Args:
        threads: of a training loop.
        device: name of the accelerator; None where the processor is measured.
        commit: of this code, where it is known and there is no repository to ask; what is not there is null.
    """
    processor = _processor()
    return {
        "device": device or processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "processor": processor,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": commit or _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _commit() -> str | None:
    """Git commit of this code; "+" marks changes."""
    try:
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    with open("/proc/cpuinfo") as file:  # noqa: PTH123 # not a file of ours
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def line(name: str, report: Report, facts: Mapping[str, Any], seconds: float) -> str:
    """The one line of JSON that a benchmark prints."""
    content = {**report.to_json(), "comparison": report.comparisons[0].name, "name": name}
    return json.dumps({**content, "machine": dict(facts), "seconds": round(seconds, 1)}, ensure_ascii=False)
