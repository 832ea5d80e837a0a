"""Data sets of pending trials: opened once each, with those of probes, and changes of content are refused."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.data_sets import DataCheck, key
from orchestrator.plan import PlannedTrial
from orchestrator.sweep import Resources
from tests import photo_folder
from tests.trainers.runs import run
from trainers.config import DataConfig, resolve, trial_id
from trainers.data import evaluation_configs, fingerprint_of


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    photo_folder.write(root / "photographs", crops=10)
    return root


def _settings(tiny: dict[str, Any], root: Path, **settings: Any) -> dict[str, Any]:
    return {
        **tiny,
        "evaluation.knn.data": ["scenes", "image_folder/photographs"],
        "execution.data_root": str(root),
        **settings,
    }


def _planned(settings: dict[str, Any]) -> PlannedTrial:
    config = resolve(settings)
    return PlannedTrial(trial_id(config), "trial", {}, config.seed, config, Resources())


def _quiet(*_: object) -> None:
    pass


def test_probes_run_on_data_sets_of_their_own(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path, photographs: Path
) -> None:
    settings = _settings(tiny, photographs)
    result, reports = run(settings, tmp_path, data_cache)
    assert {"test/knn/top1", "test/knn/k10/top1"} <= set(reports[12])
    assert {"test/knn/photographs/top1", "test/knn/photographs/k10/top1"} <= set(reports[12])
    plain, without = run({**tiny, "evaluation.probes": ["linear"]}, tmp_path / "plain", data_cache)
    assert {name: value for name, value in reports[12].items() if "linear" in name} == {
        name: value for name, value in without[12].items() if "linear" in name
    }
    assert result.data_fingerprint != plain.data_fingerprint
    (own,) = plain.data_sets
    assert (own["name"], own["fingerprint"], own["use"]) == ("scenes", plain.data_fingerprint, "training")
    assert own["images"] == {name: own["images"][name] for name in ("train", "validation", "test")}
    assert min(own["images"].values()) > 0
    assert (result.data_sets[0]["name"], result.data_sets[0]["use"]) == ("scenes", "training")
    assert {one["use"] for one in result.data_sets[1:]} == {"evaluation"} and len(result.data_sets) == 3
    check = DataCheck(data_cache, {}, False, _quiet)
    trial = _planned(settings)
    assert check.fingerprints([trial]) == {trial.trial_id: result.data_fingerprint}
    assert len(check.found) == 3  # scenes as trained on, scenes as it is by default, the photographs


def test_changed_content_is_refused_by_the_name_of_its_data_set(
    tiny: dict[str, Any], data_cache: Path, photographs: Path
) -> None:
    trial = _planned(_settings(tiny, photographs))
    data = evaluation_configs(trial.config)["image_folder/photographs"]
    known = {key(data, 16): "0" * 16}
    with pytest.raises(ValueError, match=r"photographs: its content has changed .*; give it another data.name"):
        DataCheck(data_cache, known, False, _quiet).fingerprints([trial])
    DataCheck(data_cache, known, True, _quiet).fingerprints([trial])
    published = {key(evaluation_configs(trial.config)["scenes"], 16): "0" * 16}
    with pytest.raises(ValueError, match=r"data set scenes: its content has changed \([^)]*\); pass --accept-data"):
        DataCheck(data_cache, published, False, _quiet).fingerprints([trial])


def test_fingerprints_of_all_data_of_a_trial() -> None:
    assert fingerprint_of("a" * 16, {}) == "a" * 16
    several = [fingerprint_of("a", {"x": "b"}), fingerprint_of("a", {"x": "c"}), fingerprint_of("c", {"x": "b"})]
    assert len(set(several)) == 3 and all(len(one) == 16 for one in several)


def test_evaluation_sets_have_their_own_defaults(tiny: dict[str, Any]) -> None:
    settings = {**tiny, "data.seed": 7, "evaluation.linear.data": ["fashion_mnist"], "evaluation.knn.data": ["scenes"]}
    found = evaluation_configs(resolve(settings))
    assert found == {
        "fashion_mnist": DataConfig(train="fashion_mnist", seed=7, scenes=None),
        "scenes": DataConfig(train="scenes", seed=7),
    }
