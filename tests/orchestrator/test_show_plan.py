"""The command plan: where results come from, what the rest takes, what seeds can show, and what has changed."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from statsmodels.stats.power import TTestPower as Power

from orchestrator import measured, plan_changes, plan_needs, show_plan, spec
from orchestrator.budget import HOURS, Spent
from orchestrator.estimate import Price, by_formula, checkpoint_bytes, memory_bytes, state_bytes, wall_seconds
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import State
from orchestrator.measured import Sample, shape_of
from orchestrator.plan import Plan, build_plan
from orchestrator.search import SearchGrowth
from orchestrator.seed_noise import noise
from orchestrator.seeds import SeedGrowth
from orchestrator.sweep import Budget, Resources, Sweep

METRIC = "test/linear/top1"
BASE: dict[str, Any] = {
    "name": "example",
    "question": "Does it?",
    "trial": {"preset": "short", "model": {"size": "nano", "patch_size": 8}},
    "axes": {"model.num_registers": [0, 4]},
    "seeds": [0, 1, 2],
    "baseline": {"model.num_registers": 0},
    "primary": [METRIC],
}


class Example:
    """A sweep file, its folders, and a ledger that is filled by hand."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "example.yaml"
        self.runs = folder / "runs"
        self.write()

    def write(self, **parts: Any) -> None:
        self.file.write_text(yaml.safe_dump({**BASE, **parts}))

    def plan(self) -> Plan:
        return build_plan(spec.read_sweep(self.file))

    def layout(self, name: str = "example") -> SweepLayout:
        return SweepLayout(self.runs, self.runs, name)

    def run(self, values: dict[int, float | None], name: str = "example", **result: Any) -> None:
        """Trials in the order of the plan: a value finishes one, None fails it, and the others stay planned."""
        layout, plan = self.layout(name), self.plan()
        layout.root.mkdir(parents=True, exist_ok=True)
        layout.sweep_file.write_text(spec.dump(plan.sweep))
        with Ledger.open(layout.ledger) as ledger:
            ledger.plan(plan.trials)
            for index, value in values.items():
                trial_id = plan.trials[index].trial_id
                ledger.start_attempt(trial_id, 1, "host", 1, gpus=0.0)
                if value is not None:
                    ledger.record(trial_id, 1, 10, {METRIC: value})
                ledger.finish(trial_id, 1, "failed" if value is None else "finished", result, None)

    def publish(self, name: str, index: int, status: str = "finished") -> None:
        place = self.layout(name).trial(self.plan().trials[index].trial_id)
        place.root.mkdir(parents=True)
        place.result.write_text(json.dumps({"status": status}))

    def show(self, capsys: pytest.CaptureFixture[str], **asked: Any) -> list[str]:
        show_plan.plan(show_plan.Asked(self.file, self.runs, self.runs, **asked))
        return capsys.readouterr().out.splitlines()

    def json(self, capsys: pytest.CaptureFixture[str], **asked: Any) -> dict[str, Any]:
        return dict(json.loads("\n".join(self.show(capsys, as_json=True, **asked))))


@pytest.fixture
def example(tmp_path: Path) -> Example:
    return Example(tmp_path)


