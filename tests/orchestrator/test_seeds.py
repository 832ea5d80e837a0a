"""Seeds where they matter: Stein's sample size, its coverage, and trials that a ledger's results add by whole pairs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from jsonschema import Draft202012Validator
from scipy import stats

from analysis import cells as analysed
from analysis.collect import PlannedTrial as AnalysedTrial
from orchestrator.cells import baseline_of
from orchestrator.ledger import Ledger
from orchestrator.plan import Plan, PlannedTrial, build_plan
from orchestrator.schema import sweep_schema
from orchestrator.seeds import SeedGrowth, sample_size
from orchestrator.spec import SpecError, dump, read_sweep
from orchestrator.sweep import Budget, MoreSeeds, Sweep, Until
from tests.orchestrator.sweeps import Small

NANO = {"preset": "short", "model.size": "nano", "model.patch_size": 8}
METRIC = "test/linear/top1"
Score = Callable[[int, int], float | None]  # registers, seed


def plan_of(most: int = 10, halfwidth: float = 0.5, first: int = 3, **parts: Any) -> Plan:
    more = MoreSeeds(first=first, most=most, until=Until(metric=METRIC, halfwidth=halfwidth))
    parts = {
        "axes": {"model.num_registers": (0, 2, 4)},
        "baseline": {"model.num_registers": 0},
        "trial": NANO,
        **parts,
    }
    return build_plan(Sweep(name="x", seeds=more.block, more_seeds=more, **parts))


class TestSampleSize:
    def test_by_hand(self) -> None:
        # s of (1, 2, 3) is 1, t(0.975, 2) is 4.3027: (4.3027 · 1 / 2)² = 4.63
        assert sample_size([1.0, 2.0, 3.0], 2.0) == 5
        assert sample_size([1.0, 2.0, 3.0], 100.0) == 3  # never fewer than there are
        assert sample_size([7.0, 7.0], 1e-9) == 2  # no variance

    def test_two_differences_are_needed(self) -> None:
        with pytest.raises(ValueError, match="given: 1"):
            sample_size([1.0], 1.0)

    @pytest.mark.parametrize("first", [2, 3, 5])
    def test_the_interval_covers_and_is_as_narrow_as_was_asked(self, first: int) -> None:
        """95 % within Monte-Carlo error, as Stein proves for N from the first block's variance alone."""
        generator = np.random.default_rng(first)
        quantile, runs, halfwidth, truth = float(stats.t.ppf(0.975, first - 1)), 4_000, 1.5, 0.3
        covered = 0
        for _ in range(runs):
            block = generator.normal(truth, 1.0, first)
            n = min(sample_size(list(block), halfwidth), 100_000)
            mean = (block.sum() + (n - first) * truth + math.sqrt(n - first) * generator.normal()) / n
            reach = quantile * block.std(ddof=1) / math.sqrt(n)
            assert reach <= halfwidth * (1 + 1e-4)
            covered += abs(mean - truth) <= reach
        error = math.sqrt(0.95 * 0.05 / runs)
        assert covered / runs >= 0.95 - 3 * error

    def test_a_limit_widens_the_interval_and_leaves_its_coverage(self) -> None:
        generator = np.random.default_rng(0)
        first, most, runs = 3, 8, 4_000
        covered = 0
        for _ in range(runs):
            block = generator.normal(0.0, 1.0, first)
            n = min(sample_size(list(block), 0.5), most)
            mean = (block.sum() + generator.normal(0.0, 1.0, n - first).sum()) / n
            covered += abs(mean) <= float(stats.t.ppf(0.975, first - 1)) * block.std(ddof=1) / math.sqrt(n)
        assert covered / runs >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / runs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path) as opened:
        yield opened


def finish(ledger: Ledger, trial_id: str, value: float | None, state: str = "finished") -> None:
    attempt = ledger.row(trial_id).attempts + 1
    ledger.start_attempt(trial_id, attempt, "host", 1, gpus=0.0)
    if value is not None:
        ledger.record(trial_id, attempt, 5, {METRIC: -1.0})  # an earlier step, which decides nothing
        ledger.record(trial_id, attempt, 10, {METRIC: value})
    ledger.finish(trial_id, attempt, state, {}, None)  # type: ignore[arg-type]


