"""TrialConfig: every setting of one trial with its default, unit and allowed range, and the trial's identity.

A configuration that `resolve` returned is complete: presets are expanded, every `auto` is decided, and settings
without effect are null, so that equal trials have equal configurations and equal ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from trainers import catalog, presets
from trainers.conflicts import conflicts
from trainers.explain import ConfigError, Fault, ImpossibleError, did_you_mean, explain, shown

MAX_REGISTERS = 16  # the largest count in the paper (Fig. 8)

# A field added after trials exist names here the value that means "as before"; at that value it is left out of the
# hash, so that finished trials keep their id: {"dotted.name": value}. Null always means that.
AS_BEFORE: Mapping[str, object] = {}

_NOT_IN_IDENTITY = ("preset", "execution")


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _known(names: Mapping[str, object], own: str | None = None) -> tuple[AfterValidator, WithJsonSchema]:
    """Annotations of a name that the catalog must have or, with `own`, that may be a dotted path such as `own`."""

    def check(name: str) -> str:
        if name in names or (own is not None and catalog.is_dotted_path(name)):
            return name
        choices = [*names, *([f"{own} of your own"] if own else [])]
        raise ValueError(
            f"is {shown(name)}, which does not exist{did_you_mean(name, names)}; allowed: {', '.join(choices)}"
        )

    choice: dict[str, Any] = {"enum": list(names)}
    path = {"type": "string", "pattern": r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"}
    return AfterValidator(check), WithJsonSchema({"anyOf": [choice, path]} if own else choice)


def _rising(lowest: float, highest: float) -> AfterValidator:
    """Annotation of two numbers, the first not above the second, both within the limits."""

    def check(pair: tuple[float, float]) -> tuple[float, float]:
        if not lowest <= pair[0] <= pair[1] <= highest:
            raise ValueError(f"is {shown(pair)}; allowed: two rising numbers from {lowest} to {highest}")
        return pair

    return AfterValidator(check)


def _distinct(names: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(names)) != len(names):
        raise ValueError(f"is {shown(names)}; each may be named once")
    return names


_ONCE = AfterValidator(_distinct)


class Section(BaseModel):
    """Base of all parts of a configuration: frozen, strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class ModelConfig(Section):
    """The Vision Transformer."""

    size: Annotated[str, *_known(catalog.MODEL_SIZES)] = Field(
        "small", description="width, depth and heads by name; see trainers.catalog.MODEL_SIZES"
    )
    patch_size: int = Field(16, ge=1, le=64, description="side of a patch in px; 14 in DINOv2, 16 elsewhere")
    image_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        "auto", description="side in px of the images that are trained on"
    )
    num_registers: int = Field(0, ge=0, le=MAX_REGISTERS, description="register tokens; 4 in the paper's tables")
    reg_init_std: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = Field(
        "auto",
        description="standard deviation of the registers' initialisation; 1e-6 in DINOv2, where registers that start "
        "equal stay nearly equal for long: 0.02 in short runs; null with 0 registers",
    )
    layer_scale: float | None = Field(1e-4, gt=0, description="initial LayerScale, null for none; 1e-4 in DeiT-III")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth rate, constant over depth; 0.1 in DeiT-III")
    factory: Annotated[str, *_known({}, own="package.module:build")] | None = Field(
        None, description="a backbone of your own, as package.module:build"
    )


class ScenesConfig(Section):
    """Difficulty and size of the built-in data set `scenes`: handwritten digits over photographs."""

    num_train: int = Field(10_000, ge=1, le=10_000_000)
    num_validation: int = Field(1_000, ge=1, le=1_000_000)
    num_test: int = Field(2_000, ge=1, le=1_000_000)
    contrast: float = Field(0.3, ge=0, le=1, description="contrast of the photograph behind the digits")
    main_size: Annotated[tuple[float, float], BeforeValidator(_listed), _rising(0.1, 1)] = Field(
        (0.8, 1.0), description="smallest and largest side of the main digit as a fraction of the image's side"
    )
    num_others: Annotated[tuple[int, int], BeforeValidator(_listed), _rising(0, 8)] = Field(
        (0, 0), description="fewest and most smaller digits besides the main one"
    )


