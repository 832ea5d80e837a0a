"""Sweeps of the paper's figures and tables: what they can show, what they cost, and their small twins."""

import re
from pathlib import Path

import pytest

from orchestrator.estimate import estimate
from orchestrator.plan import build_plan
from orchestrator.spec import read_sweep
from trainers.catalog import DATASETS, METHODS

PAPER = Path(__file__).parents[2] / "sweeps" / "paper"
FILES = sorted(PAPER.glob("*.yaml"))
SMALL = sorted((PAPER / "small").glob("*.yaml"))
LAB = sorted((PAPER.parent / "lab").glob("*.yaml"))
STATUS = re.compile(
    r"^# Status: (repeatable from released weights|retrainable at (?P<hours>[\d,]+) GPU-hours|not reproducible)",
    re.MULTILINE,
)


def test_every_figure_and_table_has_a_small_twin() -> None:
    assert FILES and [path.name for path in FILES] == [path.name for path in SMALL]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_of_the_paper_says_whether_its_cell_can_be_had_and_what_it_costs(path: Path) -> None:
    text = path.read_text()
    status = STATUS.search(text)
    assert status is not None and re.search(r"^# Expected cost: ", text, re.MULTILINE)
    plan = build_plan(read_sweep(path))
    assert plan.sweep.question and plan.sweep.name.startswith("paper_")
    trained = [trial for trial in plan.trials if METHODS[trial.config.method].trains]
    if trained:
        assert float(status["hours"].replace(",", "")) == pytest.approx(estimate(trained).gpu_hours, rel=0.03)
    for trial in plan.trials:
        assert DATASETS[trial.config.data.train].needs_root and trial.config.execution.data_root is not None
        assert trial.resources.gpus >= 1


@pytest.mark.parametrize("path", LAB, ids=lambda path: path.stem)
def test_a_sweep_of_a_lab_can_be_paid(path: Path) -> None:
    cost = re.search(r"^# Expected cost: (\d+) H100-hours\b.*?; (\d+) trials", path.read_text(), re.MULTILINE)
    plan = build_plan(read_sweep(path))
    assert cost is not None and int(cost[2]) == len(plan.trials)
    assert float(cost[1]) == pytest.approx(estimate(plan.trials).gpu_hours, rel=0.03) and float(cost[1]) <= 500
    assert {trial.config.model.num_registers for trial in plan.trials} == {0, 1, 4, 16}
    assert {trial.config.data.train for trial in plan.trials} == {"imagenet1k"}


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_a_small_twin_asks_the_same_of_models_that_train_here(path: Path) -> None:
    cost = re.search(
        r"^# Expected cost: (\d+) trials\b.*\bs on one core.* (\d+) minutes on", path.read_text(), re.MULTILINE
    )
    plan, paper = build_plan(read_sweep(path)), build_plan(read_sweep(PAPER / path.name))
    assert cost is not None and int(cost[1]) == len(plan.trials)
    assert {trial.config.data.train for trial in plan.trials} == {"scenes"}
    probed = set().union(*(trial.config.evaluation.probes for trial in plan.trials))
    assert set().union(*(trial.config.evaluation.probes for trial in paper.trials)) <= probed
    measured = set().union(*(trial.config.tokens.measurements for trial in plan.trials))
    assert set().union(*(trial.config.tokens.measurements for trial in paper.trials)) <= measured
    assert set(paper.sweep.primary) & set(plan.sweep.primary)


@pytest.mark.parametrize(
    "name",
    ["fig8_num_registers", "table2a_linear", "table3_object_discovery", "table4_aircraft", "table5_locality"],
)
def test_trials_that_are_named_by_their_ids_are_those_of_the_sweep_that_trains_them(name: str) -> None:
    trained = {
        trial.trial_id: trial.config.model
        for sweep in ("fig7_registers", "table2b_zero_shot")
        for trial in build_plan(read_sweep(PAPER / f"{sweep}.yaml")).trials
    }
    for trial in build_plan(read_sweep(PAPER / f"{name}.yaml")).trials:
        weights, model = trial.config.model.weights, trial.config.model
        assert weights is not None
        then = trained[weights]
        shared = ("size", "patch_size", "num_registers", "mlp", "norm_eps", "pre_norm", "pos_antialias", "pos_offset")
        assert {key: getattr(model, key) for key in shared} == {key: getattr(then, key) for key in shared}


def test_small_twins_share_their_trials() -> None:
    """So that all of them together train a third of what each would alone."""
    ids = [trial.trial_id for path in SMALL for trial in build_plan(read_sweep(path)).trials]
    assert len(set(ids)) < 0.6 * len(ids)
