"""Test-time registers: MLP neurons that write outliers write to an added token instead, without training.

Source: Jiang et al. 2025, "Vision Transformers Don't Need Trained Registers" (arXiv 2506.08010);
nickjiang2378/test-time-registers:shared/algorithms.py and shared/hook_fn.py. Neurons are hidden units of the MLP after
the activation, which enter its second linear layer.
Shapes: B images, N patches, R registers, T = 1 + R + N tokens, H hidden units, k neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers.edits import EditedViT, NeuronEdit, editable
from trainers.interventions import effect, every_metric, rule3_limit
from trainers.measurement import Arrays, Finding, Metric, Subject
from trainers.token_settings import TestTimeRegistersConfig

_ACTIVE = 0.5  # the source's sparsity filter leaves out neurons above this …
_MOST_ACTIVE = 0.5  # … on more than this share of an image's tokens


class RegisterNeurons(NamedTuple):
    """Neurons that are active where outliers are.

    Attributes:
        neurons: int64 [k, 2], block (1 … L) and hidden unit (0 … H - 1), the highest score first.
        scores: float64 [searched blocks, H], of all that were searched, from block 1 on.
    """

    neurons: NDArray[np.int64]
    scores: NDArray[np.float64]

    @property
    def of_neurons(self) -> NDArray[np.float64]:
        """Their scores, [k]."""
        return self.scores[self.neurons[:, 0] - 1, self.neurons[:, 1]]


def find_neurons(subject: Subject, settings: TestTimeRegistersConfig) -> RegisterNeurons | None:
    """The neurons with the highest score on the probe images; None where these have no outliers, or all scores are 0.

    A neuron's score is its mean |activation| over the outliers of an image, averaged over the images that have any, as
    at the source: what it does elsewhere counts in `sparse` alone. Outliers are patches by `tokens.outlier_rule` at
    `tokens.outlier_layer` (at the source tokens of any kind whose norm exceeds a fixed one).

    Raises:
        ValueError: the backbone is a user's own, or its neurons are edited already.
    """
    backbone = editable(subject.backbone)
    with_any = subject.outliers.any(axis=1)
    if not with_any.any():
        return None
    flagged_BN, pixels = subject.outliers[with_any], subject.probe_images()[with_any]
    searched = max(1, round(backbone.depth * settings.deepest))
    scoring = _Scoring(1 + backbone.num_registers, settings.sparse)
    watched = EditedViT(backbone, neurons={block: scoring.watch(block) for block in range(1, searched + 1)})
    done = 0
    for images in subject.batches(pixels):
        scoring.begin(flagged_BN[done : done + len(images)], subject.device)
        done += len(images)
        for _ in islice(watched.residuals(images), searched + 1):
            pass
    scores = torch.stack([scoring.sums[block] for block in range(1, searched + 1)]).cpu().numpy() / done
    if not scores.any():
        return None
    best = np.argsort(-scores, axis=None, kind="stable")[: settings.neurons]
    block, unit = np.unravel_index(best, scores.shape)
    return RegisterNeurons(np.stack([block + 1, unit], axis=1).astype(np.int64), scores)


class _Scoring:
    """Sums over images, by block, of the mean |activation| of each neuron over an image's outliers."""

    def __init__(self, first: int, sparse: bool) -> None:
        self.sums: dict[int, Tensor] = {}
        self._first, self._sparse = first, sparse

    def begin(self, flagged_BN: NDArray[np.bool_], device: torch.device) -> None:
        """The outliers of the next batch, each image has one or more."""
        image, patch = np.nonzero(flagged_BN)
        weight = 1.0 / flagged_BN.sum(axis=1)[image]
        self._image, self._token = (torch.from_numpy(index).to(device) for index in (image, patch + self._first))
        self._weight = torch.from_numpy(weight).float().to(device)[:, None]

    def watch(self, block: int) -> NeuronEdit:
        """Looks at the neurons of a block and leaves them as they are."""

        def look(neurons_BTH: Tensor) -> Tensor:
            weighted = neurons_BTH[self._image, self._token].abs() * self._weight
            means_BH = torch.zeros_like(neurons_BTH[:, 0]).index_add_(0, self._image, weighted)
            if self._sparse:
                active = (neurons_BTH >= _ACTIVE).float().mean(dim=1)
                means_BH = means_BH * (active <= _MOST_ACTIVE)
            summed = means_BH.sum(dim=0, dtype=torch.float64)
            self.sums[block] = self.sums[block] + summed if block in self.sums else summed
            return neurons_BTH

        return look


def with_test_time_register(backbone: nn.Module, neurons: NDArray[np.int64]) -> EditedViT:
    """`backbone` with one register more, of zeros, to which neurons are moved; parameters are shared.

    In each image, the added token gets of each neuron the activation of the patch where its size is largest, with its
    sign, and patches get 0; class token and other registers keep theirs. (The source takes one maximum for all neurons
    of a block, over the class token too, and changes the first image of a batch alone.)

    Args:
        backbone: a built-in ViT; it stays as it is.
        neurons: int64 [k, 2], block (1 … L) and hidden unit, as in `RegisterNeurons` and test_time_registers.npz.

    Raises:
        ValueError: the backbone is a user's own, its neurons are edited already, or it has no such neurons.
    """
    first = 2 + editable(backbone).num_registers

    def moved(units: Tensor) -> NeuronEdit:
        def move(neurons_BTH: Tensor) -> Tensor:
            patches_BNk = neurons_BTH[:, first:, units]
            where_B1k = patches_BNk.abs().argmax(dim=1, keepdim=True)
            edited = neurons_BTH.clone()
            edited[:, first - 1, units] = patches_BNk.gather(1, where_B1k)[:, 0]
            edited[:, first:, units] = 0
            return edited

        return move

    return EditedViT(backbone, neurons=_by_block(backbone, neurons, moved), extra_registers=1)


