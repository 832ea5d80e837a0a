"""Per-image results as files: read when asked for, broken ones said, and which images bound elimination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.collect import collect
from analysis.elimination import FRACTION, Images
from analysis.frames import Frames
from analysis.norms import EvaluatedNorms, patches
from analysis.per_image import ImageFiles
from analysis.results import evaluate
from analysis.thresholds import METRIC as FROZEN
from tests.analysis.fabricated import IMAGES, OUTLIERS, REGISTERS, TOP1, Trial, publish

# The fabricated trials have 25 probe images of 16 patches each.
SETTINGS = {
    "model.image_size": 32,
    "model.patch_size": 8,
    "tokens.outlier_layer": -1,
    "tokens.outlier_rule": "mad",
}


def trial(seed: int = 0, count: int = 4, **config: Any) -> Trial:
    return Trial({REGISTERS: count}, seed, {OUTLIERS: 0.0, TOP1: 0.5}, config={**SETTINGS, **config})


def write(folder: Path, one: Trial, values: Mapping[str, Sequence[float]]) -> None:
    rows = [
        {"trial_id": one.trial_id, "split": "test", "metric": metric, "index": index, "value": value}
        for metric, own in values.items()
        for index, value in enumerate(own)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials" / one.trial_id / "per_image.parquet")


def files(folder: Path) -> ImageFiles:
    frames: Frames = collect(folder)
    return ImageFiles(frames, patches(EvaluatedNorms(frames).last_layer()))


def test_a_metric_of_each_image_in_the_order_of_images(tmp_path: Path) -> None:
    one = trial()
    folder = publish(tmp_path / "s", [one])
    rows = [{"metric": TOP1, "index": index, "value": float(index)} for index in (2, 0, 1)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "trials" / one.trial_id / "per_image.parquet")
    found = files(folder).of(one.trial_id, TOP1)
    assert found is not None
    assert (found.index.tolist(), found.values.tolist(), found.data) == ([0, 1, 2], [0, 1, 2], "0123456789abcdef")
    assert files(folder).of(one.trial_id, "test/knn/top1") is None


def test_what_cannot_be_read_is_said_once(tmp_path: Path) -> None:
    trials = [trial(seed) for seed in range(4)]
    folder = publish(tmp_path / "s", trials)
    paths = [folder / "trials" / one.trial_id / "per_image.parquet" for one in trials]
    paths[0].write_bytes(b"no parquet")
    pq.write_table(pa.table({"metric": [TOP1], "value": [1.0]}), paths[1])
    pq.write_table(pa.table({"metric": [TOP1] * 2, "index": [0, 0], "value": [1.0, 0.0]}), paths[2])
    found = files(folder)
    assert [found.of(one.trial_id, TOP1) for one in trials for _ in range(2)] == [None] * 8
    assert len(found.problems) == 3
    assert "id-4-0: per_image.parquet is unreadable" in found.problems[0]
    assert "it has no column index" in found.problems[1]
    assert "an image twice" in found.problems[2]


def test_test_images_bound_elimination(tmp_path: Path) -> None:
    """1 and 3 outliers in 100 images of 16 patches: the mean over the two runs is 2 / 1600."""
    trials = [trial(0), trial(1)]
    folder = publish(tmp_path / "s", trials)
    for one, outliers in zip(trials, (1.0, 3.0), strict=True):
        write(folder, one, {"tokens/outliers": [outliers, *np.zeros(99)]})
    ids = [one.trial_id for one in trials]
    assert files(folder).outliers(ids, FRACTION, 0.01) == Images(2 / 1600, 100, probe=False)
    assert files(folder).outliers(ids, FROZEN, 0.01) == Images(0.01, IMAGES, probe=True)  # of another threshold


def test_probe_images_do_where_there_are_no_others(tmp_path: Path) -> None:
    trials = [trial(0), trial(1)]
    folder = publish(tmp_path / "s", trials)
    write(folder, trials[0], {"tokens/outliers": np.zeros(100).tolist()})
    ids = [one.trial_id for one in trials]
    assert files(folder).outliers(ids, FRACTION, 0.25) == Images(0.25, IMAGES, probe=True)


def test_other_rules_and_layers_have_other_outliers(tmp_path: Path) -> None:
    for number, setting in enumerate(({"tokens.outlier_layer": 2}, {"tokens.outlier_rule": "fixed"})):
        one = trial(**setting)
        folder = publish(tmp_path / str(number) / "s", [one])
        write(folder, one, {"tokens/outliers": np.zeros(100).tolist()})
        assert files(folder).outliers([one.trial_id], FRACTION, 0.0) == Images(0.0, IMAGES, probe=True)


def test_without_the_size_of_images_nothing_is_known(tmp_path: Path) -> None:
    one = trial(**{"model.image_size": "auto"})
    folder = publish(tmp_path / "s", [one])
    write(folder, one, {"tokens/outliers": np.zeros(100).tolist()})
    assert files(folder).outliers([one.trial_id], FRACTION, 0.0) is None


def test_results_have_the_tables_and_the_problems(tmp_path: Path) -> None:
    trials = [trial(seed, count) for count in (0, 1, 4) for seed in (0, 1)]
    folder = publish(tmp_path / "s", trials, baseline={REGISTERS: 0})
    for one in trials:
        write(folder, one, {"tokens/outliers": np.zeros(1_000).tolist()})
    (folder / "trials" / trials[0].trial_id / "per_image.parquet").write_bytes(b"")
    results = evaluate(collect(folder))
    tables = results.tables()
    assert {"trends", "elimination", "thresholds", "aggregates"} <= tables.keys()
    rows = [row for row in tables["elimination"].to_pylist() if row["metric"] == FRACTION]
    assert [(row["below"], row["smallest"], row["n_images"]) for row in rows] == [
        (False, False, IMAGES),  # 25 probe images bound nothing
        (True, True, 1_000),
        (True, False, 1_000),
    ]
    assert len(results.image_problems) == 1
    assert tables["thresholds"].num_rows == 3 * 200
    assert {row["metric"] for row in tables["trends"].to_pylist()} >= {OUTLIERS, TOP1}
