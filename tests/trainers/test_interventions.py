"""Interventions on planted outliers and registers, with their controls, and what becomes of every metric."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainers.labelled import IMAGES, PATCHES, labelled
from tests.trainers.planted import Planted, metrics
from tests.trainers.runs import run
from trainers import edits, interventions
from trainers.edits import EditedViT, State
from trainers.measurement import Metric, Statistic, Subject, findings
from trainers.probes.fitted import FittedProbes
from trainers.token_settings import InterventionsConfig

PLANTED = (3, 10)  # patches


def planting(layer: int = 2, factor: float = 20.0) -> edits.Edit:
    """From a layer on, two patches of every image have a high norm."""

    def step(state: State) -> State:
        if state.layer != layer:
            return state
        scale = torch.ones(PATCHES, 1)
        scale[list(PLANTED)] = factor
        return state.with_patches(state.patches_BND * scale)

    return lambda _images: step


def asked(*on_top: edits.Edit, registers: int = 0, **settings: Any) -> Subject:
    """A subject with fitted probes whose backbone is edited like this, as if it were its own doing."""
    return labelled(lambda ours: EditedViT(ours, *on_top), registers=registers, **settings)


def measured(given: Subject, **settings: Any) -> dict[str, float]:
    return metrics(list(interventions.measure(given, InterventionsConfig(**settings))))


@pytest.fixture(scope="module")
def planted() -> dict[str, float]:
    return measured(asked(planting()))


def test_clamping_planted_outliers_removes_them_and_the_control_does_not(planted: dict[str, float]) -> None:
    share = len(PLANTED) / PATCHES
    assert planted["interventions/layer"] == 2  # where they set in, not the last
    assert planted["interventions/outlier_fraction"] == share
    for how in ("clamped", "neighbors", "deleted"):
        assert planted[f"interventions/outliers_{how}/tokens/last/outlier_fraction"] == 0.0
        assert planted[f"interventions/outliers_{how}/change/tokens/last/outlier_fraction"] == -share
        assert planted[f"interventions/outliers_{how}/tokens/last/max_over_median"] < 1.5
        assert planted[f"interventions/outliers_{how}/change/tokens/last/max_over_median"] < -5
        control = planted[f"interventions/normal_{how}/tokens/last/outlier_fraction"]
        # 2 of 14 patches fewer are counted where normal ones are deleted
        assert control == (len(PLANTED) / (PATCHES - len(PLANTED)) if how == "deleted" else share)
        assert planted[f"interventions/normal_{how}/tokens/last/max_over_median"] > 5


def test_every_metric_is_there_with_its_change(planted: dict[str, float]) -> None:
    names = [f"{split}/knn{k}/top1" for split in ("val", "test") for k in ("/k3", "")]
    names += ["tokens/last/outlier_fraction", "tokens/last/max_over_median"]
    whats = [f"{who}_{how}" for who in ("outliers", "normal") for how in ("clamped", "neighbors", "deleted")]
    expected = {f"interventions/{what}/{part}{name}" for what in whats for part in ("", "change/") for name in names}
    expected |= {f"interventions/{what}/treated" for what in whats}
    assert set(planted) == expected | {"interventions/layer", "interventions/outlier_fraction"}


def test_what_is_measured_at_every_evaluation_is_measured_of_every_variant() -> None:
    given = asked(
        planting(), registers=2, tokens__measurements=["channels", "interventions", "attention", "recurrence"]
    )
    found = list(interventions.measure(given, InterventionsConfig(on_registers=(), on_outliers=("deleted",))))
    numbers = {finding.name: finding.value for finding in found if isinstance(finding, Statistic)}
    deleting = edits.treat_patches(2, given.threshold_of(given.patch_norms(2)), edits.deleted)
    deleted = given.with_backbone(EditedViT(given.backbone, deleting))
    every = ("channels", "attention")
    before, after = (
        {k: v for name in every for k, v in metrics(list(findings(name, one))).items()} for one in (given, deleted)
    )
    expected = {f"interventions/outliers_deleted/{name}": value for name, value in after.items()}
    expected |= {f"interventions/outliers_deleted/change/{name}": after[name] - before[name] for name in after}
    assert len(before) > 10 and {name: numbers[name] for name in expected} == expected
    others = {name.removeprefix("interventions/normal_deleted/") for name in numbers if name not in expected}
    assert others == {f"{part}{name}" for part in ("", "change/") for name in after}
    assert numbers["interventions/outliers_deleted/change/channels/last/max_over_median"] < 0
    assert not any("channels" in name for name in metrics(found))


def test_what_a_trial_does_not_measure_is_not_measured_of_variants() -> None:
    given = asked(planting(), tokens__measurements=["interventions"])
    found = list(interventions.measure(given, InterventionsConfig(on_outliers=("clamped",))))
    assert found and all(isinstance(finding, Metric) for finding in found)


def test_probes_of_the_end_alone_are_not_asked_about_variants() -> None:
    given = asked(planting(), tokens__measurements=[])
    given.probes.parts = [replace(part, at_end=True) for part in given.probes.parts]
    found = measured(replace(given, fitted=given.probes.fit(given.backbone, at_end=True)), on_outliers=("clamped",))
    assert found and not [name for name in found if "knn" in name]


def test_scores_of_the_untouched_that_are_known_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[Any] = []
    score = FittedProbes.score

    def counted(self: FittedProbes, backbone: Any, split: str) -> Any:
        scored.append(backbone)
        return score(self, backbone, split)

    monkeypatch.setattr(FittedProbes, "score", counted)
    given = asked(planting(), tokens__measurements=[])
    computed = measured(given, on_outliers=("clamped",))
    assert scored.count(given.backbone) == 2 and given.fitted is not None
    known = {name: value for split in ("validation", "test") for name, value in score_of(given, split).items()}
    scored.clear()
    assert measured(replace(given, scores=known), on_outliers=("clamped",)) == computed
    assert given.backbone not in scored and len(scored) == 2 * 2
    lower = {name: value - 0.25 for name, value in known.items()}
    changed = measured(replace(given, scores=lower), on_outliers=("clamped",))
    change = "interventions/outliers_clamped/change/test/knn/top1"
    assert changed[change] == pytest.approx(computed[change] + 0.25)


def score_of(given: Subject, split: str) -> dict[str, float]:
    assert given.fitted is not None
    return given.fitted.score(given.backbone, split).metrics


def test_the_probes_of_the_untouched_backbone_are_scored_on_the_edited_one() -> None:
    given = asked(planting(), registers=2)
    found = measured(given, on_registers=("zeroed",), on_outliers=("clamped",))
    norms, zeros = given.patch_norms(2), edits.constant_registers([torch.zeros(64)] * 5)
    by_hand = {
        "outliers_clamped": edits.treat_patches(2, given.threshold_of(norms), edits.clamped(float(np.median(norms)))),
        "registers_zeroed": edits.replace_registers(zeros),
    }
    assert given.fitted is not None
    untouched = given.fitted.score(given.backbone, "test").metrics
    refitted_differ = False
    for what, edit in by_hand.items():
        edited = EditedViT(given.backbone, edit)
        score = given.fitted.score(edited, "test").metrics
        refitted_differ |= score != given.probes.fit(edited).score(edited, "test").metrics
        assert {name: found[f"interventions/{what}/{name}"] for name in score} == score
        changes = {name: score[name] - untouched[name] for name in score}
        assert {name: found[f"interventions/{what}/change/{name}"] for name in score} == changes
        last = given.with_backbone(edited).patch_norms()
        ratio = float(last.max() / np.median(last))
        assert found[f"interventions/{what}/tokens/last/max_over_median"] == pytest.approx(ratio)
    assert refitted_differ


def test_without_registers_and_outliers_nothing_is_said() -> None:
    assert measured(asked()) == {}
    assert measured(asked(registers=2), on_registers=()) == {}
    with_registers = measured(asked(registers=2))
    assert {name.split("/")[1] for name in with_registers} == {
        "registers_zeroed",
        "registers_mean",
        "registers_shuffled",
    }


def test_registers_that_no_one_reads_change_nothing_and_others_do() -> None:
    apart = measured(asked(registers=2, model__register_mask="detached"))
    assert {value for name, value in apart.items() if "/change/" in name} == {0.0}
    read = measured(asked(registers=2))
    assert all(
        read[f"interventions/registers_{how}/change/tokens/last/max_over_median"] for how in ("zeroed", "shuffled")
    )


def test_the_mean_is_over_the_probe_images_of_each_layer_and_register() -> None:
    given = asked(registers=2)
    means = interventions._mean_registers(given)
    pixels = given.view(given.probe_images())
    for mean, tokens in zip(means, given.backbone.residuals(pixels), strict=True):
        torch.testing.assert_close(mean, tokens.registers_BRD.mean(0))


@pytest.mark.parametrize(("layer", "treated"), [("onset", 3), (1, None), (-1, 4), (4, 4)])
def test_the_layer_can_be_chosen(layer: int | str, treated: int | None) -> None:
    found = measured(asked(planting(layer=3)), layer=layer, on_outliers=("clamped",))
    assert found.get("interventions/layer") == treated
    assert bool(found) is (treated is not None)


def test_where_none_set_in_the_outlier_layer_is_taken() -> None:
    def rare(images: Tensor) -> edits.Step:
        """One patch of the first image of each batch, below 0.5 % of all."""

        def step(state: State) -> State:
            patches = state.patches_BND.clone()
            patches[0, 0] *= 30 if state.layer == 1 else 1
            return state.with_patches(patches)

        return step

    found = measured(asked(rare), on_outliers=("clamped",))
    assert found["interventions/layer"] == 4
    assert found["interventions/outlier_fraction"] == 1 / (IMAGES * PATCHES)


def test_the_subjects_rule_decides() -> None:
    assert measured(asked(planting(), tokens__outlier_rule="fixed", tokens__outlier_norm=1e6)) == {}


def test_layers_and_backbones_that_are_not_there_are_said() -> None:
    with pytest.raises(ValueError, match="layer 9 is not there; allowed: -5 to 4"):
        measured(asked(planting()), layer=9)
    own = Planted(lambda images: torch.ones(2, len(images), PATCHES, 8))
    with pytest.raises(ValueError, match="only the built-in ViT can be edited, and this backbone is a Planted"):
        measured(replace(asked(), backbone=own))


def test_a_whole_trial_reports_them(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    settings = {
        "model.num_registers": 2,
        "tokens.measurements": ["interventions", "test_time_registers"],
        "tokens.outlier_rule": "fixed",
        "tokens.outlier_norm": 1.0,
        "tokens.interventions.on_registers": ["shuffled"],
        "tokens.interventions.layer": 0,
    }
    _, reports = run({**tiny, **settings}, tmp_path, data_cache)
    named = {
        step: {name.split("/")[1] for name in found if name.startswith("interventions/")}
        for step, found in reports.items()
    }
    treated = {f"{who}_{how}" for who in ("outliers", "normal") for how in ("clamped", "neighbors", "deleted")}
    assert named.pop(12) == {"registers_shuffled", "layer", "outlier_fraction", *treated}
    assert not any(named.values())
    last = reports[12]
    assert last["interventions/registers_shuffled/test/linear/top1"] - last["test/linear/top1"] == pytest.approx(
        last["interventions/registers_shuffled/change/test/linear/top1"]
    )
    assert "test_time_registers/moved/change/test/linear/top1" in last
    with np.load(tmp_path / "test_time_registers.npz") as arrays:
        assert arrays["neurons"].shape == (10, 2)


def test_how_many_patches_are_treated_is_said_and_what_treats_none_is_absent(planted: dict[str, float]) -> None:
    share = planted["interventions/outlier_fraction"]
    for how in ("clamped", "neighbors", "deleted"):
        assert (
            planted[f"interventions/outliers_{how}/treated"] == planted[f"interventions/normal_{how}/treated"] == share
        )
    everything = asked(planting(), tokens__outlier_rule="fixed", tokens__outlier_norm=1e-6)
    found = metrics(list(interventions.measure(everything, InterventionsConfig())))
    done = {name.split("/")[1] for name in found} - {"layer", "outlier_fraction"}
    assert done == {"outliers_clamped"}  # no neighbours to average, no patch to be left, no normal one to compare with
    assert found["interventions/outliers_clamped/treated"] == 1.0


def test_outliers_of_a_variant_are_those_above_the_untouched_threshold(planted: dict[str, float]) -> None:
    """Clamping normal patches to the median narrows the bulk, and a threshold of its own would find more outliers."""
    given = asked(planting())
    fraction = interventions.every_metric(given, given.fitted or given.probes.fit(given.backbone), math.inf)
    assert fraction["tokens/last/outlier_fraction"] == 0.0
    limit = interventions.rule3_limit(given)
    layer = int(planted["interventions/layer"])
    threshold = given.threshold_of(given.patch_norms(layer))
    clamping = edits.treat_patches(
        layer, threshold, edits.clamped(float(np.median(given.patch_norms(layer)))), normal=lambda: given.generator("x")
    )
    norms = given.with_backbone(EditedViT(given.backbone, clamping)).patch_norms()
    assert given.edited(EditedViT(given.backbone, clamping)).threshold == given.threshold
    reported = planted["interventions/normal_clamped/tokens/last/outlier_fraction"]
    assert reported == pytest.approx(float((norms > limit).mean()), abs=0.02)
