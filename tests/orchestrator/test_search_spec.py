"""Searches and schedulers in sweep files: what is read, and each problem at its line before anything runs."""

import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from orchestrator.plan import build_plan
from orchestrator.schema import sweep_schema
from orchestrator.spec import SpecError, dump, read_sweep
from orchestrator.sweep import Sweep
from orchestrator.yaml_file import read

BEFORE = """\
name: example
trial: {model: {size: nano, patch_size: 8}, optim: {steps: 100}}
axes: {model.num_registers: [0, 4]}
seeds: [0, 1]
"""
FULL = """\
search:
  name: tpe
  samples: 16
  metric: [val/knn/top1, val/linear/top1]
  mode: [max, min]
  seeds: [1000, 1001]
  parallel: 2
  startup: 5
  seed: 3
  warm_start: [earlier]
  space:
    optim.lr: {low: 1e-5, high: 1e-1, log: true}
    optim.steps: {low: 50, high: 100, step: 10}
    optim.optimizer: {choices: [adamw, sgd]}
    evaluation.knn.k: {choices: [[10, 20], [20]], if: {optim.optimizer: adamw}}
    optim.batch_size: {low: 8, high: 64, if: {optim.steps: [50, 100], evaluation.knn.k: [10, 20]}}
scheduler: {name: median, metric: val/knn/top1, mode: min, grace: 0.5, reduction: 3}
"""
TPE = "search:\n  name: tpe\n  samples: 4\n  metric: val/knn/top1\n  space:\n"  # the space is on line 10 and below
GRID = "search:\n  name: grid\n  metric: val/knn/top1\n  space:\n"  # on line 9 and below
LR = "    optim.lr: {low: 1e-4, high: 1e-2}\n"


def sweep(path: Path, text: str) -> Sweep:
    path.write_text(BEFORE + text)
    return read_sweep(path)


def test_every_part_is_read_and_written(tmp_path: Path) -> None:
    found = sweep(tmp_path / "full.yaml", FULL)
    search, scheduler = found.search, found.scheduler
    assert search is not None
    assert scheduler is not None
    assert (search.name, search.samples, search.parallel, search.startup, search.seed) == ("tpe", 16, 2, 5, 3)
    assert search.metric == ("val/knn/top1", "val/linear/top1")
    assert search.modes == ("max", "min")
    assert search.seeds_beside(found.seeds) == (1000, 1001)
    assert search.warm_start == ("earlier",)
    assert search.space["optim.lr"].log
    assert (search.space["optim.steps"].low, search.space["optim.steps"].step) == (50, 10)
    assert search.space["optim.batch_size"].condition == {"optim.steps": (50, 100), "evaluation.knn.k": (10, 20)}
    assert (scheduler.name, scheduler.mode, scheduler.grace, scheduler.reduction) == ("median", "min", 0.5, 3.0)
    (tmp_path / "again.yaml").write_text(dump(found))
    assert read_sweep(tmp_path / "again.yaml") == found


def test_a_sweep_under_another_name_learns_from_the_one_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "again.yaml"
    path.write_text(BEFORE + TPE.replace("  space", "  warm_start: [example]\n  space") + LR)
    found = read_sweep(path, name="later").search
    assert found is not None
    assert found.warm_start == ("example",)
    with pytest.raises(SpecError, match="has example, which is this sweep"):
        read_sweep(path)


def test_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    search = sweep(tmp_path / "short.yaml", TPE + LR).search
    assert search is not None
    assert (search.metric, search.modes, search.parallel, search.startup) == (("val/knn/top1",), ("max",), 1, 10)
    assert search.seeds_beside((0, 1)) == (1000,)
    assert search.seeds_beside((1000, 1002)) == (1001,)
    grid = sweep(tmp_path / "grid.yaml", f"{GRID}    optim.lr: {{choices: [0.1, 0.2]}}\n").search
    assert grid is not None
    assert grid.samples is None


def entry(text: str, start: str = TPE) -> str:
    """A space of one more entry."""
    return f"{start}    {text}\n"