class DataConfig(Section):
    """What is trained and evaluated on."""

    train: Annotated[str, *_known(catalog.DATASETS, own="package.module:build")] = Field(
        "scenes", description="a data set of the catalog, or your own as package.module:build"
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$",
        description="logical name of an image folder, part of the identity; where it lies is execution.data_root; "
        "null for data sets of the catalog that have a name already",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of generated data and of splits; not the trial's seed")
    decode_size: Annotated[int, Field(ge=8, le=2048)] | Literal["auto", "original"] = Field(
        "auto", description="side in px to which images are decoded once; small crops see it, so it is identity"
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="of training, where there is no validation set")
    max_unreadable: float = Field(0.001, ge=0, le=1, description="fraction of unreadable images that is tolerated")
    scenes: ScenesConfig | None = Field(default_factory=ScenesConfig, description="null for other data sets")


class OptimConfig(Section):
    """Optimiser, schedule and length of training."""

    optimizer: Literal["adamw", "lamb", "sgd"] = Field("adamw", description="lamb in DeiT-III")
    lr: float = Field(1e-3, gt=0, le=10, description="peak learning rate")
    min_lr: float = Field(1e-5, ge=0, le=10, description="at the end of the cosine")
    warmup_lr: float = Field(1e-6, ge=0, le=10, description="at step 0")
    warmup_steps: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="linear warm-up; auto is 5 % of the steps"
    )
    steps: int = Field(1_000, ge=1, le=100_000_000, description="optimiser steps")
    batch_size: int = Field(128, ge=1, le=1_000_000, description="images per optimiser step over all ranks")
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="images per forward pass; must divide batch_size; auto is the whole batch"
    )
    weight_decay: float = Field(0.05, ge=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    clip_grad: float | None = Field(None, gt=0, description="largest norm of all gradients together, null for none")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] | None = Field(
        None, description="of the averaged weights, null for none; auto fits it to the length; 0.99996 in DeiT-III"
    )


class DeiT3Config(Section):
    """DeiT-III: supervised training (Touvron et al. 2022)."""

    loss: Literal["bce", "soft_ce"] = Field("soft_ce", description="soft_ce on ImageNet-21k, bce on ImageNet-1k")
    smoothing: float = Field(0.1, ge=0, lt=1, description="label smoothing")
    mixup: float = Field(0.0, ge=0, le=10, description="Beta parameter, 0 for none; 0.8 on ImageNet-1k")
    cutmix: float = Field(1.0, ge=0, le=10, description="Beta parameter, 0 for none")
    three_augment: bool = Field(True, description="one of grayscale, solarize, Gaussian blur per image")
    color_jitter: float = Field(0.3, ge=0, le=1, description="brightness, contrast and saturation")
    crop: Literal["simple", "resized", "none"] = Field("simple", description="simple random crop or resized crop")
    flip: bool = Field(True, description="horizontal flips; off where left and right carry meaning, as in digits")


class TokensConfig(Section):
    """Norm statistics of class, register and patch tokens."""

    probe_images: int = Field(256, ge=1, le=65_536, description="images of the fixed probe batch")
    training_stream: bool = Field(True, description="also accumulate histograms on the training batches")


class LinearConfig(Section):
    """Linear classification on frozen features, the official DINOv2 grid of learning rates, all heads at once."""

    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0, le=100)], ...], BeforeValidator(_listed), _ONCE] = (
        Field((1e-3, 3e-3, 1e-2, 3e-2, 0.1), min_length=1, description="per 256 images; 13 from 1e-5 to 0.1 in DINOv2")
    )
    steps: int = Field(500, ge=1, le=1_000_000, description="12,500 in DINOv2")
    batch_size: int = Field(256, ge=1, le=65_536)


class KnnConfig(Section):
    """Weighted k-nearest-neighbour classification (official DINOv2 protocol)."""

    k: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], BeforeValidator(_listed), _ONCE] = Field(
        (10, 20, 100, 200), min_length=1
    )
    temperature: float = Field(0.07, gt=0, le=10)


class EvaluationConfig(Section):
    """Which probes run on the frozen backbone, on how many images, and how often."""

    probes: Annotated[
        tuple[Annotated[str, *_known(catalog.PROBES, own="package.module:probe")], ...],
        BeforeValidator(_listed),
        AfterValidator(_distinct),
    ] = Field(("linear", "knn"))
    points: int = Field(5, ge=1, le=1_000, description="evaluations in a run, evenly spaced, the last at the end")
    train_images: int = Field(4_000, ge=16, le=100_000_000, description="most training images that probes learn from")
    linear: LinearConfig | None = Field(default_factory=LinearConfig, description="null where the probe is off")
    knn: KnnConfig | None = Field(default_factory=KnnConfig, description="null where the probe is off")


