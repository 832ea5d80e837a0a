"""The ablation table of made-up sweeps, number by number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from analysis import corrections, dunnett, statistics
from analysis.answer import supported
from analysis.cells import cells, compared_with
from analysis.collect import collect
from analysis.schemas import ABLATION
from analysis.scores import last_scores
from analysis.tables import ablation
from analysis.thresholds import METRIC as FROZEN
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep
from tests.analysis.least_squares import pooled

COUNTS = ("n", "n_missing", "n_failed", "n_diverged", "n_pruned", "n_stopped")


def table_of(folder: Path, trials: list[Trial], **plan: Any) -> pa.Table:
    plan.setdefault("baseline", {REGISTERS: 0})
    return ablation(collect(publish(folder, trials, **plan)))


def row_of(table: pa.Table, metric: str = TOP1, **cell: Any) -> dict[str, Any]:
    wanted = {"metric": metric, **{name.replace("__", "."): value for name, value in cell.items()}}
    (row,) = [row for row in table.to_pylist() if all(row[name] == value for name, value in wanted.items())]
    return dict(row)


def test_columns_types_and_order(tmp_path: Path) -> None:
    table = table_of(tmp_path / "s", registers_sweep(counts=(4, 0, 2, 1)))
    assert table.schema == pa.schema([(REGISTERS, pa.int64()), *ABLATION])
    keys = [(row[REGISTERS], row["metric"]) for row in table.to_pylist()]
    assert keys == [(r, m) for r in (0, 1, 2, 4) for m in (TOP1, OUTLIERS, FROZEN, "train/loss")]


def test_numbers_by_hand(tmp_path: Path) -> None:
    row = row_of(table_of(tmp_path / "s", registers_sweep(counts=(0, 1))), OUTLIERS, model__num_registers=1)
    # Cell .04, .0405, .0415; baseline .05, .051, .053; differences -.01, -.0105, -.0115: mean -.032/3.
    assert [row[name] for name in COUNTS] == [3, 0, 0, 0, 0, 0]
    assert row["mean"] == pytest.approx(0.122 / 3)
    assert row["std"] == pytest.approx(math.sqrt((2 / 3) ** 2 + (1 / 6) ** 2 + (5 / 6) ** 2) * 1e-3 / math.sqrt(2))
    assert row["baseline_mean"] == pytest.approx(0.154 / 3)
    assert (row["n_paired"], row["delta"]) == (3, pytest.approx(-0.032 / 3))
    spread = math.sqrt((2 / 3) ** 2 + (1 / 6) ** 2 + (5 / 6) ** 2) * 1e-3 / math.sqrt(2)
    reach = 4.302653 * spread / math.sqrt(3)
    assert row["delta_low"] == pytest.approx(-0.032 / 3 - reach, rel=1e-6)
    assert row["delta_high"] == pytest.approx(-0.032 / 3 + reach, rel=1e-6)
    assert (row["primary"], row["interval_method"], row["flags"]) == (True, "paired_t", [])


def test_outliers_that_scatter_in_the_baseline_alone_are_paired_for_all_cells_at_once(tmp_path: Path) -> None:
    outliers = {0: (0.05, 0.058, 0.041), 1: (0.01, 0.0101, 0.0102), 4: (0.0, 0.0, 0.0)}
    trials = [
        Trial({REGISTERS: r}, s, {OUTLIERS: value}) for r, cell in outliers.items() for s, value in enumerate(cell)
    ]
    table = table_of(tmp_path / "s", trials, primary=[OUTLIERS])
    row = row_of(table, OUTLIERS, model__num_registers=4)
    reach = 6.205347 * statistics.summarise(outliers[0]).std / math.sqrt(3)  # t(1 - 0.05 / 2 / 2, 2)
    assert row["interval_method"] == "paired_t_bonferroni"
    assert row["delta_low"] == pytest.approx(-0.149 / 3 - reach, rel=1e-6)
    rows = [row_of(table, OUTLIERS, model__num_registers=r) for r in (1, 4)]
    assert [row["p_adjusted"] for row in rows] == corrections.holm([row["p_value"] for row in rows])


def noisy(counts: tuple[int, ...] = (0, 1, 2, 4)) -> list[Trial]:
    """Five seeds: top-1 scatters alike in all cells, an exploratory metric and points of a curve somehow."""
    random = np.random.default_rng(0)
    trials = [Trial({REGISTERS: r}, s, {TOP1: 0.7 + 0.01 * float(random.normal())}) for r in counts for s in range(5)]
    for number, trial in enumerate(trials):
        trial.scores[OUTLIERS] = 0.05 if trial.cell[REGISTERS] == 0 else 0.02 + 0.001 * number
        trial.scores["val/knn/top1"] = 0.5 + 0.01 * (number * number % 7)
        trial.scores["val/object_discovery/bias_0.5/corloc"] = 0.2 + 0.01 * (number * number % 11)
    return trials


def test_primary_p_values_are_corrected_over_one_family(tmp_path: Path) -> None:
    rows = table_of(tmp_path / "s", noisy()).to_pylist()
    primary = [row for row in rows if row["primary"] and row["p_value"] is not None]
    top1, outliers = ([row for row in primary if row["metric"] == metric] for metric in (TOP1, OUTLIERS))
    assert {row["interval_method"] for row in top1} == {"pooled_dunnett"}
    assert {row["interval_method"] for row in outliers} == {"paired_t_bonferroni"}  # a baseline without scatter
    assert len(top1) == len(outliers) == 3
    # Holm within the metric, and over both, as some cells of the other one do not differ.
    smallest = min(outliers, key=lambda row: row["p_value"])
    assert smallest["p_adjusted"] == pytest.approx(2 * 3 * smallest["p_value"])
    least = min(top1, key=lambda row: row["p_value"])
    t = float(stats.t.isf(least["p_value"] / 2, 12))
    # All of the outliers' p-values are smaller, so that they no longer count.
    assert least["p_adjusted"] == pytest.approx(dunnett.p_value(t, 3, 12), rel=1e-6)
    assert max(row["p_adjusted"] for row in outliers) < least["p_adjusted"] / 2


def test_all_other_metrics_are_corrected_among_themselves(tmp_path: Path) -> None:
    rows = table_of(tmp_path / "s", noisy()).to_pylist()
    exploratory = [row for row in rows if not row["primary"] and row["p_value"] is not None]
    curve = [row for row in exploratory if row["metric"].endswith("/corloc")]
    others = [row for row in exploratory if not row["metric"].endswith("/corloc")]
    assert {row["metric"] for row in others} >= {"val/knn/top1"}
    assert len(curve) == 6 and {row["metric"].split("/")[-2] for row in curve} == {"bias_0.5", "common_bias"}
    points = [row for row in curve if "bias_0.5" in row["metric"]]
    tested = [row for row in exploratory if row not in points]
    expected = multipletests([row["p_value"] for row in tested], method="fdr_bh")[1]
    assert [row["p_adjusted"] for row in tested] == pytest.approx(expected)
    assert all(row["p_adjusted"] is None for row in points)
    assert all(row["p_adjusted"] is None for row in rows if row["p_value"] is None)
    assert not any(supported({**row, "p_adjusted": 0.0, "delta_low": 1.0}) for row in exploratory)


def test_every_baseline_has_a_variance_of_its_own(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    scale = {"deit3": 1.0, "dino": 100.0}
    trials = [
        Trial({"method": method, REGISTERS: r}, s, {TOP1: sd * float(random.normal())})
        for method, sd in scale.items()
        for r in (0, 1, 2, 4)
        for s in range(5)
    ]
    table = table_of(tmp_path / "s", trials, primary=[TOP1])
    for method in scale:
        cells_ = {
            t.cell[REGISTERS]: {u.seed: u.scores[TOP1] for u in trials if u.cell == t.cell}
            for t in trials
            if t.cell["method"] == method
        }
        expected = pooled(cells_, 0)[2]
        row = row_of(table, method=method, model__num_registers=2)
        assert (row["delta_low"], row["delta_high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_the_order_of_plan_and_input_changes_no_byte(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    trials = noisy()
    trials[5].status = "failed"
    (tmp_path / "first").mkdir()
    expected = collect(publish(tmp_path / "first" / "s", trials, baseline={REGISTERS: 0}))
    sink = pa.BufferOutputStream()
    pq.write_table(ablation(expected), sink)
    for number in range(3):
        order = random.permutation(len(trials)).tolist()
        (tmp_path / str(number)).mkdir()
        written = random.permutation(len(trials)).tolist()
        folder = publish(
            tmp_path / str(number) / "s", [trials[i] for i in order], baseline={REGISTERS: 0}, written=written
        )
        scores = last_scores(collect(folder))
        turned = {metric: dict(reversed(list(by_trial.items()))) for metric, by_trial in reversed(list(scores.items()))}
        for table in (ablation(collect(folder)), ablation(collect(folder), scores=turned)):
            again = pa.BufferOutputStream()
            pq.write_table(table, again)
            assert again.getvalue().equals(sink.getvalue())


def test_failed_diverged_and_missing_trials_count_but_do_not_score(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0, 1), seeds=(0, 1, 2, 3))
    for trial, status in zip(trials[4:], ("failed", "diverged", "missing", "finished"), strict=True):
        trial.status = status
    table = table_of(tmp_path / "s", trials)
    row = row_of(table, OUTLIERS, model__num_registers=1)
    assert [row[name] for name in COUNTS] == [1, 1, 1, 1, 0, 0]
    assert row["mean"] == pytest.approx(0.05 - 0.01 + 0.001)  # seed 3 alone
    assert (row["std"], row["delta_low"], row["p_value"]) == (None, None, None)
    assert row["interval_method"] == "none: one seed"
    assert row["delta"] == pytest.approx(0.041 - 0.052)
    assert row["flags"] == ["diverged", "failed", "missing", "one_seed"]


def test_a_finished_trial_without_the_metric_or_with_nan_is_missing_never_zero(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0,), seeds=(0, 1, 2))
    del trials[0].scores[TOP1]
    trials[1].scores[TOP1] = math.nan
    row = row_of(table_of(tmp_path / "s", trials))
    assert [row[name] for name in COUNTS] == [1, 2, 0, 0, 0, 0]
    assert row["mean"] == trials[2].scores[TOP1]
    assert row["flags"] == ["baseline", "missing", "not_finite", "one_seed"]


def test_the_baseline_is_matched_by_everything_else_and_by_seed(tmp_path: Path) -> None:
    value = {("deit3", 0): 0.5, ("deit3", 4): 0.6, ("dino", 0): 0.1, ("dino", 4): 0.15}
    trials = [
        Trial({"method": method, REGISTERS: count}, seed, {TOP1: mean + 0.01 * seed * (1 + count)})
        for (method, count), mean in value.items()
        for seed in (0, 1)
        if (method, count, seed) != ("dino", 0, 1)
    ]
    table = table_of(tmp_path / "s", trials, primary=[TOP1])
    assert row_of(table, method="deit3", model__num_registers=4)["delta"] == pytest.approx(0.1 + 0.02)
    row = row_of(table, method="dino", model__num_registers=4)
    assert row["n_paired"] == 1
    assert row["delta"] == pytest.approx(0.05)  # seed 0 alone has a pair
    assert row["baseline_mean"] == pytest.approx(0.1)
    assert row["flags"] == ["one_seed", "partly_paired"]
    assert row_of(table, method="dino", model__num_registers=0)["interval_method"] == "none: baseline"


def test_rows_with_more_seeds_than_the_first_are_adaptive_and_have_steins_interval(tmp_path: Path) -> None:
    few = {0: 0.0, 2: 0.1, 4: 0.2}
    trials = [
        Trial({REGISTERS: r}, s, {TOP1: 0.5 + mean + 0.01 * s * r})
        for r, mean in few.items()
        for s in range(3 if r == 2 else 5)
    ]
    table = table_of(tmp_path / "s", trials, primary=[TOP1], first_seeds=(0, 1, 2))
    row = row_of(table, model__num_registers=4)
    # differences 0.2, 0.24, 0.28, 0.32, 0.36: s of the first three is 0.04
    reach = 4.302653 * 0.04 / math.sqrt(5)
    assert (row["delta"], row["delta_low"]) == (pytest.approx(0.28), pytest.approx(0.28 - reach, rel=1e-6))
    assert (row["interval_method"], row["flags"]) == ("stein two-stage t", ["adaptive"])
    plain = row_of(table, model__num_registers=2)
    assert (plain["n_paired"], plain["interval_method"], plain["flags"]) == (3, "stein two-stage t", [])
    assert row_of(table, model__num_registers=0)["flags"] == ["adaptive", "baseline"]


def test_cells_that_a_scheduler_stopped_trials_of_are_censored(tmp_path: Path) -> None:
    trials = [Trial({REGISTERS: r}, s, {TOP1: 0.5 + 0.1 * s * r}) for r in (0, 2, 4) for s in (0, 1, 2)]
    trials[5].status = "pruned"  # 2 registers, seed 2
    asha = {"name": "asha", "metric": "val/knn/top1", "grace": 0.25}
    table = table_of(tmp_path / "s", trials, primary=[TOP1], scheduler=asha)
    assert row_of(table, model__num_registers=2)["flags"] == ["censored", "pruned"]
    assert row_of(table, model__num_registers=2)["n_pruned"] == 1
    assert row_of(table, model__num_registers=4)["flags"] == []
    plain = table_of(tmp_path / "p", trials, primary=[TOP1])
    assert row_of(plain, model__num_registers=2)["flags"] == ["pruned"]


def test_an_excluded_baseline_gives_nulls_and_a_flag(tmp_path: Path) -> None:
    cell_values = [("deit3", 0), ("deit3", 4), ("dino", 4)]
    trials = [Trial({"method": m, REGISTERS: r}, s, {TOP1: 0.5 + 0.1 * s}) for m, r in cell_values for s in (0, 1)]
    row = row_of(table_of(tmp_path / "s", trials, primary=[TOP1]), method="dino", model__num_registers=4)
    assert (row["delta"], row["delta_low"], row["p_value"], row["n_paired"]) == (None, None, None, 0)
    assert (row["interval_method"], row["flags"]) == ("none: no baseline", ["no_baseline"])


def test_idle_settings_do_not_hide_the_baseline(tmp_path: Path) -> None:
    std = "model.reg_init_std"
    cell_values: list[tuple[int, float | None]] = [(0, None), (4, 0.02), (4, 1e-6)]
    trials = [Trial({REGISTERS: r, std: v}, s, {TOP1: 0.1 * r + s}) for r, v in cell_values for s in (0, 1)]
    table = table_of(tmp_path / "s", trials, primary=[TOP1])
    assert table.schema.field(std).type == pa.float64()
    deltas = [row["delta"] for row in table.to_pylist() if row["metric"] == TOP1]
    assert deltas == [None, pytest.approx(0.4), pytest.approx(0.4)]
    # The other way round two cells would fit, so none does.
    plan = collect(tmp_path / "s").plan
    zero = cells(plan)[0]
    assert compared_with(cells(plan), {REGISTERS: 4})[zero.key] is None


def test_heads_that_were_chosen_on_validation_images_are_flagged(tmp_path: Path) -> None:
    trials = registers_sweep(counts=(0,), seeds=(0, 1))
    select_on = "evaluation.linear.select_on"
    for trial in trials:
        trial.config, trial.scores["val/linear/top1"] = {select_on: "val"}, 0.5
    table = table_of(tmp_path / "val", trials)
    flagged = {row["metric"]: "chosen_on_val" in row["flags"] for row in table.to_pylist()}
    assert flagged.pop(TOP1) and flagged.pop("val/linear/top1") and not any(flagged.values())
    for trial in trials:
        trial.config = {select_on: "train"}
    assert not any("chosen_on_val" in row["flags"] for row in table_of(tmp_path / "train", trials).to_pylist())


@pytest.mark.parametrize(
    ("result", "flag"),
    [
        ({"device": "NVIDIA H100"}, "device"),
        ({"git_commit": None}, "git_commit"),
        ({"versions": {"torch": "2.15"}}, "versions"),
        ({"data_fingerprint": "ffff"}, "data"),
        ({"threads": 8}, "threads"),
    ],
)
def test_mixed_provenance_is_flagged(tmp_path: Path, result: dict[str, Any], flag: str) -> None:
    trials = registers_sweep(counts=(0, 1, 2), seeds=(0, 1))
    trials[2].result = result  # one of two trials with 1 register
    for trial in trials[4:]:
        trial.result = result  # both with 2 registers
    table = table_of(tmp_path / "s", trials)
    flags = [set(row_of(table, OUTLIERS, model__num_registers=count)["flags"]) for count in (0, 1, 2)]
    assert flags == [{"baseline"}, {f"mixed_{flag}"}, {f"baseline_other_{flag}"}]


def test_no_variance_is_flagged(tmp_path: Path) -> None:
    row = row_of(table_of(tmp_path / "s", registers_sweep()), "train/loss", model__num_registers=2)
    assert (row["delta"], row["delta_low"], row["delta_high"], row["p_value"]) == (0.0, 0.0, 0.0, None)
    assert row["flags"] == ["no_variance"]


def test_without_axes_or_baseline(tmp_path: Path) -> None:
    table = table_of(tmp_path / "s", [Trial({}, seed, {TOP1: 0.5 + seed}) for seed in (0, 1)], baseline=None)
    assert table.schema == ABLATION
    row = row_of(table)
    assert (row["mean"], row["n"], row["delta"], row["flags"]) == (1.0, 2, None, ["no_baseline"])
    assert row_of(table, OUTLIERS)["n_missing"] == 2  # declared primary, though nobody has it


def test_each_metric_has_its_interval(tmp_path: Path) -> None:
    trials = noisy(counts=(0, 1, 2))
    for trial in trials:
        trial.scores["train/loss"] = 1.0 + 0.1 * trial.seed
    table = table_of(tmp_path / "s", trials)
    values = {r: {t.seed: t.scores[TOP1] for t in trials if t.cell[REGISTERS] == r} for r in (0, 1, 2)}
    expected = pooled(values, 0)[2]
    row = row_of(table, TOP1, model__num_registers=2)
    assert (row["interval_method"], row["delta_low"]) == ("pooled_dunnett", pytest.approx(expected.low))
    assert row_of(table, "train/loss", model__num_registers=2)["interval_method"] == "paired_t_bonferroni"


def test_rows_of_released_weights_are_observational(tmp_path: Path) -> None:
    weights = "model.weights"
    ours = (None, "0123456789abcdef", "0123456789abcdef@300:raw")  # trials, which differ in what their sweep says
    trials = [Trial({weights: name}, 0, {TOP1: 0.5}) for name in (*ours, "vit_small_patch14_dinov2.lvd142m")]
    table = table_of(tmp_path / "s", trials, baseline={weights: None}, primary=[TOP1])
    flags = {(row[weights], row["metric"]): row["flags"] for row in table.to_pylist()}
    assert all("observational" not in found for (name, _), found in flags.items() if name in ours)
    assert all("observational" in found for (name, _), found in flags.items() if name not in ours)
    assert len(flags) == 8
    # As a setting of all trials rather than an axis.
    trials = registers_sweep(counts=(0, 4), seeds=(0, 1))
    for trial in trials:
        trial.config[weights] = "vit_small_patch14_dinov2.lvd142m"
    rows = table_of(tmp_path / "same", trials).to_pylist()
    assert all("observational" in row["flags"] for row in rows)
    assert not any("observational" in row["flags"] for row in table_of(tmp_path / "t", registers_sweep()).to_pylist())