WRONG: dict[str, tuple[str, list[tuple[int, str]]]] = {
    "samples that are missing": (
        f"search:\n  name: random\n  metric: val/knn/top1\n  space:\n{LR}",
        [(5, "search.samples is missing; random wants a number of suggestions per cell")],
    ),
    "no samples": (TPE.replace("4", "0") + LR, [(7, "search.samples is 0; allowed: a whole number from 1 to 10000")]),
    "sampler that does not exist": (
        TPE.replace("tpe", "bayes") + LR,
        [(6, "search.name is 'bayes'; allowed: grid or random or tpe")],
    ),
    "metric of the test set": (
        TPE.replace("val/knn/top1", "[val/knn/top1, test/knn/top1]") + LR,
        [(8, "search.metric is 'test/knn/top1'; allowed: a metric that begins with val/")],
    ),
    "metric twice": (
        TPE.replace("val/knn/top1", "[val/knn/top1, val/knn/top1]") + LR,
        [(8, "allowed: a metric such as val/knn/top1, or a list of different ones")],
    ),
    "metric of no probe": (
        TPE.replace("val/knn/top1", "val/kn/top1") + LR,
        [(8, "search.metric has val/kn/top1, and there is no probe kn; did you mean knn?")],
    ),
    "metric that is not measured": (
        f"scheduler: {{name: asha, metric: val/segmentation/miou}}\n{TPE.replace('knn', 'depth')}{LR}",
        [
            (5, "scheduler.metric has val/segmentation/miou, but evaluation.probes (knn, linear) lacks segmentation"),
            (9, "search.metric has val/depth/top1, but evaluation.probes (knn, linear) lacks depth"),
        ],
    ),
    "mode that does not exist": (
        TPE.replace("  space", "  mode: most\n  space") + LR,
        [(9, "search.mode is 'most'; allowed: max or min, or a list with one of them for each metric")],
    ),
    "two modes for one metric": (
        TPE.replace("  space", "  mode: [max, min]\n  space") + LR,
        [(9, "search.mode has 2 modes for 1 metrics; give one, or as many")],
    ),
    "seeds of the sweep": (
        TPE.replace("  space", "  seeds:\n    - 1000\n    - 1\n    - 1000\n  space") + LR,
        [
            (11, "search.seeds has 1, which is one of seeds; replicates choose no settings"),
            (12, "search.seeds has 1000 twice"),
        ],
    ),
    "seeds by need": (
        f"baseline: {{model.num_registers: 0}}\n{TPE}{LR}",
        [(6, "search cannot be combined with seeds that are added by need; list the seeds")],
    ),
    "warm start of a grid": (
        GRID.replace("  space", "  warm_start: [other]\n  space") + entry("optim.lr: {choices: [0.1]}", ""),
        [(8, "search.warm_start is for tpe; grid learns from nothing")],
    ),
    "warm start from itself": (
        TPE.replace("  space", "  warm_start: [other, example]\n  space") + LR,
        [(9, "search.warm_start has example, which is this sweep")],
    ),
    "warm start that escapes": (
        TPE.replace("  space", "  warm_start: [../other]\n  space") + LR,
        [(9, "search.warm_start is '../other'; allowed: at most 64 letters")],
    ),
    "an axis": (entry("model.num_registers: {low: 0, high: 4}"), [(10, "model.num_registers is an axis")]),
    "the seed": (entry("seed: {low: 0, high: 4}"), [(10, "seed cannot be searched")]),
    "execution": (entry("execution.threads: {choices: [1, 2]}"), [(10, "execution.threads cannot be searched")]),
    "no setting": (
        entry("optim.lrr: {low: 0.1, high: 1}"),
        [(10, "optim.lrr is not a setting of optim; did you mean optim.lr?")],
    ),
    "an unknown key": (
        entry("optim.lr: {low: 0.1, hi: 1}"),
        [
            (
                10,
                "search.space.optim.lr.hi is not a field of search.space.optim.lr; allowed: low, high, log",
            )
        ],
    ),
    "text for a number": (
        entry('optim.lr: {low: "0.1", high: true}'),
        [
            (10, "search.space.optim.lr.low is '0.1'; allowed: a number"),
            (10, "search.space.optim.lr.high is true; allowed: a number"),
        ],
    ),
    "a bound that the setting refuses": (
        entry("optim.lr:\n      low: 0.1\n      high: 100"),
        [(12, "optim.lr is 100; allowed: a number above 0, at most 10")],
    ),
    "a fraction for a whole number": (
        entry("optim.steps: {low: 1.5, high: 3}"),
        [(10, "optim.steps is 1.5; allowed: a whole number")],
    ),
    "steps of a fraction for a whole number": (
        entry("optim.steps: {low: 1, high: 3, step: 0.5}"),
        [(10, "optim.steps is 1.5; allowed: a whole number")],
    ),
    "one bound": (entry("optim.lr: {low: 0.1}"), [(10, "optim.lr wants {low, high} or {choices}")]),
    "from high to low": (entry("optim.lr: {low: 1, high: 0.1}"), [(10, "low must be below high")]),
    "a logarithm of nothing": (
        entry("optim.weight_decay: {low: 0, high: 0.1, log: true}"),
        [(10, "optim.weight_decay has low 0 with log: true; low must be above 0")],
    ),
    "steps on a logarithmic scale": (
        entry("optim.lr: {low: 0.1, high: 0.5, step: 0.1, log: true}"),
        [(10, "optim.lr has log and step; give one of them")],
    ),
    "steps that miss the end": (
        entry("optim.lr: {low: 0.1, high: 0.5, step: 0.3}"),
        [(10, "optim.lr has step 0.3; allowed: a number that divides high - low, 0.4")],
    ),
    "steps backwards": (entry("optim.lr: {low: 0.1, high: 0.5, step: -0.1}"), [(10, "optim.lr has step -0.1")]),
    "too many steps": (
        entry("optim.lr: {low: 0.1, high: 0.5, step: 0.00001}"),
        [(10, "optim.lr has 40,001 steps; allowed: at most 10,000")],
    ),
    "choices and a range": (
        entry("optim.lr: {choices: [0.1], low: 0.1}"),
        [(10, "optim.lr has choices and a range; give one of them")],
    ),
    "a choice twice": (
        entry("optim.lr:\n      choices:\n        - 1\n        - 1.0"),
        [(13, "optim.lr has 1.0 twice")],
    ),
    "a choice that the setting refuses": (
        entry("optim.optimizer: {choices: [adamw, adamm]}"),
        [(10, "optim.optimizer is 'adamm'; allowed: adamw or lamb or sgd; did you mean adamw?")],
    ),
    "no choices": (entry("optim.lr: {choices: []}"), [(10, "search.space.optim.lr.choices is []")]),
    "a range in a grid": (
        GRID + LR,
        [(9, "optim.lr wants {low, high, step} or {choices} in a grid")],
    ),
    "a grid that cannot be listed": (
        GRID.replace("  space", "  samples: 10\n  space")
        + entry("optim.lr: {low: 0.001, high: 1, step: 0.001}", "")
        + entry("optim.weight_decay: {low: 0.001, high: 1, step: 0.001}", ""),
        [(9, "search.space has more than 100,000 suggestions, which a grid lists; use random")],
    ),
    "a grid without end": (
        GRID
        + entry("optim.lr: {low: 0.001, high: 1, step: 0.001}", "")
        + entry("optim.weight_decay: {low: 0, high: 0.01, step: 0.001}", ""),
        [(8, "search.space has more than 10,000 suggestions; give search.samples")],
    ),
    "too many trials": (
        TPE.replace("samples: 4", "samples: 10000").replace("  space", "  seeds: [5, 6, 7, 8, 9]\n  space") + LR,
        [(5, "search makes 100,004 trials in all cells; allowed: at most 100,000")],
    ),
    "a condition on nothing": (
        TPE + LR + entry("deit3.flip: {choices: [true], if: {optim.lrr: 3, optim.steps: 4}}", ""),
        [
            (11, "if of deit3.flip names optim.lrr, which is none; did you mean optim.lr?"),
            (11, "if of deit3.flip names optim.steps, which is no entry of the space"),
        ],
    ),
    "a condition on any number": (
        TPE + LR + entry("deit3.flip: {choices: [true], if: {optim.lr: 1e-3}}", ""),
        [(11, "if of deit3.flip names optim.lr, which takes any number; give that choices or a step")],
    ),
    "a condition that never holds": (
        TPE
        + entry("optim.optimizer: {choices: [adamw, sgd]}", "")
        + entry("deit3.flip:\n      choices: [true]\n      if:\n        optim.optimizer: [sgd, lamb]", ""),
        [(14, "if of deit3.flip names optim.optimizer 'lamb', which is never suggested")],
    ),
    "conditions in a circle": (
        TPE
        + entry("optim.optimizer: {choices: [adamw], if: {deit3.flip: true}}", "")
        + entry("deit3.flip: {choices: [true], if: {optim.optimizer: adamw}}", ""),
        [
            (10, "if of optim.optimizer depends on optim.optimizer itself in the end"),
            (11, "if of deit3.flip depends on deit3.flip itself in the end"),
        ],
    ),
    "an impossible bound": (
        entry("model.image_size:\n      low: 30\n      high: 64"),
        [(11, "model.image_size 30 makes an impossible trial in every cell: model.patch_size 8 does not divide")],
    ),
    "an impossible choice": (
        entry("optim.warmup_steps:\n      choices:\n        - 10\n        - 200"),
        [
            (
                13,
                "optim.warmup_steps 200 makes an impossible trial in every cell: optim.warmup_steps 200 is more than "
                "optim.steps 100",
            )
        ],
    ),
    "an impossible choice under its condition": (
        TPE
        + entry("optim.steps: {choices: [50, 1000]}", "")
        + entry("optim.warmup_steps: {choices: [200], if: {optim.steps: [50, 1000]}}", ""),
        [(11, "optim.warmup_steps 200 is more than optim.steps 50")],
    ),
    "a size without resources": (
        f"resources: {{nano: {{cpus: 1}}}}\n{TPE}    model.size: {{choices: [nano, tiny]}}\n",
        [(11, "resources has nothing for model.size tiny; it has nano")],
    ),
    "a scheduler that keeps all": (
        "scheduler: {name: asha, metric: val/knn/top1, reduction: 1}\n",
        [(5, "scheduler.reduction is 1; allowed: a number above 1")],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_searches_are_explained_at_their_lines(case: str, tmp_path: Path) -> None:
    text, expected = WRONG[case]
    before = BEFORE
    if case == "seeds by need":
        before = BEFORE.replace("[0, 1]", "{first: 2, most: 4, until: {metric: test/knn/top1, halfwidth: 0.5}}")
    path = tmp_path / "wrong.yaml"
    path.write_text(before + text)
    started = time.process_time()
    with pytest.raises(SpecError) as caught:
        read_sweep(path)
    assert time.process_time() - started < 0.5
    found = [(problem.line, problem.message) for problem in caught.value.problems]
    assert [line for line, _ in found] == [line for line, _ in expected], found
    for (_, message), (_, fragment) in zip(found, expected, strict=True):
        assert fragment in message


def test_choices_that_are_possible_only_under_their_condition_are_right(tmp_path: Path) -> None:
    space = (
        "    optim.steps: {choices: [50, 1000]}\n    optim.warmup_steps: {choices: [200], if: {optim.steps: 1000}}\n"
    )
    found = sweep(tmp_path / "right.yaml", TPE + space)
    assert len(build_plan(found).cells) == 2


def test_what_is_impossible_in_some_cells_names_one(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(
        "name: some\ntrial: {model.size: nano}\naxes: {model.patch_size: [4, 8]}\n"
        f"{TPE}    model.image_size: {{choices: [28]}}\n"
    )
    with pytest.raises(SpecError) as caught:
        read_sweep(path)
    message = "makes an impossible trial in cell {model.patch_size: 8}: model.patch_size 8 does not divide"
    assert message in str(caught.value)


def test_many_cells_are_checked_quickly(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text(
        "name: many\ntrial: {model: {size: nano, patch_size: 8}}\n"
        f"axes: {{model.num_registers: {list(range(17))}, optim.lr: {[i / 100 for i in range(1, 101)]}}}\n"
        f"{TPE}    optim.weight_decay: {{low: 0, high: 0.1}}\n"
    )
    started = time.process_time()
    assert read_sweep(path).search is not None
    assert time.process_time() - started < 6  # 1,700 cells are resolved once, and 850 with a bound


@pytest.fixture(scope="module")
def validator() -> Any:
    return jsonschema.Draft202012Validator(sweep_schema())


class TestSchema:
    def test_right_files_pass(self, validator: Any, tmp_path: Path) -> None:
        for text in (FULL, TPE + LR, f"{GRID}    optim.lr: {{choices: [0.1, 0.2]}}\n"):
            path = tmp_path / "right.yaml"
            path.write_text(BEFORE + text)
            assert [error.message for error in validator.iter_errors(read(path).root.plain())] == []

    @pytest.mark.parametrize(
        "case",
        ["no samples", "sampler that does not exist", "mode that does not exist", "no setting", "an unknown key",
         "text for a number", "a scheduler that keeps all"],
    )  # fmt: skip
    def test_wrong_files_fail(self, validator: Any, case: str, tmp_path: Path) -> None:
        path = tmp_path / "wrong.yaml"
        path.write_text(BEFORE + WRONG[case][0])
        assert not validator.is_valid(read(path).root.plain())
