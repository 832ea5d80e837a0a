"""What seeds can show: quantiles as the analysis has them, power as scipy has it, groups of cells and families."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from analysis import dunnett
from orchestrator import smallest_difference as shown
from orchestrator import spec
from orchestrator.plan import Plan, build_plan

METRIC = "test/linear/top1"


def plan(folder: Path, **parts: Any) -> Plan:
    content = {
        "name": "example",
        "question": "Does it?",
        "trial": {"preset": "short", "model": {"size": "nano", "patch_size": 8}},
        "axes": {"model.num_registers": [0, 1, 2, 4, 8, 16]},
        "seeds": [0, 1, 2, 3, 4],
        "baseline": {"model.num_registers": 0},
        "primary": [METRIC],
    }
    file = folder / "example.yaml"
    file.write_text(yaml.safe_dump({**content, **parts}))
    return build_plan(spec.read_sweep(file))


@pytest.mark.parametrize(("comparisons", "freedom"), [(1, 1), (1, 4), (1, 200), (2, 2), (5, 10), (5, 20), (60, 590)])
@pytest.mark.parametrize("confidence", [0.95, 0.975, 0.995])
def test_quantiles_are_those_of_the_analysis(comparisons: int, freedom: int, confidence: float) -> None:
    expected = dunnett.critical(comparisons, freedom, confidence)
    assert shown.quantile(confidence, comparisons, freedom) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("critical", "freedom"), [(12.7, 1), (4.3, 2), (2.73, 20), (2.0, 500)])
def test_the_difference_that_is_found_has_the_power_of_the_noncentral_t(critical: float, freedom: int) -> None:
    true = shown.shift(critical, freedom, 0.8)
    found = stats.nct.sf(critical, freedom, true) + stats.nct.cdf(-critical, freedom, true)
    assert found == pytest.approx(0.8, abs=6e-3)


def test_six_cells_are_pooled(tmp_path: Path) -> None:
    found = shown.resolution(plan(tmp_path))
    critical = dunnett.critical(5, 20, 0.95)
    assert (found.seeds, found.comparisons, found.pooled) == (5, 5, True)
    assert found.half_width == pytest.approx(critical * math.sqrt(2 / 5), rel=1e-4)
    assert found.detectable is not None
    true = found.detectable / math.sqrt(2 / 5)
    assert stats.nct.sf(critical, 20, true) == pytest.approx(0.8, abs=1e-3)
    first, second = shown.sentences(found)
    assert first.startswith("5 seeds, 5 cells against a baseline: 95 % intervals reach 1.73 standard deviations of a")
    assert second.endswith("of 5 pairs cannot go below 0.0625")


def test_two_primary_metrics_ask_for_more_but_each_interval_stays(tmp_path: Path) -> None:
    one, two = (shown.resolution(plan(tmp_path, primary=[METRIC, "val/knn/top1"][:count])) for count in (1, 2))
    assert two.half_width == one.half_width
    assert one.detectable is not None and two.detectable is not None
    assert two.detectable > one.detectable
    true = two.detectable / math.sqrt(2 / 5)
    assert stats.nct.sf(dunnett.critical(5, 20, 0.975), 20, true) == pytest.approx(0.8, abs=1e-3)


def test_the_smallest_group_decides_and_all_groups_are_a_family(tmp_path: Path) -> None:
    axes = {"model.num_registers": [0, 1, 2, 4], "model.size": ["nano", "tiny"]}
    trial = {"preset": "short", "model": {"patch_size": 8}}
    both = shown.resolution(plan(tmp_path, axes=axes, trial=trial))
    assert (both.comparisons, both.pooled) == (3, True)
    assert both.half_width == pytest.approx(dunnett.critical(3, 12, 0.95) * math.sqrt(2 / 5), rel=1e-4)
    exclude = [{"model.size": "tiny", "model.num_registers": count} for count in (2, 4)]
    found = shown.resolution(plan(tmp_path, axes=axes, trial=trial, exclude=exclude))
    assert (found.comparisons, found.pooled) == (1, False)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 4) * math.sqrt(2 / 5), rel=1e-4)
    assert found.detectable is not None
    true = found.detectable / math.sqrt(2 / 5)
    assert stats.nct.sf(stats.t.ppf(1 - 0.0125, 4), 4, true) == pytest.approx(0.8, abs=1e-3)


def test_more_seeds_by_variance_are_steins(tmp_path: Path) -> None:
    seeds = {"first": 3, "most": 8, "until": {"metric": METRIC, "halfwidth": 0.01}}
    found = shown.resolution(plan(tmp_path, seeds=seeds))
    assert (found.seeds, found.comparisons, found.pooled) == (3, 5, False)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(2 / 3), rel=1e-4)


def test_one_seed_and_no_baseline(tmp_path: Path) -> None:
    one = shown.resolution(plan(tmp_path, seeds=[0]))
    assert (one.half_width, one.detectable) == (None, None)
    assert shown.sentences(one) == ["1 seed: no interval, so no difference can be told from noise"]
    found = shown.to_json(one, {METRIC: 0.1})
    assert found["half_width"] == {"in_run_deviations": None, "of_metrics": {}}
    assert found["smallest_p"] == {"t": None, "sign_flip": None}
    none = shown.resolution(plan(tmp_path, baseline=None))
    assert (none.comparisons, none.half_width) == (1, pytest.approx(2.7764 * math.sqrt(2 / 5), rel=1e-4))


def test_nothing_heavy_is_loaded() -> None:
    code = "import sys, orchestrator.smallest_difference; print({'numpy', 'scipy', 'analysis'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
