"""Right sweep files: what is read, how `--set` changes it, and that what is written is read back equal."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from orchestrator.plan import build_plan
from orchestrator.schema import sweep_schema
from orchestrator.spec import Resources, SpecError, Sweep, dump, read_sweep
from orchestrator.yaml_file import read
from trainers.catalog import TRAINING_METHODS
from trainers.config import fields

FULL = """\
name: full
question: "Does: it work?"
trial:
  model: {size: small, patch_size: 16}
  data: {train: scenes, scenes.contrast: 0.5}
  optim.lr: 1
axes:
  model.num_registers: [0, 4, 16]
  optim: {weight_decay: [0.0, 5e-2]}
  evaluation.knn.k: [[10, 20], [20]]
seeds: [0, 1, 2]
when:
  - if: {model.num_registers: [4, 16], data.train: scenes}
    set: {optim: {lr: 5.0e-4}, optim.min_lr: 0}
  - if: {data.train: fashion_mnist}
    set: {model.patch_size: 4}
exclude:
  - {model.num_registers: 16, optim.weight_decay: 0}
baseline: {model.num_registers: 0}
primary: [test/linear/top1, tokens/last/outlier_fraction]
resources: {small: {gpus: 0.5, cpus: 4}}
scheduler: {name: asha, metric: val/knn/top1}
search: {name: tpe, samples: 16, metric: val/knn/top1, space: {optim.warmup_lr: {low: 1e-5, high: 1e-3, log: true}}}
budget: {gpu_hours: 200}
"""
WITHOUT_CAPTIONS = "axes.method=[deit3, dino, dinov2]"
SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "full.yaml"
    path.write_text(FULL)
    return path


def test_every_part_is_read(full: Path) -> None:
    sweep = read_sweep(full)
    assert sweep.name == "full"
    assert sweep.question == "Does: it work?"
    assert sweep.trial == {
        "model.size": "small",
        "model.patch_size": 16,
        "data.train": "scenes",
        "data.scenes.contrast": 0.5,
        "optim.lr": 1.0,
    }
    assert sweep.axes == {
        "model.num_registers": (0, 4, 16),
        "optim.weight_decay": (0.0, 0.05),
        "evaluation.knn.k": ((10, 20), (20,)),
    }
    assert sweep.seeds == (0, 1, 2)
    assert sweep.when[0].condition == {"model.num_registers": (4, 16), "data.train": ("scenes",)}
    assert sweep.when[0].settings == {"optim.lr": 5e-4, "optim.min_lr": 0.0}
    assert sweep.exclude == ({"model.num_registers": (16,), "optim.weight_decay": (0.0,)},)
    assert sweep.baseline == {"model.num_registers": 0}
    assert sweep.resources_of("small") == Resources(gpus=0.5, cpus=4.0)
    assert sweep.scheduler is not None
    assert sweep.scheduler.grace == 0.25
    assert sweep.search is not None
    assert sweep.search.space["optim.warmup_lr"].log


def test_what_is_left_out_has_defaults(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("name: short\naxes: {method: [deit3]}\n")
    sweep = read_sweep(path)
    assert (sweep.seeds, sweep.trial, sweep.baseline, sweep.resources) == ((0,), {}, None, Resources(gpus=0, cpus=1))


def test_a_sweep_that_is_written_is_read_back_equal(full: Path, tmp_path: Path) -> None:
    sweep = read_sweep(full, ["optim.lr=0.1", "question='010'"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(sweep))
    assert read_sweep(again) == sweep
    assert sweep.name.startswith("full@")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.train=fashion_mnist", WITHOUT_CAPTIONS],
        ["data.train=image_folder", "data.name=own", WITHOUT_CAPTIONS],
    ],
    ids=str,
)
def test_the_sweeps_of_the_project_are_right(path: Path, overrides: list[str]) -> None:
    sweep = read_sweep(path, overrides)
    assert sweep.question
    assert sweep.name.split("@")[0] == path.stem


def test_the_sweep_of_all_methods_can_be_made_large() -> None:
    (path,) = (path for path in SWEEPS if path.stem == "num_registers")
    large = ["model.size=base", "model.patch_size=16", "data.decode_size=224", "optim.steps=100000"]
    trials = build_plan(read_sweep(path, large)).trials
    assert {trial.config.method for trial in trials} == set(TRAINING_METHODS) - {"openclip"}  # it needs captions
    assert {(trial.config.preset, trial.config.model.image_size) for trial in trials} == {("short", 224)}


class TestOverrides:
    def test_a_base_setting_makes_another_experiment(self, full: Path) -> None:
        sweep = read_sweep(full, ["optim.steps=10"])
        assert sweep.trial["optim.steps"] == 10
        assert len(sweep.name) == len("full@") + 8
        assert sweep.name != read_sweep(full, ["optim.steps=11"]).name

    def test_equal_settings_make_the_same_experiment(self, full: Path) -> None:
        one = read_sweep(full, ["optim.lr=1e-3", "optim.steps=10"])
        other = read_sweep(full, ["trial.optim.steps=10", "trial.optim.lr=0.001"])
        assert one == other

    def test_seeds_axes_and_execution_extend_the_same_sweep(self, full: Path) -> None:
        extended = ["seeds=[0, 1, 2, 3]", "axes.model.num_registers=[0, 4, 8, 16]", "execution.threads=2"]
        sweep = read_sweep(full, extended)
        assert sweep.name == "full"
        assert sweep.seeds == (0, 1, 2, 3)
        assert sweep.axes["model.num_registers"] == (0, 4, 8, 16)
        assert sweep.trial["execution.threads"] == 2

    def test_a_given_name_wins(self, full: Path) -> None:
        assert read_sweep(full, ["optim.steps=10"], name="mine").name == "mine"
        with pytest.raises(SpecError, match=r"^--name \.\./mine: name is '\.\./mine'; allowed"):
            read_sweep(full, name="../mine")

    def test_the_command_line_goes_before_when(self, full: Path) -> None:
        sweep = read_sweep(full, ["optim.lr=0.1"])
        assert sweep.when[0].settings == {"optim.min_lr": 0.0}

    def test_conditions_see_the_command_line(self, full: Path) -> None:
        sweep = read_sweep(full, ["data.train=fashion_mnist"])
        assert sweep.trial["data.train"] == "fashion_mnist"
        assert len(sweep.when) == 2

    def test_exclusions_of_values_that_an_axis_lost_hold_for_no_cell(self, full: Path) -> None:
        sweep = read_sweep(full, ["axes.model.num_registers=[0, 4]"])
        assert sweep.exclude == ({"model.num_registers": (16,), "optim.weight_decay": (0.0,)},)

    def test_other_parts(self, full: Path) -> None:
        sweep = read_sweep(full, ["resources={cpus: 2}", "primary=[test/knn/top1]", "baseline=null"])
        assert sweep.resources == Resources(gpus=0, cpus=2)
        assert sweep.primary == ("test/knn/top1",)
        assert sweep.baseline is None
        assert sweep.name == "full"


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = sweep_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


class TestSchema:
    @pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
    def test_the_sweeps_of_the_project_pass(self, validator: Any, path: Path) -> None:
        assert [error.message for error in validator.iter_errors(read(path).root.plain())] == []

    def test_it_knows_every_setting_as_an_axis_and_in_trial(self, validator: Any) -> None:
        properties = validator.schema["properties"]
        axes, trial = set(properties["axes"]["properties"]), set(properties["trial"]["anyOf"][0]["properties"])
        settings = set(fields()) - {"seed"}
        assert axes == {name for name in settings if not name.startswith("execution.")}
        assert settings <= trial
        assert set(properties) == set(Sweep.model_fields) - {"more_seeds"}  # a form of seeds

    @pytest.mark.parametrize(
        "wrong",
        [
            {"axis": {}},
            {"axes": {"model.num_register": [0]}},
            {"axes": {"model.num_registers": [0, 17]}},
            {"axes": {"model.num_registers": []}},
            {"axes": {"model.num_registers": [0, 0]}},
            {"axes": {"execution.threads": [1]}},
            {"trial": {"model": {"sizes": "nano"}}},
            {"trial": {"model": {"size": "nanno"}}},
            {"trial": {"model.size": "nanno"}},
            {"trial": {"data": {"scenes": {"contrast": 2}}}},
            {"trial": {"method": "deit4"}},
            {"trial": {"seed": 1}},
            {"seeds": []},
            {"name": "../x"},
            {"when": [{"if": {}}]},
            {"exclude": [{"model.num_registerss": 0}]},
            {"baseline": {"lr": 0}},
            {"resources": {"gpu": 1}},
            {"scheduler": {"name": "pbt", "metric": "val/knn/top1"}},
            {"budget": {"gpu_hours": -1}},
        ],
        ids=str,
    )
    def test_wrong_files_fail(self, validator: Any, wrong: dict[str, Any]) -> None:
        right = {"name": "x", "axes": {"model.num_registers": [0, 4]}}
        assert validator.is_valid(right)
        assert not validator.is_valid({**right, **wrong})

    def test_a_part_of_ones_own_passes(self, validator: Any) -> None:
        axes = {"method": ["deit3", "my.package:Method"]}
        assert validator.is_valid({"name": "x", "axes": axes, "trial": {"data": {"train": "a.b:build"}}})


@pytest.mark.parametrize(
    "trial", ["{method: 'mine.methods:Own'}", "{evaluation.probes: ['mine.probes:Own']}", "{command: [sh, x.sh]}"]
)
def test_parts_of_a_users_own_may_measure_what_we_do_not_know(tmp_path: Path, trial: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"name: own\ntrial: {trial}\naxes: {{model.num_registers: [0]}}\nprimary: [test/lin/top1]\n")
    assert read_sweep(path).primary == ("test/lin/top1",)
