"""Settings of a trial that are allowed one by one but impossible together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from trainers import catalog
from trainers.explain import did_you_mean, shown
from trainers.program_settings import PLACEHOLDERS, names_given, placeholders
from trainers.score_settings import TOKEN_METRICS

if TYPE_CHECKING:
    from trainers.config import TrialConfig

Conflict = tuple[str, tuple[str, ...]]  # the sentence, and the dotted names of the settings in it

# What the built-in ViT does by itself, and the value at which it does not. A factory is given all other settings of the
# model and can follow them.
_EDITING = {"interventions", "test_time_registers"}
_BUILT_IN = {"sink": "none", "register_mask": "full", "drop_path_group": None}


def conflicts(config: TrialConfig) -> Iterator[Conflict]:
    """Combinations that are impossible although each setting is allowed; what a program can do only it knows."""
    if config.command is not None or config.program is not None:
        yield from _program(config)
    if config.command is not None:
        return
    model, optim = config.model, config.optim
    if isinstance(model.image_size, int) and model.image_size % model.patch_size:
        yield _undivided("model.patch_size", model.patch_size, "model.image_size", model.image_size)
    if isinstance(optim.micro_batch_size, int) and optim.batch_size % optim.micro_batch_size:
        yield _undivided("optim.micro_batch_size", optim.micro_batch_size, "optim.batch_size", optim.batch_size)
    if isinstance(optim.warmup_steps, int) and optim.warmup_steps > optim.steps > 0:  # with 0 nothing is trained
        yield (
            f"optim.warmup_steps {optim.warmup_steps} is more than optim.steps {optim.steps}",
            ("optim.warmup_steps", "optim.steps"),
        )
    yield from _backbone(config)
    yield from _measured_weights(config)
    yield from _groups(config)
    yield from _blurred(config)
    yield from _crops(config)
    yield from _parts_of_methods(config)
    yield from _missing_parts(config)
    yield from _missing_measurements(config)
    yield from _probes(config)
    yield from _probe_settings(config)
    yield from _score(config)
    yield from _unmet_needs(config)


def _program(config: TrialConfig) -> Iterator[Conflict]:
    """Settings of programs go with a command, recipes of our trainers do not, and a command names what is given."""
    if config.command is None:
        for name in config.program or ():
            yield f"program.{name} is a setting of a program; give the program as command", (f"program.{name}",)
        return
    if "preset" in config.model_fields_set:
        yield f"preset {config.preset} is a recipe of our own trainers, which a command has not", ("preset", "command")
    given = list(names_given(config))
    for name in placeholders(config.command):
        if name in given or name in PLACEHOLDERS or name.split(".")[0] not in type(config).model_fields:
            continue  # other braces are the program's own
        yield (
            f"command has {{{name}}} in it, which is not given{did_you_mean(name, given)}; given are "
            f"{', '.join([*given, *PLACEHOLDERS])}",
            ("command",),
        )


def _undivided(part: str, size: int, whole: str, total: int) -> Conflict:
    return f"{part} {size} does not divide {whole} {total}", (part, whole)


def _backbone(config: TrialConfig) -> Iterator[Conflict]:
    """Where weights come from, and what only the built-in ViT can do."""
    init = config.model.init_from
    sources = [name for name in ("file", "timm", "trial") if getattr(init, name, None) is not None]
    if init is not None:
        names = tuple(f"model.init_from.{name}" for name in (*sources, "step"))
        if len(sources) > 1:
            yield f"model.init_from wants one of file, timm and trial; it has {' and '.join(sources)}", names
        elif (init.trial is None) != (init.step is None):
            yield f"model.init_from.step is {shown(init.step)}; it goes with model.init_from.trial alone", names
    if config.model.factory is not None:
        if sources:
            yield (
                "model.init_from loads into the built-in ViT only; model.factory names another backbone",
                ("model.factory", "model.init_from.file", "model.init_from.timm", "model.init_from.trial"),
            )
        for name in sorted(_EDITING & set(config.tokens.measurements)):
            yield (
                f"measurement {name} edits the passes of the built-in ViT; model.factory names another backbone",
                ("tokens.measurements", "model.factory"),
            )
        for name, value in _BUILT_IN.items():
            given = getattr(config.model, name)
            if given is not None and given != value:
                yield (
                    f"model.{name} {shown(given)} is what the built-in ViT can do; model.factory names another "
                    f"backbone, so leave it {shown(value)}",
                    (f"model.{name}", "model.factory"),
                )


def _measured_weights(config: TrialConfig) -> Iterator[Conflict]:
    """Weights are measured by the method that trains nothing, and by no other."""
    method, model = catalog.METHODS.get(config.method), config.model
    if method is None or method.trains:
        if model.normalization != "imagenet":
            yield (
                f"model.normalization {model.normalization} is for weights that method pretrained measures; method "
                f"{config.method} trains with imagenet",
                ("model.normalization", "method"),
            )
        if model.weights is not None:
            yield (
                f"model.weights are measured by method pretrained, and method is {config.method}: set that, or "
                "model.init_from to train from them",
                ("model.weights", "method"),
            )
        return
    given = [name for name in ("weights", "factory") if getattr(model, name) is not None]
    if len(given) != 1:
        which = "both are" if given else "neither is"
        yield (
            f"method {config.method} measures model.weights, or a backbone of your own (model.factory); {which} given",
            ("method", "model.weights", "model.factory"),
        )
    if any(getattr(model.init_from, name, None) is not None for name in ("file", "timm", "trial")):
        yield f"method {config.method} starts from model.weights, not model.init_from", ("method", "model.weights")
    if config.optim.steps:
        yield f"optim.steps is {config.optim.steps}; method {config.method} trains nothing", ("optim.steps", "method")


def _groups(config: TrialConfig) -> Iterator[Conflict]:
    """Groups of images that are treated together divide what is computed at once."""
    optim, method = config.optim, catalog.METHODS.get(config.method)
    if not isinstance(optim.micro_batch_size, int):
        return  # the whole batch, which `settle` writes here
    micro = optim.micro_batch_size
    if method is not None and not method.accumulates and micro != optim.batch_size:
        yield (
            f"optim.micro_batch_size {micro} is not optim.batch_size {optim.batch_size}: the losses of method "
            f"{config.method} couple all images of a batch, which is therefore computed at once",
            ("optim.micro_batch_size", "optim.batch_size", "method"),
        )
        return
    koleo = config.dinov2.koleo if config.dinov2 is not None and config.method == "dinov2" else None
    sizes = {
        "model.drop_path_group": config.model.drop_path_group,
        "deit3.mix_group_size": config.deit3.mix_group_size if config.deit3 and config.method == "deit3" else None,
        "dinov2.koleo.group_size": None if koleo is None else koleo.group_size,
    }
    for name, size in sizes.items():
        if size is not None and micro % size:
            yield _undivided(name, size, "optim.micro_batch_size", micro)
    size = config.dinov2.mask_group_size if config.dinov2 is not None and config.method == "dinov2" else None
    if size is not None and optim.batch_size % size:
        yield _undivided("dinov2.mask_group_size", size, "optim.batch_size", optim.batch_size)


_LEAST_BLURRED = {"dino": 7, "dinov2": 5}  # px: one more than the radius of the blur's kernel


def _crops(config: TrialConfig) -> Iterator[Conflict]:
    """Local crops consist of whole patches and are no larger than the global ones, which are the images."""
    section = getattr(config, config.method) if config.method in ("dino", "dinov2") else None
    if section is None or section.crops.num_local == 0 or not isinstance(section.crops.local_size, int):
        return
    name, size = f"{config.method}.crops.local_size", section.crops.local_size
    if size % config.model.patch_size:
        yield _undivided("model.patch_size", config.model.patch_size, name, size)
    if isinstance(config.model.image_size, int) and size > config.model.image_size:
        yield (
            f"{name} {size} is larger than model.image_size {config.model.image_size}, the side of the global crops",
            (name, "model.image_size"),
        )


def _blurred(config: TrialConfig) -> Iterator[Conflict]:
    """Crops are large enough to be blurred."""
    crops = getattr(getattr(config, config.method, None), "crops", None)
    if crops is not None and crops.blur and crops.num_local and isinstance(crops.local_size, int):
        least = _LEAST_BLURRED[config.method]
        if crops.local_size < least:
            yield (
                f"{config.method}.crops.local_size {crops.local_size} is too small to be blurred; allowed: from "
                f"{least}, or {config.method}.crops.blur false",
                (f"{config.method}.crops.local_size", f"{config.method}.crops.blur"),
            )


def _parts_of_methods(config: TrialConfig) -> Iterator[Conflict]:
    """OpenCLIP's attention heads, and DINOv2's losses, one of which must be left and can be computed."""
    text = config.openclip if config.method == "openclip" else None
    if text is not None and text.text_width % text.text_heads:
        yield _undivided("openclip.text_heads", text.text_heads, "openclip.text_width", text.text_width)
    losses = config.dinov2 if config.method == "dinov2" else None
    if losses is not None and losses.dino_weight == losses.ibot_weight == 0.0:
        yield (
            "dinov2.dino_weight and dinov2.ibot_weight are both 0, so that nothing would be learned",
            ("dinov2.dino_weight", "dinov2.ibot_weight"),
        )
    elif losses is not None and losses.ibot_weight and not losses.mask_probability:
        yield (
            f"dinov2.mask_probability is 0, so that iBOT with dinov2.ibot_weight {losses.ibot_weight} has nothing to "
            "predict; set dinov2.ibot_weight to 0 as well",
            ("dinov2.mask_probability", "dinov2.ibot_weight"),
        )
    elif losses is not None and losses.ibot_weight and isinstance(config.model.image_size, int):
        patches = (config.model.image_size // config.model.patch_size) ** 2
        if int(patches * losses.mask_ratio[1]) == 0:
            yield (
                f"dinov2.mask_ratio {list(losses.mask_ratio)} masks none of the {patches} patches of an image, so that "
                "iBOT has nothing to predict",
                ("dinov2.mask_ratio", "model.image_size", "model.patch_size"),
            )


def _missing_parts(config: TrialConfig) -> Iterator[Conflict]:
    """Settings that the chosen data set, method and probes cannot do without."""
    entry = catalog.DATASETS.get(config.data.train)
    if entry is not None and entry.needs_name and config.data.name is None:
        yield (
            f"data.name is missing: data.train {config.data.train} needs a logical name, part of the trials' identity",
            ("data.train", "data.name"),
        )
    if config.data.train == "scenes" and config.data.scenes is None:
        yield "data.scenes is null; data.train scenes needs it", ("data.train",)
    method = catalog.METHODS.get(config.method)
    if method is not None and method.section is not None and getattr(config, method.section) is None:
        yield f"{method.section} is null; method {config.method} needs it", ("method",)
    for probe in config.evaluation.probes:
        if probe in catalog.PROBES and getattr(config.evaluation, probe) is None:
            yield f"evaluation.{probe} is null; evaluation.probes names it", ("evaluation.probes",)


def _missing_measurements(config: TrialConfig) -> Iterator[Conflict]:
    """Measurements that are named have their settings."""
    for name in config.tokens.measurements:
        entry = catalog.MEASUREMENTS.get(name)
        if entry is not None and entry.section is not None and getattr(config.tokens, entry.section) is None:
            yield f"tokens.{entry.section} is null; tokens.measurements names it", ("tokens.measurements",)
    yield from _missing_layers(config)
    recurrence, model = config.tokens.recurrence, config.model
    if recurrence is None or "recurrence" not in config.tokens.measurements or not isinstance(model.image_size, int):
        return
    if recurrence.shift >= (side := model.image_size // model.patch_size):
        yield (
            f"tokens.recurrence.shift {recurrence.shift} leaves nothing of {side} × {side} patches; at most {side - 1}",
            ("tokens.recurrence.shift", "model.image_size", "model.patch_size"),
        )


def _missing_layers(config: TrialConfig) -> Iterator[Conflict]:
    """Layers that measurements name are there; how many a user's own backbone has only it can say."""
    if config.model.factory is not None:
        return
    depth = catalog.MODEL_SIZES[config.model.size].depth
    treated = config.tokens.interventions if "interventions" in config.tokens.measurements else None
    named = {
        "tokens.outlier_layer": config.tokens.outlier_layer,
        "tokens.interventions.layer": None if treated is None else treated.layer,
    }
    for name, layer in named.items():
        if isinstance(layer, int) and not -depth - 1 <= layer <= depth:
            yield (
                f"{name} {layer} is not there: model.size {config.model.size} has layers 0 to {depth}, or -1 to "
                f"{-depth - 1} from the last",
                (name, "model.size"),
            )


