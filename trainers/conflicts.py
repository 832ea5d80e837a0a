"""Settings of a trial that are allowed one by one but impossible together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainers import catalog

if TYPE_CHECKING:
    from trainers.config import TrialConfig

Conflict = tuple[str, tuple[str, ...]]  # the sentence, and the dotted names of the settings in it


def conflicts(config: TrialConfig) -> Iterator[Conflict]:
    """Combinations that are impossible although each setting is allowed."""
    model, optim = config.model, config.optim
    if isinstance(model.image_size, int) and model.image_size % model.patch_size:
        yield (
            f"model.patch_size {model.patch_size} does not divide model.image_size {model.image_size}",
            ("model.patch_size", "model.image_size"),
        )
    if isinstance(optim.micro_batch_size, int) and optim.batch_size % optim.micro_batch_size:
        yield (
            f"optim.micro_batch_size {optim.micro_batch_size} does not divide optim.batch_size {optim.batch_size}",
            ("optim.micro_batch_size", "optim.batch_size"),
        )
    if isinstance(optim.warmup_steps, int) and optim.warmup_steps > optim.steps:
        yield (
            f"optim.warmup_steps {optim.warmup_steps} is more than optim.steps {optim.steps}",
            ("optim.warmup_steps", "optim.steps"),
        )
    yield from _missing_parts(config)
    yield from _unmet_needs(config)


def _missing_parts(config: TrialConfig) -> Iterator[Conflict]:
    """Settings that the chosen data set, method and probes cannot do without."""
    entry = catalog.DATASETS.get(config.data.train)
    if entry is not None and entry.needs_root and config.data.name is None:
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


def _unmet_needs(config: TrialConfig) -> Iterator[Conflict]:
    """What the method and the probes need and the data set does not provide."""
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
    for probe in config.evaluation.probes:
        for need in catalog.PROBES[probe].needs if probe in catalog.PROBES else ():
            if need not in provided:
                yield (
                    f"probe {probe} needs {need}; data.train {config.data.train} provides {', '.join(provided)}",
                    ("evaluation.probes", "data.train"),
                )
