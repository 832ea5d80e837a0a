"""The training loop: exact resume after a kill, fair pairs, divergence, accumulation, files."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from trainers import checkpoint, loader, train
from trainers.config import resolve
from trainers.methods import Batch, Method, Progress
from trainers.streams import Streams
from trainers.tokens import table as token_table

Reports = dict[int, dict[str, float]]


def run(settings: Mapping[str, Any], directory: Path, cache: Path, **arguments: Any) -> tuple[train.Result, Reports]:
    reports: Reports = {}
    torch.set_num_threads(1)

    def report(step: int, metrics: Mapping[str, float]) -> None:
        reports.setdefault(step, {}).update(metrics)

    result = train.train(resolve(settings), report, directory, cache=cache, **arguments)
    return result, reports


FULL = {"model.num_registers": 2, "model.drop_path": 0.2, "optim.ema_decay": "auto", "deit3.mixup": 0.4}


def test_a_trial_reports_and_leaves_its_files(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    result, reports = run({**tiny, **FULL}, tmp_path, data_cache)
    assert (result.status, result.steps) == ("finished", 12)
    assert {4, 8, 12} <= set(reports)
    at_end = reports[12]
    assert {"train/loss", "val/linear/top1", "test/linear/top1", "test/knn/top1"} <= set(at_end)
    assert "tokens/last/outlier_fraction" in reports[4]
    assert not any(name.startswith("test/") for step in (4, 8) for name in reports[step])
    rows = token_table.read(tmp_path / "token_norms.parquet")
    keys = {(r.step, r.source, r.weights) for r in rows}
    assert keys == {(s, *kind) for s in (4, 8, 12) for kind in (("probe", "raw"), ("probe", "ema"), ("train", "raw"))}
    stream = [r for r in rows if r.source == "train" and r.token == "register_1" and r.layer == 0]
    assert [r.statistics.count for r in stream] == [64, 64, 64]  # 4 steps of 16 images between evaluations
    per_image = pq.read_table(tmp_path / "per_image.parquet").to_pandas()
    chosen = per_image[per_image.metric == "test/linear/top1"]
    assert len(chosen) == 32
    assert chosen.value.mean() == pytest.approx(at_end["test/linear/top1"])
    with np.load(tmp_path / "norm_map.npz") as maps:
        assert maps["norms"].shape == (8, 2, 2)
        assert maps["layer"] == 4


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from trainers.config import TrialConfig
from trainers.train import train
torch.set_num_threads(1)
config = TrialConfig.model_validate_json(sys.argv[1])
def report(step, metrics):
    print(step, flush=True)
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
train(config, report, Path(sys.argv[2]), cache=Path(sys.argv[3]))
"""


