"""Interventions at evaluation: registers or outliers are replaced, and what becomes of every metric (paper.md §4).

Probes stay those that were fitted on the untouched backbone. Each intervention on outliers has its control: as many
random normal patches of the same image, treated alike.
Shapes: B images, N patches, R registers, D width, L blocks (layers 0 … L).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from trainers.edits import (
    Edit,
    EditedViT,
    averaged,
    clamped,
    constant_registers,
    deleted,
    editable,
    registers_of_others,
    replace_registers,
    treat_patches,
)
from trainers.measurement import Finding, Metric, Subject
from trainers.probes.fitted import PREFIXES, FittedProbes
from trainers.token_settings import InterventionsConfig
from trainers.tokens import outliers
from trainers.tokens.norms import describe


def measure(subject: Subject, settings: InterventionsConfig) -> Iterator[Finding]:
    """`interventions/WHAT/METRIC` and its change `interventions/WHAT/change/METRIC`; nothing where nothing can change.

    registers_zeroed    registers at every layer 0 … L are zeros: a state that the model has never seen
    registers_mean      … are their mean over the probe images, at each layer and of each register
    registers_shuffled  … are those of another image of the batch in an undisturbed pass
    outliers_clamped    outliers of one layer get the median norm of the probe images' patches there
    outliers_neighbors  … become the mean of their up to 8 neighbours that are no outliers
    outliers_deleted    … are read by no later block and left out of the mean patch and of token norms
    normal_clamped …    the same done to random normal patches

    Zeros beside plausible replacements follow Parodi et al. 2026 ("Zero-Ablation Overstates Register Content
    Dependence", arXiv 2604.14433), who replace registers after every block; their code was not at hand.
    `interventions/layer` is the layer whose outliers are treated, `interventions/outlier_fraction` their share of the
    probe images' patches.

    Raises:
        ValueError: the backbone is a user's own, or there is no layer as asked for.
    """
    backbone = editable(subject.backbone)
    edits = dict(_on_registers(subject, settings))
    layer, threshold, fraction = _outliers(subject, settings)
    if fraction:
        yield Metric("interventions/layer", layer)
        yield Metric("interventions/outlier_fraction", fraction)
        edits |= _on_outliers(subject, settings, layer, threshold)
    if not edits:
        return
    fitted = subject.fitted or subject.probes.fit(backbone)
    untouched = every_metric(subject, fitted)
    for name, edit in edits.items():
        variant = subject.with_backbone(EditedViT(backbone, edit))
        yield from effect(f"interventions/{name}", every_metric(variant, fitted), untouched)


def every_metric(subject: Subject, fitted: FittedProbes) -> dict[str, float]:
    """Probe metrics `val/…` and `test/…` and `tokens/last/…` of the probe images, of a subject's backbone."""
    metrics: dict[str, float] = {}
    for split in PREFIXES:
        metrics |= fitted.score(subject.backbone, split).metrics
    last = next(describe(subject.patch_norms().reshape(1, -1)))
    of_tokens = {"outlier_fraction": last.outlier_fraction, "max_over_median": last.max_over_median}
    return metrics | {f"tokens/last/{name}": value for name, value in of_tokens.items() if value is not None}


def effect(prefix: str, metrics: Mapping[str, float], untouched: Mapping[str, float]) -> Iterator[Metric]:
    """`PREFIX/METRIC`, and `PREFIX/change/METRIC` against the untouched backbone, which had it too."""
    for name, value in metrics.items():
        yield Metric(f"{prefix}/{name}", value)
        if name in untouched:
            yield Metric(f"{prefix}/change/{name}", value - untouched[name])


def _on_registers(subject: Subject, settings: InterventionsConfig) -> Iterator[tuple[str, Edit]]:
    if not subject.num_registers:
        return
    backbone = editable(subject.backbone)
    for how in settings.on_registers:
        if how == "zeroed":
            zeros_D = torch.zeros(backbone.embed_dim, device=subject.device)
            source = constant_registers([zeros_D] * (backbone.depth + 1))
        elif how == "mean":
            source = constant_registers(_mean_registers(subject))
        else:
            spare, draw = subject.view(subject.probe_images(1)), partial(subject.generator, "interventions/shuffled")
            source = registers_of_others(backbone, draw, spare)
        yield f"registers_{how}", replace_registers(source)


def _mean_registers(subject: Subject) -> list[Tensor]:
    """Of each layer, the mean over the probe images in an undisturbed pass, [R, D]."""
    backbone, count = editable(subject.backbone), 0
    sums: list[Tensor] = []
    for images in subject.batches(subject.probe_images()):
        summed = [tokens.registers_BRD.sum(dim=0, dtype=torch.float64) for tokens in backbone.residuals(images)]
        sums = [a + b for a, b in zip(sums, summed, strict=True)] if sums else summed
        count += len(images)
    return [(of_layer / count).float() for of_layer in sums]


def _outliers(subject: Subject, settings: InterventionsConfig) -> tuple[int, float, float]:
    """The layer whose outliers are treated, the norm above which its patches are, and their share on probe images.

    "onset" is the onset layer of paper.md §5, 13, by `tokens.outlier_rule`.
    """
    layers = len(subject.norms[0])
    layer: int = subject.tokens.outlier_layer
    if settings.layer != "onset":
        layer = settings.layer
    elif (onset := outliers.onset([_share(subject, layer)[1] for layer in range(layers)])) is not None:
        layer = onset
    return layer % layers, *_share(subject, layer)


def _share(subject: Subject, layer: int) -> tuple[float, float]:
    """The threshold of a layer, and the share of the probe images' patches above it; padding does not count."""
    norms = subject.patch_norms(layer)
    threshold = subject.threshold_of(norms)
    return threshold, int((norms > threshold).sum()) / max(1, int(np.isfinite(norms).sum()))


def _on_outliers(
    subject: Subject, settings: InterventionsConfig, layer: int, threshold: float
) -> Iterator[tuple[str, Edit]]:
    treatments = {
        "clamped": clamped(float(np.nanmedian(subject.patch_norms(layer)))),
        "neighbors": averaged,
        "deleted": deleted,
    }
    normal = partial(subject.generator, "interventions/normal")
    for how in settings.on_outliers:
        yield f"outliers_{how}", treat_patches(layer, threshold, treatments[how])
        yield f"normal_{how}", treat_patches(layer, threshold, treatments[how], normal=normal)
