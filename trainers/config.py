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
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from trainers import catalog, presets, probe_presets, released
from trainers.conflicts import conflicts
from trainers.execution_settings import ExecutionConfig as ExecutionConfig
from trainers.explain import ConfigError, Fault, ImpossibleError, explain
from trainers.method_settings import DeiT3Config, DinoConfig, DinoV2Config
from trainers.method_settings import HeadConfig as HeadConfig  # for planning, which imports settings from here alone
from trainers.method_settings import OpenCLIPConfig as OpenCLIPConfig
from trainers.probe_settings import DepthConfig as DepthConfig
from trainers.probe_settings import KnnConfig as KnnConfig
from trainers.probe_settings import LinearConfig as LinearConfig
from trainers.probe_settings import ObjectDiscoveryConfig as ObjectDiscoveryConfig
from trainers.probe_settings import SegmentationConfig as SegmentationConfig
from trainers.probe_settings import ZeroShotConfig as ZeroShotConfig
from trainers.program_settings import PROGRAM_SETTING as PROGRAM_SETTING
from trainers.program_settings import ProgramSettings, is_program_setting, only_given
from trainers.program_settings import filled as filled
from trainers.score_settings import ScoreConfig as ScoreConfig
from trainers.section import LISTED, ONCE, Section, known, rising
from trainers.settle import settle
from trainers.token_settings import TokensConfig as TokensConfig

MAX_REGISTERS = 16  # the largest count in the paper (Fig. 8)

# A field added after trials exist names here the value that means "as before"; at that value it is left out of the
# hash, so that finished trials keep their id: {"dotted.name": value}. Null always means that.
AS_BEFORE: Mapping[str, object] = {
    "data.scenes.colored": True,
    "data.fit": "crop",
    "compile": False,
    "model.cls_init_std": 0.02,
    "model.pre_norm": False,
    "model.norm_eps": 1e-6,
    "model.mlp": "gelu",
    "model.pos_antialias": True,
    "model.pos_offset": 0.0,
    "model.normalization": "imagenet",
    "model.sink": "none",
    "model.register_mask": "full",
    "optim.schedule": "timm",
    "optim.eps": 1e-8,
    "optim.decay_tokens": "none",
    "optim.decay_registers": True,
    "optim.layer_decay": 1.0,
    "optim.patch_embed_lr_scale": 1.0,
    "deit3.repeats": 1,
    # Measuring more changes nothing that is trained: trials that finished before these existed lack their numbers.
    "tokens.detail_images": 32,
    "tokens.outlier_rule": "mad",
    "tokens.outlier_norm": 150.0,
    "tokens.outlier_layer": -1,
    "tokens.measurements": ("location", "channels", "attention", "similarity", "neighbors"),
    "evaluation.linear.data": (),
    "evaluation.linear.at": "every",
    "evaluation.linear.blocks": (1,),
    "evaluation.linear.crops": False,
    "evaluation.linear.select_on": "train",
    "evaluation.knn.data": (),
    "evaluation.knn.at": "every",
}

_NOT_IN_IDENTITY = ("preset", "execution")


class InitFrom(Section):
    """Weights to start from: exactly one of a file, a timm model, and a step of another trial."""

    file: str | None = Field(None, min_length=1, description="safetensors or PyTorch weights of a known layout")
    timm: str | None = Field(None, min_length=1, description="name of a timm ViT with pretrained weights")
    trial: str | None = Field(None, pattern=r"^[0-9a-f]{16}$", description="id of a trial that keeps this step")
    step: int | None = Field(None, ge=0, description="of that trial")
    fingerprint: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{16}$",
        description="that the weights must have, as the log of a trial says it: a file that changes under its name is "
        "then refused; null for any",
    )


