"""Guards of the ablation table: unequal training, other provenance, declared scoring steps, trials that are lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.collect import collect
from analysis.flags import _PROVENANCE
from analysis.labels import FLAGS, flag_text, metric_label
from analysis.norms import EvaluatedNorms
from analysis.results import evaluate
from analysis.schemas import METRICS
from analysis.scores import last_scores
from analysis.tables import ablation
from analysis.terminal import ablation_table
from analysis.thresholds import frozen
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep

BEST = "evaluation.score.best"


def sweep(folder: Path, trials: Sequence[Trial], flops: dict[int, float] | None = None, **plan: Any) -> Path:
    """A published sweep; `flops` of training by the number of registers, `plan` what plan.json has besides."""
    publish(folder, trials, baseline={REGISTERS: 0})
    path = folder / "plan.json"
    content = json.loads(path.read_text())
    for trial in content["trials"]:
        trial["training_flops"] = (flops or {}).get(trial["cell"][REGISTERS])
    path.write_text(json.dumps(content | plan))
    return folder


def flags_of(folder: Path, registers: int, metric: str = TOP1) -> set[str]:
    rows = ablation(collect(folder)).to_pylist()
    (found,) = [set(row["flags"]) for row in rows if (row[REGISTERS], row["metric"]) == (registers, metric)]
    return found


def unequal(folder: Path, registers: int) -> set[str]:
    return {flag for flag in flags_of(folder, registers) if flag.startswith("unequal_")}


def test_flops_beyond_a_hundredth_are_unequal(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1, 2, 4))
    folder = sweep(tmp_path / "s", trials, {0: 100.0, 1: 101.0, 2: 101.1, 4: 98.9})
    assert [unequal(folder, n) for n in (0, 1, 2, 4)] == [set(), set(), {"unequal_flops"}, {"unequal_flops"}]
    unknown = sweep(tmp_path / "u", trials, {0: 100.0})  # programs, and plans of older versions
    assert [unequal(unknown, n) for n in (0, 1, 2, 4)] == [set()] * 4


def longer(trials: list[Trial]) -> list[Trial]:
    """Trials of which those with 4 registers trained 30 steps instead of 20."""
    for trial in trials:
        if trial.cell[REGISTERS] == 4:
            trial.config["optim.steps"] = 30
    return trials


@pytest.mark.parametrize(
    ("match", "expected"),
    [(None, {"unequal_steps", "unequal_flops"}), ("steps", {"unequal_steps"}), ("flops", {"unequal_flops"})],
)
def test_what_is_declared_equal_leaves_the_other_free(match: str | None, expected: set[str], tmp_path: Path) -> None:
    folder = sweep(tmp_path / "s", longer(registers_sweep(counts=(0, 4))), {0: 100.0, 4: 160.0}, match=match)
    assert unequal(folder, 4) == expected
    assert unequal(folder, 0) == set()


def test_only_finished_trials_have_trained_to_their_end(tmp_path: Path) -> None:
    trials = longer(registers_sweep(counts=(0, 4)))
    for trial in trials[3:]:
        trial.status, trial.result = "diverged", {"steps": 7}
    assert "unequal_steps" not in flags_of(sweep(tmp_path / "s", trials), 4)


def test_programs_that_were_told_no_steps_are_compared_by_those_they_made(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4))
    for trial in trials:
        trial.config["optim.steps"] = None
        trial.result["steps"] = 25 if trial.cell[REGISTERS] else 20
    assert unequal(sweep(tmp_path / "s", trials), 4) == {"unequal_steps"}


def test_steps_that_are_the_question_are_not_flagged(tmp_path: Path) -> None:
    trials = [Trial({"optim.steps": steps}, seed, {TOP1: 0.5 + 0.1 * seed}) for steps in (10, 20) for seed in (0, 1)]
    folder = publish(tmp_path / "s", trials, baseline={"optim.steps": 10})
    rows = ablation(collect(folder)).to_pylist()
    assert not any("unequal_steps" in row["flags"] for row in rows)


@pytest.mark.parametrize(
    ("result", "flag"),
    [
        ({"git_commit": "other"}, "git_commit"),
        ({"device": "cuda"}, "device"),
        ({"threads": 4}, "threads"),
        ({"versions": {"torch": "3"}}, "versions"),
        ({"data_fingerprint": "f" * 16}, "data"),
    ],
)
def test_provenance_that_differs_within_a_cell_or_from_the_baseline_is_flagged(
    result: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    trials = registers_sweep(counts=(0, 1, 2))
    trials[4].result = result  # one of those with 1 register
    for trial in trials[6:]:
        trial.result = result  # all of those with 2
    folder = sweep(tmp_path / "s", trials)
    ours = [{name for name in flags_of(folder, n) if name.endswith(flag)} for n in (0, 1, 2)]
    assert ours == [set(), {f"mixed_{flag}"}, {f"baseline_other_{flag}"}]


def test_another_precision_than_the_baselines_is_flagged_unless_it_is_the_question(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1))
    for trial in trials[3:]:
        trial.config["precision"] = "bf16"
    assert "baseline_other_precision" in flags_of(sweep(tmp_path / "s", trials), 1)
    asked = [Trial({"precision": p}, seed, {TOP1: 0.5 + 0.1 * seed}) for p in ("fp32", "bf16") for seed in (0, 1)]
    rows = ablation(collect(publish(tmp_path / "q", asked, baseline={"precision": "fp32"}))).to_pylist()
    assert not any("baseline_other_precision" in row["flags"] for row in rows)


def scored(folder: Path, steps: Sequence[int], rule: dict[str, Any]) -> Path:
    """A sweep of 0 and 4 registers and two seeds whose trials are scored at `steps`, in the order of the trials.

    test/ is measured there alone; all else at steps 10 and 20 as published, where it is 9.0 at step 10.
    """
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1))
    for trial in trials:
        trial.config = rule
        trial.scores["val/knn/top1"] = 0.3
    sweep(folder, trials)
    for trial, step in zip(trials, steps, strict=True):
        path = folder / "trials" / trial.trial_id / "metrics.parquet"
        rows = [row for row in pq.read_table(path).to_pylist() if not row["name"].startswith("test/")]
        rows += [{"step": step, "name": "test/linear/top1", "value": trial.scores[TOP1]}]
        rows += [{"step": step, "name": "score/step", "value": float(step)}]
        rows.sort(key=lambda row: (row["step"], row["name"]))
        schema = pa.schema([METRICS.field(name) for name in ("step", "name", "value")])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return folder


def test_scores_are_those_of_the_declared_step_for_every_metric(tmp_path: Path) -> None:
    folder = scored(tmp_path / "s", (10, 20, 15, 10), {BEST: "val/knn/top1", "evaluation.score.mode": "max"})
    frames = collect(folder)
    ids = [trial.trial_id for trial in frames.plan.trials]
    scores = last_scores(frames)
    found = {name: [(scores[name][i].step, scores[name][i].value) for i in ids] for name in scores}
    own = registers_sweep(counts=(0, 4), seeds=(0, 1))
    assert found[TOP1] == [(step, t.scores[TOP1]) for step, t in zip((10, 20, 15, 10), own, strict=True)]
    # What was measured at 10 and 20 alone counts up to the scoring step: at 15 it is that of step 10.
    assert found["val/knn/top1"] == [(10, 9.0), (20, 0.3), (10, 9.0), (10, 9.0)]
    assert found["train/loss"][1] == (20, own[1].scores["train/loss"])
    assert [end["patch"].step for end in EvaluatedNorms(frames).last_layer().values()] == [10, 20, 10, 10]
    assert {step for step, _ in frozen(frames).fractions.values()} == {10, 20}
    assert [scores["score/step"][i].value for i in ids] == [10.0, 20.0, 15.0, 10.0]


def test_declared_scoring_steps_are_flagged_and_not_taken_for_a_mix(tmp_path: Path) -> None:
    best = scored(tmp_path / "b", (10, 20, 10, 20), {BEST: "val/knn/top1", "evaluation.score.mode": "max"})
    assert "best_checkpoint" in flags_of(best, 4) and "mixed_steps" not in flags_of(best, 4)
    assert "scored_early" not in flags_of(best, 4)
    early = scored(tmp_path / "e", (10, 10, 10, 10), {"evaluation.score.step": 10})
    assert "scored_early" in flags_of(early, 4) and "best_checkpoint" not in flags_of(early, 4)
    plain = flags_of(sweep(tmp_path / "p", registers_sweep(counts=(0, 4))), 4, OUTLIERS)
    assert plain.isdisjoint({"best_checkpoint", "scored_early", "mixed_steps"})


def test_a_cell_of_which_nothing_exists_is_missing_in_every_row(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 4))
    for trial in trials[3:]:
        trial.status = "missing"
    rows = [row for row in ablation(collect(sweep(tmp_path / "s", trials))).to_pylist() if row[REGISTERS] == 4]
    assert rows
    for row in rows:
        assert (row["n"], row["n_missing"], row["mean"], row["delta"]) == (0, 3, None, None)
        assert "missing" in row["flags"]


def test_every_flag_that_is_given_is_put_into_words(tmp_path: Path) -> None:
    for flag in ("unequal_steps", "unequal_flops", "best_checkpoint", "scored_early", "adaptive", "observational"):
        assert flag_text(flag) == FLAGS[flag]
    for name in _PROVENANCE.values():
        assert f"mixed_{name}" in FLAGS
    assert flag_text("baseline_other_precision") == "trials and their baseline differ in precision"


def test_the_terminal_says_flags_in_words(tmp_path: Path) -> None:
    trials = [Trial({REGISTERS: r}, s, {TOP1: 0.5 + 0.1 * s * r}) for r in (0, 4) for s in range(3)]
    folder = sweep(tmp_path / "s", trials, {0: 100.0, 4: 110.0}, more_seeds={"first": 2}, seeds=[0, 1])
    results = evaluate(collect(folder))
    caption = str(ablation_table(results.frames.plan, results.rows, results.varying).caption)
    assert FLAGS["adaptive"] in caption and FLAGS["unequal_flops"] in caption


def test_the_terminal_says_which_primary_metrics_it_leaves_out(tmp_path: Path) -> None:
    primary = [TOP1, OUTLIERS, "test/a", "test/b", "test/knn/top1"]
    results = evaluate(collect(sweep(tmp_path / "s", registers_sweep(), primary=primary)))
    caption = str(ablation_table(results.frames.plan, results.rows, results.varying).caption)
    assert f"Primary too, but not shown: {metric_label(primary[-1])}." in caption
