"""The schema of a sweep file: what a sweep consists of once it has been read and found right."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from trainers.config import ScoreConfig
from trainers.explain import shown

MAX_TRIALS = 100_000
MAX_NAME = 64  # characters
MAX_SAMPLES = 10_000  # of a search in one cell
FIRST_SEARCH_SEED = 1000  # far from those of cells, so that a sweep that gets more seeds keeps its searches

# Folders and files that stand beside the sweeps in storage and state.
RESERVED_NAMES = ("cache", "mlartifacts", "mlflow.db", "measured.json")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
_SPACE = "{optim.lr: {low: 1.0e-4, high: 1.0e-2}}"
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


def _one_or_more(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _validation_metrics(value: object) -> object:
    names = _one_or_more(value)
    if not names or len(set(map(str, names))) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"is {shown(value)}; allowed: a metric such as val/knn/top1, or a list of different ones")
    return tuple(map(_validation_metric, names))


def _modes(value: object) -> object:
    modes = _one_or_more(value)
    if not modes or not set(map(str, modes)) <= {"max", "min"}:
        raise ValueError(f"is {shown(value)}; allowed: max or min, or a list with one of them for each metric")
    return modes


def _space(value: object) -> object:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"is {shown(value)}; allowed: a mapping of one or more settings, as in {_SPACE}")
    return value


def _number(value: object) -> object:
    """A whole number stays one, since that says that only whole numbers are meant."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"is {shown(value)}; allowed: a number")
    return value


ValidationMetric = Annotated[str, AfterValidator(_validation_metric)]
Mode = Literal["max", "min"]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Number = Annotated[int | float | None, BeforeValidator(_number)]

_METRICS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
_MODE_SCHEMA = {"enum": ["max", "min"]}
ValidationMetrics = Annotated[
    tuple[str, ...],
    BeforeValidator(_validation_metrics),
    WithJsonSchema(_METRICS_SCHEMA),
]
Modes = Annotated[
    tuple[Mode, ...],
    BeforeValidator(_modes),
    WithJsonSchema({"anyOf": [_MODE_SCHEMA, {"type": "array", "items": _MODE_SCHEMA, "minItems": 1}]}),
]


class Part(BaseModel):
    """Base of all parts of a sweep: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True)


class Resources(Part):
    """What one trial asks for; clipped to the largest node."""

    gpus: Annotated[float, Field(ge=0, le=1024), AfterValidator(_whole_above_one)] | Literal["auto"] = Field(
        0.0, description="0.5 is half a GPU; auto takes the share that holds the memory that plan --measure found"
    )
    cpus: float = Field(1.0, gt=0, le=4096, description="logical CPU cores of all ranks together")
    ranks: int | None = Field(
        None, ge=1, le=1024, description="processes that train one trial together; null is one, or one for each GPU"
    )

    @property
    def num_ranks(self) -> int:
        """Processes that train one trial together; one where `gpus: auto` is not settled yet."""
        return self.ranks or (1 if self.gpus == "auto" else max(1, int(self.gpus)))

    @property
    def num_gpus(self) -> float:
        """GPUs of all ranks together.

        Raises:
            ValueError: `gpus: auto` is not settled yet.
        """
        if self.gpus == "auto":
            raise ValueError("resources.gpus is auto; the command orchestrate plan FILE --measure finds the share")
        return self.gpus


class When(Part):
    """Settings for the cells in which every named axis or base setting has one of the values."""

    condition: dict[str, tuple[Any, ...]] = Field(alias="if")
    settings: dict[str, Any] = Field(alias="set")


class Scheduler(Part):
    """Early stopping of trials, within a cell only."""

    name: Literal["asha", "median"]
    metric: ValidationMetric = Field(description="a validation metric")
    mode: Mode = Field("max", description="whether more of the metric is better, or less")
    grace: float = Field(0.25, gt=0, le=1, description="fraction of a run before which no trial is stopped")
    reduction: float = Field(4.0, gt=1, description="asha: one trial in so many goes on past each of its rungs")


class Range(Part):
    """Values that a search may suggest for one setting: from low to high, or one of the choices.

    With `if` it is suggested only where every named other entry of the space has one of the values.
    """

    low: Number = None
    high: Number = None
    log: bool = Field(False, description="evenly on a logarithmic scale")
    step: Number = Field(None, description="between two neighbouring values, counted from low")
    choices: Annotated[tuple[Any, ...], BeforeValidator(_listed)] | None = Field(None, min_length=1)
    condition: dict[str, Annotated[tuple[Any, ...], BeforeValidator(_one_or_more), WithJsonSchema({})]] = Field(
        default_factory=dict, alias="if", description="other entry of the space: a value, or a list of values"
    )


class Search(Part):
    """A study per cell over settings that are not axes; the best suggestion is run anew as the cell's row."""

    name: Literal["grid", "random", "tpe"]
    samples: int | None = Field(
        None, ge=1, le=MAX_SAMPLES, description="suggestions per cell; may be left out for the whole grid"
    )
    per: Literal["cell"] = "cell"
    metric: ValidationMetrics = Field(description="a validation metric, or a list of them")
    mode: Modes = Field(("max",), description="whether more of it is better, or less; a list has one for each metric")
    space: Annotated[dict[str, Range], BeforeValidator(_space)] = Field(
        min_length=1, description="dotted setting: {low, high}, with log or step, or {choices}; any with if"
    )
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_listed)] | None = Field(
        None, min_length=1, description="set aside for searching; null is the lowest unused one from 1000 on"
    )
    parallel: int = Field(1, ge=1, le=1024, description="suggestions of a cell that run at the same time")
    startup: int = Field(10, ge=1, le=MAX_SAMPLES, description="tpe: random suggestions before it learns")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the sampler")
    warm_start: Annotated[tuple[Annotated[str, AfterValidator(sweep_name)], ...], BeforeValidator(_listed)] = Field(
        (), description="tpe: sweeps whose suggestions for the same cells it learns from beforehand"
    )

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The mode of each metric."""
        return self.mode * len(self.metric) if len(self.mode) == 1 else self.mode

    def seeds_beside(self, taken: Collection[int]) -> tuple[int, ...]:
        """The seeds of suggestions, where the sweep's own are `taken`."""
        return self.seeds or (next(seed for seed in itertools.count(FIRST_SEARCH_SEED) if seed not in taken),)


