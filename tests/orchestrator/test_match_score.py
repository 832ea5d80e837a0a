"""`match` and `score` of a sweep file: what is refused where, equal FLOPs by the formula, and what plan.json says."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator import driver, match
from orchestrator.driver import Options
from orchestrator.ledger import Ledger
from orchestrator.ledger_schema import StoredConfig, StoredTrial
from orchestrator.plan import Plan, build_plan
from orchestrator.plan_changes import changes
from orchestrator.schema import sweep_schema
from orchestrator.search_plan import plan_json
from orchestrator.spec import SpecError, Sweep, dump, read_sweep
from trainers.catalog import MODEL_SIZES
from trainers.config import resolve, trial_id

TEXT = """\
name: example
trial:
  model: {size: nano, patch_size: 8}
  optim: {steps: 1000}
axes:
  model.num_registers: [0, 4, 16]
seeds: [0, 1]
baseline: {model.num_registers: 0}
"""
BASELINE = "baseline: {model.num_registers: 0}\n"
REGISTERS = "model.num_registers"


def read(folder: Path, text: str, *overrides: str) -> Sweep:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return read_sweep(path, overrides)


def said(folder: Path, text: str) -> list[tuple[int | None, str]]:
    """Line and message of every problem."""
    with pytest.raises(SpecError) as caught:
        read(folder, text)
    return [(problem.line, problem.message) for problem in caught.value.problems]


def steps(plan: Plan) -> dict[Any, int]:
    return {tuple(trial.cell.values()): trial.config.optim.steps for trial in plan.trials}


WRONG = {
    "unknown value": (
        TEXT + "match: step\n",
        9,
        "match is 'step'; allowed: steps or flops or null; did you mean steps?",
    ),
    "without a baseline": (
        TEXT.replace(BASELINE, "match: steps\n"),
        8,
        "match is steps, which is about cells that are compared; name a baseline",
    ),
    "steps that differ by when": (
        TEXT + f"match: steps\nwhen:\n  - if: {{{REGISTERS}: 16}}\n    set: {{optim.steps: 900}}\n",
        12,
        f"{{{REGISTERS}: 16}} trains 900 steps and its baseline 1000, but match is steps",
    ),
    "steps that differ by a preset": (
        "name: a\naxes:\n  model.size:\n    - small\n    - nano\nbaseline: {model.size: small}\nmatch: steps\n"
        "trial: {model.patch_size: 8}\n",
        5,
        "{model.size: nano} trains 300 steps and its baseline 1000, but match is steps",
    ),
    "an axis that match sets": (
        TEXT.replace("  optim: {steps: 1000}\n", "").replace("seeds", "  optim.steps: [100, 200]\nseeds")
        + "match: flops\n",
        6,
        "optim.steps is an axis, and match: flops sets it; leave one of them out",
    ),
    "steps of some cells that match sets": (
        TEXT + f"match: flops\nwhen:\n  - if: {{{REGISTERS}: 16}}\n    set: {{optim.steps: 900}}\n",
        12,
        f"optim.steps is 900 for {{{REGISTERS}: 16}}, which match: flops sets; leave it out",
    ),
    "a length that does not fit": (
        TEXT.replace("steps: 1000", "steps: 1000, warmup_steps: 990") + "match: flops\n",
        9,
        f"with the FLOPs of its baseline, {{{REGISTERS}: 4}}: optim.warmup_steps 990 is more than optim.steps",
    ),
    "weights that are measured": (
        "name: a\ntrial: {method: pretrained}\naxes:\n  model.weights: [vit_small_patch14_dinov2.lvd142m, "
        "vit_small_patch14_reg4_dinov2.lvd142m]\nbaseline: {model.weights: vit_small_patch14_dinov2.lvd142m}\n"
        "match: steps\n",
        6,
        "match is steps, and method pretrained trains nothing",
    ),
    "a program": (
        "name: a\ntrial: {command: [echo, '{program.x}']}\naxes: {program.x: [1, 2]}\nbaseline: {program.x: 1}\n"
        "match: flops\n",
        5,
        "match is flops, but how long a program trains only it knows; leave match out",
    ),
    "a search": (
        TEXT + "match: flops\nsearch: {name: random, samples: 2, metric: val/knn/top1, space: {optim.lr: "
        "{low: 0.001, high: 0.01}}}\n",
        9,
        "match is flops, but what a search suggests may change FLOPs; use match: steps with a search",
    ),
    "a search over steps": (
        TEXT + "match: steps\nsearch:\n  name: random\n  samples: 2\n  metric: val/knn/top1\n  space:\n"
        "    optim.steps: {low: 10, high: 20}\n",
        15,
        "search.space has optim.steps, which match: steps fixes",
    ),
    "a limit of outliers of one": (
        TEXT + "outlier_limit: 1\n",
        9,
        "outlier_limit is 1; allowed: a number above 0, below 1",
    ),
    "an empty rule": (TEXT + "score: {}\n", 9, "score says neither best nor step; leave it out to score the last step"),
    "a rule without its metric": (TEXT + "score: {mode: max}\n", 9, "score says neither best nor step"),
    "a rule by the test set": (
        TEXT + "score:\n  best: test/knn/top1\n",
        10,
        "score.best is 'test/knn/top1'; allowed: a metric that begins with val/, since choices never see the test",
    ),
    "a rule by a probe that is off": (
        TEXT + "score:\n  mode: max\n  best: val/depth/rmse\n",
        11,
        "evaluation.score.best is val/depth/rmse, but evaluation.probes (linear, knn) lacks depth (in every cell)",
    ),
    "a rule beyond the end": (
        TEXT + "score: {step: 1001}\n",
        9,
        "evaluation.score.step 1001 is more than optim.steps 1000 (in every cell)",
    ),
    "two rules": (
        TEXT + "score: {step: 10, best: val/knn/top1}\n",
        9,
        "evaluation.score has both best (val/knn/top1) and step (10)",
    ),
    "an unknown part of a rule": (TEXT + "score: {bets: val/knn/top1}\n", 9, "did you mean best?"),
    "a rule in the trial as well": (
        TEXT.replace("axes:", "  evaluation.score.step: 5\naxes:") + "score: {step: 10}\n",
        5,
        "evaluation.score.step is given, and score as well; set the rule in one place",
    ),
    "a rule of some cells as well": (
        TEXT + f"score: {{step: 10}}\nwhen:\n  - if: {{{REGISTERS}: 16}}\n    set: {{evaluation.score.step: 9}}\n",
        12,
        "when sets evaluation.score.step, and score gives all cells one rule",
    ),
    "a rule for a program": (
        "name: a\ntrial: {command: [echo]}\naxes: {program.x: [1, 2]}\nscore: {step: 5}\n",
        4,
        "score is for our own trainers; a program decides itself at which step it is tested",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_at_its_line(case: str, tmp_path: Path) -> None:
    text, line, message = WRONG[case]
    problems = said(tmp_path, text)
    assert any(at == line and message in found for at, found in problems), problems


def flops_of_one_step(registers: int) -> int:
    """Three forward passes of deit3's ViT of size nano on a batch, by hand: patches of 8 px of an image of 32 px."""
    size, patches, batch = MODEL_SIZES["nano"], 16, 128
    tokens, width = patches + 1 + registers, size.width
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    return 3 * batch * (size.depth * block + 6 * 8**2 * patches * width + 2 * width * 1000)