class ModelConfig(Section):
    """The Vision Transformer."""

    size: Annotated[str, *known(catalog.MODEL_SIZES)] = Field(
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
    cls_init_std: float = Field(0.02, ge=0, le=1, description="of the class token's initialisation; 1e-6 in DINOv2")
    layer_scale: float | None = Field(
        1e-4, gt=0, description="initial LayerScale, null for none; 1e-4 in DeiT-III, 1e-5 in DINOv2"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth rate, constant over depth; 0.1 in DeiT-III")
    drop_path_group: int | None = Field(
        None,
        ge=2,
        description="drop equally many of every so many crops of one size and compute only the rest (DINOv2's "
        "batch-subset stochastic depth, there among all that a device holds); null draws for every image by itself",
    )
    pre_norm: bool = Field(
        False, description="LayerNorm before the first block, patch convolution without bias: OpenCLIP's ln_pre"
    )
    norm_eps: float = Field(1e-6, gt=0, le=1e-2, description="of all LayerNorms; 1e-5 in OpenCLIP")
    mlp: Literal["gelu", "quick_gelu", "swiglu"] = Field(
        "gelu", description="quick_gelu in OpenAI's CLIP; swiglu in DINOv2's vitl14 and vitg14"
    )
    pos_antialias: bool = Field(
        True, description="of the resampled position embedding; false in DINO, and in DINOv2 without registers"
    )
    pos_offset: float = Field(
        0.0, ge=0, lt=1, description="added to the sides of its new grid; 0.1 in DINO, and in DINOv2 without registers"
    )
    sink: Literal["none", "attention_bias", "softmax1", "value_gate"] = Field(
        "none",
        description="where attention can go besides tokens: a learned key and value, zeros, or a learned "
        "vector added to each head's output (DINOv3's value gating)",
    )
    register_mask: Literal["full", "patches_cannot_read", "registers_cannot_write", "detached"] | None = Field(
        "full", description="who attends to whom: sink, storage and extra compute apart; null with 0 registers"
    )
    normalization: Annotated[str, *known(catalog.NORMALIZATIONS)] = Field(
        "imagenet", description="of the images of measured weights, which were trained with it; imagenet for training"
    )
    init_from: InitFrom | None = Field(None, description="weights to start from; null for random ones")
    weights: str | None = Field(
        None,
        min_length=1,
        max_length=1_000,
        description="weights that method pretrained measures: a timm name, a file (under execution.weights_root), or a "
        "trial as ID, ID@STEP or ID@STEP:teacher. Names of released weights say size, patch size, registers and "
        "the like, which need not be given; for others give them",
    )
    weights_fingerprint: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{16}$",
        description="that these weights must have, as the log of a trial says it; null for any",
    )
    factory: Annotated[str, *known({}, own="package.module:build")] | None = Field(
        None, description="a backbone of your own, as package.module:build"
    )

    @property
    def side(self) -> int:
        """Side in px of the images, of a resolved configuration."""
        assert isinstance(self.image_size, int), "the configuration is not resolved"
        return self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's patches, of a resolved configuration."""
        return (self.side // self.patch_size,) * 2


class ScenesConfig(Section):
    """Difficulty and size of the built-in data set `scenes`: handwritten digits over photographs."""

    num_train: int = Field(10_000, ge=1, le=10_000_000)
    num_validation: int = Field(1_000, ge=1, le=1_000_000)
    num_test: int = Field(2_000, ge=1, le=1_000_000)
    contrast: float = Field(0.3, ge=0, le=1, description="contrast of the photograph behind the digits")
    colored: bool = Field(
        True, description="random colours; false: white on grey, where methods without labels cannot go by colours"
    )
    main_size: Annotated[tuple[float, float], LISTED, rising(0.1, 1)] = Field(
        (0.8, 1.0), description="smallest and largest side of the main digit as a fraction of the image's side"
    )
    num_others: Annotated[tuple[int, int], LISTED, rising(0, 8)] = Field(
        (0, 0), description="fewest and most smaller digits besides the main one"
    )


class DataConfig(Section):
    """What is trained and evaluated on."""

    train: Annotated[str, *known(catalog.DATASETS, own="package.module:build")] = Field(
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
        "auto",
        description="side in px to which images are decoded once; small crops see it, so it is identity; original "
        "streams training images from their files at their own size, as the official code does",
    )
    fit: Literal["crop", "pad"] = Field(
        "crop",
        description="how an image folder's pictures become squares: their centre, or whole between black margins, "
        "whose patches token statistics of the probe images leave out; crop for other data sets of the catalog",
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="of training, where there is no validation set")
    max_unreadable: float = Field(0.001, ge=0, le=1, description="fraction of unreadable images that is tolerated")
    scenes: ScenesConfig | None = Field(default_factory=ScenesConfig, description="null for other data sets")


class OptimConfig(Section):
    """Optimiser, schedule and length of training."""

    optimizer: Literal["adamw", "lamb", "sgd"] = Field("adamw", description="lamb in DeiT-III")
    lr: float = Field(1e-3, gt=0, le=10, description="peak learning rate")
    schedule: Literal["timm", "dino", "open_clip"] = Field(
        "timm", description="whose warm-up and cosine; they differ by a step at the joints; dino is DINOv2's too"
    )
    min_lr: Annotated[float, Field(ge=0, le=10)] | None = Field(
        1e-5, description="at the end of the cosine; null with open_clip's, which ends at 0"
    )
    warmup_lr: Annotated[float, Field(ge=0, le=10)] | None = Field(
        1e-6, description="at step 0; null with open_clip's, which begins at lr / warmup_steps"
    )
    warmup_steps: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="linear warm-up; auto is 5 % of the steps"
    )
    steps: int = Field(
        1_000, ge=0, le=100_000_000, description="optimiser steps; 0 measures the weights it starts from"
    )
    batch_size: int = Field(128, ge=1, le=1_000_000, description="images per optimiser step over all ranks")
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="images per forward pass; must divide batch_size; auto is the whole batch"
    )
    weight_decay: float = Field(0.05, ge=0, le=1)
    weight_decay_end: float | None = Field(
        None, ge=0, le=1, description="at the end of a cosine over all steps, as in DINO and DINOv2; null for constant"
    )
    decay_tokens: Literal["none", "position", "all"] | None = Field(
        "none",
        description="weight decay on the position embedding and on class and mask token: none in DeiT-III, position in "
        "OpenCLIP, all in DINO and DINOv2; null without weight decay",
    )
    decay_registers: bool | None = Field(
        True,
        description="weight decay on registers, as in DINOv2; timm has none; null with 0 registers or no weight decay",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor of the learning rate from a block to the one before; 0.9 in DINOv2's vitl16_short",
    )
    patch_embed_lr_scale: float = Field(
        1.0, gt=0, le=1, description="factor of the patch embedding's learning rate; 0.2 in DINOv2"
    )
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float | None = Field(
        1e-8, gt=0, le=1e-2, description="of adamw and lamb; 1e-6 in OpenCLIP; null with sgd, which has none"
    )
    clip_grad: float | None = Field(
        None,
        gt=0,
        description="largest norm of the gradients, null for none: of all together, in dino of each parameter, in "
        "dinov2 of backbone and heads each",
    )
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] | None = Field(
        None, description="of the averaged weights, null for none; auto fits it to the length; 0.99996 in DeiT-III"
    )


