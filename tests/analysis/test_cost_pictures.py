"""Pictures of cost: what cells paid, which of them no other beats, and what registers add."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.cost_pictures import pareto
from analysis.directions import HIGHER, LOWER
from analysis.figures.cost import CostPoint
from analysis.flops import Shape, forward_flops
from tests.analysis.drawing import leave_out_rendering, named, pictures_of
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep

BASELINE = {REGISTERS: 0}
NANO = Shape(width=64, depth=4, patch_size=8, image_size=32)


@pytest.fixture(autouse=True)
def unrendered(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "rendered" not in request.keywords:
        leave_out_rendering(monkeypatch)


def plan_costs(folder: Path, flops: Callable[[Mapping[str, Any]], float]) -> Path:
    """Adds to the plan what training costs each cell, and the shapes of models."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    for trial in plan["trials"]:
        trial["training_flops"] = flops(trial["cell"])
    plan["model_sizes"] = {"nano": {"width": NANO.width, "depth": NANO.depth}}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return folder


def sized(trials: list[Trial]) -> list[Trial]:
    for trial in trials:
        trial.config |= {"model.image_size": 32, "optim.batch_size": 64}
    return trials


def of_training(cell: Mapping[str, Any], crops: int = 1) -> float:
    """20 steps of 64 images, forward and backward."""
    return 20 * 64 * 3 * crops * forward_flops(NANO, cell[REGISTERS])


def test_scores_stand_against_flops_and_core_time(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1, 4), seeds=(0, 1))
    folder = plan_costs(publish(tmp_path / "s", trials, baseline=BASELINE), lambda cell: 1e12 * (1.0 + cell[REGISTERS]))
    drawn = named(pictures_of(folder))["cost_test_linear_top1"]
    # Top-1 is 0.71 and 0.69 with 0 and with 4 registers, 0.69 and 0.704 with 1.
    assert (
        "Training per trial, TFLOP. 0: 70.00 for 1 (on the Pareto front); 1: 69.70 for 2; 4: 70.00 for 5."
        in drawn.alternative
    )
    # All trials took 36 s on two threads: both of the best are on the front.
    assert (
        "CPU core minutes per trial. 1: 69.70 for 1.2; 0: 70.00 for 1.2 (on the Pareto front); "
        "4: 70.00 for 1.2 (on the Pareto front)." in drawn.alternative
    )
    assert "Beside points stands their number of registers." in drawn.caption


def test_less_is_better_of_outliers(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0,))
    folder = plan_costs(publish(tmp_path / "s", trials, baseline=BASELINE), lambda cell: 1e9 * (2.0 - cell[REGISTERS]))
    drawn = named(pictures_of(folder))["cost_tokens_last_outlier_fraction"]
    assert "GFLOP. 1: 4.00 for 1 (on the Pareto front); 0: 5.00 for 2." in drawn.alternative


def test_gpu_hours_stand_alone_and_both_kinds_are_not_mixed(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0,))
    for trial in trials:
        trial.result = {"gpu_seconds": 7200.0 * (1 + trial.cell[REGISTERS]), "device": "NVIDIA H100"}
    pictures = pictures_of(publish(tmp_path / "gpu", trials, baseline=BASELINE))
    assert "GPU hours per trial. 0: 71.00 for 2 " in named(pictures)["cost_test_linear_top1"].alternative
    assert "Training" not in named(pictures)["cost_test_linear_top1"].alternative  # no FLOPs in the plan
    trials[0].result = {"gpu_seconds": 0.0}
    mixed = pictures_of(publish(tmp_path / "mixed", trials, baseline=BASELINE))
    assert mixed.problems == ("scores against hours are not drawn: some trials ran on GPUs and some did not",)
    assert not [name for name in named(mixed) if name.startswith("cost_")]


def test_trials_without_a_record_or_a_score_do_not_count(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1))
    trials[0].result = {"seconds": None}
    trials[2].status = "diverged"
    del trials[3].scores[TOP1]
    drawn = named(pictures_of(publish(tmp_path / "s", trials, baseline=BASELINE)))["cost_test_linear_top1"]
    assert drawn.alternative == "CPU core minutes per trial. 0: 69.00 for 1.2 (on the Pareto front)."
    assert "Beside points" not in drawn.caption


