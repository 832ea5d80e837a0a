"""Pictures of scores: differences with their intervals, scores side by side, and probes of local information."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.figures import intervals
from analysis.figures.intervals import Interval
from tests.analysis.drawing import leave_out_rendering, named, pictures_of
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep

BASELINE = {REGISTERS: 0}
MIOU, RMSE = "test/segmentation/miou", "test/depth/rmse"


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_rendering(monkeypatch)


@pytest.mark.usefixtures("unrendered")
def test_differences_and_intervals_are_those_of_the_table(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1, 2))
    drawn = named(pictures_of(publish(tmp_path / "s", trials, baseline=BASELINE)))["differences"]
    # −1, −1.05 and −1.15 points: Student's t interval with two degrees of freedom, 4.3027 · 0.07638 / √3 wide.
    assert "outlier fraction (last layer), difference in points: 1 register −1.07 [−1.26, −0.88]." in drawn.alternative
    assert "0 registers" not in drawn.alternative and "Student's t of paired differences" in drawn.caption


@pytest.mark.usefixtures("unrendered")
def test_one_seed_has_differences_without_intervals_and_no_baseline_has_none(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0,))
    drawn = named(pictures_of(publish(tmp_path / "one", trials, baseline=BASELINE)))["differences"]
    assert "4 registers −3.00." in drawn.alternative and "There are no intervals." in drawn.caption
    assert "differences" not in named(pictures_of(publish(tmp_path / "none", trials)))


def test_what_is_supported_is_filled() -> None:
    cells = [
        Interval("a", -0.02, -0.03, -0.01, supported=True),
        Interval("b", 0.01, -0.01, 0.03, supported=False),
        Interval("c", 0.01, None, None, supported=False),
    ]
    drawn = intervals.differences({TOP1: cells}, ["paired_t"])
    svg = drawn.svg.decode()
    assert all(f">{words}<" in svg for words in ("supported", "not supported", "no interval", "difference, points"))
    assert drawn.alternative.endswith("a −2.00 [−3.00, −1.00]; b +1.00 [−1.00, +3.00]; c +1.00.")
    assert ">supported<" not in intervals.differences({TOP1: cells[1:]}, ["paired_t"]).svg.decode()


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    trials = [
        Trial({"data.name": name, REGISTERS: count}, seed, {TOP1: 0.5 + 0.1 * seed * count, OUTLIERS: 0.01})
        for name in ("a <b>$x_1$\"'", "</svg><script>&")
        for count in (0, 4)
        for seed in (0, 1)
    ]
    for drawn in pictures_of(publish(tmp_path / "s", trials, baseline=BASELINE)).drawn:
        svg = drawn.svg.decode()
        assert "<b>" not in svg and "<script>" not in svg and svg.count("</svg>") == 1
        if drawn.name == "differences":
            assert "a &lt;b&gt;$x_1$" in svg


@pytest.mark.usefixtures("unrendered")
def test_of_300_cells_it_is_said_what_is_left_out(tmp_path: Path) -> None:
    trials = [
        Trial({"optim.lr": 0.001 * number, REGISTERS: count}, seed, {TOP1: 0.5 + 0.001 * number * seed, OUTLIERS: 0.01})
        for number in range(1, 151)
        for count in (0, 4)
        for seed in (0, 1)
    ]
    drawn = named(pictures_of(publish(tmp_path / "s", trials, baseline=BASELINE)))
    assert "The first 24 of 150 cells are drawn." in drawn["differences"].caption
    assert "The first 7 of 150 series are drawn." in drawn["cost_test_linear_top1"].caption
    assert "The first 7 of 150 series are drawn." in drawn["top1"].caption


@pytest.mark.usefixtures("unrendered")
def test_downstream_scores_stand_side_by_side_against_registers(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1))
    for trial in trials:
        trial.scores |= {MIOU: 0.3 + 0.01 * trial.cell[REGISTERS], RMSE: 0.5 - 0.1 * trial.seed}
    drawn = named(pictures_of(publish(tmp_path / "s", trials, baseline=BASELINE)))["downstream"]
    assert drawn.alternative == (
        "Top-1 (linear probe, test), %. Means. 0: 70.00 %; 4: 70.00 %. "
        "MIoU (linear segmentation, test), %. Means. 0: 30.00 %; 4: 34.00 %. "
        "RMSE (linear depth, test). Means. 0: 0.45; 4: 0.45."
    )
    assert "Fig. 8" in drawn.caption
    rates = [Trial({"optim.lr": rate}, 0, {TOP1: 0.5, MIOU: 0.3}) for rate in (0.1, 0.2)]
    assert "downstream" not in named(pictures_of(publish(tmp_path / "other", rates)))


@pytest.mark.usefixtures("unrendered")
def test_local_information_of_outliers_and_others(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1))
    for trial in trials:
        trial.scores |= {"locality/position/normal/top1": 0.4 + 0.02 * trial.seed, "locality/pixels/normal/l2": 16.0}
        if trial.cell[REGISTERS] == 0:
            trial.scores["locality/position/outlier/top1"] = 0.2
    drawn = named(pictures_of(publish(tmp_path / "s", trials, baseline=BASELINE)))["local_information"]
    assert drawn.alternative == (
        "Means of normal patches and of outliers. "
        "0: position probe, top-1, % 41.00 and 20.00, pixel probe, L2 error 16 and none; "
        "4: position probe, top-1, % 41.00 and none, pixel probe, L2 error 16 and none."
    )
    assert "Fig. 5b" in drawn.caption
