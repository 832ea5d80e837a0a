"""What every training method of the catalog promises: exact resume, fair pairs, equal results on several ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_trial
from tests.trainers.runs import run, training
from trainers import checkpoint
from trainers.catalog import TRAINING_METHODS
from trainers.config import resolve
from trainers.loader import Shares

FILES = (
    *("token_norms.parquet", "token_statistics.parquet", "probes.parquet", "per_image.parquet", "norm_map.npz"),
    *("location.npz", "neighbors.npz", "attention.npz", "attention/last_block_mean_of_heads_0.png"),
)


def read_parts(one: Any, step: int) -> list[Any]:
    """The micro-batches of a step, as the loop reads them."""
    optim = one.config.optim
    shares = Shares(optim.batch_size, optim.micro_batch_size)
    return list(shares.parts(one._reader(shares)(step)))


def test_no_method_of_the_catalog_is_left_out() -> None:
    from tests.conftest import TINY_METHODS

    assert set(TINY_METHODS) == set(TRAINING_METHODS)


# --- resume -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from trainers.config import TrialConfig
from trainers.train import train
torch.set_num_threads(1)
config = TrialConfig.model_validate_json(sys.argv[1])
def report(step, metrics):
    print(step, flush=True)
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
train(config, report, Path(sys.argv[2]), cache=Path(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_killed_in_the_middle_of_an_epoch_it_goes_on_bit_for_bit(method: str, tmp_path: Path, data_cache: Path) -> None:
    settings = tiny_trial(method, model__num_registers=2)
    _, undisturbed = run(settings, tmp_path / "whole", data_cache)
    arguments = [resolve(settings).model_dump_json(), str(tmp_path / "1"), str(data_cache)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    result, reports = run(settings, tmp_path / "2", data_cache, resume_from=[tmp_path / "1" / "checkpoints"])
    assert result.status == "finished"
    assert reports == undisturbed
    whole, resumed = (checkpoint.load_newest([tmp_path / name / "checkpoints"]) for name in ("whole", "2"))
    assert whole is not None and resumed is not None
    for name, weights in whole["method"].items():
        assert torch.equal(weights, resumed["method"][name]), name
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


# --- fair pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_trials_that_differ_in_registers_share_weights_and_every_random_draw(
    method: str, tmp_path: Path, data_cache: Path
) -> None:
    """Views and masks of three steps, all shared initial weights, and where every stream stands afterwards."""
    plain = training(tiny_trial(method), tmp_path / "0", data_cache)
    initial = {name: value.clone() for name, value in plain.method.state_dict().items()}
    seen = _views_of_steps(plain)
    for registers in (1, 2, 4, 8, 16):
        other = training(tiny_trial(method, model__num_registers=registers), tmp_path / str(registers), data_cache)
        state = other.method.state_dict()
        assert {name.rpartition(".")[2] for name in set(state) - set(initial)} == {"reg_token"}
        for name, value in initial.items():
            assert torch.equal(value, state[name]), name
        for step, views in enumerate(_views_of_steps(other)):
            assert views.keys() == seen[step].keys()
            for name, value in views.items():
                assert torch.equal(value, seen[step][name]), (step, name)
        ours, theirs = plain.streams.state_dict(), other.streams.state_dict()
        assert ours["numpy"] == theirs["numpy"]
        assert ours["torch"].keys() == theirs["torch"].keys() and "drop_path" in ours["torch"]
        for name, value in ours["torch"].items():
            assert torch.equal(value, theirs["torch"][name]), name


def _views_of_steps(one: Any, steps: int = 3) -> list[dict[str, Any]]:
    """Views of the first steps, with the steps taken in between, so that all that is drawn is drawn."""
    taken = []
    views = one.method.views

    def recorded(*arguments: Any) -> dict[str, Any]:
        made = views(*arguments)
        taken.append({name: value.clone() for name, value in made.items() if isinstance(value, torch.Tensor)})
        return made  # type: ignore[no-any-return]

    one.method.views = recorded
    one.method.train()
    for step in range(steps):
        one.stepper(read_parts(one, step), step)
    return taken


# --- several ranks ------------------------------------------------------------------------------------------------

RANKS = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from trainers.config import TrialConfig
from trainers.train import train
torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, cache = Path(sys.argv[2]), Path(sys.argv[3])
for name, config in json.loads(Path(sys.argv[1]).read_text()).items():
    reports = {}
    def report(step, metrics):
        reports.setdefault(step, {}).update(metrics)
    result = train(TrialConfig.model_validate_json(config), report, folder / name, cache=cache)
    assert result.status == "finished", result
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(reports))
dist.destroy_process_group()
"""