def test_new_unfinished_reused_failed_and_adopted_trials_are_told_apart(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    example.run({0: 0.5, 1: None})
    example.write(seeds=[0, 1, 2, 3])  # trials 3 and 7 are new
    example.publish("another", 7)
    example.publish("another", 6, status="diverged")
    lines = example.show(capsys)
    assert lines[:7] == [
        "example: Does it?",
        "8 trials in 2 cells, seeds [0, 1, 2, 3]",
        "new: 1",
        "finished in another sweep, adopted: 1",
        "not finished: 4 (4 planned)",
        "over, with a result: 1 (1 finished)",
        "failed, run again: 1 (1 failed)",
    ]
    found = example.json(capsys)
    assert [trial["origin"] for trial in found["trials"]] == [
        *("reused", "again", "unfinished", "new"),
        *("unfinished", "unfinished", "unfinished", "adopted"),
    ]
    assert (found["cost"]["trials"], found["to_run"]["trials"], found["no_longer_planned"]) == (8, 6, 0)


def test_a_plan_makes_no_folder_and_prices_by_formula_where_nothing_was_measured(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = example.show(capsys)
    assert "  based on formulas: 6 trials" in lines
    assert any(line.startswith("assumed: ") for line in lines)
    assert not example.runs.exists()


def test_measured_trials_of_another_sweep_price_the_plan(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    optim = example.plan().trials[0].config.optim
    seconds = optim.steps * optim.batch_size / 2000 + 36
    result = {"images_per_second": 2000.0, "seconds": seconds, "device": "cpu", "threads": 1, "attempts": 1}
    example.write(seeds=[5], axes={"model.num_registers": [0]})
    example.run({0: 0.5}, "earlier", **result)
    example.write(axes={"model.num_registers": [0]}, baseline=None)
    found = example.json(capsys, max_concurrent=2)["to_run"]
    assert found["based_on"] == {"the same shape on cpu (earlier)": 3}
    assert found["cpu_core_hours"] == pytest.approx(3 * seconds / 3600)
    assert found["hours"] == pytest.approx(2 * seconds / 3600)  # three trials, two at a time


def test_trials_begin_where_others_end() -> None:
    prices = [Price(seconds, seconds, "") for seconds in (5.0, 1.0, 1.0, 1.0, 4.0)]
    assert wall_seconds(prices, 1) == 12.0
    assert wall_seconds(prices, 2) == 7.0  # 5 beside 1 + 1 + 1 + 4
    assert wall_seconds(prices, 99) == 5.0
    assert wall_seconds([], 3) == 0.0
    with pytest.raises(ValueError, match="at_a_time is 0"):
        wall_seconds(prices, 0)


def test_disk_counts_checkpoints_and_records_of_what_finished(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    example.run({0: 0.5, 1: 0.5})
    for index, size in ((0, 1000), (1, 3000)):
        folder = example.layout().trial(example.plan().trials[index].trial_id).root
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "step_000000010.pt").write_bytes(b"x" * 10_000)
        (folder / "token_norms.parquet").write_bytes(b"x" * size)
    found = example.json(capsys)["disk"]
    assert found["records"] == 4 * 2000  # of the four trials that are left, at the median
    assert found["checkpoints"] == sum(checkpoint_bytes(trial.config) for trial in example.plan().trials[2:])
    assert found["free"] > 0


def test_records_are_counted_in_a_storage_whose_path_has_the_word_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    example = Example(tmp_path / "checkpoints")
    example.run({0: 0.5})
    folder = example.layout().trial(example.plan().trials[0].trial_id).root
    folder.mkdir(parents=True)
    (folder / "token_norms.parquet").write_bytes(b"x" * 1000)
    assert example.json(capsys)["disk"]["records"] == 5 * 1000


def test_too_small_a_disk_is_said() -> None:
    assert plan_needs.Disk(10**9, None, 2 * 10**9, "/there").warnings() == []
    assert plan_needs.Disk(10**9, 5 * 10**9, 2 * 10**9, "/there").warnings() == [
        "the disk at /there has 2.00 GB free, and 6.00 GB are needed"
    ]


@pytest.mark.parametrize(("gigabytes", "fits"), [(None, None), (0.001, False), (80.0, True)])
def test_memory_of_a_gpu_that_nobody_measured_is_asked_for(
    example: Example, capsys: pytest.CaptureFixture[str], gigabytes: float | None, fits: bool | None
) -> None:
    example.write(resources={"gpus": 0.5})
    (found,) = example.json(capsys, gpu_memory=gigabytes)["memory"]
    assert (found["what"], found["device"], found["fits"]) == ("deit3 nano", None, fits)
    assert found["available"] == (None if gigabytes is None else round(gigabytes * 1e9 / 2))
    (line,) = (line for line in example.show(capsys, gpu_memory=gigabytes) if line.startswith("memory: "))
    said = {
        None: "; --gpu-memory GB says whether it fits",
        False: " does not fit into 0.5 MB",
        True: " fits into 40.00 GB",
    }
    assert line.endswith(said[fits])


def test_memory_is_that_of_one_rank_of_the_largest_trial(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    example.write(axes={"model.num_registers": [0, 4, 2]})
    configs = [trial.config for trial in example.plan().trials]
    (found,) = example.json(capsys)["memory"]
    assert found["needed"] == max(map(memory_bytes, configs)) > memory_bytes(configs[-1])
    example.write(axes={"model.num_registers": [4]}, baseline=None, resources={"gpus": 2})
    (found,) = example.json(capsys)["memory"]
    config = example.plan().trials[0].config
    state = state_bytes(config)  # which each rank has whole
    assert found["needed"] == state + round((memory_bytes(config) - state) / 2)


def test_the_largest_trial_decides_how_many_run_at_a_time(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_needs.os, "cpu_count", lambda: 8)
    (one, *_) = example.plan().trials
    asking = [replace(one, resources=Resources(cpus=cpus)) for cpus in (1.0, 3.0, 2.0)]
    assert plan_needs.at_a_time(asking) == 2
    assert plan_needs.at_a_time(asking[:1]) == 8
    assert plan_needs.at_a_time([]) == 1


def test_auto_names_the_share_where_memory_was_measured_and_the_command_where_not(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    example.write(resources={"gpus": "auto"})
    assert "--measure" in example.json(capsys)["notes"][0]
    config = example.plan().trials[-1].config
    measured.keep(example.runs, [Sample(shape_of(config), "H100", 1.0, 500.0, peak=15 * 10**9, capacity=80 * 10**9)])
    found = example.json(capsys)
    assert found["notes"] == ["resources.gpus auto is 0.25 for deit3 nano"]
    assert [memory["fits"] for memory in found["memory"]] == [True]
    assert list(found["to_run"]["based_on"]) == ["the same shape on H100 (dry steps)"]
    assert found["to_run"]["gpu_hours"] > 0


class TestSmallestDifference:
    def test_in_units_of_the_metric_by_pairs_of_this_sweep(
        self, example: Example, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # pairs: 0.6 - 0.1, 0.7 - 0.3 and 0.8 - 0.5: 0.5, 0.4, 0.3, of standard deviation 0.1
        example.run({0: 0.1, 1: 0.3, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.8})
        found = example.json(capsys)["smallest_difference"]
        assert found["half_width"]["in_run_deviations"] == pytest.approx(3.513, abs=1e-3)  # 4.3027 · √(2 / 3)
        assert found["half_width"]["of_metrics"] == {METRIC: pytest.approx(0.2484, abs=1e-4)}
        power = Power().solve_power(nobs=3, alpha=0.05, power=0.8)  # in standard deviations of a pair
        assert found["detectable"]["power"] == 0.8
        assert found["detectable"]["in_run_deviations"] == pytest.approx(power * 2**0.5, rel=1e-3)
        assert found["detectable"]["of_metrics"] == {METRIC: pytest.approx(power * 0.1, rel=1e-3)}
        assert found["smallest_p"] == {"t": None, "sign_flip": 0.25}
        assert f"  {METRIC}: ± 0.2484, found from {power * 0.1:.4g}, by earlier pairs (2 degrees)" in example.show(
            capsys
        )

    def test_by_single_trials_of_another_sweep_of_the_same_kind(
        self, example: Example, capsys: pytest.CaptureFixture[str]
    ) -> None:
        example.run({0: 0.1, 1: 0.2, 2: 0.3}, "earlier")  # of standard deviation 0.1
        example.write(axes={"model.num_registers": [0, 8]})
        found = example.json(capsys)["smallest_difference"]["half_width"]["of_metrics"]
        assert found == {METRIC: pytest.approx(2.484 * 0.1 * 2**0.5, abs=1e-3)}
        example.write(trial={"preset": "short", "model": {"size": "tiny", "patch_size": 8}})
        assert example.json(capsys)["smallest_difference"]["half_width"]["of_metrics"] == {}

    def test_equal_or_single_values_show_no_noise(self, example: Example) -> None:
        example.run({0: 0.5, 1: 0.5, 3: 0.25})
        with Ledger.open(example.layout().ledger, writer=False) as ledger:
            assert noise(ledger, [METRIC, "val/knn/top1"], {"model.num_registers": 0}) == []


class TestChanges:
    def test_each_part_has_its_line(self, example: Example) -> None:
        before = spec.read_sweep(example.file)
        example.write(
            trial={"model": {"size": "nano", "patch_size": 8}, "preset": "short", "optim": {"lr": 0.5}},
            axes={"model.num_registers": [4, 2], "optim.weight_decay": [0.1]},
            seeds=[0, 1, 3],
            primary=[],
            budget={"hours": 2},
        )
        assert plan_changes.changes(before, spec.read_sweep(example.file, ["baseline=null"])) == [
            "trial.optim.lr: not given → 0.5",
            "axis optim.weight_decay is new: [0.1]",
            "axis model.num_registers: [2] added, [0] removed",
            "seeds: [3] added, [2] removed",
            "baseline: {model.num_registers: 0} → null",
            f"primary: [{METRIC}] → []",
            "budget: null → {gpu_hours: null, hours: 2.0, trials: null}",
        ]
        assert plan_changes.changes(before, before) == []

    def test_the_command_compares_with_what_was_run(self, example: Example, capsys: pytest.CaptureFixture[str]) -> None:
        assert "note: the sweep has not been run, so nothing has changed since" in example.show(capsys, difference=True)
        example.run({0: 0.5})
        old = example.plan().trials
        example.write(trial={**BASE["trial"], "optim": {"lr": 0.5}}, seeds=[0, 1, 2, 3])
        new = example.plan().trials
        lines = example.show(capsys, difference=True)
        assert f"  {new[0].trial_id} {new[0].name} (its settings have changed; it was {old[0].trial_id})" in lines
        assert f"  {new[3].trial_id} {new[3].name}" in lines  # of the new seed
        assert "changed: trial.optim.lr: not given → 0.5" in lines
        assert "changed: seeds: [3] added" in lines
        assert "no longer planned: 6" in lines
        assert len(example.json(capsys, difference=True)["replaced"]) == 6

    def test_what_was_run_by_a_version_of_other_settings_is_said(
        self, example: Example, capsys: pytest.CaptureFixture[str]
    ) -> None:
        example.run({})
        example.layout().sweep_file.write_text("name: example\naxes: {model.registers: [1]}\n")
        assert any("cannot be compared: " in line for line in example.show(capsys, difference=True))


def test_trials_that_more_seeds_added_are_still_planned(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    example.write(seeds={"first": 3, "most": 5, "until": {"metric": METRIC, "halfwidth": 0.001}})
    example.run({0: 0.1, 1: 0.3, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.8})
    with Ledger.open(example.layout().ledger) as ledger:
        ledger.add(SeedGrowth(example.plan()).more(ledger))
        assert len(ledger.rows()) == 10
    lines = example.show(capsys)
    assert "no longer planned: 0" in lines
    note = (
        f"note: each cell gets up to 5 seeds, 3 at first, until the interval of its difference in {METRIC} is ± 0.001, "
        "which are 0.1 points, or narrower; more seeds are not in the estimate"
    )
    assert note in lines


def test_a_search_is_priced_with_its_suggestions(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    space = {"optim.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": True}}
    example.write(search={"name": "random", "samples": 4, "metric": "val/linear/top1", "space": space})
    found = example.json(capsys)
    assert found["to_run"]["trials"] == 2 * (4 + 3)  # of two cells: suggestions, then the best on three seeds


@pytest.mark.parametrize(
    ("budget", "begun", "said"),
    [
        ({"trials": 3}, 0, "0 of 3 trials used; 3 of 6 trials run"),
        ({"trials": 3}, 2, "2 of 3 trials used; 1 of 4 trials run"),
        ({"trials": 3}, 3, "3 of 3 trials used; nothing begins"),
        ({"trials": 6, "hours": 24}, 3, "3 of 6 trials, 0 of 24 hours used"),
        ({"hours": 2}, 3, "2.5 of 2 hours used; nothing begins"),
    ],
)
def test_what_a_budget_leaves_undone_is_said(
    example: Example, capsys: pytest.CaptureFixture[str], budget: dict[str, int], begun: int, said: str
) -> None:
    example.write(budget=budget)
    if begun:
        example.run(dict.fromkeys(range(begun), 0.5))
    if budget == {"hours": 2}:
        with Ledger.open(example.layout().ledger) as ledger:
            ledger.set_meta(HOURS, 2.5)
    assert f"budget: {said}" in example.show(capsys)
    assert example.json(capsys)["budget"] == f"budget: {said}"


def test_a_begun_trial_goes_on_within_a_full_budget() -> None:
    trials = build_plan(Sweep(name="x", axes={"model.num_registers": (0, 2, 4)})).trials
    said = plan_needs.of_budget(Budget(trials=1), Spent(0.0, 0.0, 1), {trials[1].trial_id}, trials)
    assert said == "budget: 1 of 1 trials used; 1 of 3 trials run"
    assert plan_needs.of_budget(None, Spent(0.0, 0.0, 1), (), trials) is None


def test_cells_that_lose_their_baseline_by_exclude_are_said() -> None:
    axes: dict[str, tuple[Any, ...]] = {"method": ("deit3", "dino"), "model.num_registers": (0, 2, 4)}
    parts: dict[str, Any] = {"name": "x", "axes": axes, "baseline": {"model.num_registers": 0}}
    exclude = ({"method": ("dino",), "model.num_registers": (0,)},)
    assert plan_needs.of_baseline(build_plan(Sweep(**parts))) == []
    assert plan_needs.of_baseline(build_plan(Sweep(**parts, exclude=({"model.num_registers": (2,)},)))) == []
    assert plan_needs.of_baseline(build_plan(Sweep(**parts, exclude=exclude))) == [
        "2 of 5 cells have no baseline cell, so they get no difference; the first is "
        "{method: dino, model.num_registers: 2}"
    ]


def test_a_sweep_to_learn_from_that_is_not_there_is_named_at_its_line(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    search = {"name": "tpe", "samples": 4, "metric": "val/knn/top1", "space": {"optim.lr": {"low": 0.1, "high": 1}}}
    example.write(search={**search, "warm_start": ["earlyer"]})
    line = next(n for n, text in enumerate(example.file.read_text().splitlines(), 1) if "earlyer" in text)
    with pytest.raises(spec.SpecError, match=f":{line}: search.warm_start names earlyer, a sweep that .* lacks; there"):
        example.show(capsys)
    with Ledger.open(example.layout("earlier").ledger):
        pass
    with pytest.raises(spec.SpecError, match=r"lacks; did you mean earlier\?"):
        example.show(capsys)
    with Ledger.open(example.layout().ledger):
        assert example.show(capsys)  # it has begun, and needs the earlier one no more


class TestSearchesThatHaveRun:
    """One cell of a grid of two suggestions on seed 1000, then of three seeds."""

    METRIC = "val/linear/top1"

    @pytest.fixture
    def search(self, example: Example) -> Example:
        space = {"optim.lr": {"choices": [1.0e-3, 1.0e-2]}}
        search = {"name": "grid", "metric": self.METRIC, "space": space}
        example.write(search=search, axes={"model.num_registers": [4]}, baseline=None)
        return example

    def run(self, example: Example, states: list[State]) -> None:
        """Trials in the order in which they are named, each with its end, as far as there are any; the rest waits."""
        layout = example.layout()
        layout.root.mkdir(parents=True, exist_ok=True)
        growth = SearchGrowth(example.plan(), example.runs)
        with Ledger.open(layout.ledger) as ledger:
            growth.restart(ledger, everything=False)
            ledger.add(growth.more(ledger))
            for state in states:
                row = next(row for row in ledger.rows() if row.state == "planned")
                ledger.start_attempt(row.trial_id, 1, "host", 1, gpus=0.0)
                if state == "finished":
                    ledger.record(row.trial_id, 1, 10, {self.METRIC: 0.5})
                ledger.finish(row.trial_id, 1, state, {}, None)
                ledger.add(growth.more(ledger))

    @pytest.mark.parametrize(
        ("states", "counts", "to_run"),
        [
            ([], (4, "1 (1 planned)", 0, 0), 5),
            (["finished"], (3, "1 (1 planned)", 1, 0), 4),
            (["failed"], (3, "1 (1 planned)", 1, 0), 4),  # which the search counts
            (["finished", "finished"], (0, "3 (3 planned)", 2, 0), 3),
            (["finished"] * 5, (0, "0", 5, 0), 0),
            (["finished", "failed", "finished", "failed", "finished"], (0, "0", 4, 1), 1),
            (["failed", "failed"], (3, "0", 0, 2), 5),  # begun anew, since nothing came of it
        ],
    )
    def test_what_is_over_is_not_planned_again(
        self,
        search: Example,
        capsys: pytest.CaptureFixture[str],
        states: list[State],
        counts: tuple[int, str, int, int],
        to_run: int,
    ) -> None:
        self.run(search, states)
        lines = search.show(capsys)
        new, unfinished, over, again = counts
        assert f"new: {new}" in lines
        assert f"not finished: {unfinished}" in lines
        assert any(line.split(" (")[0] == f"over, with a result: {over}" for line in lines)
        assert sum(line.startswith(f"failed, run again: {again}") for line in lines) == (again > 0)
        assert "no longer planned: 0" in lines
        assert search.json(capsys)["to_run"]["trials"] == to_run == new + int(unfinished.split()[0]) + again

    def test_noise_is_of_sweeps_of_the_same_kind(self, example: Example, capsys: pytest.CaptureFixture[str]) -> None:
        example.run({0: 0.1, 1: 0.2, 2: 0.3}, "earlier")
        search = {"name": "grid", "metric": self.METRIC, "space": {"optim.lr": {"choices": [1.0e-3, 1.0e-2]}}}
        example.write(search=search)
        found = example.json(capsys)["smallest_difference"]["half_width"]["of_metrics"]
        assert found == {METRIC: pytest.approx(0.351, abs=1e-3)}
        example.write(search=search, trial={"preset": "short", "model": {"size": "tiny", "patch_size": 8}})
        assert example.json(capsys)["smallest_difference"]["half_width"]["of_metrics"] == {}


def test_programs_of_others_have_no_price(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    example.write(trial={"command": ["true"]}, primary=[])
    lines = example.show(capsys)
    assert "estimate: 6 of 6 trials are programs, whose cost is not known" in lines
    found = example.json(capsys)["to_run"]
    assert (found["gpu_hours"], found["hours"]) == (None, None)
    assert all(by_formula(trial) is None for trial in example.plan().trials)


def test_a_thousand_finished_trials_are_planned_in_a_second(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    example.write(seeds=list(range(500)))
    result: dict[str, Any] = {
        "images_per_second": 2000.0,
        "seconds": 60.0,
        "device": "cpu",
        "threads": 1,
        "attempts": 1,
    }
    example.run(dict.fromkeys(range(0, 1000, 2), 0.5), **result)
    started = time.process_time()
    lines = example.show(capsys, difference=True)
    assert time.process_time() - started < 1.5
    assert "over, with a result: 500 (500 finished)" in lines