def test_a_killed_run_goes_on_bit_for_bit(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    settings = {**tiny, **FULL}
    _, undisturbed = run(settings, tmp_path / "whole", data_cache)
    arguments = [resolve(settings).model_dump_json(), str(tmp_path / "1"), str(data_cache)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    result, reports = run(settings, tmp_path / "2", data_cache, resume_from=[tmp_path / "1" / "checkpoints"])
    assert result.status == "finished"
    assert reports == undisturbed
    states = [checkpoint.load_newest([tmp_path / name / "checkpoints"]) for name in ("whole", "2")]
    for name, weights in states[0]["method"].items():
        assert torch.equal(weights, states[1]["method"][name]), name
    for name in ("token_norms.parquet", "probes.parquet", "per_image.parquet", "norm_map.npz"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_a_run_that_was_asked_to_stop_goes_on_bit_for_bit(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    _, undisturbed = run(tiny, tmp_path / "whole", data_cache)
    calls = iter(range(100))
    result, _ = run(tiny, tmp_path / "1", data_cache, should_stop=lambda: "interrupted" if next(calls) == 5 else None)
    assert (result.status, result.steps) == ("interrupted", 5)
    result, reports = run(tiny, tmp_path / "1", data_cache)
    assert result.status == "finished"
    assert reports == undisturbed


def test_a_run_killed_after_its_last_step_reports_everything_again(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    _, undisturbed = run(tiny, tmp_path / "1", data_cache)
    _, again = run(tiny, tmp_path / "2", data_cache, resume_from=[tmp_path / "1" / "checkpoints"])
    assert again == undisturbed


def test_a_checkpoint_of_another_trial_is_refused(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    run(tiny, tmp_path / "1", data_cache)
    with pytest.raises(ValueError, match="belongs to trial"):
        run({**tiny, "seed": 1}, tmp_path / "2", data_cache, resume_from=[tmp_path / "1" / "checkpoints"])


class NanAtTen(Method):
    """A method of a user's own whose loss is NaN from optimiser step 10 on."""

    def views(self, batch: Batch, streams: Streams) -> dict[str, torch.Tensor]:
        return {"images": batch.images.permute(0, 3, 1, 2) / 255}

    def losses(self, views: Mapping[str, torch.Tensor], progress: Progress) -> dict[str, torch.Tensor]:
        loss = self.backbone.tokens(views["images"]).cls_BD.square().mean()
        return {"size": loss * (float("nan") if progress.step >= 10 else 1.0)}


def test_nan_ends_as_diverged_with_the_last_good_step(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    result, reports = run({**tiny, "method": f"{__name__}:NanAtTen"}, tmp_path, data_cache)
    assert (result.status, result.steps) == ("diverged", 10)
    assert max(reports) == 10
    assert result.error is not None and "train/loss is nan between steps 10 and 11" in result.error["message"]
    assert {row.step for row in token_table.read(tmp_path / "token_norms.parquet")} == {4, 8}


def trainer(settings: Mapping[str, Any], tmp_path: Path, cache: Path) -> Any:
    torch.set_num_threads(1)
    return train._Training(resolve(settings), tmp_path, cache)


def test_trials_that_differ_only_in_registers_share_everything_else(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    """Data order, augmentations, mixing, drop path and all shared initial weights, to the bit."""
    pair = [trainer({**tiny, **FULL, "model.num_registers": n}, tmp_path / str(n), data_cache) for n in (0, 16)]
    weights = [one.method.state_dict() for one in pair]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name
    for step in range(3):
        draws, views = [], []
        for one in pair:
            order = loader.Order(len(one.data.train), 16, one.streams)
            batch = loader.fetch(one.data.train, order(step), one.device)
            views.append(one.method.views(batch, one.streams))
            draws.append(one.backbone._draw_drop_path(views[-1]["images"]))
        assert torch.equal(views[0]["images"], views[1]["images"])
        assert torch.equal(views[0]["targets"], views[1]["targets"])
        assert torch.equal(draws[0], draws[1])


def test_another_seed_draws_other_images_and_weights(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    first, second = (trainer({**tiny, "seed": seed}, tmp_path / str(seed), data_cache) for seed in (0, 1))
    assert first.data.fingerprint == second.data.fingerprint
    orders = [loader.Order(128, 16, one.streams)(0) for one in (first, second)]
    assert not np.array_equal(*orders)
    assert not torch.equal(first.method.head.weight, second.method.head.weight)


def test_every_epoch_sees_every_image_once_in_another_order() -> None:
    order = loader.Order(num_images=10, batch_size=4, streams=Streams(0))
    seen = np.concatenate([order(step) for step in range(5)])
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    assert np.array_equal(loader.Order(10, 4, Streams(0))(2), seen[8:12])


def test_accumulation_gives_the_gradient_of_the_whole_batch(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    """With views that do not draw, since micro-batches draw their own."""
    plain = {**tiny, "deit3.crop": "none", "deit3.flip": False, "deit3.three_augment": False, "deit3.cutmix": 0.0}
    plain = {**plain, "deit3.color_jitter": 0.0, "optim.optimizer": "sgd", "optim.warmup_steps": 0}
    whole = trainer(plain, tmp_path / "a", data_cache)
    parts = trainer({**plain, "optim.micro_batch_size": 4}, tmp_path / "b", data_cache)
    for one in (whole, parts):
        batch = loader.fetch(one.data.train, np.arange(16), one.device)
        one._one_step(batch)
    for (name, first), second in zip(whole.method.named_parameters(), parts.method.parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6), name
    assert whole._take_losses()["train/loss"] == pytest.approx(parts._take_losses()["train/loss"], abs=1e-5)


def test_token_statistics_change_nothing(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    _, with_stream = run({**tiny, **FULL}, tmp_path / "a", data_cache)
    _, without = run({**tiny, **FULL, "tokens.training_stream": False}, tmp_path / "b", data_cache)
    assert with_stream == without


def test_fp16_on_a_cpu_is_refused(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run({**tiny, "precision": "fp16"}, tmp_path, data_cache)


def test_bf16_trains(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    result, _ = run({**tiny, "precision": "bf16"}, tmp_path, data_cache)
    assert result.status == "finished"