def _probes(config: TrialConfig) -> Iterator[Conflict]:
    """What probes need of the method, and of the data sets that they run on."""
    for probe in config.evaluation.probes:
        entry = catalog.PROBES.get(probe)
        if entry is None:
            continue
        if entry.methods and config.method in catalog.METHODS and config.method not in entry.methods:
            yield (
                f"probe {probe} needs method {' or '.join(entry.methods)}; method is {config.method}",
                ("evaluation.probes", "method"),
            )
        named = getattr(getattr(config.evaluation, probe), "data", ())
        for name in named or (config.data.train,):
            where = f"evaluation.{probe}.data" if named else "data.train"
            provided = catalog.provides(catalog.evaluation_set(name)[0])
            for need in entry.needs if provided is not None else ():
                if need not in cast(tuple[str, ...], provided):
                    yield (
                        f"probe {probe} needs {need}; {where} {name} provides {', '.join(provided or ())}",
                        ("evaluation.probes", where),
                    )


def _probe_settings(config: TrialConfig) -> Iterator[Conflict]:
    """Settings of probes that leave nothing to predict, and data sets whose metrics would have one name."""
    evaluation = config.evaluation
    for probe in evaluation.probes:
        names = [catalog.short_name(name) for name in getattr(getattr(evaluation, probe, None), "data", ())]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is None and probe == "knn":  # as knn/k10/top1 is of k = 10
            twice = next((name for name in names[1:] if re.fullmatch(r"k\d+", name)), None)
        if twice is not None:
            yield (
                f"evaluation.{probe}.data has two sets whose metrics would be {probe}/{twice}/…; give one another name",
                (f"evaluation.{probe}.data",),
            )
    segmentation = evaluation.segmentation if "segmentation" in evaluation.probes else None
    if segmentation is not None and segmentation.stride is not None and isinstance(config.model.image_size, int):
        side = segmentation.side or config.model.image_size
        if segmentation.whole and segmentation.stride > side:
            yield (
                f"evaluation.segmentation.stride {segmentation.stride} leaves gaps between windows of {side} px; "
                f"at most {side}",
                ("evaluation.segmentation.stride", "evaluation.segmentation.side", "model.image_size"),
            )
    depth = evaluation.depth if "depth" in evaluation.probes else None
    if depth is not None and isinstance(depth.max_depth, float) and depth.min_depth >= depth.max_depth:
        yield (
            f"evaluation.depth.min_depth {depth.min_depth} is not below evaluation.depth.max_depth {depth.max_depth}",
            ("evaluation.depth.min_depth", "evaluation.depth.max_depth"),
        )


