"""The bias that compared trials share, on curves made up by hand; its rows, and the picture of the curves."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis import discovery_pictures
from analysis.cells import cells
from analysis.collect import collect
from analysis.discovery import common, comparisons, families, is_curve
from analysis.layout import arrange
from analysis.pictures import draw
from analysis.report import render
from analysis.results import evaluate
from analysis.scores import last_scores
from analysis.tables import ablation
from analysis.terminal import ablation_table, shown_metrics
from tests.analysis.fabricated import REGISTERS, Trial, publish

BASELINE = {REGISTERS: 0}
PROBE = "object_discovery"
VAL, TEST = "val/object_discovery/", "test/object_discovery/"


def curve(family: str, corloc: Mapping[float, float]) -> dict[str, float]:
    return {f"{family}bias_{bias}/corloc": value for bias, value in corloc.items()}


def trial(
    cell: Mapping[str, Any],
    seed: int,
    val: Mapping[float, float],
    test: Mapping[float, float],
    more: Mapping[str, float] | None = None,
    **config: Any,
) -> Trial:
    scores = curve(VAL, val) | curve(TEST, test) | {f"{TEST}corloc": max(test.values())} | dict(more or {})
    return Trial(dict(cell), seed, scores, config={name.replace("__", "."): value for name, value in config.items()})


def pair(**config: Any) -> list[Trial]:
    """Without registers the best bias is −1, with them 0, and on average −0.5; on test it would be another."""
    return [
        trial({REGISTERS: 0}, 0, {-1.0: 0.6, -0.5: 0.5, 0.0: 0.1}, {-1.0: 0.9, -0.5: 0.2, 0.0: 0.1}, **config),
        trial({REGISTERS: 4}, 0, {-1.0: 0.1, -0.5: 0.5, 0.0: 0.6}, {-1.0: 0.9, -0.5: 0.3, 0.0: 0.8}, **config),
    ]


def derived(
    folder: Path, trials: Sequence[Trial], baseline: Mapping[str, Any] | None = BASELINE
) -> dict[str, dict[str, float]]:
    scores = last_scores(collect(publish(folder, trials, baseline=baseline, primary=())))
    return {
        name: {trial_id: score.value for trial_id, score in by_trial.items()}
        for name, by_trial in scores.items()
        if "common_bias" in name
    }


def test_the_best_on_average_is_taken_for_all(tmp_path: Path) -> None:
    found = derived(tmp_path / "s", pair())
    assert found == {
        f"{TEST}common_bias": {"id-0-0": -0.5, "id-4-0": -0.5},
        f"{TEST}common_bias/corloc": {"id-0-0": 0.2, "id-4-0": 0.3},
        f"{VAL}common_bias": {"id-0-0": -0.5, "id-4-0": -0.5},
        f"{VAL}common_bias/corloc": {"id-0-0": 0.5, "id-4-0": 0.5},
    }


def test_where_trials_chose_on_test_images_so_does_the_common_bias(tmp_path: Path) -> None:
    found = derived(tmp_path / "s", pair(evaluation__object_discovery__protocol_splits=True))
    assert found[f"{TEST}common_bias/corloc"] == {"id-0-0": 0.9, "id-4-0": 0.9}
    assert set(found[f"{TEST}common_bias"].values()) == {-1.0}


def test_ties_go_to_the_bias_nearest_to_0(tmp_path: Path) -> None:
    flat = dict.fromkeys((-1.0, -0.2, 0.2, 1.0), 0.3)
    trials = [trial({REGISTERS: count}, 0, flat, flat) for count in (0, 4)]
    assert set(derived(tmp_path / "s", trials)[f"{TEST}common_bias"].values()) == {-0.2}
    # 0.1 + 0.2 is not 0.3 in binary: a tie all the same.
    trials = [
        trial({REGISTERS: 0}, 0, {-1.0: 0.1, 0.0: 0.3}, flat),
        trial({REGISTERS: 4}, 0, {-1.0: 0.2, 0.0: 0.0}, flat),
    ]
    assert set(derived(tmp_path / "binary", trials)[f"{VAL}common_bias"].values()) == {0.0}


def test_every_seed_counts_once(tmp_path: Path) -> None:
    """Two seeds at −1 weigh more than one at 0."""
    low, high = {-1.0: 0.5, 0.0: 0.2}, {-1.0: 0.1, 0.0: 0.5}
    trials = [trial({REGISTERS: 0}, seed, low, low) for seed in (0, 1)] + [trial({REGISTERS: 4}, 0, high, high)]
    assert set(derived(tmp_path / "s", trials)[f"{VAL}common_bias"].values()) == {-1.0}


def test_other_data_sets_take_the_bias_of_the_first(tmp_path: Path) -> None:
    trials = pair()
    for one, values in zip(trials, ({-1.0: 0.9, -0.5: 0.11}, {-1.0: 0.9, -0.5: 0.22}), strict=True):
        one.scores |= curve(f"{TEST}voc2012/", values)
    found = derived(tmp_path / "s", trials)
    assert found[f"{TEST}voc2012/common_bias/corloc"] == {"id-0-0": 0.11, "id-4-0": 0.22}
    assert set(found[f"{TEST}voc2012/common_bias"].values()) == {-0.5}


def test_methods_and_kinds_of_features_are_compared_apart(tmp_path: Path) -> None:
    """Each method's pair has its own bias, also where a baseline is declared that all cells would share."""
    first, second = {-1.0: 0.5, 0.0: 0.1}, {-1.0: 0.1, 0.0: 0.5}
    trials = [
        trial({"method": method, REGISTERS: count}, 0, values, values)
        for method, values in (("deit3", first), ("dino", second))
        for count in (0, 4)
    ]
    expected = {"id-deit3-0-0": -1.0, "id-deit3-4-0": -1.0, "id-dino-0-0": 0.0, "id-dino-4-0": 0.0}
    for number, baseline in enumerate((BASELINE, None, {"method": "deit3", REGISTERS: 0})):
        assert derived(tmp_path / f"{number}", trials, baseline)[f"{VAL}common_bias"] == expected
    third = {-1.0: 0.2, 0.0: 0.3}  # alone it would take 0
    weights = [
        trial({"model.weights": f"{kind}{count}"}, 0, values, values, evaluation__object_discovery__features=kind)
        for kind, of_counts in (("values", (first, third)), ("keys", (second, second)))
        for count, values in zip((0, 4), of_counts, strict=True)
    ]
    for number, weight in enumerate(weights):
        weight.config[REGISTERS] = 4 * (number % 2)
    for name, baseline in (("pretrained", {"model.weights": "keys0"}), ("alone", None)):
        found = derived(tmp_path / name, weights, baseline)[f"{VAL}common_bias"]
        assert found == {"id-values0-0": -1.0, "id-values4-0": -1.0, "id-keys0-0": 0.0, "id-keys4-0": 0.0}


