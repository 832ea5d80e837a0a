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

from trainers import catalog
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
from trainers.measurement import Finding, Metric, Statistic, Subject, findings
from trainers.probes.fitted import PREFIXES, FittedProbes
from trainers.token_settings import InterventionsConfig
from trainers.tokens import outliers


def measure(subject: Subject, settings: InterventionsConfig) -> Iterator[Finding]:
    """`interventions/WHAT/METRIC` and its change `interventions/WHAT/change/METRIC`; nothing where nothing can change.

    Probes and `tokens/last/…` are metrics. What the measurements of the trial find that run at every evaluation, such
    as `attention/last/cls/registers`, are statistics of these names.

    registers_zeroed    registers at every layer 0 … L are zeros: a state that the model has never seen
    registers_mean      … are their mean over the probe images, at each layer and of each register
    registers_shuffled  … are those of another image of the batch in an undisturbed pass; whose depends on the batch
    outliers_clamped    outliers of one layer get the median norm of the probe images' patches there
    outliers_neighbors  … become the mean of their up to 8 neighbours that are no outliers
    outliers_deleted    … are read by no later block and left out of the mean patch and of token norms
    normal_clamped …    the same done to random normal patches

    Zeros beside plausible replacements follow Parodi et al. 2026 ("Zero-Ablation Overstates Register Content
    Dependence", arXiv 2604.14433), who replace registers after every block; their code was not at hand.
    `interventions/layer` is the layer whose outliers are treated, `interventions/outlier_fraction` their share of the
    probe images' patches, and `interventions/WHAT/treated` the share that is treated: a control has fewer where an
    image has fewer normal patches than outliers, and an image of outliers alone is neither averaged nor deleted. What
    is an outlier afterwards is decided by the untouched norms' threshold.

    Raises:
        ValueError: the backbone is a user's own, or there is no layer as asked for.
    """
    backbone = editable(subject.backbone)
    edits = dict(_on_registers(subject, settings))
    layer, threshold, fraction = _outliers(subject, settings)
    if fraction:
        yield Metric("interventions/layer", layer)
        yield Metric("interventions/outlier_fraction", fraction)
        for name, edit, treated in _on_outliers(subject, settings, layer, threshold):
            if treated:  # else nothing can change, which is no finding
                yield Metric(f"interventions/{name}/treated", treated)
                edits[name] = edit
    if not edits:
        return
    fitted = (subject.fitted or subject.probes.fit(backbone)).quick
    limit = rule3_limit(subject)
    untouched, measured = every_metric(subject, fitted, limit), _measured(subject.with_backbone(backbone))
    for name, edit in edits.items():
        variant = subject.edited(EditedViT(backbone, edit))
        yield from effect(f"interventions/{name}", every_metric(variant, fitted, limit), untouched)
        yield from effect(f"interventions/{name}", _measured(variant), measured, Statistic)


def _measured(subject: Subject) -> dict[str, float]:
    """Metrics of the measurements that the trial has switched on and that run at every evaluation."""
    return {
        finding.name: float(finding.value)
        for name in subject.tokens.measurements
        if name in catalog.MEASUREMENTS and catalog.MEASUREMENTS[name].every
        for finding in findings(name, subject)
        if isinstance(finding, Metric)
    }


def rule3_limit(subject: Subject) -> float:
    """The norm above which rule 3 calls patches of the last layer outliers."""
    return outliers.threshold(subject.patch_norms(), "mad", None)


def every_metric(subject: Subject, fitted: FittedProbes, limit: float) -> dict[str, float]:
    """Probe metrics `val/…` and `test/…` and `tokens/last/…` of the probe images, of a subject's backbone.

    Probe metrics that the subject has already are not computed again. Outliers are norms above `limit`, that of the
    untouched backbone.
    """
    metrics = dict(subject.scores or {})
    for split in PREFIXES if subject.scores is None else ():
        metrics |= fitted.score(subject.backbone, split).metrics
    norms = subject.patch_norms()
    norms = norms[~np.isnan(norms)].astype(np.float64)
    if not norms.size:
        return metrics
    metrics["tokens/last/outlier_fraction"] = float((norms > limit).mean())
    if median := float(np.median(norms)):
        metrics["tokens/last/max_over_median"] = float(norms.max()) / median
    return metrics


def effect(
    prefix: str,
    metrics: Mapping[str, float],
    untouched: Mapping[str, float],
    kind: type[Metric] | type[Statistic] = Metric,
) -> Iterator[Finding]:
    """`PREFIX/METRIC`, and `PREFIX/change/METRIC` against the untouched backbone, which had it too."""
    for name, value in metrics.items():
        yield kind(f"{prefix}/{name}", value)
        if name in untouched:
            yield kind(f"{prefix}/change/{name}", value - untouched[name])


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
) -> Iterator[tuple[str, Edit, float]]:
    """What is done, the edit that does it, and the share of the probe images' patches that it treats."""
    norms_BN = subject.patch_norms(layer)
    outlying_B, patches_B = (norms_BN > threshold).sum(axis=1), np.isfinite(norms_BN).sum(axis=1)
    normal_B = patches_B - outlying_B
    whole_B = normal_B > 0  # an image of outliers alone has no neighbours to average, and would lose all of its patches
    treatments = {
        "clamped": clamped(float(np.nanmedian(subject.patch_norms(layer)))),
        "neighbors": averaged,
        "deleted": deleted,
    }
    normal = partial(subject.generator, "interventions/normal")
    for how in settings.on_outliers:
        chosen_B = outlying_B if how == "clamped" else outlying_B * whole_B
        controls_B = np.minimum(outlying_B, normal_B)
        yield f"outliers_{how}", treat_patches(layer, threshold, treatments[how]), chosen_B.sum() / patches_B.sum()
        control = treat_patches(layer, threshold, treatments[how], normal=normal)
        yield f"normal_{how}", control, controls_B.sum() / patches_B.sum()