@pytest.mark.parametrize("better", [HIGHER, LOWER])
def test_the_front_is_that_of_comparing_all_pairs(better: int) -> None:
    rng = np.random.default_rng(0)
    places = rng.integers(0, 6, size=(40, 2)).tolist()
    points = [CostPoint("", "", (cost,) * 3, (score,) * 3, best=False) for cost, score in places]
    expected = [
        not any(
            (c <= cost and better * s >= better * score) and (c < cost or better * s > better * score)
            for c, s in places
        )
        for cost, score in places
    ]
    assert [point.best for point in pareto(points, better)] == expected
    assert 0 < sum(expected) < len(expected)


def test_the_price_of_registers_by_formula_and_as_planned(tmp_path: Path) -> None:
    trials = sized(registers_sweep(counts=(0, 1, 4), seeds=(0,)))
    folder = plan_costs(publish(tmp_path / "s", trials, baseline=BASELINE), of_training)
    drawn = named(pictures_of(folder))["price_of_registers"]
    # 64 of 213,568 parameters; 7,802,880 FLOPs instead of 7,373,824. Only counts up to the sweep's highest.
    assert drawn.alternative == (
        "nano, 32 px, more than without registers: parameters 1: 0.03 %, 2: 0.0599 %, 4: 0.12 %; "
        "forward pass 1: 5.82 %, 2: 11.7 %, 4: 23.4 %; training 1: 5.82 %, 4: 23.4 %."
    )


def test_the_price_is_one_of_images_however_long_trials_are(tmp_path: Path) -> None:
    """Where cells train as many FLOPs by fewer steps, a register costs no less."""
    trials = sized(registers_sweep(counts=(0, 4), seeds=(0,)))
    trials[1].config["optim.steps"] = 10
    folder = plan_costs(publish(tmp_path / "s", trials, baseline=BASELINE), lambda cell: 1e9)
    assert "training 4: 100 %" in named(pictures_of(folder))["price_of_registers"].alternative


def test_models_that_cost_alike_are_one_line_and_methods_differ(tmp_path: Path) -> None:
    trials = sized(
        [
            Trial({"method": method, "optim.lr": rate, REGISTERS: count}, 0, {TOP1: 0.5, OUTLIERS: 0.0})
            for method in ("deit3", "dinov2")
            for rate in (0.1, 0.2)
            for count in (0, 4)
        ]
    )
    folder = plan_costs(
        publish(tmp_path / "s", trials, baseline=BASELINE),
        lambda cell: of_training(cell) + (of_training({REGISTERS: 0}) if cell["method"] == "dinov2" else 0.0),
    )
    words = named(pictures_of(folder))["price_of_registers"].alternative
    assert words.count("more than without registers") == 2
    assert "deit3, lr = 0.1 and 1 more, more than" in words and "dinov2, lr = 0.1 and 1 more, more than" in words
    assert "training 4: 23.4 %" in words and "training 4: 11.7 %" in words


def test_nothing_is_priced_where_nothing_is_known(tmp_path: Path) -> None:
    assert "price_of_registers" not in named(pictures_of(publish(tmp_path / "a", registers_sweep(seeds=(0,)))))
    rates = [Trial({"optim.lr": rate}, 0, {TOP1: 0.5}) for rate in (0.1, 0.2)]
    folder = plan_costs(publish(tmp_path / "b", sized(rates), baseline={"optim.lr": 0.1}), lambda cell: 1e9)
    assert "price_of_registers" not in named(pictures_of(folder))
    assert "cost_test_linear_top1" in named(pictures_of(folder))
    unknown = sized(registers_sweep(counts=(0, 4), seeds=(0,)))
    for trial in unknown:
        trial.config["model.size"] = "mine"
    folder = plan_costs(publish(tmp_path / "c", unknown, baseline=BASELINE), of_training)
    words = named(pictures_of(folder))["price_of_registers"].alternative
    assert words == "all, more than without registers: training 4: 23.4 %."