class EvaluationConfig(Section):
    """Which probes run on the frozen backbone, on how many images, and how often."""

    probes: Annotated[
        tuple[Annotated[str, *known(catalog.PROBES, own="package.module:Class")], ...],
        LISTED,
        ONCE,
    ] = Field(("linear", "knn"))
    points: int = Field(5, ge=1, le=1_000, description="evaluations in a run, evenly spaced, the last at the end")
    train_images: int = Field(4_000, ge=16, le=100_000_000, description="most training images that probes learn from")
    score: ScoreConfig | None = Field(None, description="which step is scored on the test set; null for the last")
    linear: LinearConfig | None = Field(default_factory=LinearConfig, description="null where the probe is off")
    knn: KnnConfig | None = Field(default_factory=KnnConfig, description="null where the probe is off")
    zero_shot: ZeroShotConfig | None = Field(default_factory=ZeroShotConfig, description="null where the probe is off")
    segmentation: SegmentationConfig | None = Field(
        default_factory=SegmentationConfig, description="null where the probe is off"
    )
    depth: DepthConfig | None = Field(default_factory=DepthConfig, description="null where the probe is off")
    object_discovery: ObjectDiscoveryConfig | None = Field(
        default_factory=ObjectDiscoveryConfig, description="null where the probe is off"
    )


