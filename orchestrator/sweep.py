"""The schema of a sweep file: what a sweep consists of once it has been read and found right."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from trainers.explain import shown

MAX_TRIALS = 100_000
MAX_NAME = 64  # characters

# Folders and files that stand beside the sweeps in storage and state.
RESERVED_NAMES = ("cache", "mlartifacts", "mlflow.db")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
_METRIC = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)+")


def sweep_name(name: str) -> str:
    """`name` if it can be a folder's name that stays inside its parent on every file system.

    Raises:
        ValueError: with what is allowed.
    """
    too_long = len(name.split("@")[0]) > MAX_NAME or len(name) > MAX_NAME + 16  # NAME@HASH is longer than its file's
    if too_long or not _NAME.fullmatch(name) or name.endswith("."):
        raise ValueError(
            f"is {shown(name)}; allowed: at most {MAX_NAME} letters, digits, _, - and ., not beginning with - or ."
        )
    if name.lower() in RESERVED_NAMES:
        raise ValueError(f"is {shown(name)}, which is kept for files of the tracking store and the cache")
    return name


def is_metric(name: object) -> bool:
    """Whether `name` has the form of a metric's name: small letters, digits and _ with slashes between."""
    return isinstance(name, str) and _METRIC.fullmatch(name) is not None


def _metric_name(name: str) -> str:
    if not is_metric(name):
        raise ValueError(f"is {shown(name)}; allowed: a metric such as test/linear/top1")
    return name


def _validation_metric(name: str) -> str:
    if not _metric_name(name).startswith("val/"):
        raise ValueError(f"is {shown(name)}; allowed: a metric that begins with val/, since choices never see the test")
    return name


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"is {gpus}; allowed: a number from 0 to 1, or a whole number above")
    return gpus


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


ValidationMetric = Annotated[str, AfterValidator(_validation_metric)]


class Part(BaseModel):
    """Base of all parts of a sweep: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


class Resources(Part):
    """What one trial asks for; clipped to the largest node."""

    gpus: Annotated[float, AfterValidator(_whole_above_one)] = Field(
        0.0, ge=0, le=1024, description="0.5 is half a GPU"
    )
    cpus: float = Field(1.0, gt=0, le=4096, description="logical CPU cores of all ranks together")
    ranks: int | None = Field(
        None, ge=1, le=1024, description="processes that train one trial together; null is one, or one for each GPU"
    )

    @property
    def num_ranks(self) -> int:
        """Processes that train one trial together."""
        return self.ranks or max(1, int(self.gpus))


class When(Part):
    """Settings for the cells in which every named axis or base setting has one of the values."""

    condition: dict[str, tuple[Any, ...]] = Field(alias="if")
    settings: dict[str, Any] = Field(alias="set")


class Scheduler(Part):
    """Early stopping of trials, within a cell only."""

    name: Literal["asha", "median"]
    metric: ValidationMetric = Field(description="a validation metric")
    grace: float = Field(0.25, gt=0, le=1, description="fraction of a run before which no trial is stopped")


class Range(Part):
    """Values that a search may suggest for one setting: from low to high, or one of the choices."""

    low: float | None = None
    high: float | None = None
    log: bool = Field(False, description="evenly on a logarithmic scale")
    choices: Annotated[tuple[Any, ...], BeforeValidator(_listed)] | None = Field(None, min_length=1)


class Search(Part):
    """A study per cell over settings that are not axes."""

    name: Literal["tpe", "random"]
    samples: int = Field(ge=1, le=10_000, description="suggestions per cell")
    per: Literal["cell"] = "cell"
    metric: ValidationMetric = Field(description="a validation metric, maximised")
    space: dict[str, Range] = Field(min_length=1, description="dotted setting: {low, high, log} or {choices}")


class Budget(Part):
    """Limits of the whole sweep."""

    gpu_hours: float | None = Field(None, gt=0)
    hours: float | None = Field(None, gt=0, description="of wall-clock time")
    trials: int | None = Field(None, ge=1, description="of trials that are begun, over all runs of the sweep")


class Sweep(Part):
    """One question: every combination of the axes is a cell, every seed in a cell a trial."""

    name: Annotated[str, AfterValidator(sweep_name)]
    question: str = Field("", max_length=1_000)
    trial: dict[str, Any] = Field(default_factory=dict, description="base settings by dotted name")
    axes: dict[str, tuple[Any, ...]] = Field(default_factory=dict, description="values by dotted name")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...], BeforeValidator(_listed)] = Field(
        (0,), min_length=1, description="replicates of every cell"
    )
    when: tuple[When, ...] = Field((), description="settings of some cells; later entries win")
    exclude: tuple[dict[str, tuple[Any, ...]], ...] = Field((), description="cells that are left out")
    baseline: dict[str, Any] | None = Field(None, description="the cell that differences are taken against")
    primary: Annotated[tuple[Annotated[str, AfterValidator(_metric_name)], ...], BeforeValidator(_listed)] = Field(
        (), description="metrics declared beforehand; the rest is exploratory"
    )
    resources: Resources | dict[str, Resources] = Field(
        default_factory=Resources, description="of a trial, or by model size"
    )
    scheduler: Scheduler | None = None
    search: Search | None = None
    budget: Budget | None = None

    def resources_of(self, size: str) -> Resources:
        """The resources of a trial with a model of `size`."""
        return self.resources if isinstance(self.resources, Resources) else self.resources[size]