def run(ledger: Ledger, growth: SeedGrowth, score: Score, most_trials: int | None = None) -> list[tuple[int, int]]:
    """Trials in the order of the ledger until none is left; what was added: (registers, seed)."""
    added: list[PlannedTrial] = []
    while True:
        while new := growth.more(ledger):
            ledger.add(new)
            added += new
        waiting = [row for row in ledger.rows() if row.state == "planned"]
        if not waiting or (most_trials is not None and len(ledger.begun()) >= most_trials):
            return [(trial.cell["model.num_registers"], trial.seed) for trial in added]
        row = waiting[0]
        value = score(row.cell["model.num_registers"], row.seed)
        finish(ledger, row.trial_id, value, "finished" if value is not None else "failed")


def noisy(registers: int, seed: int) -> float:
    """Differences to the baseline of 2 registers: 0, 1, 2, … (s = 1 of the first three); of 4: always 7."""
    return {0: 100.0, 2: 100.0 + seed, 4: 107.0}[registers]


def test_cell_and_baseline_get_the_seeds_that_the_first_block_asks_for(ledger: Ledger) -> None:
    plan = plan_of(halfwidth=2.0)
    ledger.plan(plan.trials)
    growth = SeedGrowth(plan)
    assert growth.more(ledger) == []
    assert run(ledger, growth, noisy) == [(0, 3), (2, 3), (0, 4), (2, 4)]
    assert len(ledger.rows()) == 9 + 4
    assert ledger.rows()[-1].name == "deit3 nano reg2 seed4"


def test_a_trial_that_is_added_is_the_one_that_a_longer_list_of_seeds_has(ledger: Ledger) -> None:
    plan = plan_of(halfwidth=2.0)
    ledger.plan(plan.trials)
    run(ledger, SeedGrowth(plan), noisy)
    longer = build_plan(plan.sweep.model_copy(update={"seeds": (0, 1, 2, 3, 4), "more_seeds": None}))
    ids = {trial.trial_id for trial in longer.trials if trial.cell["model.num_registers"] != 4 or trial.seed < 3}
    assert {row.trial_id for row in ledger.rows()} == ids
    names = {trial.trial_id: trial.name for trial in longer.trials}
    assert all(row.name == names[row.trial_id] for row in ledger.rows())


@pytest.mark.parametrize("last_of", ["cell", "baseline"])
def test_nothing_is_decided_before_both_blocks_are_over(ledger: Ledger, last_of: str) -> None:
    plan = plan_of(halfwidth=0.1)
    ledger.plan(plan.trials)
    growth = SeedGrowth(plan)
    both = [trial for trial in plan.trials if trial.cell["model.num_registers"] in (0, 2)]
    *others, last = both if last_of == "cell" else both[::-1]
    for trial in others:
        finish(ledger, trial.trial_id, noisy(trial.cell["model.num_registers"], trial.seed))
        assert growth.more(ledger) == []
    finish(ledger, last.trial_id, noisy(last.cell["model.num_registers"], last.seed))
    assert [(t.cell["model.num_registers"], t.seed) for t in growth.more(ledger)][:2] == [(0, 3), (2, 3)]
    assert growth.more(ledger) == []


def test_most_is_the_limit(ledger: Ledger) -> None:
    plan = plan_of(halfwidth=1e-6, most=5)
    ledger.plan(plan.trials)
    assert run(ledger, SeedGrowth(plan), noisy) == [(0, 3), (2, 3), (0, 4), (2, 4)]


def test_two_cells_share_the_seeds_of_their_baseline(ledger: Ledger) -> None:
    plan = plan_of(halfwidth=2.0)
    ledger.plan(plan.trials)
    both = run(ledger, SeedGrowth(plan), lambda registers, seed: float(registers * seed))  # s: 2 and 4
    assert sorted(both) == sorted([(0, s) for s in range(3, 10)] + [(r, s) for r in (2, 4) for s in range(3, 10)])


