"""What is measured of a backbone during training and at its end: probes, token norms, measurements, and their files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from trainers import catalog
from trainers.config import TrialConfig, trial_id
from trainers.data import DataSet
from trainers.files import write_whole
from trainers.measurement import Arrays, Metric, PerImage, Picture, Statistic, Subject, findings
from trainers.probes import Context
from trainers.probes.fitted import PREFIXES, FittedProbes, Probes
from trainers.streams import Streams
from trainers.tokens.location import on_grid
from trainers.tokens.norms import NormRow, probe_rows
from trainers.tokens.statistics import StatisticRow

# Metrics that no measurement gives.
_OTHERS = ("train/", "val/", "test/", "score/", "system/", "tokens/last/", "tokens/onset_")
_MAP_IMAGES = 8  # images whose last-layer norm maps are kept

_PER_IMAGE = pa.schema(
    [
        ("trial_id", pa.string()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("index", pa.int64()),
        ("value", pa.float64()),
    ]
)
_PROBES = pa.schema([("trial_id", pa.string()), ("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])


@dataclass
class Findings:
    """What the measurements of one evaluation gave, besides files."""

    metrics: dict[str, float] = field(default_factory=dict)
    statistics: list[StatisticRow] = field(default_factory=list)


class Evaluation:
    """Evaluates backbones of one trial, always on the same images, in float32 and eval mode.

    Args:
        config: of the trial.
        data: its data set.
        streams: of the trial; evaluation draws from none that training draws from.
        device: where backbones are.
        method: of the trial, for probes that ask it.
        others: data sets that probes run on besides, by the names by which they name them.
        scratch: folder for features that are too large for memory.
    """

    def __init__(
        self,
        config: TrialConfig,
        data: DataSet,
        streams: Streams,
        device: torch.device,
        *,
        method: nn.Module | None = None,
        others: Mapping[str, DataSet] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self._config, self._data, self._streams, self._device = config, data, streams, device
        self._trial_id = trial_id(config)
        self._per_image: dict[tuple[str, str], NDArray[np.floating]] = {}  # by split and metric
        self._files: list[Arrays | Picture] = []  # of probes
        self.probes = Probes(
            config.evaluation,
            data,
            config.model,
            Context(streams, method, config.method),
            device,
            others=others,
            norm_layer=config.tokens.outlier_layer,
            scratch=scratch,
        )

    def subject(
        self,
        backbone: nn.Module,
        step: int,
        *,
        at_end: bool = False,
        fitted: FittedProbes | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> Subject:
        """`backbone` as measurements see it; at the end of a trial with its probes and what they scored."""
        return Subject(
            backbone=backbone,
            model=self._config.model,
            tokens=self._config.tokens,
            data=self._data,
            device=self._device,
            streams=self._streams,
            step=step,
            probes=self.probes,
            at_end=at_end,
            fitted=fitted,
            scores=scores,
        )

    def score(self, backbone: nn.Module, fitted: FittedProbes, splits: Sequence[str]) -> dict[str, float]:
        """Probe metrics `val/…` and `test/…` of a backbone; per-image results of the test set are kept for the end."""
        metrics: dict[str, float] = {}
        for split in splits:
            scores = fitted.score(backbone, split)
            metrics |= scores.metrics
            if split == "test":
                self._per_image |= {(PREFIXES[split], name): values for name, values in scores.per_image.items()}
                self._files = scores.files
        return metrics

    def keep_outliers(self, subject: Subject) -> None:
        """Keep how many outliers each test image has, beside what probes say of it."""
        norms = None if subject.fitted is None else subject.fitted.patch_norms()
        if norms is None:
            return
        outlier = norms > subject.threshold
        padding = subject.padding(self._data.test, np.arange(len(outlier)))
        count = (outlier if padding is None else outlier & ~padding).sum(axis=1).astype(np.float64)
        self._per_image[PREFIXES["test"], "tokens/outliers"] = count

    def token_rows(self, subject: Subject, weights: str) -> list[NormRow]:
        """Exact norm statistics of the probe batch, the first validation images."""
        norms_LBT, class_token = subject.norms
        return probe_rows(
            norms_LBT,
            subject.num_registers,
            trial_id=self._trial_id,
            step=subject.step,
            weights=weights,
            class_token=class_token,
        )

    def measure(self, subject: Subject, weights: str, directory: Path, *, at_end: bool) -> Findings:
        """Runs `tokens.measurements`, those that are due, in their order; at the end their files are published."""
        found = Findings()
        for name in self._config.tokens.measurements:
            entry = catalog.MEASUREMENTS.get(name)
            if not (at_end or (entry is not None and entry.every)):
                continue
            for finding in findings(name, subject):
                if isinstance(finding, Metric):
                    _refuse_metric(name, finding, found.metrics)
                    found.metrics[finding.name] = float(finding.value)
                elif isinstance(finding, Statistic):
                    found.statistics.append(self._row(finding, weights, subject.step))
                elif at_end:
                    self._keep(finding, directory)
        for file in self._files if at_end else ():
            self._keep(file, directory)
        return found

    def _row(self, finding: Statistic, weights: str, step: int) -> StatisticRow:
        place = (finding.layer, finding.head, finding.token)
        return StatisticRow(self._trial_id, step, weights, finding.name, *place, float(finding.value))

    def _keep(self, finding: PerImage | Arrays | Picture, directory: Path) -> None:
        if isinstance(finding, PerImage):
            self._per_image[PREFIXES["validation"], finding.name] = finding.values
        elif isinstance(finding, Arrays):
            _write_arrays(finding.arrays, directory / f"{finding.name}.npz")
        else:
            write_whole(directory / "attention" / f"{finding.name}.png", finding.png)

    def write_norm_map(self, subject: Subject, directory: Path) -> None:
        """Publish norm_map.npz: a few probe images and the norms of their last-layer patches on the grid.

        Raises:
            ValueError: the patches do not fill the grid.
        """
        images = np.array(subject.probe_images(_MAP_IMAGES))
        layers, norms = len(subject.norms[0]), subject.patch_norms()[: len(images)]
        arrays = {"images": images, "norms": on_grid(norms, subject.grid), "layer": np.int64(layers - 1)}
        _write_arrays(arrays, directory / "norm_map.npz")

    def write_probes(self, history: list[tuple[int, dict[str, float]]], directory: Path) -> None:
        """Publish probes.parquet: every probe metric of every evaluation."""
        kept = [
            {"trial_id": self._trial_id, "step": step, "name": name, "value": value}
            for step, metrics in history
            for name, value in sorted(metrics.items())
            if name.startswith(("val/", "test/"))
        ]
        _write_table(pa.Table.from_pylist(kept, schema=_PROBES), directory / "probes.parquet")

    def write_per_image(self, directory: Path) -> None:
        """Publish per_image.parquet: what was measured image by image at the end."""
        tables = [
            pa.table(
                {
                    "trial_id": [self._trial_id] * len(values),
                    "split": [split] * len(values),
                    "metric": [metric] * len(values),
                    "index": np.arange(len(values)),
                    "value": np.asarray(values, np.float64),
                },
                schema=_PER_IMAGE,
            )
            for (split, metric), values in sorted(self._per_image.items())
        ]
        _write_table(pa.concat_tables(tables) if tables else _PER_IMAGE.empty_table(), directory / "per_image.parquet")


def _refuse_metric(measurement: str, metric: Metric, known: Mapping[str, float]) -> None:
    """A measurement gives finite numbers under names that nothing else has.

    Raises:
        ValueError: it does not; a user's own may know no better.
    """
    if metric.name in known or metric.name.startswith(_OTHERS):
        raise ValueError(f"measurement {measurement} gives the metric {metric.name}, a name that is taken")
    if not math.isfinite(metric.value):
        raise ValueError(
            f"measurement {measurement} gives {metric.name} = {metric.value}; what is undefined is left out"
        )


def _write_arrays(arrays: Mapping[str, Any], path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def _write_table(table: pa.Table, path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_whole(path, buffer.getvalue())
