"""The probes of a trial: fitted on a backbone, and then asked about it or about others that were derived from it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trainers import catalog
from trainers.config import EvaluationConfig, ModelConfig
from trainers.data import DataSet
from trainers.dotted import load
from trainers.findings import Arrays, Picture, Score
from trainers.probes import Context, Fitted, HeadDiverged, Probe
from trainers.probes.features import training_subset
from trainers.probes.seen import SeenSplit

log = logging.getLogger(__name__)

PREFIXES = {"validation": "val", "test": "test"}  # of metrics, by split
OWN = ""  # the name of the trial's own data set among those that probes run on

_OUTLIER_READS = frozenset({"norms"})


class Scores(NamedTuple):
    """Of one split: metrics `val/…` or `test/…`; what they are image by image, [n], under the same names; files."""

    metrics: dict[str, float]
    per_image: dict[str, NDArray[np.floating]]
    files: list[Arrays | Picture]


@dataclass(frozen=True)
class Part:
    """One probe on one data set."""

    name: str  # of the probe
    probe: Probe
    data: str  # name among the data sets; OWN for the trial's own
    first: bool  # whether its metrics have the short names
    at_end: bool  # whether it runs at the end of a trial alone


class Probes:
    """The probes of `evaluation.probes`, always on the same images.

    Args:
        settings: which probes, and theirs.
        data: the trial's data set.
        model: the backbone's settings.
        context: what probes may know of the trial.
        device: where backbones are.
        others: further data sets, by the names by which probes name them.
        norm_layer: `tokens.outlier_layer`, whose norms are kept of test images.
        scratch: folder for features that are too large for memory.
    """

    def __init__(
        self,
        settings: EvaluationConfig,
        data: DataSet,
        model: ModelConfig,
        context: Context,
        device: torch.device,
        *,
        others: Mapping[str, DataSet] | None = None,
        norm_layer: int = -1,
        scratch: Path | None = None,
    ) -> None:
        self._settings, self._model, self._device = settings, model, device
        self._data: dict[str, DataSet] = {OWN: data, **(others or {})}
        self._norm_layer, self._scratch = norm_layer, scratch
        self.parts = list(self._parts(context))

    def _parts(self, context: Context) -> Iterator[Part]:
        for name in self._settings.probes:
            build = load(catalog.PROBES[name].build if name in catalog.PROBES else name)
            settings = getattr(self._settings, name, None)
            at_end = getattr(settings, "at", "every") == "end"
            for number, data in enumerate(getattr(settings, "data", ()) or (OWN,)):
                yield Part(name, cast(Probe, build(settings, context)), data, number == 0, at_end)

    def fit(self, backbone: nn.Module, *, at_end: bool = False) -> FittedProbes:
        """Probes that have learned from training images; those of the end of a trial only `at_end`.

        What no probe looks at is not computed.
        """
        seen = _Views(self, backbone, at_end)
        fitted: list[tuple[Part, Fitted]] = []
        for part in self.parts:
            if part.at_end and not at_end:
                continue
            first = [known for other, known in fitted if other.name == part.name]
            if part.probe.transfers and not part.first:
                fitted += [(part, known) for known in first[:1]]  # none where the first has diverged
                continue
            try:
                fitted.append(
                    (part, part.probe.fit(seen.split(part.data, "train"), seen.split(part.data, "validation")))
                )
            except HeadDiverged as error:
                log.warning("probe %s on %s has no metrics: %s", part.name, part.data or "the trial's data", error)
        return FittedProbes(self, fitted, seen, at_end)

    def see(self, backbone: nn.Module, data: str, split: str, *, at_end: bool = True) -> SeenSplit:
        """A split of one of the data sets, for probes that run now; of training images those that they learn from."""
        opened = self._data[data]
        count = len(getattr(opened, split))
        probes = [part.probe for part in self.parts if part.data == data and (at_end or not part.at_end)]
        if split == "train":
            probes = [probe for probe in probes if getattr(probe, "learns", True)]
        reads = frozenset[str]().union(*(probe.reads for probe in probes))
        if (data, split) == (OWN, "test") and reads:
            reads |= _OUTLIER_READS
        return SeenSplit(
            backbone,
            self._model,
            opened,
            split,
            training_subset(count, self._settings.train_images) if split == "train" else np.arange(count),
            self._device,
            reads,
            self._norm_layer,
            self._scratch,
        )


class _Views:
    """The splits as one backbone sees them; each is extracted at most once."""

    def __init__(self, probes: Probes, backbone: nn.Module, at_end: bool) -> None:
        self._probes, self.backbone, self.at_end = probes, backbone, at_end
        self._seen: dict[tuple[str, str], SeenSplit] = {}

    def split(self, data: str, split: str) -> SeenSplit:
        """A split as this backbone sees it."""
        if (data, split) not in self._seen:
            self._seen[data, split] = self._probes.see(self.backbone, data, split, at_end=self.at_end)
        return self._seen[data, split]


@dataclass(frozen=True)
class FittedProbes:
    """Probes that have learned, which can be asked about other backbones than they have learned from."""

    probes: Probes
    fitted: list[tuple[Part, Fitted]]
    seen: _Views
    at_end: bool = True  # whether those of the end of a trial are among them

    @property
    def quick(self) -> FittedProbes:
        """Those that run at every evaluation."""
        fitted = [(part, fitted) for part, fitted in self.fitted if not part.at_end]
        return replace(self, fitted=fitted, at_end=False)

    def score(self, backbone: nn.Module, split: str) -> Scores:
        """Metrics on `split`, "validation" or "test", as `backbone` sees it."""
        seen = self.seen if backbone is self.seen.backbone else _Views(self.probes, backbone, self.at_end)
        scores = Scores({}, {}, [])
        for part, fitted in self.fitted:
            for score in fitted.score(seen.split(part.data, split)):
                if not isinstance(score, Score):
                    scores.files.append(score._replace(name=_file_name(score.name, part)))
                    continue
                name = f"{PREFIXES[split]}/{_named(score, part)}"
                if name in scores.metrics:
                    raise ValueError(f"probe {part.name} gives the metric {name}, which another probe gives too")
                scores.metrics[name] = float(score.value)
                if score.per_image is not None:
                    scores.per_image[name] = score.per_image
        return scores

    def patch_norms(self) -> NDArray[np.float32] | None:
        """Norms [n, N] of the test images' patches at the outlier layer; None where no probe looked at them."""
        norms = self.seen.split(OWN, "test").features.get("norms") if self.fitted else None
        return None if norms is None else norms.cpu().numpy()


def _file_name(name: str, part: Part) -> str:
    return name if part.first else f"{name}_{catalog.short_name(part.data)}"


def _named(score: Score, part: Part) -> str:
    """The metric's name; of further data sets with theirs after that of the probe."""
    if part.first:
        return score.name
    family, _, rest = score.name.partition("/")
    return f"{family}/{catalog.short_name(part.data)}/{rest}"