def with_zeroed_neurons(backbone: nn.Module, neurons: NDArray[np.int64]) -> EditedViT:
    """`backbone` with neurons set to 0 on patches, and no token added; see `with_test_time_register`."""
    first = 1 + editable(backbone).num_registers

    def zeroed(units: Tensor) -> NeuronEdit:
        def zero(neurons_BTH: Tensor) -> Tensor:
            edited = neurons_BTH.clone()
            edited[:, first:, units] = 0
            return edited

        return zero

    return EditedViT(backbone, neurons=_by_block(backbone, neurons, zeroed))


def _by_block(
    backbone: nn.Module, neurons: NDArray[np.int64], edit: Callable[[Tensor], NeuronEdit]
) -> dict[int, NeuronEdit]:
    blocks, edits = editable(backbone).blocks, {}
    for block in np.unique(neurons[:, 0]).tolist():
        units = np.unique(neurons[neurons[:, 0] == block, 1])
        hidden = blocks[block - 1].mlp.fc2.in_features if 1 <= block <= len(blocks) else 0
        if not hidden or units[0] < 0 or units[-1] >= hidden:
            raise ValueError(f"block {block} has no neurons {units.tolist()}: they belong to another model")
        device = next(backbone.parameters()).device
        edits[block] = edit(torch.from_numpy(units).to(device))
    return edits


def random_neurons(found: RegisterNeurons, generator: np.random.Generator) -> NDArray[np.int64]:
    """As many neurons of each block as were found there, drawn from the others of that block, int64 [k, 2]."""
    drawn = []
    for block in np.unique(found.neurons[:, 0]):
        taken = found.neurons[found.neurons[:, 0] == block, 1]
        others = np.setdiff1d(np.arange(found.scores.shape[1]), taken)
        units = generator.choice(others, size=min(len(taken), len(others)), replace=False)
        drawn.append(np.stack([np.full_like(units, block), units], axis=1))
    return np.concatenate(drawn).astype(np.int64)


def measure(subject: Subject, settings: TestTimeRegistersConfig) -> Iterator[Finding]:
    """`test_time_registers/WHAT/METRIC` and `…/WHAT/change/METRIC`; nothing where the probe images have no outliers.

    moved   the neurons found write to an added token
    random  as many random neurons of the same blocks do; mean over `controls` draws
    zeroed  the neurons found are 0 on patches, and no token is added

    Probes are fitted on each remedied backbone. Besides, `…/WHAT/added/norm_over_median` is the added token's mean norm
    at `tokens.outlier_layer` over the median of the patches there, and `test_time_registers/score_share` the share of
    the neurons found in the sum of all scores.

    Raises:
        ValueError: the backbone is a user's own, or its neurons are edited already.
    """
    backbone = editable(subject.backbone)
    found = find_neurons(subject, settings)
    if found is None:
        return
    arrays: dict[str, NDArray[Any]] = {
        "neurons": found.neurons,
        "scores": found.of_neurons,
        "all_scores": found.scores.astype(np.float32),
    }
    yield Arrays("test_time_registers", arrays)
    yield Metric("test_time_registers/score_share", float(found.of_neurons.sum() / found.scores.sum()))
    generator = subject.numpy("test_time_registers/random")
    drawn = [random_neurons(found, generator) for _ in range(settings.controls)]
    variants: dict[str, list[EditedViT]] = {
        "moved": [with_test_time_register(backbone, found.neurons)],
        "random": [with_test_time_register(backbone, neurons) for neurons in drawn],
        "zeroed": [with_zeroed_neurons(backbone, found.neurons)],
    }
    limit = rule3_limit(subject)
    untouched = every_metric(subject, (subject.fitted or subject.probes.fit(backbone)).quick, limit)
    for what, remedied in variants.items():
        draws = [_remedied(subject, variant, limit) for variant in remedied]
        shared = [name for name in (draws[0] if draws else ()) if all(name in draw for draw in draws)]
        metrics = {name: float(np.mean([draw[name] for draw in draws])) for name in shared}
        yield from effect(f"test_time_registers/{what}", metrics, untouched)


def _remedied(subject: Subject, variant: EditedViT, limit: float) -> dict[str, float]:
    of_variant = subject.edited(variant)
    metrics = every_metric(of_variant, subject.probes.fit(variant), limit)
    if variant.num_registers > subject.num_registers:
        layer = subject.tokens.outlier_layer
        added_B = of_variant.norms[0][layer, :, variant.num_registers]  # class, registers, of which it is the last
        metrics["added/norm_over_median"] = float(added_B.mean() / np.nanmedian(of_variant.patch_norms(layer)))
    return metrics
