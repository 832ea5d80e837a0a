"""What is measured of a backbone during training and at its end: probes, token norms, per-image results."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from pathlib import Path

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
from trainers.files import write_whole
from trainers.probes.features import Features, evaluating, extract, training_subset
from trainers.streams import Streams
from trainers.tokens.norms import NormRow, last_layer_metrics, probe_rows

_MAP_IMAGES = 8  # images whose last-layer norm maps are kept
_PROBE_CHUNK = 64  # images of the probe batch at a time

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

    def score(self, backbone: nn.Module, split: str, directory: Path | None = None) -> dict[str, float]:
        """Probe metrics `split/…` of a backbone whose probes learn from training images.

        With a `directory`, per-image results are published there as per_image.parquet.
        """
        evaluated: Split = getattr(self._data, split)
        subset = training_subset(len(self._data.train), self._config.evaluation.train_images)
        train_features = self._features(backbone, self._data.train, subset)
        features = self._features(backbone, evaluated, None)
        predicted: dict[str, Tensor] = {}
        for name, fit in _fits(self._config.evaluation):
            settings = getattr(self._config.evaluation, name, None)
            probe = fit(train_features, settings, self._streams, len(self._data.class_names))
            predicted |= probe.predict(features)  # type: ignore[attr-defined]
        if directory is not None:
            self._write_per_image(probes.correct(predicted, features.classes), split, directory)
        return {f"{split}/{name}": value for name, value in probes.top1(predicted, features.classes)}

    def _features(self, backbone: nn.Module, split: Split, indices: NDArray[np.int64] | None) -> Features:
        classes = np.asarray(split.targets["classes"])
        return extract(backbone, split.images, classes, self._view, device=self._device, indices=indices)

    def token_rows(self, backbone: nn.Module, weights: str, step: int) -> list[NormRow]:
        """Exact norm statistics of the probe batch, the first validation images."""
        norms_LBT = self.probe_norms(backbone, self._config.tokens.probe_images)
        return probe_rows(
            norms_LBT, self._config.model.num_registers, trial_id=self._trial_id, step=step, weights=weights
        )

    @torch.no_grad()
    def probe_norms(self, backbone: nn.Module, count: int) -> NDArray[np.float32]:
        """Norms float32 [L + 1, B, T] of the first `count` validation images."""
        images = self._data.validation.images[:count]
        with evaluating(backbone):
            parts = [
                vit.token_norms(backbone, self._view(torch.from_numpy(np.array(part)).to(self._device)))  # type: ignore[arg-type]
                for part in np.array_split(images, max(1, -(-len(images) // _PROBE_CHUNK)))
            ]
        return np.asarray(torch.cat(parts, dim=1).cpu().numpy())

    def write_norm_map(self, backbone: nn.Module, directory: Path) -> None:
        """Publish norm_map.npz: a few probe images and the norms of their last-layer patches on the grid."""
        images = np.array(self._data.validation.images[:_MAP_IMAGES])
        norms_LBT = self.probe_norms(backbone, len(images))
        patches = norms_LBT[-1, :, 1 + self._config.model.num_registers :]
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


def token_metrics(rows: list[NormRow]) -> dict[str, float]:
    """The metrics `tokens/…` of one evaluation of the evaluated weights."""
    return last_layer_metrics(rows)


def _fits(evaluation: EvaluationConfig) -> Iterator[tuple[str, vit.Loaded]]:
    for name in evaluation.probes:
        path = catalog.PROBES[name].build if name in catalog.PROBES else name
        yield name, vit.load(path)


def _write_table(table: pa.Table, path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_whole(path, buffer.getvalue())
