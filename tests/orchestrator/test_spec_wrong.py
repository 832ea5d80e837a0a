"""Wrong sweep files: every problem is reported at its line, with what was given and what is allowed."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.spec import SpecError, Sweep, read_sweep
from orchestrator.yaml_file import dump

GOOD = """\
name: example
trial:
  model: {size: nano, patch_size: 8}
axes:
  model.num_registers: [0, 4]
  model.size:
    - nano
    - tiny
seeds: [0, 1]
baseline: {model.num_registers: 0}
primary: [test/linear/top1]
"""
NO_SIZE_AXIS = GOOD.replace("  model.size:\n    - nano\n    - tiny\n", "")


def edited(old: str, new: str, text: str = NO_SIZE_AXIS) -> str:
    assert old in text
    return text.replace(old, new)


SEEDS, BASELINE, PRIMARY = "seeds: [0, 1]", "baseline: {model.num_registers: 0}", "primary: [test/linear/top1]"
TRIAL = "  model: {size: nano, patch_size: 8}\n"
AXIS = "  model.num_registers: [0, 4]\n"

# Text of the file, and for each expected problem its line and what its message holds.
WRONG: dict[str, tuple[str, list[tuple[int, str]]]] = {
    "unknown part": (edited(SEEDS, "sedes: [0, 1]"), [(6, "sedes is not a part of a sweep file; did you mean seeds?")]),
    "setting outside trial": (
        edited(SEEDS, "optim: {lr: 1}"),
        [(6, "optim is not a part of a sweep file; it belongs")],
    ),
    "unknown nested setting": (
        edited("patch_size: 8", "patchsize: 8"),
        [(3, "model.patchsize is not a setting of model; did you mean model.patch_size?")],
    ),
    "unknown dotted setting": (
        edited(TRIAL, "  model.num_register: 4\n"),
        [(3, "model.num_register is not a setting of model; did you mean model.num_registers?")],
    ),
    "unknown section": (edited("model: {", "modell: {"), [(3, "modell is not a setting; did you mean model?")]),
    "another project's name": (
        edited(TRIAL, "  optim.learning_rate: 1\n"),
        [(3, "optim.learning_rate is not a setting of optim; did you mean optim.lr?")],
    ),
    "section without settings": (edited(TRIAL, "  optim:\n"), [(3, "optim is a section; its settings are optim.opt")]),
    "given twice, nested and dotted": (
        edited(TRIAL, f"{TRIAL}  model.size: tiny\n"),
        [(4, "model.size is given twice, first on line 3")],
    ),
    "duplicate key": (edited(SEEDS, f"{SEEDS}\nname: other"), [(7, "name is given twice, first on line 1")]),
    "text for a number": (
        edited(TRIAL, '  optim.lr: "1e-3"\n'),
        [(3, "optim.lr is '1e-3'; allowed: a number above 0, at most 10; write it without quotes")],
    ),
    "fraction for a whole number": (
        edited(TRIAL, "  optim.steps: 1e3\n"),
        [(3, "optim.steps is 1000.0; allowed: a whole number from 0 to 100000000; did you mean 1000?")],
    ),
    "yes for true": (
        edited(TRIAL, "  deit3.flip: yes\n"),
        [(3, "deit3.flip is 'yes'; allowed: true or false; did you mean true?")],
    ),
    "true for a number": (
        edited(TRIAL, "  optim.steps: true\n"),
        [(3, "optim.steps is true; allowed: a whole number")],
    ),
    "not a number": (edited(TRIAL, "  optim.lr: .nan\n"), [(3, "optim.lr is .nan; allowed: a number above 0")]),
    "infinite": (edited(TRIAL, "  optim.weight_decay: 1e999\n"), [(3, "optim.weight_decay is .inf; allowed")]),
    "17 registers": (
        edited("[0, 4]", "\n  - 0\n  - 17"),
        [(7, "model.num_registers is 17; allowed: a whole number from 0 to 16")],
    ),
    "method that does not exist": (
        edited(TRIAL, "  method: deit4\n"),
        [(3, "method is 'deit4', which does not exist; did you mean deit3?; allowed: deit3,")],
    ),
    "data set that does not exist": (
        edited(TRIAL, "  data: {train: imagenet}\n"),
        [(3, "data.train is 'imagenet', which does not exist; did you mean imagenet1k?; allowed: scenes,")],
    ),
    "wrong member of a list": (
        edited(TRIAL, "  evaluation.knn.k: [10, x]\n"),
        [(3, "evaluation.knn.k has 'x' in it; allowed: a list of one or more whole numbers")],
    ),
    "unordered pair": (
        edited(TRIAL, "  data.scenes.main_size: [1, 0.5]\n"),
        [(3, "data.scenes.main_size is [1.0, 0.5]; allowed: two rising numbers from 0.1 to 1")],
    ),
    "seed in trial": (edited(TRIAL, "  seed: 1\n"), [(3, "use seeds")]),
    "axis that is no setting": (
        edited(AXIS, f"{AXIS}  registers: [0]\n"),
        [(6, "registers is not a setting; did you mean model.num_registers?")],
    ),
    "seed as an axis": (edited(AXIS, f"{AXIS}  seed: [0, 1]\n"), [(6, "seed is not an axis; use seeds")]),
    "execution as an axis": (
        edited(AXIS, f"{AXIS}  execution.threads: [1, 2]\n"),
        [(6, "execution.threads is not an axis: execution changes nothing that a trial computes")],
    ),
    "empty axis": (edited("[0, 4]", "[]"), [(5, "model.num_registers is empty")]),
    "axis that is no list": (
        edited("[0, 4]", "0"),
        [(5, "model.num_registers is 0; allowed: a list of values, as in [0]")],
    ),
    "no axes": (edited(f"axes:\n{AXIS}", "").replace(f"{BASELINE}\n", ""), [(1, "axes is missing")]),
    "empty axes": (edited(f"axes:\n{AXIS}", "axes: {}\n").replace(f"{BASELINE}\n", ""), [(4, "axes is empty")]),
    "repeated axis value": (edited("[0, 4]", "[0, 4, 0]"), [(5, "model.num_registers has 0 twice")]),
    "equal after conversion": (
        edited(AXIS, f"{AXIS}  optim.lr: [1, 1.0]\n"),
        [(6, "optim.lr has 1.0 twice")],
    ),
    "axis in trial too": (
        edited("patch_size: 8", "num_registers: 2"),
        [(3, "model.num_registers is an axis as well; set it in one place")],
    ),
    "empty seeds": (
        edited(SEEDS, "seeds: []"),
        [(6, "seeds is []; allowed: a list of one or more whole numbers from 0")],
    ),
    "repeated seed": (edited(SEEDS, "seeds:\n  - 3\n  - 3"), [(8, "seeds has 3 twice")]),
    "negative seed": (edited(SEEDS, "seeds: [0, -1]"), [(6, "seeds has -1 in it; allowed: a list of one or more")]),
    "name that escapes": (
        edited("name: example", "name: ../example"),
        [(1, "name is '../example'; allowed: at most 64")],
    ),
    "hidden name": (edited("name: example", "name: .example"), [(1, "not beginning with - or .")]),
    "name with a separator": (edited("name: example", "name: a/b"), [(1, "name is 'a/b'; allowed")]),
    "long name": (edited("name: example", f"name: {'x' * 65}"), [(1, "at most 64 letters")]),
    "name of the cache": (edited("name: example", "name: Cache"), [(1, "is kept for files of the tracking store")]),
    "no name": (edited("name: example\n", ""), [(1, "name is missing; give a text")]),
    "when sets an axis": (
        edited(SEEDS, f"{SEEDS}\nwhen:\n  - if: {{method: deit3}}\n    set: {{model.num_registers: 4}}"),
        [(9, "model.num_registers is an axis, which when may not set")],
    ),
    "when of an unknown setting": (
        edited(SEEDS, f"{SEEDS}\nwhen: [{{if: {{metod: x}}, set: {{optim.lr: 1}}}}]"),
        [(7, "metod is not a setting; did you mean method?")],
    ),
    "when of a value the axis lacks": (
        edited(SEEDS, f"{SEEDS}\nwhen: [{{if: {{model.num_registers: 3}}, set: {{optim.lr: 1}}}}]"),
        [(7, "if names model.num_registers 3, a value that its axis lacks; it has 0, 4")],
    ),
    "when without set": (edited(SEEDS, f"{SEEDS}\nwhen: [{{if: {{}}}}]"), [(7, "set is missing")]),
    "when that is no list": (edited(SEEDS, f"{SEEDS}\nwhen: {{}}"), [(7, "when is {}; allowed: a list of entries")]),
    "exclude of no axis": (
        edited(SEEDS, f"{SEEDS}\nexclude: [{{method: deit3}}]"),
        [(7, "exclude names method, which is not an axis; allowed: model.num_registers")],
    ),
    "exclude of a value the axis lacks": (
        edited(SEEDS, f"{SEEDS}\nexclude:\n  - {{model.num_registers: 3}}"),
        [(8, "exclude names model.num_registers 3, a value that its axis lacks; it has 0, 4")],
    ),
    "exclude of everything": (
        edited(SEEDS, f"{SEEDS}\nexclude: [{{model.num_registers: [0, 4]}}]"),
        [(7, "exclude leaves no cell")],
    ),
    "exclude of the baseline": (
        edited(SEEDS, f"{SEEDS}\nexclude: [{{model.num_registers: 0}}]"),
        [(8, "exclude leaves no cell of the baseline {model.num_registers: 0}, so there is nothing to differ from")],
    ),
    "baseline of no axis": (
        edited(BASELINE, "baseline: {model.num_register: 0}"),
        [(7, "baseline names model.num_register, which is not an axis; did you mean model.num_registers?")],
    ),
    "baseline of a value the axis lacks": (
        edited(BASELINE, "baseline: {model.num_registers: 1}"),
        [(7, "baseline names model.num_registers 1, a value that its axis lacks; it has 0, 4")],
    ),
    "number for true": (
        edited(AXIS, f"{AXIS}  deit3.flip: [true, false]\n").replace(BASELINE, "baseline: {deit3.flip: 1}"),
        [(8, "baseline names deit3.flip 1, a value that its axis lacks; it has true, false")],
    ),
    "metric that its probe does not have": (
        edited(TRIAL, "  evaluation.probes: [segmentation]\n").replace("test/linear/top1", "test/segmentation/miuo"),
        [(8, "primary has test/segmentation/miuo, and probe segmentation has no metric 'miuo'; did you mean miou?")],
    ),
    "metric of the first data set under its name": (
        edited(TRIAL, "  evaluation.knn.data: [scenes]\n").replace("test/linear/top1", "test/knn/scenes/top1"),
        [(8, "but the first data set of evaluation.knn.data has the short names: test/knn/top1")],
    ),
    "metric without a probe": (
        edited(PRIMARY, "primary: [test/lineer/top1]"),
        [(8, "primary has test/lineer/top1, and there is no probe lineer; did you mean linear?")],
    ),
    "metric whose probe is like none": (
        edited(PRIMARY, "primary: [test/lin/top1]"),
        [(8, "and there is no probe lin; did you mean linear?")],
    ),
    "metric whose probe is like nothing": (
        edited(PRIMARY, "primary: [val/xyz/top1]"),
        [(8, "primary has val/xyz/top1, and there is no probe xyz; allowed: linear, knn, zero_shot,")],
    ),
    "metric that decides of more seeds without a probe": (
        edited(SEEDS, "seeds: {first: 2, most: 4, until: {metric: test/fid/top1, halfwidth: 0.1}}"),
        [(6, "seeds.until.metric is test/fid/top1, and there is no probe fid; allowed: linear,")],
    ),
    "metric of early stopping without a probe": (
        edited(PRIMARY, "scheduler: {name: asha, metric: val/loss}"),
        [(8, "scheduler.metric has val/loss, and there is no probe loss; allowed: linear,")],
    ),
    "metric of a search without a probe": (
        edited(PRIMARY, "search: {name: tpe, samples: 4, metric: val/nn/top1, space: {optim.lr: {low: 0.1, high: 1}}}"),
        [(8, "search.metric has val/nn/top1, and there is no probe nn")],
    ),
    "metric that is not measured": (
        edited(TRIAL, "  evaluation.probes: [knn]\n"),
        [(8, "primary has test/linear/top1, but evaluation.probes (knn) lacks linear")],
    ),
    "metric without a slash": (
        edited(PRIMARY, "primary: [top1]"),
        [(8, "primary is 'top1'; allowed: a metric such as")],
    ),
    "negative resources": (
        edited(PRIMARY, "resources: {gpus: -1}"),
        [(8, "resources.gpus is -1; allowed: a number from 0")],
    ),
    "no CPU": (edited(PRIMARY, "resources: {cpus: 0}"), [(8, "resources.cpus is 0; allowed: a number above 0")]),
    "one and a half GPUs": (edited(PRIMARY, "resources: {gpus: 1.5}"), [(8, "or a whole number above")]),
    "resources that are a number": (
        edited(PRIMARY, "resources: 2"),
        [(8, "resources is 2; allowed: a mapping, as in {cpus: 4, gpus: 0.5}, or one for each model size")],
    ),
    "resources of a size that are a number": (
        edited(PRIMARY, "resources: {nano: 2}"),
        [(8, "resources.nano is 2; allowed: a mapping, as in {cpus: 4, gpus: 0.5}")],
    ),
    "command as for a shell": (
        edited(TRIAL, "  command: sh 'a b.sh'\n"),
        [(3, "allowed: a list of its words, as in [sh, a b.sh]")],
    ),
    "search over nothing": (
        edited(PRIMARY, "search: {name: tpe, samples: 4, metric: val/knn/top1, space: {}}"),
        [(8, "search.space is {}; allowed: a mapping of one or more settings, as in {optim.lr: {")],
    ),
    "resources of another size": (
        edited(PRIMARY, "resources: {tiny: {cpus: 1}}"),
        [(8, "resources has nothing for model.size nano; it has tiny")],
    ),
    "resources of an unknown size": (
        edited(PRIMARY, "resources: {nano: {cpus: 1}, tinny: {cpus: 1}}"),
        [(8, "resources names tinny, which is no model size; did you mean tiny?")],
    ),
    "scheduler that does not exist": (
        edited(PRIMARY, "scheduler: {name: ashaa, metric: val/knn/top1}"),
        [(8, "scheduler.name is 'ashaa'; allowed: asha or median; did you mean asha?")],
    ),
    "scheduler that sees the test": (
        edited(PRIMARY, "scheduler: {name: asha, metric: test/knn/top1}"),
        [(8, "scheduler.metric is 'test/knn/top1'; allowed: a metric that begins with val/")],
    ),
    "search over an axis": (
        edited(
            PRIMARY,
            "search: {name: tpe, samples: 4, metric: val/knn/top1, space: {model.num_registers: {low: 0, high: 4}}}",
        ),
        [(8, "model.num_registers is an axis; a search is over settings that are not")],
    ),
    "search from high to low": (
        edited(
            PRIMARY, "search: {name: tpe, samples: 4, metric: val/knn/top1, space: {optim.lr: {low: 1, high: 0.1}}}"
        ),
        [(8, "optim.lr has low 1 and high 0.1; low must be below high")],
    ),
    "empty budget": (edited(PRIMARY, "budget: {}"), [(8, "budget is empty")]),
    "patch size that does not divide": (
        edited(AXIS, f"{AXIS}  model.image_size:\n  - 64\n  - 100\n"),
        [
            (
                8,
                "model.patch_size 8 does not divide model.image_size 100 (in 2 of 4 cells, first in {model.num_reg",
            )
        ],
    ),
    "impossible in every cell": (
        edited(TRIAL, "  optim: {batch_size: 10, micro_batch_size: 3}\n"),
        [(3, "optim.micro_batch_size 3 does not divide optim.batch_size 10 (in every cell)")],
    ),
    "impossible by when": (
        edited(SEEDS, f"{SEEDS}\nwhen: [{{if: {{model.num_registers: 4}}, set: {{model.image_size: 20}}}}]"),
        [(7, "model.patch_size 8 does not divide model.image_size 20 (in 1 of 2 cells")],
    ),
    "image folder without a name": (
        edited(TRIAL, "  data.train: image_folder\n"),
        [(3, "data.name is missing: data.train image_folder needs a logical name")],
    ),
    "too many trials": (
        edited(SEEDS, f"seeds: [{', '.join(map(str, range(4000)))}]")
        .replace("[0, 4]", f"[{', '.join(map(str, range(13)))}]")
        .replace(AXIS.split(":")[0], "  optim.lr: [0.1, 0.2]\n  model.num_registers", 1),
        [(4, "axes and seeds make 104,000 trials; allowed: at most 100,000")],
    ),
    "two errors at once": (
        edited("[0, 4]", "[0, 17]").replace("size: nano", "size: nanno"),
        [
            (3, "model.size is 'nanno', which does not exist; did you mean nano?"),
            (5, "model.num_registers is 17; allowed: a whole number from 0 to 16"),
        ],
    ),
    "no mapping": ("- 1\n- 2\n", [(1, "a sweep file is a mapping")]),
    "alias bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{k}: &{k} [{', '.join([f'*{p}'] * 9)}]\n" for p, k in zip("abcdefgh", "bcdefghi", strict=True)),
        [(4, "more than 5000 keys and values")],
    ),
}


def problems(path: Path, text: str, overrides: tuple[str, ...] = ()) -> list[tuple[int | None, str]]:
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_sweep(path, overrides)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [(problem.line, problem.message) for problem in caught.value.problems]


def test_the_examples_are_right_before_they_are_made_wrong(tmp_path: Path) -> None:
    for text in (GOOD.replace("{size: nano, patch_size: 8}", "{patch_size: 8}"), NO_SIZE_AXIS):
        path = tmp_path / "good.yaml"
        path.write_text(text)
        assert read_sweep(path).name == "example"


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_explained_at_their_lines(case: str, tmp_path: Path) -> None:
    text, expected = WRONG[case]
    started = time.process_time()
    found = problems(tmp_path / "wrong.yaml", text)
    assert time.process_time() - started < 0.5
    assert [line for line, _ in found] == [line for line, _ in expected], found
    for (_, message), (_, fragment) in zip(found, expected, strict=True):
        assert fragment in message


def test_a_problem_reads_as_file_line_message(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG["duplicate key"][0])
    with pytest.raises(SpecError) as caught:
        read_sweep(path)
    assert str(caught.value) == f"{path}:7: name is given twice, first on line 1"


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "num_registers.yaml").write_text(GOOD)
    with pytest.raises(SpecError, match=r"num_register\.yaml: does not exist; did you mean .*num_registers\.yaml\?"):
        read_sweep(tmp_path / "num_register.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr is 'fast'; allowed: a number above 0, at most 10"),
        ("optim.lr", "write KEY=VALUE"),
        ("=1", "write KEY=VALUE"),
        ("optim.lr=", "optim.lr is given no value; write optim.lr=null for none"),
        ("optim.lr=[1", r"a [ that is opened here is not closed"),
        ("optim.steps=010", "010 with a leading zero is ambiguous"),
        ("lr=1", "lr is not a setting; did you mean optim.lr?"),
        ("trial.optim.lrr=1", "optim.lrr is not a setting of optim; did you mean optim.lr?"),
        ("model.num_registers=3", "model.num_registers is an axis as well"),
        ("axes.model.num_registers=[0, 17]", "model.num_registers is 17; allowed: a whole number from 0 to 16"),
        ("axes.model.num_registers=4", "model.num_registers is 4; allowed: a list of values, as in [4]"),
        ("seeds=3", "seeds is 3; allowed: a list of one or more whole numbers"),
        ("seed=3", "seed is not set by itself; write --set seeds=[0]"),
        ("name=x", "a sweep's name is given by --name"),
        ("when=[]", "when can only be changed in the file"),
        ("resources.gpus=-1", "resources.gpus is -1; allowed"),
        ("command=sh x.sh", "command is 'sh x.sh'; allowed: a list of its words, as in [sh, x.sh]"),
        ("seds=[1]", "seds cannot be set; did you mean seeds?"),
    ],
)
def test_wrong_overrides_are_named_as_they_were_typed(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(NO_SIZE_AXIS)
    with pytest.raises(SpecError) as caught:
        read_sweep(path, [override])
    first = caught.value.problems[0]
    assert first.file == f"--set {override}"
    assert first.line is None
    assert message in first.message


_WORDS = [
    *NO_SIZE_AXIS.split(),
    "when:",
    "- if:",
    "exclude:",
    "null",
    "{",
    "}",
    "[",
    "]",
    "\n",
    "  ",
    "&a",
    "*a",
    "0",
    "search:",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text() | st.lists(st.sampled_from(_WORDS), max_size=30).map(" ".join), st.integers(0, 200), st.text(max_size=8)
)
def test_any_text_gives_a_sweep_or_a_spec_error(tmp_path: Path, text: str, position: int, inserted: str) -> None:
    path = tmp_path / "any.yaml"
    for content in (text, GOOD[:position] + inserted + GOOD[position:]):
        path.write_text(content, encoding="utf-8")
        try:
            assert isinstance(read_sweep(path), Sweep)
        except SpecError as error:
            assert error.problems


_SCALARS = st.sampled_from([None, True, 0, 4, -1, 2.5, "x", "nano", "auto", [], {}, [0], [[1]], {"a": 1}, "deit3"])
_PARTS = st.sampled_from(sorted(Sweep.model_fields))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(_PARTS, _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(
    st.sampled_from(["if", "set", "name", "model", "model.size", "seed", "gpus", "space", "metric", "nano"]), _SCALARS
)))  # fmt: skip
def test_any_structure_gives_a_sweep_or_a_spec_error(tmp_path: Path, raw: dict[str, object]) -> None:
    path = tmp_path / "any.yaml"
    path.write_text(dump({"name": "any", "axes": {"model.num_registers": [0, 4]}, **raw}))
    try:
        assert isinstance(read_sweep(path), Sweep)
    except SpecError as error:
        assert error.problems


def test_reading_and_planning_import_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator import plan, estimate, schema, spec;"
        "heavy = {'torch', 'ray', 'mlflow', 'analysis', 'scipy', 'numpy', 'pandas'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