def _score(config: TrialConfig) -> Iterator[Conflict]:
    """The scoring step is one that training reaches, chosen by what is measured while it does."""
    score, steps = config.evaluation.score, config.optim.steps
    if score is None or steps == 0:
        return
    if score.best is not None and score.step is not None:
        yield (
            f"evaluation.score has both best ({score.best}) and step ({score.step}); one of them says which step it is",
            ("evaluation.score.best", "evaluation.score.step"),
        )
    elif score.step is not None and score.step > steps:
        yield (
            f"evaluation.score.step {score.step} is more than optim.steps {steps}",
            ("evaluation.score.step", "optim.steps"),
        )
    elif score.best is not None:
        yield from _score_metric(config, score.best)


def _score_metric(config: TrialConfig, metric: str) -> Iterator[Conflict]:
    evaluation, probe = config.evaluation, metric.split("/")[1].replace("linear_mean_patch", "linear")
    if metric in TOKEN_METRICS:
        if evaluation.score is not None and evaluation.score.mode in ("auto", None):
            yield (
                f"evaluation.score.mode is not given, and neither more nor less of {metric} is better by agreement; "
                "allowed: max, min",
                ("evaluation.score.best", "evaluation.score.mode"),
            )
    elif probe in catalog.PROBES and (last := metric.rpartition("/")[2]) not in catalog.PROBES[probe].metrics:
        yield (
            f"evaluation.score.best is {metric}, and probe {probe} has no metric {last!r}; it has "
            f"{', '.join(catalog.PROBES[probe].metrics)}",
            ("evaluation.score.best",),
        )
    elif probe in catalog.PROBES and probe not in evaluation.probes:
        yield (
            f"evaluation.score.best is {metric}, but evaluation.probes ({', '.join(evaluation.probes)}) lacks {probe}",
            ("evaluation.score.best", "evaluation.probes"),
        )
    elif probe in catalog.PROBES and getattr(getattr(evaluation, probe), "at", "every") == "end":
        yield (
            f"evaluation.score.best is {metric}, which is measured at the end alone; set evaluation.{probe}.at to "
            "every",
            ("evaluation.score.best", f"evaluation.{probe}.at"),
        )


def _unmet_needs(config: TrialConfig) -> Iterator[Conflict]:
    """What the method and the measurements need and the data set does not provide."""
    provided = catalog.provides(config.data.train)
    if provided is None:
        return
    method = catalog.METHODS.get(config.method)
    for need in method.needs if method is not None else ():
        if need not in provided:
            yield (
                f"method {config.method} needs {need}; data.train {config.data.train} provides {', '.join(provided)}",
                ("method", "data.train"),
            )
    for name in config.tokens.measurements:
        for need in catalog.MEASUREMENTS[name].needs if name in catalog.MEASUREMENTS else ():
            if need not in provided:
                yield (
                    f"measurement {name} needs {need}; data.train {config.data.train} provides {', '.join(provided)}",
                    ("tokens.measurements", "data.train"),
                )