SHARED: dict[str, dict[str, Any]] = {
    "deit3": tiny_trial("deit3", model__num_registers=2, optim__clip_grad=1.0),
    "openclip": tiny_trial("openclip"),
    "siglip": tiny_trial("openclip", openclip__loss="siglip"),
    "accumulated": tiny_trial("openclip", optim__micro_batch_size=8, model__drop_path=0.2),
    "dino": tiny_trial("dino"),
    "dinov2": tiny_trial("dinov2", model__num_registers=2),
    "sinkhorn": tiny_trial("dinov2", dinov2__centering="sinkhorn", dinov2__ibot_head=None),
}


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=400, env={**os.environ, **path}, cwd=cwd
    )


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    """A folder with what two ranks reported of every configuration in SHARED."""
    folder = tmp_path_factory.mktemp("ranks")
    configs = {name: resolve(settings).model_dump_json() for name, settings in SHARED.items()}
    (folder / "configs.json").write_text(json.dumps(configs))
    (folder / "run.py").write_text(RANKS)
    done = torchrun(str(folder / "run.py"), str(folder / "configs.json"), str(folder), str(data_cache), cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_train_as_one_does_with_the_same_batch(
    name: str, on_two_ranks: Path, tmp_path: Path, data_cache: Path
) -> None:
    """The loss of every step: the first ones test the losses, the later ones gradients, teacher and centre too."""
    _, alone = run(SHARED[name], tmp_path, data_cache)
    together = {int(step): metrics for step, metrics in json.loads((on_two_ranks / f"{name}.json").read_text()).items()}
    assert together.keys() == alone.keys() and len(alone) == 12
    for step, metrics in alone.items():
        for metric, value in metrics.items():
            if metric.startswith("train/"):
                tolerance = 1e-5 if step <= 2 else 1e-3
                assert together[step][metric] == pytest.approx(value, rel=tolerance, abs=1e-6), (step, metric)


@pytest.mark.slow
def test_it_runs_under_torchrun_and_goes_on_with_another_number_of_ranks(tmp_path: Path, data_cache: Path) -> None:
    settings = tiny_trial("deit3", optim__steps=4, evaluation__points=1)
    (tmp_path / "config.json").write_text(resolve(settings).model_dump_json())
    place = [str(tmp_path / "config.json"), str(tmp_path / "trial"), "--cache", str(data_cache)]
    done = torchrun("-m", "trainers", *place, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]  # of the first rank alone
    result, reports = run(settings, tmp_path / "trial", data_cache)
    assert result.status == "finished"
    assert reports[4]["train/loss"] == lines[3]["train/loss"]


@pytest.mark.slow
def test_asked_to_end_it_leaves_a_checkpoint_and_goes_on(tmp_path: Path, data_cache: Path) -> None:
    settings = tiny_trial("dino", optim__steps=400, evaluation__points=1, execution__checkpoint_seconds=600.0)
    (tmp_path / "config.json").write_text(resolve(settings).model_dump_json())
    place = [str(tmp_path / "config.json"), str(tmp_path / "trial"), "--cache", str(data_cache)]
    command = [sys.executable, "-m", "trainers", *place]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run_:
        assert run_.stdout is not None and run_.stderr is not None
        run_.stdout.readline()  # it trains
        run_.send_signal(signal.SIGINT)
        run_.stdout.read()
        said = run_.stderr.read()
    assert run_.returncode == 130
    assert "the same command goes on from there" in said and "Traceback" not in said
    kept = list((tmp_path / "trial" / "checkpoints").glob("*.pt"))
    assert len(kept) == 1 and 0 < int(kept[0].stem.removeprefix("step_")) < 400