def test_equal_flops_make_steps_by_the_formula(tmp_path: Path) -> None:
    sweep = read(tmp_path, TEXT.replace("nano", "nano, image_size: 32") + "match: flops\n", "optim.batch_size=128")
    plan = build_plan(sweep)
    wanted = {(n,): round(1000 * flops_of_one_step(0) / flops_of_one_step(n)) for n in (0, 4, 16)}
    assert steps(plan) == wanted and wanted[(16,)] < wanted[(4,)] < 1000
    assert {t.config.optim.warmup_steps for t in plan.trials} == {count // 20 for count in wanted.values()}
    for trial in plan.trials:
        assert match.training_flops(trial.config) == pytest.approx(1000 * flops_of_one_step(0), rel=0.5 / 500)
        assert trial.trial_id == trial_id(trial.config)
    assert plan.trials[0].trial_id == build_plan(sweep.model_copy(update={"match": None})).trials[0].trial_id
    assert any(f"{{{REGISTERS}: 16}} {wanted[(16,)]}" in note for note in plan.notes)
    assert any("share initial weights, and data order" in note for note in plan.notes)


def test_every_cell_is_matched_to_its_own_baseline(tmp_path: Path) -> None:
    when = "when:\n  - if: {model.patch_size: 16}\n    set: {optim.steps: 500}\n"
    axes = "axes:\n  model.patch_size: [8, 16]\n"
    text = TEXT.replace(", patch_size: 8", "").replace("axes:\n", axes).replace("  optim: {steps: 1000}\n", "")
    sweep = read(tmp_path, text + "match: flops\n" + when)
    found = steps(build_plan(sweep))
    assert found[16, 0] == 500 and found[8, 0] == 300  # of the preset
    assert found[16, 4] < 500 and found[8, 0] > found[8, 4] > found[8, 16]


def test_how_a_trial_is_executed_does_not_decide_how_long_it_trains(tmp_path: Path) -> None:
    text = TEXT + "match: flops\n"
    plain = build_plan(read(tmp_path, text))
    slower = build_plan(read(tmp_path, text, "execution.activation_checkpointing=true"))
    assert [t.trial_id for t in plain.trials] == [t.trial_id for t in slower.trials]
    assert [match.training_flops(t.config) for t in plain.trials] == [
        match.training_flops(t.config) for t in slower.trials
    ]


def test_equal_steps_are_accepted_as_they_are(tmp_path: Path) -> None:
    matched, plain = (build_plan(read(tmp_path, TEXT + more)) for more in ("match: steps\n", ""))
    assert [t.trial_id for t in matched.trials] == [t.trial_id for t in plain.trials]
    two = TEXT.replace("  optim: {steps: 1000}\n", "").replace("seeds", "  optim.steps: [100, 200]\nseeds")
    assert set(steps(build_plan(read(tmp_path, two + "match: steps\n"))).values()) == {100, 200}  # pairs are equal


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("{best: val/knn/top1}", {"best": "val/knn/top1", "mode": "max", "step": None}),
        ("{best: tokens/last/outlier_fraction, mode: min}", {"best": "tokens/last/outlier_fraction", "mode": "min"}),
        ("{step: 500}", {"best": None, "step": 500}),
    ],
)
def test_a_rule_is_a_setting_of_every_trial(rule: str, settings: dict[str, Any], tmp_path: Path) -> None:
    plan = build_plan(read(tmp_path, f"{TEXT}score: {rule}\n"))
    for trial in plan.trials:
        score = trial.config.evaluation.score
        assert score is not None and settings.items() <= score.model_dump().items()
    plain = build_plan(read(tmp_path, TEXT))
    assert {t.trial_id for t in plan.trials}.isdisjoint(t.trial_id for t in plain.trials)
    last = build_plan(read(tmp_path, TEXT + "score: {step: 1000}\n"))
    assert [t.trial_id for t in last.trials] == [t.trial_id for t in plain.trials]


