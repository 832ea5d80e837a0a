"""The probes of a trial together: names of metrics, which run when, and that nothing is extracted twice."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainers.runs import run
from trainers.config import EvaluationConfig, ModelConfig, resolve
from trainers.data import DataSet, Split
from trainers.findings import Arrays, Picture, Score
from trainers.probes import Context, HeadDiverged, features, fitted, seen
from trainers.probes.fitted import Probes
from trainers.probes.object_discovery import ObjectDiscovery
from trainers.probes.seen import SeenSplit
from trainers.probes.zero_shot import ZeroShot
from trainers.streams import Streams
from trainers.vit import ViT

IMAGES = {"train": 20, "validation": 6, "test": 5}


class Counting:
    """A user's own probe: the number of images it was fitted on, and of those it is scored on."""

    reads = frozenset({"mean_patch"})
    transfers = False

    def __init__(self, settings: None, context: Context) -> None:
        assert settings is None and context.name == "deit3"

    def fit(self, train: SeenSplit, validation: SeenSplit) -> Counting:
        fitted = copy(self)
        fitted.fitted = len(train.features["mean_patch"])
        return fitted

    def score(self, seen: SeenSplit) -> Iterator[Score | Arrays | Picture]:
        assert seen.features["mean_patch"].shape == (len(seen), 64)
        yield Score("counting/fitted", self.fitted)
        yield Score("counting/scored", len(seen), np.arange(float(len(seen))))
        yield Arrays("counting", {"n": np.array(len(seen))})


class Clashing(Counting):
    """Another probe with the same names."""


def _data(seed: int, name: str) -> DataSet:
    rng = np.random.default_rng(seed)
    splits = {
        split: Split(rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), {"classes": np.arange(count) % 2})
        for split, count in IMAGES.items()
    }
    return DataSet(name, ("a", "b"), ("classes",), fingerprint="0" * 16, **splits)


def _model() -> ModelConfig:
    return resolve({"model": {"size": "nano", "image_size": 16, "patch_size": 8}}).model


def _probes(**settings: Any) -> Probes:
    evaluation = EvaluationConfig.model_validate({"train_images": 16, **settings})
    others = {"image_folder/birds": _data(1, "birds")}
    context = Context(Streams(0), None, "deit3")
    return Probes(evaluation, _data(0, "own"), _model(), context, torch.device("cpu"), others=others)