class TrialConfig(Section):
    """One trial. Build it with `resolve`, which expands presets, decides every `auto` and nulls idle settings.

    Of a trial with a `command` only what was given exists: `model_dump` leaves the defaults of our own trainers out,
    which its program never hears of, and so do its identity and the tables.
    """

    method: Annotated[str, *known(catalog.METHODS, own="package.module:Class")] = Field(
        "deit3", description="a method of the catalog, or your own as package.module:Class"
    )
    preset: str = Field(
        "auto",
        description="recipe whose values replace the defaults; auto is nano for model.size nano, else short; not part "
        "of the identity",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1)
    command: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), LISTED] | None = Field(
        None, description="words of the program that is the trial, as in [torchrun, mine.py]; null for our own trainers"
    )
    program: ProgramSettings | None = Field(None, description="free settings of that program by name")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of the forward pass")
    compile: bool = Field(False, description="torch.compile of each block; rounds otherwise than without")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    deit3: DeiT3Config | None = Field(default_factory=DeiT3Config, description="null for other methods")
    openclip: OpenCLIPConfig | None = Field(default_factory=OpenCLIPConfig, description="null for other methods")
    dino: DinoConfig | None = Field(default_factory=DinoConfig, description="null for other methods")
    dinov2: DinoV2Config | None = Field(default_factory=DinoV2Config, description="null for other methods")
    tokens: TokensConfig = Field(default_factory=TokensConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    execution: ExecutionConfig = Field(default_factory=ExecutionConfig)

    @model_validator(mode="after")
    def _check(self) -> TrialConfig:
        if found := list(conflicts(self)):
            raise ImpossibleError(found)
        return self

    @model_serializer(mode="wrap")
    def _dumped(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        if self.command is None:
            dumped.pop("program", None)  # free settings, of which our own trainers have none
            return dumped
        execution = {"execution": dumped["execution"]} if "execution" in dumped else {}
        return {**only_given(self, dumped), **execution}


def resolve(settings: Mapping[str, Any]) -> TrialConfig:
    """The complete configuration of a trial from nested or dotted settings.

    Later wins: defaults, the preset of (method, preset), `settings`. `auto` is decided from the other settings
    alone, never from the machine, since the result is the trial's identity.

    Raises:
        ConfigError: a ValueError with everything that is unknown, not allowed or impossible together.
    """
    given = flatten(settings)
    if given.get("command") is not None:
        return _of_program(given)
    try:
        name, recipe = presets.recipe(given)
        weights = given.get("model.weights")
        if isinstance(weights, str):
            recipe = {**recipe, **released.settings(weights)}
        recipe = {**recipe, **probe_presets.recipes({**recipe, **given})}
        nested = nest({**_beside(recipe, given), **given, "preset": name})
    except ValueError as error:
        raise ConfigError([Fault((), str(error), ("preset", "method"))]) from error
    return _validated(nest(settle(_validated(nested))))


def _of_program(given: Mapping[str, Any]) -> TrialConfig:
    """The configuration of a trial that is a program: what was given, without presets, which are of our trainers."""
    try:
        return _validated(nest(given))
    except ConfigError:
        raise
    except ValueError as error:  # a value and fields below it at once
        raise ConfigError([Fault((), str(error), ("command",))]) from error


def _beside(recipe: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `recipe` without those of sections that `given` sets to null, and nulls of sections it enters."""
    entered = {section for name in given for section in _sections_of(name)}
    return {k: v for k, v in recipe.items() if k not in entered and not any(s in given for s in _sections_of(k))}


def _sections_of(name: str) -> list[str]:
    """All sections that the dotted `name` is in: a.b.c is in a and a.b."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _validated(nested: Mapping[str, Any]) -> TrialConfig:
    try:
        return TrialConfig.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(explain(error, TrialConfig)) from error


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
    """Dotted names of all settings but those of programs, which are free, in the order in which they are declared."""
    for name in section.model_fields:
        inner = section_of(section, name)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")
        elif f"{prefix}{name}" != "program":
            yield f"{prefix}{name}"


def is_setting(name: str) -> bool:
    """Whether the dotted `name` is a setting of a trial, of ours or of a program's own."""
    return is_program_setting(name) or name in _NAMES


def section_of(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that field `name` of `section` holds; None where it is a setting, or no field at all."""
    info = section.model_fields.get(name)
    members = () if info is None else (info.annotation, *get_args(info.annotation))
    return next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)


def is_execution(name: str) -> bool:
    """Whether the dotted name is not part of a trial's identity: how it is executed, or a recipe, whose values are."""
    return name.split(".")[0] in _NOT_IN_IDENTITY or name.endswith(".preset")


def identity(config: TrialConfig) -> dict[str, Any]:
    """What a trial computes: all dotted settings but those of its execution, nulls, and those that mean "as before".

    Of a program it is all that the program is handed, nulls included.
    """
    flat = flatten(config.model_dump(mode="json"))
    if config.command is not None:
        return {name: value for name, value in flat.items() if not is_execution(name)}
    before = {name: list(value) if isinstance(value, tuple) else value for name, value in AS_BEFORE.items()}
    kept = {k: v for k, v in flat.items() if not is_execution(k) and v is not None and before.get(k) != v}
    return {k: 0.0 if v == 0.0 and isinstance(v, float) else v for k, v in kept.items()}  # -0.0 is 0.0


def trial_id(config: TrialConfig) -> str:
    """16 hexadecimal digits of the SHA-256 of the canonical JSON of `identity(config)`."""
    canonical = json.dumps(identity(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


_NAMES = frozenset(fields())
