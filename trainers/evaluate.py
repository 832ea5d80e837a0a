"""What is measured of a backbone during training and at its end: probes, token norms, per-image results."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trainers import catalog, probes, vit
from trainers.augment import evaluation_view
from trainers.config import EvaluationConfig, TrialConfig, trial_id
from trainers.data import DataSet, Split
from trainers.dotted import Loaded, load
from trainers.files import write_whole
from trainers.probes.features import Features, evaluating, extract, training_subset
from trainers.streams import Streams
from trainers.tokens.norms import NormRow, probe_rows

_MAP_IMAGES = 8  # images whose last-layer norm maps are kept
_PROBE_CHUNK = 64  # images of the probe batch at a time

_PREFIXES = {"validation": "val", "test": "test"}  # of metrics

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


class Evaluation:
    """Evaluates backbones of one trial, always on the same images, in float32 and eval mode."""

    def __init__(self, config: TrialConfig, data: DataSet, streams: Streams, device: torch.device) -> None:
        assert isinstance(config.model.image_size, int), "the configuration is not resolved"
        self._config = config
        self._data = data
        self._streams = streams
        self._device = device
        self._view = functools.partial(evaluation_view, image_size=config.model.image_size)
        self._trial_id = trial_id(config)
        self._num_classes = len(data.class_names)

    def score(self, backbone: nn.Module, splits: Sequence[str], directory: Path) -> dict[str, float]:
        """Probe metrics `val/…` and `test/…` of a backbone, for probes that learn once from training images.

        Per-image results of the test set are published in `directory` as per_image.parquet.
        """
        subset = training_subset(len(self._data.train), self._config.evaluation.train_images)
        train_features = self._features(backbone, self._data.train, subset)
        fitted = [
            fit(train_features, getattr(self._config.evaluation, name, None), self._streams, self._num_classes)
            for name, fit in _fits(self._config.evaluation)
        ]
        metrics: dict[str, float] = {}
        for split in splits:
            features = self._features(backbone, getattr(self._data, split), None)
            predicted: dict[str, Tensor] = {}
            for probe in fitted:
                predicted |= probe.predict(features)  # type: ignore[attr-defined]
            prefix = _PREFIXES[split]
            metrics |= {f"{prefix}/{name}": value for name, value in probes.top1(predicted, features.classes)}
            if split == "test":
                self._write_per_image(probes.correct(predicted, features.classes), prefix, directory)
        return metrics

    def _features(self, backbone: nn.Module, split: Split, indices: NDArray[np.int64] | None) -> Features:
        classes = np.asarray(split.targets["classes"])
        return extract(backbone, split.images, classes, self._view, device=self._device, indices=indices)

    def token_rows(self, backbone: nn.Module, weights: str, step: int) -> list[NormRow]:
        """Exact norm statistics of the probe batch, the first validation images."""
        norms_LBT, class_token = self.probe_norms(backbone, self._config.tokens.probe_images)
        return probe_rows(
            norms_LBT,
            self._config.model.num_registers,
            trial_id=self._trial_id,
            step=step,
            weights=weights,
            class_token=class_token,
        )

    @torch.no_grad()
    def probe_norms(self, backbone: nn.Module, count: int) -> tuple[NDArray[np.float32], bool]:
        """Norms float32 [L + 1, B, T] of the first `count` validation images; whether T begins with a class token."""
        images = self._data.validation.images[:count]
        model, device = cast(vit.Backbone, backbone), self._device
        with evaluating(backbone):
            parts = []
            for part in np.array_split(images, max(1, -(-len(images) // _PROBE_CHUNK))):
                norms_LBT, class_token = vit.token_norms(model, self._view(torch.from_numpy(np.array(part)).to(device)))
                parts.append(norms_LBT)
        return np.asarray(torch.cat(parts, dim=1).cpu().numpy()), class_token

    def write_norm_map(self, backbone: nn.Module, directory: Path) -> None:
        """Publish norm_map.npz: a few probe images and the norms of their last-layer patches on the grid."""
        images = np.array(self._data.validation.images[:_MAP_IMAGES])
        norms_LBT, class_token = self.probe_norms(backbone, len(images))
        patches = norms_LBT[-1, :, int(class_token) + self._config.model.num_registers :]
        side = round(patches.shape[1] ** 0.5)
        buffer = io.BytesIO()
        grid = patches.reshape(len(images), side, side)
        np.savez_compressed(buffer, images=images, norms=grid, layer=np.int64(len(norms_LBT) - 1))
        write_whole(directory / "norm_map.npz", buffer.getvalue())

    def write_probes(self, history: list[tuple[int, dict[str, float]]], directory: Path) -> None:
        """Publish probes.parquet: every probe metric of every evaluation."""
        kept = [
            {"trial_id": self._trial_id, "step": step, "name": name, "value": value}
            for step, metrics in history
            for name, value in sorted(metrics.items())
            if name.startswith(("val/", "test/"))
        ]
        _write_table(pa.Table.from_pylist(kept, schema=_PROBES), directory / "probes.parquet")

    def _write_per_image(self, correct: dict[str, Tensor], split: str, directory: Path) -> None:
        tables = [
            pa.table(
                {
                    "trial_id": [self._trial_id] * len(right),
                    "split": [split] * len(right),
                    "metric": [f"{split}/{metric}"] * len(right),
                    "index": np.arange(len(right)),
                    "value": right.double().numpy(),
                },
                schema=_PER_IMAGE,
            )
            for metric, right in sorted(correct.items())
        ]
        _write_table(pa.concat_tables(tables) if tables else _PER_IMAGE.empty_table(), directory / "per_image.parquet")


def _fits(evaluation: EvaluationConfig) -> Iterator[tuple[str, Loaded]]:
    for name in evaluation.probes:
        path = catalog.PROBES[name].build if name in catalog.PROBES else name
        yield name, load(path)


def _write_table(table: pa.Table, path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_whole(path, buffer.getvalue())