def test_parts_are_written_read_back_and_described(tmp_path: Path) -> None:
    text = TEXT + "match: flops\nscore: {best: val/knn/top1}\noutlier_limit: 0.01\n"
    sweep = read(tmp_path, text)
    (tmp_path / "again.yaml").write_text(dump(sweep))
    again = read_sweep(tmp_path / "again.yaml")
    assert again == sweep and build_plan(again) == build_plan(sweep)
    validator = jsonschema.Draft202012Validator(sweep_schema())
    assert not list(validator.iter_errors(yaml.safe_load(text)))
    for wrong in ({"match": "step"}, {"score": {"bets": "x"}}, {"outlier_limit": 1.0}, {"score": {"mode": "most"}}):
        assert list(validator.iter_errors({**yaml.safe_load(TEXT), **wrong})), wrong
    assert [line.split(":")[0] for line in changes(read(tmp_path, TEXT), sweep)] == ["match", "score", "outlier limit"]


def test_options_that_change_what_is_computed_make_another_sweep(tmp_path: Path) -> None:
    assert read(tmp_path, TEXT, "outlier_limit=0.01").name == "example"
    names = [read(tmp_path, TEXT, option).name for option in ("match=flops", "score.step=5", "score.step=6")]
    assert len(set(names)) == 3 and all(name.startswith("example@") for name in names)
    ruled = TEXT + "score: {step: 5}\n"
    assert read(tmp_path, ruled, "score.step=5").name == "example"  # as in the file
    assert read(tmp_path, ruled, "score=null").name != "example"
    assert read(tmp_path, ruled, "score=null").score is None