class Budget(Part):
    """Limits of the whole sweep."""

    gpu_hours: float | None = Field(None, gt=0)
    hours: float | None = Field(None, gt=0, description="of wall-clock time")
    trials: int | None = Field(None, ge=1, description="of trials that are begun, over all runs of the sweep")


class Until(Part):
    """How narrow the interval of each difference to the baseline should become."""

    metric: Annotated[str, AfterValidator(_metric_name)] = Field(description="such as test/linear/top1")
    halfwidth: float = Field(gt=0, description="of the 95 % interval, in units of the metric: 0.005 is half a point")


class MoreSeeds(Part):
    """A first block of seeds, 0 … first - 1, and more of them where that block's variance asks for them."""

    first: int = Field(ge=2, le=10_000, description="seeds of every cell, from 0 on")
    most: int = Field(ge=2, le=10_000, description="seeds of a cell altogether, at most")
    until: Until

    @property
    def block(self) -> tuple[int, ...]:
        """The seeds that every cell has."""
        return tuple(range(self.first))


def score_settings(score: ScoreConfig | None) -> dict[str, Any]:
    """A scoring rule as settings of a trial by dotted name."""
    given = {} if score is None else score.model_dump(exclude_none=True)
    return {f"evaluation.score.{name}": value for name, value in given.items()}


class Sweep(Part):
    """One question: every combination of the axes is a cell, every seed in a cell a trial."""

    name: Annotated[str, AfterValidator(sweep_name)]
    question: str = Field("", max_length=1_000)
    trial: dict[str, Any] = Field(default_factory=dict, description="base settings by dotted name")
    axes: dict[str, tuple[Any, ...]] = Field(default_factory=dict, description="values by dotted name")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...], BeforeValidator(_listed)] = Field(
        (0,), min_length=1, description="replicates of every cell"
    )
    more_seeds: MoreSeeds | None = Field(
        None, description="in a file: seeds: {first, most, until: {metric, halfwidth}}; `seeds` is then the first block"
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
    match: Literal["steps", "flops"] | None = Field(
        None,
        description="what compared cells have equal: steps, which is checked; or training FLOPs, for which each cell "
        "gets as many steps as cost what its baseline costs; null for neither",
    )
    score: ScoreConfig | None = Field(
        None, description="which step of every trial is scored on the test set; null for the last one"
    )
    outlier_limit: float = Field(
        0.005, gt=0, lt=1, description="of patches: a fraction whose upper bound is below counts as no outliers"
    )
    scheduler: Scheduler | None = None
    search: Search | None = None
    budget: Budget | None = None

    @property
    def base(self) -> dict[str, Any]:
        """Settings of every cell: those of `trial`, and the rule of `score`."""
        return {**self.trial, **score_settings(self.score)}

    def resources_of(self, size: str) -> Resources:
        """The resources of a trial with a model of `size`."""
        return self.resources if isinstance(self.resources, Resources) else self.resources[size]
