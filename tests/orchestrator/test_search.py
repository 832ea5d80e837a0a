"""Searches from the first suggestion to the chosen rows, with a real ledger and an objective played by hand."""

import json
import math
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator import room
from orchestrator.ledger import Ledger, TrialRow
from orchestrator.plan import Plan, build_plan
from orchestrator.search import SearchGrowth
from orchestrator.search_plan import PENDING, expected, plan_json
from orchestrator.sweep import Resources, Scheduler, Sweep

TINY = {"preset": "short", "model.size": "nano", "model.patch_size": 8}
LR = {"low": 1e-5, "high": 1e-1, "log": True}
METRIC = "val/knn/top1"

Ending = tuple[str, dict[str, float]]  # state, last metrics
Objective = Callable[[Mapping[str, Any], int], Ending]  # of the nested configuration and the seed


def sweep(space: Mapping[str, Any] | None = None, **parts: Any) -> Sweep:
    search = {"name": "tpe", "samples": 4, "metric": METRIC, "startup": 2, "space": space or {"optim.lr": LR}}
    search |= {key: parts.pop(key) for key in list(parts) if key in ("samples", "parallel", "mode", "warm_start")}
    search |= {key: parts.pop(key) for key in list(parts) if key in ("metric", "startup")}
    search |= {"name": parts.pop("sampler", "tpe")} | ({"seeds": s} if (s := parts.pop("search_seeds", None)) else {})
    raw = {"name": "example", "trial": TINY, "axes": {"model.num_registers": (0, 4)}, "seeds": (0, 1), **parts}
    return Sweep.model_validate({**raw, "search": search})


def quadratic(config: Mapping[str, Any], seed: int) -> Ending:
    """Best at lr = 1e-3; each seed adds a little."""
    return "finished", {METRIC: 1 - (math.log10(config["optim"]["lr"]) + 3) ** 2 + seed / 1e6}


class Killed(BaseException):
    """The driver's process ended here."""


class Fragile(Ledger):
    """A ledger whose process is killed after so many changes have reached the disk."""

    left = 10**9

    def _change(self, *, durable: bool = True) -> Any:
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super()._change(durable=durable)


class Driver:
    """What the driver does with a growth: one trial at a time in the order of the plan, until nothing is left."""

    def __init__(self, folder: Path, objective: Objective = quadratic) -> None:
        self.path = folder / "example" / "ledger.db"
        self.state = folder
        self.objective = objective
        self.ran: list[str] = []

    def run(self, asked: Sweep, changes: int = 10**9, rerun: bool = False) -> SearchGrowth:
        """One run of the command, which is killed once it has made so many changes."""
        plan = build_plan(asked)
        ledger = Fragile.open(self.path)
        ledger.left = changes
        try:
            growth = SearchGrowth(plan, self.state)
            ledger.release_running()
            ledger.plan(plan.trials)
            for trial_id in growth.restart(ledger, everything=rerun):
                ledger.reset(trial_id)
            while True:
                while new := growth.more(ledger):
                    ledger.add(new)
                row = next((row for row in ledger.rows() if row.state == "planned"), None)
                if row is None:
                    assert growth.is_over(ledger)
                    return growth
                assert not (row.role == "search" and growth.is_over(ledger))
                self._train(ledger, row)
        finally:
            ledger.close()

    def _train(self, ledger: Ledger, row: TrialRow) -> None:
        self.ran.append(row.trial_id)
        number = row.attempts + 1
        ledger.start_attempt(row.trial_id, number, "host", 1)
        state, metrics = self.objective(row.config, row.seed)
        ledger.record_many(row.trial_id, number, [(10, dict.fromkeys(metrics, 0.0)), (20, metrics)])
        assert ledger.finish(row.trial_id, number, state, {}, None)  # type: ignore[arg-type]

    def rows(self) -> list[TrialRow]:
        with Ledger.open(self.path, writer=False) as ledger:
            return ledger.rows()

    def found(self, asked: Sweep) -> dict[str, Any]:
        """What ends up in plan.json."""
        with Ledger.open(self.path, writer=False) as ledger:
            content = plan_json(build_plan(asked), ledger.rows(), ledger)
        return dict(json.loads(json.dumps(content, allow_nan=False)))