def test_a_trial_run_of_one_step_needs_no_rule(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(TEXT + "match: flops\nscore: {step: 500}\n")
    options = Options(path, storage=tmp_path, state=tmp_path, smoke=True)
    plan = build_plan(read_sweep(path, driver.smoke_overrides(options)))
    assert {trial.config.optim.steps for trial in plan.trials} == {1}
    (tmp_path / "plain.yaml").write_text(TEXT)
    short = read_sweep(tmp_path / "plain.yaml", ["optim.steps=1", "optim.warmup_steps=0", "evaluation.points=1"])
    assert read_sweep(tmp_path / "plain.yaml", driver.smoke_overrides(options)).name == short.name


def test_the_plan_says_what_training_costs(tmp_path: Path) -> None:
    sweep = read(tmp_path, TEXT + "score: {step: 5}\noutlier_limit: 0.01\n")
    plan = build_plan(sweep)
    content = json.loads(json.dumps(plan.to_json()))
    assert (content["match"], content["outlier_limit"]) == (None, 0.01)
    assert content["score"] == {"best": None, "mode": "auto", "step": 5}
    assert [t["training_flops"] for t in content["trials"]] == [match.training_flops(t.config) for t in plan.trials]
    assert content["trials"][0]["training_flops"] < content["trials"][-1]["training_flops"]
    program = Sweep(name="p", trial={"command": ("echo", "{program.x}")}, axes={"program.x": (1, 2)})
    assert {t["training_flops"] for t in build_plan(program).to_json()["trials"]} == {None}


def test_the_plan_of_a_running_sweep_prices_further_seeds_searches_and_no_imports(tmp_path: Path) -> None:
    plan = build_plan(read(tmp_path, TEXT))
    cell, config = plan.trials[0].cell, plan.trials[0].config
    further = StoredTrial("f" * 16, "further", cell, 9, StoredConfig(config.model_dump(mode="json")))
    other = resolve({"model.size": "nano", "optim.steps": 30})
    chosen = StoredTrial("c" * 16, "chosen", {REGISTERS: 2}, 0, StoredConfig(other.model_dump(mode="json")))
    imported = StoredTrial("e" * 16, "imported", cell, 10, StoredConfig({"imported": True, "execution": {}}))
    with Ledger.open(tmp_path / "ledger.db") as ledger:
        ledger.plan([*plan.trials, further, chosen, imported])
        content = plan_json(plan, ledger.rows(), ledger)
    found = {trial["trial_id"]: trial["training_flops"] for trial in content["trials"]}
    assert found["f" * 16] == found[plan.trials[0].trial_id] == match.training_flops(config)
    assert found["c" * 16] == match.training_flops(other)
    assert found["e" * 16] is None