@pytest.fixture
def backbone() -> ViT:
    return ViT(_model(), Streams(0))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each extraction passed through a backbone."""
    counted: list[int] = []

    def extract(backbone: Any, batches: Any, count: int, *arguments: Any, **named: Any) -> Any:
        counted.append(count)
        return features.extract(backbone, batches, count, *arguments, **named)

    monkeypatch.setattr(seen, "extract", extract)
    return counted


def test_a_probe_of_ones_own(backbone: ViT) -> None:
    scores = _probes(probes=[f"{__name__}:Counting"]).fit(backbone).score(backbone, "test")
    assert scores.metrics == {"test/counting/fitted": 16, "test/counting/scored": 5}
    assert scores.per_image["test/counting/scored"].tolist() == [0, 1, 2, 3, 4]
    assert [file.name for file in scores.files] == ["counting"]


def test_probes_with_equal_names_are_an_error(backbone: ViT) -> None:
    fitted = _probes(probes=[f"{__name__}:Counting", f"{__name__}:Clashing"]).fit(backbone)
    with pytest.raises(ValueError, match="gives the metric test/counting/fitted, which another probe gives too"):
        fitted.score(backbone, "test")


def test_further_data_sets_have_their_name_after_that_of_the_probe(backbone: ViT) -> None:
    knn = {"k": (5, 17), "data": ("image_folder/birds",)}
    first = _probes(probes=["knn"], knn=knn).fit(backbone).score(backbone, "validation")
    assert set(first.metrics) == {"val/knn/k5/top1"}  # 17 are more than probes learn from
    probes = _probes(probes=["knn", "linear"], knn=knn, linear={"steps": 2})
    named = probes.fit(backbone).score(backbone, "test")
    assert set(named.metrics) == {"test/knn/k5/top1", "test/linear/top1", "test/linear_mean_patch/top1"}
    probes.parts = [replace(part, first=part.data == fitted.OWN) for part in probes.parts]
    assert "test/knn/birds/k5/top1" in probes.fit(backbone).score(backbone, "test").metrics


def test_images_pass_once_whatever_the_number_of_probes(backbone: ViT, passes: list[int]) -> None:
    own = _probes(probes=["knn", "linear", f"{__name__}:Counting"], linear={"steps": 2}).fit(backbone)
    for split in ("validation", "test"):
        own.score(backbone, split)
        own.score(backbone, split)
    assert own.patch_norms() is not None
    assert passes == [16, 6, 5]
    own.score(ViT(_model(), Streams(1)), "test")
    assert passes == [16, 6, 5, 5]  # another backbone sees other features


def test_only_what_the_probes_of_a_data_set_read_is_extracted(backbone: ViT) -> None:
    probes = _probes(probes=["knn", f"{__name__}:Counting"], knn={"data": ("image_folder/birds",)})
    assert probes.see(backbone, fitted.OWN, "train").reads == {"mean_patch"}
    assert probes.see(backbone, fitted.OWN, "test").reads == {"mean_patch", "norms"}
    assert probes.see(backbone, "image_folder/birds", "test").reads == {"cls", "mean_patch"}


def test_probes_of_the_end_run_at_the_end(backbone: ViT, passes: list[int]) -> None:
    probes = _probes(probes=["knn", "linear"], linear={"steps": 2, "at": "end"})
    assert set(probes.fit(backbone).score(backbone, "test").metrics) == {"test/knn/k10/top1"}
    at_end = probes.fit(backbone, at_end=True)
    assert len(at_end.score(backbone, "test").metrics) == 3
    assert set(at_end.quick.score(backbone, "test").metrics) == {"test/knn/k10/top1"}


class Keyed(Counting):
    """A probe that reads keys besides."""

    reads = frozenset({"mean_patch", "keys"})


def test_what_only_probes_of_the_end_read_is_extracted_at_the_end(backbone: ViT) -> None:
    probes = _probes(probes=["knn", f"{__name__}:Keyed"])
    probes.parts[1] = replace(probes.parts[1], at_end=True)
    assert "keys" not in probes.fit(backbone).seen.split(fitted.OWN, "test").reads
    at_end = probes.fit(backbone, at_end=True)
    assert "keys" in at_end.seen.split(fitted.OWN, "test").reads
    asked: list[bool] = []
    see = probes.see

    def noted(*arguments: Any, at_end: bool) -> SeenSplit:
        asked.append(at_end)
        return see(*arguments, at_end=at_end)

    probes.see = noted  # type: ignore[method-assign]
    at_end.quick.score(ViT(_model(), Streams(1)), "test")
    assert asked == [False]


def test_without_probes_no_image_is_looked_at(backbone: ViT, passes: list[int]) -> None:
    fitted = _probes(probes=[]).fit(backbone, at_end=True)
    assert fitted.score(backbone, "test").metrics == {} and fitted.patch_norms() is None and passes == []


class Transferring(Counting):
    """A probe whose fit on the first data set serves all."""

    transfers = True


def test_what_transfers_is_fitted_once(backbone: ViT) -> None:
    probes = _probes(probes=[f"{__name__}:Transferring"])
    (part,) = probes.parts
    probes.parts = [part, replace(part, data="image_folder/birds", first=False)]
    fitted = probes.fit(backbone)
    assert fitted.fitted[0][1] is fitted.fitted[1][1]
    scores = fitted.score(backbone, "test")
    assert set(scores.metrics) == {
        f"test/counting{data}/{name}" for data in ("", "/birds") for name in ("fitted", "scored")
    }
    assert [file.name for file in scores.files] == ["counting", "counting_birds"]


def test_a_trial_keeps_outliers_of_test_images_beside_what_probes_say(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    import pyarrow.parquet as pq

    settings = {**tiny, "tokens.outlier_rule": "fixed", "tokens.outlier_norm": 5.0}
    run({**settings, "evaluation.probes": ["linear", "knn", f"{__name__}:Counting"]}, tmp_path, data_cache)
    with np.load(tmp_path / "counting.npz") as left:
        assert int(left["n"]) == 32  # of the test set, not of validation
    kept = pq.read_table(tmp_path / "per_image.parquet").to_pandas()
    kept = kept[kept["split"] == "test"].pivot(index="index", columns="metric", values="value")
    assert {"tokens/outliers", "test/linear/top1", "test/knn/top1"} <= set(kept.columns)
    assert len(kept) == 32 and kept["tokens/outliers"].between(0, 4).all() and kept["tokens/outliers"].max() > 0


def test_dense_targets_take_the_nearest_pixel_at_the_size_of_the_images(backbone: ViT) -> None:
    data = _data(0, "own")
    coarse = np.arange(5 * 4).reshape(5, 2, 2).astype(np.uint8)
    data = replace(data, test=Split(data.test.images, {"segmentation": coarse}))
    given = SeenSplit(backbone, _model(), data, "test", np.array([4, 2]), torch.device("cpu"))
    found = given.dense("segmentation", np.array([1]))
    assert found.shape == (1, 16, 16) and found.dtype == torch.uint8
    assert torch.equal(found[0], torch.tensor([[8, 9], [10, 11]]).repeat_interleave(8, 0).repeat_interleave(8, 1))


class Diverging(Counting):
    """A probe that learns nothing finite."""

    def fit(self, train: SeenSplit, validation: SeenSplit) -> Counting:
        raise HeadDiverged("its loss is not finite")


class DivergingOnce(Diverging):
    """Of several data sets the first serves all."""

    transfers = True


def test_what_has_diverged_does_not_transfer(backbone: ViT) -> None:
    probes = _probes(probes=[f"{__name__}:DivergingOnce"])
    (part,) = probes.parts
    other = replace(
        part, data="image_folder/birds", first=False, probe=Counting(None, Context(Streams(0), None, "deit3"))
    )
    other.probe.transfers = True  # it could learn
    probes.parts = [part, other]
    assert probes.fit(backbone).fitted == []


class Looking(Counting):
    """A probe that learns nothing from training images."""

    learns = False
    reads = frozenset({"cls"})


def test_training_images_cost_nothing_for_a_probe_that_does_not_learn(backbone: ViT) -> None:
    probes = _probes(probes=[f"{__name__}:Looking", f"{__name__}:Counting"])
    assert probes.see(backbone, fitted.OWN, "train").reads == {"mean_patch"}
    assert probes.see(backbone, fitted.OWN, "validation").reads == {"cls", "mean_patch"}
    assert not ObjectDiscovery.learns and not ZeroShot.learns


def test_a_head_that_diverges_leaves_out_its_metrics_and_nothing_else(
    backbone: ViT, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = _probes(probes=[f"{__name__}:Diverging", "knn"]).fit(backbone)
    assert set(fitted.score(backbone, "test").metrics) == {"test/knn/k10/top1"}
    assert "Diverging on the trial's data has no metrics: its loss is not finite" in caplog.text