def test_a_search_ends_with_the_best_of_each_cell_on_the_seeds_of_the_sweep(tmp_path: Path) -> None:
    driver, asked = Driver(tmp_path), sweep()
    plan = build_plan(asked)
    assert plan.trials == ()
    assert plan.cells == ({"model.num_registers": 0}, {"model.num_registers": 4})
    driver.run(asked)
    rows = driver.rows()
    assert [(row.role, row.state) for row in rows].count(("search", "finished")) == 8  # 2 cells of 4
    assert [(row.role, row.state) for row in rows].count(("cell", "finished")) == 4  # 2 cells of 2 seeds
    assert {row.seed for row in rows if row.role == "search"} == {1000}
    assert {row.seed for row in rows if row.role == "cell"} == {0, 1}
    for cell in plan.cells:
        own = [row for row in rows if row.cell == cell]
        tried = {row.config["optim"]["lr"] for row in own if row.role == "search"}
        chosen = {row.config["optim"]["lr"] for row in own if row.role == "cell"}
        assert len(tried) == 4
        assert chosen == {min(tried, key=lambda lr: abs(math.log10(lr) + 3))}
    assert "deit3 nano reg4 seed1000 sample3" in {row.name for row in rows}
    assert "deit3 nano reg4 seed1" in {row.name for row in rows}