@pytest.mark.parametrize("values", [(None, 1.0, 2.0), (math.nan, 1.0, 2.0)])
def test_pairs_without_a_value_count_neither_as_differences_nor_as_seeds(
    ledger: Ledger, values: tuple[float | None, ...]
) -> None:
    plan = plan_of(first=3, halfwidth=4.0, axes={"model.num_registers": (0, 2)})
    ledger.plan(plan.trials)
    # (1, 2): s = 0.7071, t(0.975, 1) = 12.706, (12.706 · 0.7071 / 4)² = 5.05: 6 pairs, of which 4 are lacking
    added = run(
        ledger, SeedGrowth(plan), lambda registers, seed: 0.0 if registers == 0 else [*values, *[1.5] * 9][seed]
    )
    assert added == [(registers, seed) for seed in range(3, 7) for registers in (0, 2)]


def test_what_did_not_finish_is_no_difference(ledger: Ledger) -> None:
    plan = plan_of(first=3, halfwidth=4.0, axes={"model.num_registers": (0, 2)})
    ledger.plan(plan.trials)
    for trial in plan.trials:
        diverged = trial.cell["model.num_registers"] == 2 and trial.seed == 0
        value = 0.0 if trial.cell["model.num_registers"] == 0 else [1000.0, 1.0, 2.0][trial.seed]
        finish(ledger, trial.trial_id, value, "diverged" if diverged else "finished")
    assert [trial.seed for trial in SeedGrowth(plan).more(ledger)] == [3, 3, 4, 4, 5, 5, 6, 6]  # as by (1, 2) alone


def test_pairs_that_a_budget_has_room_for_are_those_that_were_decided_first(ledger: Ledger) -> None:
    """A driver that was killed takes the decisions up in their order, not in that of the cells."""
    plan = plan_of(halfwidth=1e-6, budget=Budget(trials=11))
    ledger.plan(plan.trials)
    score: Score = lambda registers, seed: float(registers * seed)  # noqa: E731
    growth = SeedGrowth(plan)
    for trial in sorted(plan.trials, key=lambda trial: trial.cell["model.num_registers"] == 2):  # cell 2 ends last
        finish(ledger, trial.trial_id, score(trial.cell["model.num_registers"], trial.seed))
        growth.more(ledger)
    for _ in range(2):  # the runs that follow
        added = SeedGrowth(plan).more(ledger)
        assert [(trial.cell["model.num_registers"], trial.seed) for trial in added] == [(0, 3), (4, 3)]


def test_one_pair_shows_no_variance_until_failed_trials_ran_again(ledger: Ledger) -> None:
    plan = plan_of(halfwidth=2.0, axes={"model.num_registers": (0, 2)})
    ledger.plan(plan.trials)
    growth = SeedGrowth(plan)
    assert run(ledger, growth, lambda registers, seed: None if registers and seed else noisy(registers, seed)) == []
    for row in ledger.rows():
        if row.state == "failed":
            ledger.reset(row.trial_id)
    assert run(ledger, SeedGrowth(plan), noisy) == [(0, 3), (2, 3), (0, 4), (2, 4)]


def test_a_sweep_without_a_baseline_cell_of_a_cell_leaves_that_one_alone(ledger: Ledger) -> None:
    plan = plan_of(halfwidth=1e-6, most=4, exclude=({"model.num_registers": (0,)},))
    ledger.plan(plan.trials)
    growth = SeedGrowth(plan)
    assert run(ledger, growth, noisy) == []