class ExecutionConfig(Section):
    """How a trial is executed; nothing here changes what it computes, and nothing here is in its identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of a rank; null leaves PyTorch's own")
    data_root: str | None = Field(None, description="where the files of an image folder or a download lie")
    checkpoint_seconds: float = Field(60.0, ge=0, description="least time between two checkpoints")
    keep_checkpoints: int = Field(1, ge=1, le=1_000, description="how many checkpoints are kept")


class TrialConfig(Section):
    """One trial. Build it with `resolve`, which expands presets, decides every `auto` and nulls idle settings."""

    method: Annotated[str, *_known(catalog.METHODS, own="package.module:Class")] = Field(
        "deit3", description="a method of the catalog, or your own as package.module:Class"
    )
    preset: str = Field("short", description="recipe whose values replace the defaults; not part of the identity")
    seed: int = Field(0, ge=0, le=2**32 - 1)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of the forward pass")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    deit3: DeiT3Config | None = Field(default_factory=DeiT3Config, description="null for other methods")
    tokens: TokensConfig = Field(default_factory=TokensConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    execution: ExecutionConfig = Field(default_factory=ExecutionConfig)

    @model_validator(mode="after")
    def _check(self) -> TrialConfig:
        if found := list(conflicts(self)):
            raise ImpossibleError(found)
        return self


def resolve(settings: Mapping[str, Any]) -> TrialConfig:
    """The complete configuration of a trial from nested or dotted settings.

    Later wins: defaults, the preset of (method, preset), `settings`. `auto` is decided from the other settings
    alone, never from the machine, since the result is the trial's identity.

    Raises:
        ConfigError: a ValueError with everything that is unknown, not allowed or impossible together.
    """
    given = flatten(settings)
    method = given.get("method", TrialConfig.model_fields["method"].default)
    name = given.get("preset", TrialConfig.model_fields["preset"].default)
    try:
        recipe = presets.preset(str(method), str(name))
        nested = nest({**recipe, **given})
    except ValueError as error:
        raise ConfigError([Fault((), str(error), ("preset", "method"))]) from error
    return _validated(nest(_settle(_validated(nested))))


def _validated(nested: Mapping[str, Any]) -> TrialConfig:
    try:
        return TrialConfig.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(explain(error, TrialConfig)) from error


def _settle(config: TrialConfig) -> dict[str, Any]:
    """Flat values of `config` with every `auto` decided and every setting without effect set to null."""
    values = config.model_dump()
    model, data, optim, evaluation = values["model"], values["data"], values["optim"], values["evaluation"]
    native = catalog.DATASETS[config.data.train].decode_size if config.data.train in catalog.DATASETS else None
    if model["image_size"] == "auto":
        side = data["decode_size"] if isinstance(data["decode_size"], int) else (native or 224)
        model["image_size"] = max(side // model["patch_size"], 1) * model["patch_size"]
    if data["decode_size"] == "auto":
        data["decode_size"] = native or max(model["image_size"] * 8 // 7, 8)  # the usual 256 px for 224 px
    if model["num_registers"] == 0:
        model["reg_init_std"] = None
    elif model["reg_init_std"] in ("auto", None):
        model["reg_init_std"] = 0.02
    if optim["warmup_steps"] == "auto":
        optim["warmup_steps"] = optim["steps"] // 20
    if optim["micro_batch_size"] == "auto":
        optim["micro_batch_size"] = optim["batch_size"]
    if optim["ema_decay"] == "auto":
        optim["ema_decay"] = max(0.0, 1.0 - 10.0 / optim["steps"])  # the initialisation weighs e^-10 at the end
    if values["precision"] == "auto":
        large = catalog.MODEL_SIZES[model["size"]].width >= 384 and model["image_size"] >= 160
        values["precision"] = "bf16" if large else "fp32"  # bf16 is slower for small shapes on CPUs
    if config.data.train != "scenes":
        data["scenes"] = None
    if config.data.train in catalog.DATASETS and not catalog.DATASETS[config.data.train].needs_root:
        data["name"] = None
    for name, entry in catalog.METHODS.items():
        if entry.section is not None and config.method != name:
            values[entry.section] = None
    for name in catalog.PROBES:
        if name not in config.evaluation.probes:
            evaluation[name] = None
    return values


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted names; an empty mapping disappears."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested dictionaries; the inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{name}: {parent} is set to a value and to fields of its own at once")
        inner[last] = value
    return nested


def fields(section: type[BaseModel] = TrialConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings, in the order in which they are declared."""
    for name in section.model_fields:
        inner = section_of(section, name)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def section_of(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that field `name` of `section` holds; None where it is a setting, or no field at all."""
    info = section.model_fields.get(name)
    members = () if info is None else (info.annotation, *get_args(info.annotation))
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def is_execution(name: str) -> bool:
    """Whether the dotted name says only how a trial is executed, and so is not part of its identity."""
    return name.split(".")[0] in _NOT_IN_IDENTITY


def identity(config: TrialConfig) -> dict[str, Any]:
    """What a trial computes: all dotted settings but those of its execution, nulls, and those that mean "as before"."""
    flat = flatten(config.model_dump(mode="json"))
    kept = {k: v for k, v in flat.items() if not is_execution(k) and v is not None and AS_BEFORE.get(k) != v}
    return {k: 0.0 if v == 0.0 and isinstance(v, float) else v for k, v in kept.items()}  # -0.0 is 0.0


def trial_id(config: TrialConfig) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON of `identity(config)`."""
    canonical = json.dumps(identity(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
