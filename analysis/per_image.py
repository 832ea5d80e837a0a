"""Reads what trials publish of each image, per_image.parquet, and only where a statistic asks for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.elimination import FRACTION, Images
from analysis.frames import Frames, short
from analysis.image_bootstrap import PerImage
from analysis.norms import TokenNorms

_SCHEMA = pa.schema([("metric", pa.string()), ("index", pa.int64()), ("value", pa.float64())])
_TEST_OUTLIERS = "tokens/outliers"  # of each test image, by the threshold of the probe images
_SETTINGS = (
    "model.image_size",
    "model.patch_size",
    "tokens.outlier_layer",
    "tokens.outlier_rule",
)
_LAST, _RULE_3 = -1, "mad"


class ImageFiles:
    """The per-image results of the trials of `frames`, read when first asked for.

    Args:
        norms: the patches of finished trials, `norms.patches`, which say how many probe images there were.

    Attributes:
        problems: files that could not be read, as sentences, in the order of first reading.
    """

    def __init__(self, frames: Frames, norms: Mapping[str, TokenNorms]) -> None:
        names = ["trial_id", "data_fingerprint", *(name for name in _SETTINGS if name in frames.runs.column_names)]
        self._runs: dict[str, dict[str, Any]] = {row["trial_id"]: row for row in frames.runs.select(names).to_pylist()}
        self._folder = frames.folder
        self._counted = Counter({trial: one.histogram.total for trial, one in norms.items()})  # patches of probe images
        self._read: dict[tuple[str, str], PerImage | None] = {}
        self.problems: list[str] = []

    def of(self, trial_id: str, metric: str) -> PerImage | None:
        """`metric` of each image of a trial; None where the trial says nothing of single images."""
        if (trial_id, metric) not in self._read:
            self._read[trial_id, metric] = self._load(trial_id, metric)
        return self._read[trial_id, metric]

    def outliers(self, trials: Sequence[str], metric: str, mean: float) -> Images | None:
        """The images over which elimination may be bounded: test images of all `trials`, else their probe images.

        Test images are counted with the threshold of rule 3 in the last layer and so serve the metric FRACTION alone.
        """
        patches = [self._patches(trial) for trial in trials]
        if metric == FRACTION and all(self._last_by_rule_3(trial) for trial in trials):
            found = [self.of(trial, _TEST_OUTLIERS) for trial in trials]
            both = [(one.values, count) for one, count in zip(found, patches, strict=True) if one and count]
            if len(both) == len(trials):
                shares = [float(values.mean()) / count for values, count in both]
                return Images(float(np.mean(shares)), min(len(values) for values, _ in both), probe=False)
        probe = [self._counted[trial] // count for trial, count in zip(trials, patches, strict=True) if count]
        return Images(mean, min(probe), probe=True) if len(probe) == len(trials) and min(probe) > 0 else None

    def _patches(self, trial_id: str) -> int | None:
        """Patches of an image, where the settings say."""
        row = self._runs[trial_id]
        size, patch = row.get("model.image_size"), row.get("model.patch_size")
        return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) and 0 < patch <= size else None

    def _last_by_rule_3(self, trial_id: str) -> bool:
        row = self._runs[trial_id]
        return row.get("tokens.outlier_layer") == _LAST and row.get("tokens.outlier_rule") == _RULE_3

    def _load(self, trial_id: str, metric: str) -> PerImage | None:
        path = self._folder / "trials" / trial_id / "per_image.parquet"
        if not path.is_file():
            return None
        try:
            table = _rows(path, metric)
        except (OSError, pa.ArrowException, ValueError) as error:
            self.problems.append(f"trial {trial_id}: {path.name} is unreadable: {short(error)}")
            return None
        if not table.num_rows:
            return None
        index, values = _numbers(table, "index", np.int64), _numbers(table, "value", np.float64)
        if len(np.unique(index)) < len(index):
            self.problems.append(f"trial {trial_id}: {path.name} has an image twice in {metric}")
            return None
        order = np.argsort(index)
        return PerImage(index[order], values[order], self._runs[trial_id]["data_fingerprint"])


def _rows(path: Path, metric: str) -> pa.Table:
    """The rows of one metric. Raises OSError, pa.ArrowException or ValueError."""
    table = pq.ParquetFile(path).read(columns=_SCHEMA.names)
    if missing := [name for name in _SCHEMA.names if name not in table.column_names]:
        raise ValueError(f"it has no column {missing[0]}")
    kept = table.select(_SCHEMA.names).cast(_SCHEMA)
    return kept.filter(pa.compute.equal(kept["metric"], metric))


def _numbers(table: pa.Table, name: str, kind: type[np.generic]) -> NDArray[Any]:
    return np.asarray(table[name].combine_chunks().to_numpy(zero_copy_only=False), kind)