def test_an_idle_setting_does_not_part_a_pair(tmp_path: Path) -> None:
    """Without registers there is no deviation of their start: (0, null) is compared with (4, 0.02)."""
    axes = (REGISTERS, "model.reg_init_std")
    trials = [
        trial(dict(zip(axes, values, strict=True)), 0, corloc, corloc)
        for values, corloc in (((0, None), {-1.0: 0.6, 0.0: 0.1}), ((4, 0.02), {-1.0: 0.2, 0.0: 0.4}))
    ]
    for name, baseline in (("with", BASELINE), ("without", None)):
        assert set(derived(tmp_path / name, trials, baseline)[f"{VAL}common_bias"].values()) == {-1.0}


def test_a_baseline_of_another_axis_shares_its_bias(tmp_path: Path) -> None:
    trials = pair()
    for one, sink in zip(trials, ("none", "softmax1"), strict=True):
        one.cell = {"model.sink": sink}
    found = derived(tmp_path / "s", trials, {"model.sink": "none"})
    assert set(found[f"{VAL}common_bias"].values()) == {-0.5}


def test_only_biases_that_all_trials_have_and_finite_numbers_count(tmp_path: Path) -> None:
    trials = [
        trial({REGISTERS: 0}, 0, {-1.0: 0.9, -0.5: 0.8, 0.0: 0.1}, {-0.5: 0.8, 0.0: 0.1}),
        trial({REGISTERS: 4}, 0, {-0.5: float("nan"), 0.0: 0.1}, {0.0: 0.1}),
        Trial({REGISTERS: 8}, 0, {"train/loss": 1.0}),  # without the probe
        trial({REGISTERS: 8}, 1, {-0.5: 0.9}, {-0.5: 0.9}),
    ]
    trials[3].status = "failed"
    found = derived(tmp_path / "s", trials)
    assert found[f"{VAL}common_bias"] == {"id-0-0": 0.0, "id-4-0": 0.0}
    assert found[f"{TEST}common_bias/corloc"] == {"id-0-0": 0.1, "id-4-0": 0.1}
    apart = [trial({REGISTERS: count}, 0, {bias: 0.5}, {bias: 0.5}) for count, bias in ((0, -1.0), (4, 0.0))]
    frames = collect(publish(tmp_path / "apart", apart, baseline=BASELINE))
    assert common(frames, last_scores(frames)) == {}
    assert [comparison.bias for comparison in comparisons(frames, last_scores(frames))] == [None]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("test/object_discovery/bias_-0.5/corloc", True),
        ("val/object_discovery/voc2012/bias_1e-05/corloc", True),
        ("interventions/registers_zeroed/change/test/object_discovery/bias_0.0/corloc", True),
        ("test/object_discovery/corloc", False),
        ("test/object_discovery/bias", False),
        ("test/object_discovery/common_bias/corloc", False),
        ("test/other/bias_0.0/corloc", False),
    ],
)
def test_what_belongs_to_a_curve(metric: str, expected: bool) -> None:
    assert is_curve(metric) == expected


