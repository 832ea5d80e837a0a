"""`orchestrate export`, and trials that start from another trial's step."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from orchestrator import cli, export, spec
from orchestrator.attempt import Job, Outcome, run_attempt
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger
from orchestrator.plan import build_plan
from tests.orchestrator.sweeps import ORCHESTRATE, Small, imported_by, run
from trainers import checkpoint, vit
from trainers.config import TrialConfig
from trainers.streams import Streams
from trainers.weights import fingerprint

STEPS = 4


@dataclass(frozen=True)
class Planned:
    """A sweep in its ledger; trials are run one by one, as a rank process would."""

    layout: SweepLayout
    configs: Mapping[str, TrialConfig]

    def run(self, trial: str) -> Outcome:
        folder = self.layout.trial(trial)
        number = folder.begin_attempt()
        config = self.configs[trial].model_dump(mode="json")
        cache = str(self.layout.cache)
        job = Job(trial, "name", config, str(folder.root), cache, threads=1)
        return run_attempt(job, number, lambda *_: None, lambda: None)

    @property
    def first(self) -> str:
        return next(iter(self.configs))


def planned(folder: Path, name: str, changes: Mapping[str, Any], registers: list[int]) -> Planned:
    small = Small(folder, steps=STEPS)
    short = ["evaluation.points=1", "optim.ema_decay=0.5", "execution.keep_steps=[2]"]
    file = small.write(name=name, axes={"model.num_registers": registers}, seeds=[0], baseline=None)
    overrides = [*short, *(f"{key}={value}" for key, value in changes.items())]
    plan = build_plan(spec.read_sweep(file, overrides, name))
    layout = SweepLayout(small.storage.resolve(), small.storage.resolve(), name)
    layout.root.mkdir(parents=True)
    with Ledger.open(layout.ledger) as ledger:
        ledger.plan(plan.trials)
    return Planned(layout, {trial.trial_id: trial.config for trial in plan.trials})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Planned:
    """Two trials, 2 and 4 registers, of which the first has trained."""
    sweep = planned(tmp_path_factory.mktemp("export"), "small", {}, [2, 4])
    outcome = sweep.run(sweep.first)
    assert outcome.status == "finished", outcome.error
    return sweep


def newest(trial: TrialLayout) -> dict[str, Any]:
    state = checkpoint.load_newest(trial.checkpoint_folders())
    assert state is not None
    return state


def features(sweep: Planned, tensors: Mapping[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    ours = vit.ViT(sweep.configs[sweep.first].model, Streams(0)).eval()
    ours.load_state_dict(dict(tensors))
    return ours.forward_features(images)


def test_the_printed_line_loads_what_was_trained(trained: Planned) -> None:
    done = run([*ORCHESTRATE, "export", trained.first, "--storage", str(trained.layout.storage)])
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    folder = trained.layout.trial(trained.first).root / "export" / "raw"
    assert said[0] == f"deit3 nano reg2 seed0: raw weights of step {STEPS} are in {folder}"
    scope: dict[str, Any] = {"timm": timm}
    exec(said[-1], scope)
    raw = newest(trained.layout.trial(trained.first))["method"]
    tensors = {name.removeprefix("backbone."): t for name, t in raw.items() if name.startswith("backbone.")}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = scope["model"].eval().forward_features(images)
    assert given.shape == (2, 1 + 2 + 4, 64)
    assert torch.allclose(given, features(trained, tensors, images), rtol=0, atol=1e-5)


def command(monkeypatch: pytest.MonkeyPatch, sweep: Planned, *arguments: str) -> int:
    """The exit code of `orchestrate export` in this process."""
    place = ["--storage", str(sweep.layout.storage)]
    monkeypatch.setattr(sys, "argv", ["orchestrate", "export", *arguments, *place])
    monkeypatch.delenv("ORCHESTRATE_CONFIG", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_averaged_weights_go_where_they_are_asked_to(
    trained: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "a" / "b"
    assert command(monkeypatch, trained, "small/deit3 nano reg2 seed0", "--weights", "ema", "--to", str(to)) == 0
    assert f'timm.create_model("local-dir:{to}", pretrained=True)' in capsys.readouterr().out
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    given = timm.create_model(f"local-dir:{to}", pretrained=True).eval().forward_features(images)
    expected = features(trained, newest(trained.layout.trial(trained.first))["ema"], images)
    assert torch.allclose(given, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["deit3 nano reg2 seed0", "--weights", "teacher"], "has no teacher weights; its checkpoint has: raw, ema"),
        (["deit3 nano reg4 seed0"], "deit3 nano reg4 seed0 is planned and has no checkpoint to export"),
        (["nothing"], "there is no trial 'nothing'"),
        (["other/deit3 nano reg2 seed0"], "there is no trial 'other/deit3 nano reg2 seed0'"),
    ],
)
def test_what_cannot_be_exported_is_exit_2_and_one_line(
    arguments: list[str],
    message: str,
    trained: Planned,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, trained, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1 and "Traceback" not in said


def test_a_trial_adopted_from_another_sweep_is_exported_from_there(
    trained: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adopting = planned(tmp_path, "adopting", {}, [2])
    assert adopting.first == trained.first
    elsewhere = adopting.layout.storage / "small" / "trials" / trained.first
    shutil.copytree(trained.layout.trial(trained.first).root, elsewhere)
    (elsewhere / "result.json").write_text("{}")
    assert command(monkeypatch, adopting, trained.first) == 0
    assert str(adopting.layout.trial(trained.first).root / "export" / "raw") in capsys.readouterr().out


def test_a_checkpoint_that_lies_in_the_store_alone_comes_from_there(trained: Planned, tmp_path: Path) -> None:
    far = tmp_path / "far"
    copied = planned(tmp_path / "near", "small", {}, [2])
    shutil.copytree(trained.layout.trial(trained.first).root, far / "small" / "trials" / trained.first)
    with pytest.raises(ValueError, match="has no checkpoint to export"):
        export.export(copied.first, None, "raw", copied.layout.storage, copied.layout.state)
    export.export(copied.first, None, "raw", copied.layout.storage, copied.layout.state, far.as_uri())
    assert (copied.layout.trial(copied.first).root / "export" / "raw" / "model.safetensors").is_file()


def test_neither_help_nor_a_wrong_name_imports_torch(tmp_path: Path) -> None:
    for arguments in (["export", "--help"], ["export", "nothing", "--storage", str(tmp_path)]):
        assert imported_by(arguments, ("torch", "ray", "timm")) == "[]"


def test_a_trial_starts_from_another_ones_step_wherever_their_storage_is(trained: Planned, tmp_path: Path) -> None:
    source = {"model.init_from.trial": f"'{trained.first}'", "model.init_from.step": 2}
    sweep = planned(tmp_path, "later", source, [2])
    shutil.copytree(trained.layout.root, sweep.layout.storage / "small")
    outcome = sweep.run(sweep.first)
    assert outcome.status == "finished", outcome.error
    step = trained.layout.trial(trained.first).attempt(1) / "checkpoints" / "step_000000002.pt"
    method = checkpoint.read(step)["method"]
    tensors = {name.removeprefix("backbone."): t for name, t in method.items() if name.startswith("backbone.")}
    assert newest(sweep.layout.trial(sweep.first))["started_from"] == fingerprint(tensors)


def test_a_folder_given_for_other_trials_is_the_one_that_is_searched(trained: Planned, tmp_path: Path) -> None:
    source = {"model.init_from.trial": f"'{trained.first}'", "model.init_from.step": 2}
    empty = tmp_path / "empty"
    empty.mkdir()
    sweep = planned(tmp_path, "later", {**source, "execution.trials_root": str(empty)}, [2])
    outcome = sweep.run(sweep.first)
    assert outcome.status == "failed" and not outcome.retryable
    assert outcome.error is not None
    assert f"there is no trial {trained.first} with checkpoints under {empty}" in outcome.error["message"]
