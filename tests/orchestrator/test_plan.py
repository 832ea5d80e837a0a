"""Plans: order, identities, collapsed cells, names, what is new, and the smallest difference that seeds can show."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from orchestrator.match import training_flops
from orchestrator.plan import Plan, build_plan, interval_half_width
from orchestrator.spec import read_sweep
from orchestrator.sweep import Resources, Sweep, When
from orchestrator.trial_names import trial_names
from trainers.config import resolve, trial_id

TINY = {"preset": "short", "model.size": "nano", "model.patch_size": 8}


def sweep(**parts: Any) -> Sweep:
    return Sweep(**{"name": "example", "trial": TINY, "axes": {"model.num_registers": (0, 4)}, **parts})


def cells(plan: Plan) -> list[tuple[Any, ...]]:
    return [tuple(cell.values()) for cell in plan.cells]


def test_trials_stand_in_the_order_of_the_file() -> None:
    plan = build_plan(sweep(axes={"optim.lr": (1e-3, 1e-4), "model.num_registers": (4, 0)}, seeds=(1, 0)))
    assert [(t.cell["optim.lr"], t.cell["model.num_registers"], t.seed) for t in plan.trials] == [
        (1e-3, 4, 1), (1e-3, 4, 0), (1e-3, 0, 1), (1e-3, 0, 0),
        (1e-4, 4, 1), (1e-4, 4, 0), (1e-4, 0, 1), (1e-4, 0, 0),
    ]  # fmt: skip


def test_a_trial_is_its_resolved_configuration() -> None:
    plan = build_plan(sweep(seeds=(0, 7)))
    last = plan.trials[-1]
    assert last.config == resolve({**TINY, "model.num_registers": 4, "seed": 7})
    assert last.trial_id == trial_id(last.config)
    assert len({trial.trial_id for trial in plan.trials}) == 4


def test_settings_without_effect_are_null_and_their_cells_are_one() -> None:
    plan = build_plan(sweep(axes={"model.num_registers": (0, 4), "model.reg_init_std": (0.02, 1e-6)}, seeds=(0, 1)))
    assert cells(plan) == [(0, None), (4, 0.02), (4, 1e-6)]
    assert len(plan.trials) == len({t.trial_id for t in plan.trials}) == 6
    assert plan.notes == ()


def test_an_axis_whose_value_may_be_null_keeps_it() -> None:
    plan = build_plan(sweep(axes={"model.layer_scale": (None, 1e-4)}))
    assert cells(plan) == [(None,), (1e-4,)]


def test_an_axis_without_effect_anywhere_is_said() -> None:
    plan = build_plan(sweep(axes={"model.reg_init_std": (0.02, 1e-6)}))
    assert len(plan.trials) == 1
    assert plan.notes == ("model.reg_init_std has no effect in any cell",)


def test_an_axis_over_sizes_that_mixes_recipes_is_said() -> None:
    sizes = {"model.size": ("nano", "tiny")}
    plan = build_plan(sweep(trial={"model.patch_size": 8}, axes=sizes))
    assert plan.notes == ("cells of deit3 follow the presets nano and short; set trial.preset for one recipe",)
    assert build_plan(sweep(trial={"model.patch_size": 8, "preset": "short"}, axes=sizes)).notes == ()


def test_images_that_are_enlarged_are_said() -> None:
    sizes = {"data.decode_size": 16, "model.image_size": 32}
    plan = build_plan(sweep(trial={**TINY, **sizes}))
    assert plan.notes == (
        "data.decode_size 16 is below model.image_size 32: images are enlarged, which adds no detail",
    )
    assert build_plan(sweep(trial={**TINY, "data.decode_size": 32, "model.image_size": 32})).notes == ()


def test_two_names_for_the_same_trial_are_one_and_said() -> None:
    plan = build_plan(sweep(trial={**TINY, "optim.steps": 100}, axes={"optim.warmup_steps": ("auto", 5, 6)}))
    assert cells(plan) == [("auto",), (6,)]
    note = "the cells {optim.warmup_steps: auto} and {optim.warmup_steps: 5} are the same trial; the first is kept"
    assert plan.notes == (note,)


def test_when_sets_cells_and_later_entries_win() -> None:
    when = (
        When(condition={"model.num_registers": (4,)}, settings={"optim.lr": 0.5, "optim.min_lr": 0.1}),
        When(condition={"method": ("deit3",), "model.num_registers": (4, 8)}, settings={"optim.lr": 0.25}),
        When(condition={"data.train": ("fashion_mnist",)}, settings={"optim.lr": 0.125}),
    )
    plan = build_plan(sweep(when=when, axes={"model.num_registers": (0, 4, 8)}))
    found = [(t.config.optim.lr, t.config.optim.min_lr) for t in plan.trials]
    assert found == [(1e-3, 1e-5), (0.25, 0.1), (0.25, 1e-5)]


def test_conditions_see_defaults_and_the_preset() -> None:
    when = (
        When(condition={"preset": ("imagenet21k",), "optim.optimizer": ("lamb",)}, settings={"optim.lr": 0.5}),
        When(condition={"optim.optimizer": ("adamw",)}, settings={"optim.lr": 0.25}),
    )
    plan = build_plan(sweep(when=when, axes={"preset": ("short", "imagenet21k")}))
    assert [t.config.optim.lr for t in plan.trials] == [0.25, 0.5]


def test_excluded_cells_are_left_out() -> None:
    exclude = ({"model.num_registers": (4, 8), "optim.lr": (0.1,)},)
    plan = build_plan(sweep(exclude=exclude, axes={"model.num_registers": (0, 4, 8), "optim.lr": (0.1, 0.2)}))
    assert cells(plan) == [(0, 0.1), (0, 0.2), (4, 0.2), (8, 0.2)]


def test_execution_and_order_do_not_change_identities() -> None:
    one = build_plan(sweep(axes={"model.num_registers": (0, 4), "optim.lr": (0.1, 0.2)}))
    other = build_plan(
        sweep(axes={"optim.lr": (0.2, 0.1), "model.num_registers": (4, 0)}, trial={**TINY, "execution.threads": 2})
    )
    assert {t.trial_id for t in one.trials} == {t.trial_id for t in other.trials}


def test_extending_a_sweep_keeps_the_trials_it_has() -> None:
    before = build_plan(sweep(seeds=(0, 1)))
    after = build_plan(sweep(seeds=(0, 1, 2), axes={"model.num_registers": (0, 4, 8)}))
    known = {trial.trial_id for trial in before.trials}
    new = [(t.cell["model.num_registers"], t.seed) for t in after.trials if t.trial_id not in known]
    assert new == [(0, 2), (4, 2), (8, 0), (8, 1), (8, 2)]
    assert known < {trial.trial_id for trial in after.trials}


class TestNames:
    def names(self, **parts: Any) -> list[str]:
        return [trial.name for trial in build_plan(sweep(**parts)).trials]

    def test_they_say_method_size_registers_and_seed(self) -> None:
        assert self.names(seeds=(0, 1)) == [
            "deit3 nano reg0 seed0", "deit3 nano reg0 seed1", "deit3 nano reg4 seed0", "deit3 nano reg4 seed1",
        ]  # fmt: skip

    def test_other_axes_follow_in_short(self) -> None:
        axes = {
            "optim.lr": (1e-3, 1e-5),
            "optim.optimizer": ("lamb",),
            "model.patch_size": (8,),
            "deit3.flip": (True,),
            "evaluation.knn.k": ((10, 20),),
            "data.train": ("scenes",),
        }
        assert self.names(axes=axes) == [
            "deit3 nano reg0 lr0.001 optimizer=lamb patch8 flip=true k=10,20 scenes seed0",
            "deit3 nano reg0 lr1e-5 optimizer=lamb patch8 flip=true k=10,20 scenes seed0",
        ]

    def test_settings_without_effect_are_left_out(self) -> None:
        axes = {"model.num_registers": (0, 4), "model.reg_init_std": (0.02, 1e-6)}
        assert self.names(axes=axes)[0] == "deit3 nano reg0 seed0"

    def test_they_are_unique_even_where_short_ones_are_not(self) -> None:
        axes = {"method": ("a.b:Method", "c.d:Method"), "model.num_registers": (0, 4)}
        names = self.names(axes=axes, seeds=(0, 1))
        assert len(set(names)) == 8
        assert all(name.startswith("Method nano reg") for name in names)

    def test_equal_leaves_are_told_apart_by_their_whole_names(self) -> None:
        axes = {"optim.steps": (11, 1), "evaluation.linear.steps": (1, 11)}
        assert self.names(axes=axes)[0] == "deit3 nano reg0 steps11 steps1 seed0"
        assert len(set(self.names(axes=axes))) == 4


def test_resources_may_depend_on_the_size() -> None:
    by_size = {"nano": Resources(cpus=1), "small": Resources(cpus=2, gpus=0.5)}
    plan = build_plan(sweep(axes={"model.size": ("nano", "small")}, trial={"model.patch_size": 8}, resources=by_size))
    assert [trial.resources for trial in plan.trials] == [Resources(cpus=1), Resources(cpus=2, gpus=0.5)]


def test_the_published_plan_is_plain_json() -> None:
    axes = {"model.num_registers": (0, 4), "evaluation.knn.k": ((10,), (20,))}
    plan = build_plan(sweep(axes=axes, baseline={"model.num_registers": 0}, primary=("test/knn/top1",), question="?"))
    published = json.loads(json.dumps(plan.to_json({"gpu_hours": 1.5}), allow_nan=False))
    assert list(published) == [
        "sweep", "question", "axes", "seeds", "baseline", "primary", "match", "score", "outlier_limit", "scheduler",
        "cost", "model_sizes", "trials",
    ]  # fmt: skip
    assert published["sweep"] == "example"
    assert published["axes"] == {"model.num_registers": [0, 4], "evaluation.knn.k": [[10], [20]]}
    assert published["baseline"] == {"model.num_registers": 0}
    assert published["scheduler"] is None
    assert published["cost"] == {"gpu_hours": 1.5}
    assert published["trials"][0] == {
        "trial_id": plan.trials[0].trial_id,
        "name": "deit3 nano reg0 k=10 seed0",
        "cell": {"model.num_registers": 0, "evaluation.knn.k": [10]},
        "seed": 0,
        "training_flops": training_flops(plan.trials[0].config),
    }


@pytest.mark.parametrize("seeds", [2, 3, 5, 11, 31, 32, 60, 500])
def test_the_smallest_difference_is_that_of_the_t_interval(seeds: int) -> None:
    expected = float(stats.t.ppf(0.975, seeds - 1)) / math.sqrt(seeds)
    assert interval_half_width(seeds) == pytest.approx(expected, rel=3e-5)


def test_one_seed_has_no_interval() -> None:
    assert interval_half_width(1) is None


def test_measured_weights_of_whose_model_the_name_says_nothing_are_said(tmp_path: Path) -> None:
    named, own = "vit_small_patch14_dinov2.lvd142m", "own.pth"
    file = tmp_path / "weights.yaml"
    file.write_text(f"name: weights\ntrial: {{method: pretrained}}\naxes: {{model.weights: [{named}, {own}]}}\n")
    (note,) = (note for note in build_plan(read_sweep(file)).notes if "model.weights" in note)
    assert note.startswith(
        "model.weights own.pth is no name of released weights: it must be of model.size small, patch"
    )


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["sh", "-c", 'echo "val/Top1": 0.5'], "sh"),
        (["bash", "-lc", "exec ./train.sh"], "bash"),
        (["python", "train.py", "--x", "{program.x}"], "train"),
        (["torchrun", "--standalone", "mine.py", "-c", "conf.yaml"], "mine"),
    ],
)
def test_a_programs_trials_are_named_by_its_file(command: list[str], name: str) -> None:
    config = resolve({"command": command, "program.x": 1, "seed": 3})
    assert trial_names([({"program.x": 1}, config)]) == [f"{name} x1 seed3"]