@pytest.mark.parametrize("budget", [9, 10, 11, 12, 13, 30])
def test_a_budget_of_trials_cuts_whole_pairs_off_and_a_larger_one_adds_them(ledger: Ledger, budget: int) -> None:
    wide = plan_of(halfwidth=2.0, budget=Budget(trials=30))
    plan = plan_of(halfwidth=2.0, budget=Budget(trials=budget))
    ledger.plan(plan.trials)
    growth = SeedGrowth(plan)
    added = run(ledger, growth, noisy)
    assert added == [(0, 3), (2, 3), (0, 4), (2, 4)][: (budget - 9) // 2 * 2]
    said = f"{4 - len(added)} trials of more seeds do not fit into the budget; a larger budget.trials runs them"
    assert growth.left_out() == (None if len(added) == 4 else said)
    assert len(ledger.begun()) <= budget
    ledger.plan(wide.trials)  # the next run
    assert run(ledger, SeedGrowth(wide), noisy) == [(0, 3), (2, 3), (0, 4), (2, 4)]


@pytest.mark.parametrize("killed_after", range(1, 30, 3))
def test_a_killed_driver_adds_the_same_trials(path: Path, killed_after: int) -> None:
    """Every result comes in another order after the kill; the decisions that were made stay."""
    score: Score = lambda registers, seed: [0.0, 0.3 * seed**2, 0.4 * seed][registers // 2]  # noqa: E731
    plan = plan_of(halfwidth=1.0, budget=Budget(trials=20))
    with Ledger.open(path.with_name("whole.db")) as ledger:
        ledger.plan(plan.trials)
        run(ledger, SeedGrowth(plan), score)
        whole = {row.trial_id for row in ledger.rows()}
    with Ledger.open(path) as ledger:
        ledger.plan(plan.trials)
        run(ledger, SeedGrowth(plan), score, most_trials=killed_after)
    with Ledger.open(path) as ledger:
        ledger.plan(plan.trials)  # which leaves out what had been added
        run(ledger, SeedGrowth(plan), score)
        assert {row.trial_id for row in ledger.rows()} == whole
    assert 9 < len(whole) <= 20


def test_a_sweep_that_lists_its_seeds_has_no_such_growth() -> None:
    with pytest.raises(ValueError, match="lists its seeds"):
        SeedGrowth(build_plan(Sweep(name="x", trial=NANO, axes={"model.num_registers": (0, 4)})))


def test_cells_are_paired_as_the_analysis_pairs_them() -> None:
    axes: Mapping[str, tuple[Any, ...]] = {
        "model.num_registers": (0, 2, 4),
        "model.reg_init_std": (0.02, 1e-6),
        "optim.lr": (0.1, 0.2),
    }
    exclude = ({"model.num_registers": (0,), "optim.lr": (0.2,)},)
    plan = build_plan(Sweep(name="x", trial=NANO, axes=dict(axes), exclude=exclude))
    for baseline in ({"model.num_registers": 0}, {"optim.lr": 0.1}, {"model.reg_init_std": 0.02}):
        built = [analysed.Cell(cell, (AnalysedTrial("a", "a", cell, 0),)) for cell in plan.cells]
        found = analysed.compared_with(built, baseline)
        for cell in built:
            theirs = found[cell.key]
            ours = baseline_of(cell.values, plan.cells, baseline)
            assert ours == (None if theirs is None else theirs.values)


FILE = """name: x
axes: {{model.num_registers: [0, 4]}}
trial: {{model.size: nano, model.patch_size: 8}}
seeds:
  first: {first}
  most: {most}
  until:
    metric: {metric}
    halfwidth: {halfwidth}
{baseline}
"""
RIGHT = {
    "first": 3,
    "most": 10,
    "metric": METRIC,
    "halfwidth": 0.005,
    "baseline": "baseline: {model.num_registers: 0}",
}


class TestFile:
    def read(self, folder: Path, overrides: Sequence[str] = (), **changes: Any) -> Sweep:
        file = folder / "x.yaml"
        file.write_text(FILE.format(**{**RIGHT, **changes}))
        return read_sweep(file, overrides)

    def test_the_first_block_stands_in_seeds_and_a_dump_reads_back_equal(self, tmp_path: Path) -> None:
        sweep = self.read(tmp_path)
        assert sweep.seeds == (0, 1, 2)
        assert sweep.more_seeds == MoreSeeds(first=3, most=10, until=Until(metric=METRIC, halfwidth=0.005))
        again = tmp_path / "again.yaml"
        again.write_text(dump(sweep))
        assert read_sweep(again) == sweep
        assert yaml.safe_load(again.read_text())["seeds"]["first"] == 3

    def test_the_command_line_replaces_one_value_or_all_seeds(self, tmp_path: Path) -> None:
        more = self.read(tmp_path, ["seeds.most=20", "seeds.until.halfwidth=0.25"]).more_seeds
        assert more is not None and (more.most, more.until.halfwidth) == (20, 0.25)
        listed = self.read(tmp_path, ["seeds=[7]"])
        assert (listed.seeds, listed.more_seeds) == ((7,), None)

    @pytest.mark.parametrize(
        ("changes", "line", "message"),
        [
            ({"first": 1}, 5, "seeds.first is 1; allowed: a whole number from 2"),
            ({"first": "[0, 1]"}, 5, "seeds.first is [0, 1]; allowed: a whole number from 2"),
            ({"most": 2}, 6, "seeds.most is 2; allowed: from seeds.first, 3, on"),
            ({"most": 2.5}, 6, "seeds.most is 2.5; allowed: a whole number"),
            ({"metric": "top1"}, 8, "seeds.until.metric is 'top1'; allowed: a metric such as test/linear/top1"),
            ({"metric": "test/lineer/top1"}, 8, "there is no probe lineer; did you mean linear?"),
            ({"metric": "test/depth/rmse"}, 8, "evaluation.probes (knn, linear) lacks depth"),
            ({"metric": "tokens/last/outlier_fraction_frozen"}, 8, "it is derived from all trials at the end"),
            ({"halfwidth": 0}, 9, "seeds.until.halfwidth is 0; allowed: a number above 0"),
            ({"halfwidth": "1.0\n    more: 3"}, 10, "seeds.until.more is not a field of seeds.until"),
            ({"baseline": ""}, 7, "the file has no baseline"),
            ({"most": 10_000, "first": 9_000, "baseline": RIGHT["baseline"]}, None, ""),
        ],
    )
    def test_what_is_wrong_is_said_at_its_line(
        self, tmp_path: Path, changes: dict[str, Any], line: int | None, message: str
    ) -> None:
        if line is None:
            assert self.read(tmp_path, **changes).more_seeds is not None
            return
        with pytest.raises(SpecError) as error:
            self.read(tmp_path, **changes)
        (problem,) = error.value.problems
        assert problem.line == line
        assert message in problem.message

    @pytest.mark.parametrize("missing", ["first", "most", "until"])
    def test_all_three_parts_are_needed(self, tmp_path: Path, missing: str) -> None:
        parts = {"first": "3", "most": "10", "until": f"{{metric: {METRIC}, halfwidth: 1}}"}
        seeds = ", ".join(f"{name}: {value}" for name, value in parts.items() if name != missing)
        file = tmp_path / "x.yaml"
        head = "name: x\naxes: {model.num_registers: [0, 4]}\nbaseline: {model.num_registers: 0}\n"
        file.write_text(f"{head}seeds: {{{seeds}}}\n")
        with pytest.raises(SpecError, match=rf"x\.yaml:4: seeds\.{missing} is missing"):
            read_sweep(file)

    def test_editors_know_it(self, tmp_path: Path) -> None:
        validator = Draft202012Validator(sweep_schema())
        whole = yaml.safe_load(FILE.format(**RIGHT))
        assert validator.is_valid(whole)
        for wrong in ({"first": 1}, {"until": {"metric": METRIC}}, {"more": 1}):
            assert not validator.is_valid({**whole, "seeds": {**whole["seeds"], **wrong}})

    def test_the_published_plan_says_which_seeds_came_first(self, tmp_path: Path) -> None:
        published = build_plan(self.read(tmp_path)).to_json()
        assert published["seeds"] == [0, 1, 2]
        assert published["more_seeds"] == {"first": 3, "most": 10, "until": {"metric": METRIC, "halfwidth": 0.005}}


@pytest.mark.slow
def test_a_real_sweep_gets_more_seeds_within_its_budget(tmp_path: Path) -> None:
    """A halfwidth that no number of seeds reaches; 7 trials hold one pair more than the first block of two cells."""
    until = {"metric": "train/loss", "halfwidth": 1e-6}
    small = Small(tmp_path, steps=6)
    for trials, seeds in ((7, 3), (100, 5)):
        small.write(seeds={"first": 2, "most": 5, "until": until}, budget={"trials": trials})
        done = small.run("--in-process")
        assert done.returncode in (0, 1), done.stderr
        rows = pq.read_table(small.root / "tables" / "ablation.parquet").to_pylist()
        losses = [row for row in rows if row["metric"] == "train/loss"]
        assert [(row["n"], row["n_missing"]) for row in losses] == [(seeds, 0), (seeds, 0)]
        assert [row["flags"] for row in losses] == [["adaptive", "baseline"], ["adaptive", "unequal_flops"]]
        assert losses[1]["interval_method"] == "stein two-stage t"
    tables = small.tables()
    assert small.run("--in-process").returncode == 0
    assert small.tables() == tables
    assert set(small.attempts().values()) == {1}