def test_curves_of_edited_models_are_none_of_the_trial(tmp_path: Path) -> None:
    trials = pair()
    trials[0].scores |= curve(f"interventions/registers_zeroed/{TEST}", {-0.5: 0.7})
    frames = collect(publish(tmp_path / "s", trials, baseline=BASELINE))
    assert list(families(last_scores(frames))) == [TEST, VAL]
    assert list(families(last_scores(frames))[TEST]) == [-1.0, -0.5, 0.0]


def test_the_ablation_has_all_and_what_is_shown_has_no_curve(tmp_path: Path) -> None:
    frames = collect(publish(tmp_path / "s", pair(), baseline=BASELINE, primary=()))
    scores = last_scores(frames)
    table = ablation(frames, scores=scores)
    rows = {(row[REGISTERS], row["metric"]): row for row in table.to_pylist()}
    assert rows[4, f"{TEST}common_bias/corloc"]["delta"] == pytest.approx(0.1)
    assert rows[4, f"{TEST}bias_-1.0/corloc"]["mean"] == 0.9
    assert shown_metrics(frames.plan, table.to_pylist()) == [
        f"{TEST}common_bias",
        f"{TEST}common_bias/corloc",
        f"{TEST}corloc",
    ]
    results = evaluate(frames)
    page = render(results, draw(results).drawn, ())
    assert "CorLoc (common bias, LOST, test)" in page and "bias −1.0" not in page
    assert ablation_table(frames.plan, table.to_pylist(), [REGISTERS]).row_count == 2


def test_the_picture_of_curves(tmp_path: Path) -> None:
    trials = [
        trial({"method": method, REGISTERS: count}, seed, {-1.0: 0.2, 0.0: 0.1}, {-1.0: 0.4 + 0.1 * seed, 0.0: 0.1})
        for method in ("deit3", "dino")
        for count in (0, 4)
        for seed in (0, 1)
    ]
    trials[0].scores[f"{TEST}bias_0.0/corloc"] = float("nan")  # of one seed: the other stands for both
    for one in trials:
        one.scores |= curve(f"{TEST}voc2012/", {-300.0: 0.3, 0.0: 0.2})
    frames = collect(publish(tmp_path / "s", trials, baseline=BASELINE))
    drawn = {one.name: one for one in draw(evaluate(frames)).drawn if one.group == "Object discovery"}
    assert list(drawn) == ["corloc_by_bias", "corloc_by_bias_voc2012"]
    first = drawn["corloc_by_bias"]
    assert "nan" not in first.svg.decode().lower()
    line = "{} registers: best 45.00 % at a bias of -1"
    for method in ("deit3", "dino"):
        words = f"{method}: {line.format(0)}, {line.format(4)}, common bias -1"
        assert words in first.alternative
    svg = first.svg.decode()
    assert all(text in svg for text in ("deit3", "dino", "0 registers", "4 registers", "common bias", "CorLoc, %"))
    assert struct.unpack(">I", first.png[16:20])[0] > 300
    assert "voc2012" in drawn["corloc_by_bias_voc2012"].title
    other = drawn["corloc_by_bias_voc2012"].svg.decode()
    assert all(f">{tick}<" in other for tick in ("−100", "−10", "0", "10")) and ">−1<" not in other
    assert "best 30.00 % at a bias of -300" in drawn["corloc_by_bias_voc2012"].alternative


def test_no_picture_without_curves(tmp_path: Path) -> None:
    trials = [Trial({REGISTERS: count}, 0, {"test/linear/top1": 0.5}) for count in (0, 4)]
    frames = collect(publish(tmp_path / "s", trials, baseline=BASELINE))
    assert not [one for one in draw(evaluate(frames)).drawn if one.group == "Object discovery"]
    assert common(frames, last_scores(frames)) == {}
    assert arrange(frames).axis == REGISTERS


def test_a_seed_that_is_not_finite_is_left_out_of_its_line(tmp_path: Path) -> None:
    trials = [
        trial({REGISTERS: 0}, seed, {0.0: 0.1}, {-1.0: value, 0.0: 0.3}) for seed, value in ((0, 0.2), (1, math.nan))
    ]
    frames = collect(publish(tmp_path / "s", trials, baseline=BASELINE))
    curve_of = families(last_scores(frames))[TEST]
    (line,) = discovery_pictures._lines(cells(frames.plan), arrange(frames), curve_of)
    assert (line.biases, line.values) == ([-1.0, 0.0], [[0.2], [0.3, 0.3]])
