"""Trials on streamed images: every method trains and resumes, shards are files, ranks and registers change no view."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.plan import build_plan
from orchestrator.sweep import Sweep
from tests.conftest import tiny_trial
from tests.trainers.runs import run, training
from tests.trainers.streamed_images import damaged, opened, row_of, streamed, write_folder, write_shards
from trainers import checkpoint
from trainers.config import resolve
from trainers.loader import Shares


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


def trial(method: str, root: Path, **settings: Any) -> dict[str, Any]:
    own = {
        "data.train": "image_text" if method == "openclip" else "image_folder",
        "data.name": "mine",
        "data.decode_size": "original",
        "model.image_size": 32,
        "optim.steps": 4,
        "optim.batch_size": 8,
        "evaluation.points": 2,
        "evaluation.train_images": 16,
        "execution.data_root": str(root),
    }
    base = {name: value for name, value in tiny_trial(method).items() if not name.startswith("data.scenes")}
    extra = {name.replace("__", "."): value for name, value in settings.items()}
    probes = {"evaluation.probes": [], "evaluation.points": 1} if method == "openclip" else {}
    return {**base, **own, **probes, "data.scenes": None, **extra}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("method", ["deit3", "dino", "dinov2", "openclip"])
def test_every_method_trains_and_goes_on_bit_for_bit(method: str, folder: Path, shards: Path, tmp_path: Path) -> None:
    settings = trial(method, shards if method == "openclip" else folder)
    result, whole = run(settings, tmp_path / "whole", tmp_path / "cache")
    assert result.status == "finished"
    answers = iter([None, None, "stopped"])
    stopped, _ = run(settings, tmp_path / "1", tmp_path / "cache", should_stop=lambda: next(answers))
    assert (stopped.status, stopped.steps) == ("stopped", 2)
    result, resumed = run(settings, tmp_path / "2", tmp_path / "cache", resume_from=[tmp_path / "1" / "checkpoints"])
    assert result.status == "finished" and resumed == whole
    ends = [checkpoint.load_newest([tmp_path / name / "checkpoints"]) for name in ("whole", "2")]
    assert ends[0] is not None and ends[1] is not None
    for name, weights in ends[0]["method"].items():
        assert torch.equal(weights, ends[1]["method"][name]), name


def test_images_from_shards_are_those_from_files_and_train(folder: Path, tmp_path: Path) -> None:
    data = opened(
        write_shards(tmp_path / "shards", count=12), tmp_path / "cache", "image_text", validation_fraction=0.2
    )
    files = opened(folder, tmp_path / "cache")
    for seed in range(12):
        ours, theirs = (streamed(d).original(row_of(d, seed))[1] for d in (data, files))
        np.testing.assert_array_equal(ours, theirs)
    result, _ = run(
        trial("dino", tmp_path / "shards", data__train="image_text", evaluation__probes=[], optim__steps=2),
        tmp_path / "trial",
        tmp_path / "cache",
    )
    assert result.status == "finished"


def test_an_unreadable_image_in_the_middle_ends_nothing_and_too_many_do(tmp_path: Path) -> None:
    root = damaged(tmp_path / "root", 4, 5)
    settings = trial("deit3", root, optim__steps=3, evaluation__points=1)
    result, reports = run({**settings, "data.max_unreadable": 0.1}, tmp_path / "1", tmp_path / "cache")
    assert result.status == "finished"
    again = run({**settings, "data.max_unreadable": 0.1}, tmp_path / "2", tmp_path / "cache")[1]
    assert again == reports
    with pytest.raises(ValueError, match=r"training images cannot be read, more than data\.max_unreadable 0\.0 allows"):
        run({**settings, "data.max_unreadable": 0.0}, tmp_path / "3", tmp_path / "cache")


def test_trials_that_differ_in_registers_see_the_same_views(folder: Path, tmp_path: Path) -> None:
    views = []
    for registers in (0, 4):
        settings = trial("deit3", folder, model__num_registers=registers)
        one = training(settings, tmp_path / str(registers), tmp_path / "cache")
        batch = one._reader(Shares(8, 8))(0)
        views.append(one.method.views(batch, one.streams)["images"])
    assert torch.equal(*views)


RANKS = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from trainers.config import TrialConfig
from trainers.train import train
torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, reports = Path(sys.argv[2]), {}
def report(step, metrics):
    reports.setdefault(step, {}).update(metrics)
train(TrialConfig.model_validate_json(Path(sys.argv[1]).read_text()), report, folder / "trial", cache=Path(sys.argv[3]))
if dist.get_rank() == 0:
    (folder / "reports.json").write_text(json.dumps(reports))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_train_as_one_does(folder: Path, tmp_path: Path) -> None:
    settings = trial("deit3", folder, deit3__mix_group_size=4)
    _, alone = run(settings, tmp_path / "alone", tmp_path / "cache")
    (tmp_path / "config.json").write_text(resolve(settings).model_dump_json())
    (tmp_path / "run.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = ["run.py", "config.json", str(tmp_path), str(tmp_path / "cache")]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads((tmp_path / "reports.json").read_text())
    assert {int(step) for step in together} == alone.keys()
    for step, metrics in alone.items():
        for name, value in metrics.items():
            if name.startswith("train/"):
                assert together[str(step)][name] == pytest.approx(value, rel=1e-3 if step > 2 else 1e-5), (step, name)


@pytest.mark.parametrize(
    ("method", "preset", "data"),
    [
        ("deit3", "imagenet1k", "imagenet1k"),
        ("dino", "imagenet1k", "imagenet1k"),
        ("dinov2", "imagenet1k", "imagenet1k"),
        ("openclip", "laion400m", "image_text"),
    ],
)
def test_the_papers_recipes_are_planned_without_data(method: str, preset: str, data: str) -> None:
    trial = {"method": method, "preset": preset, "data.train": data, "data.scenes": None}
    if data == "image_text":
        trial |= {"data.name": "pairs", "evaluation.probes": []}
    sweep = Sweep(name="x", trial=trial, axes={"model.num_registers": (0, 4)})
    assert {planned.config.data.decode_size for planned in build_plan(sweep).trials} == {"original"}