def test_running_it_again_runs_nothing_and_more_samples_go_on(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    driver.run(sweep())
    before, ran = driver.rows(), len(driver.ran)
    driver.run(sweep())
    assert len(driver.ran) == ran
    assert {row.trial_id for row in driver.rows()} == {row.trial_id for row in before}
    driver.run(sweep(samples=6))
    searched = [row for row in driver.rows() if row.role == "search"]
    assert len(searched) == 12
    assert {row.trial_id for row in before if row.role == "search"} <= {row.trial_id for row in searched}
    alone = Driver(tmp_path / "alone")
    alone.run(sweep(samples=6))
    assert {row.trial_id for row in alone.rows()} == {row.trial_id for row in driver.rows()}
    driver.run(sweep())
    assert {row.trial_id for row in driver.rows()} == {row.trial_id for row in before}  # of the first 4 again


def test_another_space_base_or_seed_is_another_study(tmp_path: Path) -> None:
    growths = [
        SearchGrowth(build_plan(asked), tmp_path)
        for asked in (
            sweep(),
            sweep(samples=9, parallel=3),
            sweep(seeds=(0, 1, 2)),
            sweep(trial={**TINY, "execution.threads": 3}),
            sweep({"optim.lr": {**LR, "high": 0.2}}),
            sweep(trial={**TINY, "optim.steps": 99}),
            sweep(search_seeds=[7]),
            sweep(mode="min"),
            sweep(seeds=(0, 1000)),  # so that suggestions get seed 1001
        )
    ]
    studies = [[cell.study for cell in growth.cells] for growth in growths]
    assert studies[0] == studies[1] == studies[2] == studies[3]
    assert len({study for pair in studies[3:] for study in pair}) == 12


def test_a_value_is_the_mean_over_the_seeds_that_are_set_aside(tmp_path: Path) -> None:
    def objective(config: Mapping[str, Any], seed: int) -> Ending:
        steep = {0.1: {7: 0.9, 8: 0.1}, 0.2: {7: 0.6, 8: 0.5}}
        return "finished", {METRIC: steep[config["optim"]["lr"]].get(seed, 0.0)}

    driver = Driver(tmp_path, objective)
    asked = sweep({"optim.lr": {"choices": [0.1, 0.2]}}, sampler="grid", samples=None, search_seeds=[7, 8])
    driver.run(asked)
    found = driver.found(asked)
    values = {entry["params"]["optim.lr"]: entry["values"] for entry in found["search"]}
    assert values == {0.1: {METRIC: 0.5}, 0.2: {METRIC: 0.55}}
    assert [entry["params"]["optim.lr"] for entry in found["search"] if entry["chosen"]] == [0.2, 0.2]
    assert all(len(entry["trials"]) == 2 for entry in found["search"])


def test_a_suggestion_waits_for_space_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_TRY_SECONDS", 0.0)
    keep, full = Ledger.append_event, [True, True]

    def keep_when_there_is_room(self: Ledger, study: str, event: Mapping[str, Any]) -> None:
        if full:
            full.pop()
            raise sqlite3.OperationalError("database or disk is full")
        keep(self, study, event)

    undisturbed, driver = Driver(tmp_path / "undisturbed"), Driver(tmp_path / "full")
    undisturbed.run(sweep())
    monkeypatch.setattr(Ledger, "append_event", keep_when_there_is_room)
    driver.run(sweep())
    assert full == [] and driver.ran == undisturbed.ran


def test_less_is_better_with_mode_min(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    asked = sweep({"optim.lr": {"choices": [1e-3, 1e-2, 1e-1]}}, sampler="grid", samples=None, mode="min")
    driver.run(asked)
    assert {row.config["optim"]["lr"] for row in driver.rows() if row.role == "cell"} == {1e-1}


ENDINGS: dict[str, tuple[Ending, str, str | None]] = {
    "failed": (("failed", {METRIC: 9.0}), "fail", "failed"),
    "diverged": (("diverged", {METRIC: 9.0}), "fail", "diverged"),
    "stopped": (("stopped", {METRIC: 9.0}), "fail", "stopped"),
    "pruned": (("pruned", {METRIC: 9.0}), "pruned", "pruned"),
    "pruned before any value": (("pruned", {}), "pruned", "pruned"),
    "without the metric": (("finished", {"val/other/top1": 9.0}), "fail", f"no finite {METRIC}"),
    "not a number": (("finished", {METRIC: math.nan}), "fail", f"no finite {METRIC}"),
    "infinite": (("finished", {METRIC: math.inf}), "fail", f"no finite {METRIC}"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_what_did_not_finish_is_never_chosen(case: str, tmp_path: Path) -> None:
    ending, state, reason = ENDINGS[case]

    def objective(config: Mapping[str, Any], seed: int) -> Ending:
        return ending if config["optim"]["lr"] == 0.01 and seed == 8 else ("finished", {METRIC: 0.5})

    driver = Driver(tmp_path, objective)
    asked = sweep({"optim.lr": {"choices": [0.01, 0.02, 0.03]}}, sampler="grid", samples=None, search_seeds=[7, 8])
    driver.run(asked)
    search = driver.found(asked)["search"]
    found = {(entry["state"], entry["reason"]) for entry in search if entry["params"]["optim.lr"] == 0.01}
    assert found == {(state, reason)}
    assert not any(entry["chosen"] or entry["pareto_front"] for entry in search if entry["state"] != "complete")
    assert {row.config["optim"]["lr"] for row in driver.rows() if row.role == "cell"} <= {0.02, 0.03}


def test_a_cell_without_any_finished_suggestion_has_no_row_until_it_is_searched_anew(tmp_path: Path) -> None:
    broken = True

    def objective(config: Mapping[str, Any], seed: int) -> Ending:
        return ("failed", {}) if config["model"]["num_registers"] == 4 and broken else quadratic(config, seed)

    driver, asked = Driver(tmp_path, objective), sweep()
    growth = driver.run(asked)
    with Ledger.open(driver.path, writer=False) as ledger:
        assert growth.barren(ledger) == [
            "{model.num_registers: 4} has no row: none of 4 suggestions finished (4 failed)"
        ]
    trials = driver.found(asked)["trials"]
    assert [(trial["cell"]["model.num_registers"], trial["seed"]) for trial in trials] == [
        (0, 0), (0, 1), (4, 0), (4, 1),
    ]  # fmt: skip
    assert [trial["trial_id"].startswith(PENDING) for trial in trials] == [False, False, True, True]
    broken, whole = False, Driver(tmp_path / "whole")
    driver.run(asked)
    whole.run(asked)
    assert {row.trial_id for row in driver.rows()} == {row.trial_id for row in whole.rows()}
    assert not any(trial["trial_id"].startswith(PENDING) for trial in driver.found(asked)["trials"])


def test_rerun_searches_anew_and_runs_everything_again(tmp_path: Path) -> None:
    driver, asked = Driver(tmp_path), sweep()
    driver.run(asked)
    before = driver.found(asked)
    searched = sum(row.role == "search" for row in driver.rows())
    driver.ran.clear()
    driver.run(asked, rerun=True)
    assert len(driver.ran) == searched  # the driver itself resets the trials of cells
    assert driver.found(asked) == before


def test_equal_suggestions_are_one_trial_that_is_told_as_often(tmp_path: Path) -> None:
    driver = Driver(tmp_path)
    asked = sweep({"optim.lr": {"choices": [1e-3, 1e-2]}}, sampler="random", samples=8)
    driver.run(asked)
    assert len(driver.ran) == len(set(driver.ran)) == 2 * (2 + 2)
    search = driver.found(asked)["search"]
    assert len(search) == 16
    assert {entry["state"] for entry in search} == {"complete"}


def test_impossible_suggestions_are_told_and_the_search_goes_on(tmp_path: Path) -> None:
    space = {"optim.steps": {"choices": [10, 1000]}, "optim.warmup_steps": {"choices": [5, 500]}}
    asked = sweep(space, sampler="grid", samples=None)
    driver = Driver(tmp_path, lambda config, seed: ("finished", {METRIC: config["optim"]["steps"] / 1e4}))
    driver.run(asked)
    search = driver.found(asked)["search"]
    wrong = [entry for entry in search if entry["state"] == "fail"]
    assert [entry["params"] for entry in wrong] == [{"optim.steps": 10, "optim.warmup_steps": 500}] * 2
    assert {entry["reason"] for entry in wrong} == {"impossible: optim.warmup_steps 500 is more than optim.steps 10"}
    assert [entry["trials"] for entry in wrong] == [[], []]
    assert sum(row.role == "search" for row in driver.rows()) == 6


def test_several_metrics_keep_the_whole_front(tmp_path: Path) -> None:
    values = {1e-4: (0.9, 0.1), 1e-3: (0.5, 0.5), 1e-2: (0.4, 0.4), 1e-1: (0.1, 0.9)}
    metrics = [METRIC, "val/linear/top1"]

    def objective(config: Mapping[str, Any], seed: int) -> Ending:
        return "finished", dict(zip(metrics, values[config["optim"]["lr"]], strict=True))

    driver = Driver(tmp_path, objective)
    asked = sweep({"optim.lr": {"choices": list(values)}}, sampler="grid", samples=None, metric=metrics)
    driver.run(asked)
    search = [entry for entry in driver.found(asked)["search"] if entry["cell"] == {"model.num_registers": 0}]
    assert {entry["params"]["optim.lr"] for entry in search if entry["pareto_front"]} == {1e-4, 1e-3, 1e-1}
    assert [entry["params"]["optim.lr"] for entry in search if entry["chosen"]] == [1e-4]


def test_a_grid_is_cut_by_samples_and_ends_by_itself(tmp_path: Path) -> None:
    space = {"optim.lr": {"choices": [1e-4, 1e-3, 1e-2]}, "optim.steps": {"low": 10, "high": 20, "step": 5}}
    driver = Driver(tmp_path)
    driver.run(sweep(space, sampler="grid", samples=4))
    some = {row.trial_id for row in driver.rows() if row.role == "search"}
    assert len(some) == 2 * 4
    driver.run(sweep(space, sampler="grid", samples=100))
    assert len({row.trial_id for row in driver.rows() if row.role == "search"}) == 2 * 9
    assert some < {row.trial_id for row in driver.rows()}


def test_as_many_suggestions_are_open_as_may_run_at_the_same_time(tmp_path: Path) -> None:
    plan = build_plan(sweep(samples=5, parallel=3))
    growth = SearchGrowth(plan, tmp_path)
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        first = growth.more(ledger)
        assert [trial.name[-7:] for trial in first] == ["sample0", "sample1", "sample2"] * 2
        ledger.add(first)
        assert growth.more(ledger) == []
        for trial in first[1:3]:  # out of order
            ledger.start_attempt(trial.trial_id, 1, "host", 1)
            ledger.record(trial.trial_id, 1, 20, {METRIC: 0.5})
            ledger.finish(trial.trial_id, 1, "finished", {}, None)
        assert [trial.name[-7:] for trial in growth.more(ledger)] == ["sample3", "sample4"]
        assert not growth.is_over(ledger)


def test_a_search_learns_from_an_earlier_sweep_once(tmp_path: Path) -> None:
    earlier = Driver(tmp_path)
    shorter = sweep(samples=12, trial={**TINY, "optim.steps": 50}, axes={"model.num_registers": (4, 8)})
    earlier.run(shorter)
    asked = sweep(name="later", warm_start=["example"])
    later = Driver(tmp_path)
    later.path = tmp_path / "later" / "ledger.db"
    later.run(asked)
    plan = build_plan(asked)
    with Ledger.open(later.path, writer=False) as ledger:
        studies = [cell.study for cell in SearchGrowth(plan, tmp_path).cells]
        events = [ledger.events(study) for study in studies]
    assert [event["kind"] for event in events[0]][:3] == ["warm", "ask", "tell"]
    assert events[0][0]["samples"] == []  # no cell of 0 registers
    known = events[1][0]["samples"]
    rows = [row for row in earlier.rows() if row.role == "search" and row.cell == {"model.num_registers": 4}]
    assert [sample["params"] for sample in known] == [{"optim.lr": row.config["optim"]["lr"]} for row in rows]
    assert known[0]["values"] == [quadratic(rows[0].config, 1000)[1][METRIC]]
    cold = Driver(tmp_path / "cold")
    cold.run(sweep())
    with Ledger.open(cold.path, writer=False) as ledger:
        first = ledger.events(SearchGrowth(build_plan(sweep()), tmp_path).cells[1].study)[0]
    assert events[1][1] != first  # what it learnt made it suggest something else
    earlier.path.unlink()
    later.ran.clear()
    later.run(asked)  # the earlier sweep is not needed any more
    assert later.ran == []


def test_a_sweep_to_learn_from_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"search\.warm_start names nowhere: there is no ledger at"):
        Driver(tmp_path).run(sweep(warm_start=["nowhere"]))


def test_resources_follow_the_size_that_is_suggested(tmp_path: Path) -> None:
    by_size = {"nano": Resources(cpus=1), "tiny": Resources(cpus=2)}
    asked = sweep({"model.size": {"choices": ["nano", "tiny"]}}, sampler="grid", samples=None, resources=by_size)
    growth = SearchGrowth(build_plan(asked.model_copy(update={"search": asked.search})), tmp_path)
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        (trial, _) = growth.more(ledger)
        assert trial.resources == by_size[trial.config.model.size]
        assert trial.name.split()[1] == trial.config.model.size


def test_what_a_search_will_cost_is_known_before_it_begins() -> None:
    trials = expected(build_plan(sweep(samples=4, search_seeds=[7, 8])))
    assert [sum(trial.role == role for trial in trials) for role in ("search", "cell")] == [2 * 4 * 2, 2 * 2]


def test_the_plan_says_what_will_be_searched_and_that_cells_are_censored() -> None:
    scheduler = Scheduler(name="asha", metric=METRIC)
    searched = build_plan(sweep(scheduler=scheduler))
    assert searched.notes == (
        "asha stops suggestions early, which are not scored then; the chosen ones run to their end",
        "tpe search in each of 2 cells: 4 suggestions on seeds [1000], then the best anew on seeds [0, 1]",
    )
    plain = build_plan(sweep(scheduler=scheduler).model_copy(update={"search": None}))
    assert plain.notes == (
        "asha stops trials early, so cells are censored: they are scored by the trials that were left to finish",
    )


def test_the_plan_of_a_sweep_without_a_search_has_the_rows_of_the_ledger(tmp_path: Path) -> None:
    plan: Plan = build_plan(sweep().model_copy(update={"search": None}))
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.plan(plan.trials)
        assert plan_json(plan, ledger.rows(), ledger) == json.loads(json.dumps(plan.to_json()))


ASKED: dict[str, dict[str, Any]] = {
    "grid": {"sampler": "grid", "samples": None, "space": {"optim.lr": {"choices": [1e-4, 1e-3, 1e-2]}}},
    "random": {"sampler": "random", "samples": 3},
    "tpe": {"samples": 4},
    "two at a time": {"samples": 4, "parallel": 2},
    "few choices": {"samples": 5, "parallel": 2, "space": {"optim.lr": {"choices": [1e-3, 1e-2]}}},
    "impossible ones": {
        "sampler": "grid",
        "samples": None,
        "space": {"optim.steps": {"choices": [10, 1000]}, "optim.warmup_steps": {"choices": [5, 500]}},
    },
}


class TestKilledDrivers:
    """A killed driver's search goes on as if nothing had happened."""

    def asked(self, case: str) -> Sweep:
        return sweep(**{"axes": {"model.num_registers": (4,)}, "seeds": (0,), **ASKED[case]})

    def outcome(self, driver: Driver, asked: Sweep) -> Any:
        with Ledger.open(driver.path, writer=False) as ledger:
            (cell,) = SearchGrowth(build_plan(asked), driver.state).cells
            events = ledger.events(cell.study)
        rows = [(row.trial_id, row.name, row.role, row.state) for row in driver.rows()]
        return events, rows, driver.found(asked)

    @pytest.mark.parametrize("case", ASKED)
    def test_after_every_change(self, case: str, tmp_path: Path) -> None:
        asked, alone = self.asked(case), Driver(tmp_path / "alone")
        alone.run(asked)
        expected = self.outcome(alone, asked)
        for changes in range(1, 200):
            driver = Driver(tmp_path / str(changes))
            try:
                driver.run(asked, changes)
            except Killed:
                driver.run(asked)
                assert self.outcome(driver, asked) == expected, changes
            else:
                break
        assert changes > 20

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(changes=st.lists(st.integers(2, 30), min_size=2, max_size=6), seed=st.integers(0, 3))
    def test_again_and_again(self, changes: list[int], seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("killed")
        asked, alone = self.asked("tpe"), Driver(folder / "alone")
        asked = asked.model_copy(update={"search": asked.search.model_copy(update={"seed": seed})})  # type: ignore[union-attr]
        alone.run(asked)
        driver = Driver(folder / "killed")
        for count in changes:
            try:
                driver.run(asked, count)
            except Killed:
                continue
        driver.run(asked)
        assert self.outcome(driver, asked) == self.outcome(alone, asked)
