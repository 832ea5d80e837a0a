"""The training loop: exact resume after a kill, fair pairs, divergence, accumulation, files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import tiny_trial
from tests.trainers.runs import run, training
from trainers import checkpoint, distributed, loader, pretrained, vit
from trainers.catalog import TRAINING_METHODS
from trainers.config import ExecutionConfig, resolve
from trainers.methods import Batch, Method, Progress
from trainers.streams import Streams
from trainers.tokens import statistics as token_statistics
from trainers.tokens import table as token_table

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


def test_a_checkpoint_from_before_statistics_were_kept_goes_on(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    calls = iter(range(100))
    run(tiny, tmp_path / "1", data_cache, should_stop=lambda: "interrupted" if next(calls) == 9 else None)
    state = checkpoint.load_newest([tmp_path / "1" / "checkpoints"])
    assert state is not None and state["step"] == 9 and state.pop("statistics").numel()
    checkpoint.save(tmp_path / "old", 9, state)
    result, _ = run(tiny, tmp_path / "2", data_cache, resume_from=[tmp_path / "old"])
    assert result.status == "finished"
    assert {row.step for row in token_statistics.read(tmp_path / "2" / "token_statistics.parquet")} == {12}


def spiked(tmp_path: Path) -> dict[str, Any]:
    """Settings that measure a file of weights whose position embedding makes one patch of each image an outlier."""
    settings = {"model.size": "nano", "model.patch_size": 8, "model.image_size": 16}
    backbone = vit.ViT(resolve(settings).model, Streams(0))
    with torch.no_grad():
        assert backbone.pos_embed is not None
        backbone.pos_embed[0, 2] = 100.0
    save_file(dict(backbone.state_dict()), tmp_path / "own.safetensors")
    execution = {"execution.weights_root": str(tmp_path)}
    described = pretrained.describe("own.safetensors", ExecutionConfig(weights_root=str(tmp_path)))
    return {
        "method": "pretrained",
        "model.weights": "own.safetensors",
        "model.image_size": 16,
        **described,
        **execution,
    }


def measuring(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    kept = ("data.", "tokens.", "evaluation.train", "execution.")
    return {name: value for name, value in tiny.items() if name.startswith(kept)} | spiked(tmp_path)


def test_weights_that_were_never_trained_have_no_onset_step(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    _, reports = run(measuring(tiny, tmp_path), tmp_path / "1", data_cache)
    assert reports[0]["tokens/last/outlier_fraction"] == 0.25 and "tokens/onset_layer" in reports[0]
    assert "tokens/onset_step" not in reports[0]


@pytest.mark.parametrize("setting", ["model.weights", "model.init_from"])
def test_weights_that_have_changed_since_the_trial_began_are_named_by_their_setting(
    setting: str, tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    settings = measuring(tiny, tmp_path)
    if setting == "model.init_from":
        settings = {**tiny, "model.layer_scale": None, "model.init_from.file": str(tmp_path / "own.safetensors")}
    one = training(settings, tmp_path / "1", data_cache)
    now, one.started_from = one.started_from, "another"
    one._save()
    with pytest.raises(ValueError, match=rf"^{setting} gives other weights \({now}\) than when .* \(another\)"):
        training(settings, tmp_path / "2", data_cache).resume([tmp_path / "1" / "checkpoints"], lambda *_: None)


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


def test_another_seed_draws_other_images_and_weights(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    first, second = (training({**tiny, "seed": seed}, tmp_path / str(seed), data_cache) for seed in (0, 1))
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


def test_repeated_augmentation_shows_a_third_of_the_images_three_times_in_a_row() -> None:
    order = loader.Order(num_images=12, batch_size=6, streams=Streams(0), repeats=3)
    once = loader.Order(num_images=12, batch_size=6, streams=Streams(0))
    epoch = np.concatenate([order(0), order(1)])
    assert np.array_equal(epoch, np.repeat(np.concatenate([once(0), once(1)])[:4], 3))
    assert not np.array_equal(order(2)[::3], epoch[:6:3])  # another part of the data in the next epoch


def test_mixing_in_groups_mixes_each_with_its_own_mirror_and_its_own_share(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    plain = {"deit3.crop": "none", "deit3.flip": False, "deit3.three_augment": False, "deit3.color_jitter": 0.0}
    plain |= {"deit3.cutmix": 0.0, "deit3.mixup": 1.0, "deit3.smoothing": 0.0, "deit3.mix_group_size": 4}
    one = training({**tiny, **plain}, tmp_path, data_cache)
    batch = one._reader(loader.Shares(16, 16))(0)
    targets = one.method.views(batch, one.streams)["targets"]
    classes = torch.nn.functional.one_hot(batch.targets["classes"], 10).float()
    shares = []
    for first in range(0, 16, 4):
        own, mirror = classes[first : first + 4], classes[first : first + 4].flip(0)
        differ = (own - mirror).square().sum(1) > 0
        share = ((targets[first : first + 4] - mirror) * (own - mirror)).sum(1)[differ] / 2
        assert torch.allclose(share, share[:1].expand_as(share), atol=1e-6)
        assert torch.allclose(targets[first : first + 4], share[0] * own + (1 - share[0]) * mirror, atol=1e-6)
        shares.append(float(share[0]))
    assert len(set(shares)) == 4


class Careless(NanAtTen):
    """A method of a user's own that leaves its head to PyTorch's default initialisation."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.head = torch.nn.Linear(64, 10)


def test_what_a_users_own_method_draws_from_the_global_generator_is_the_trials_too(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    heads = []
    for number, registers in enumerate((0, 0, 4)):
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        settings = {**tiny, "method": f"{__name__}:Careless", "model.num_registers": registers}
        heads.append(training(settings, tmp_path, data_cache).method.head.weight)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


def test_a_trial_of_no_steps_measures_and_keeps_what_it_starts_from(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    result, reports = run({**tiny, "optim.steps": 0}, tmp_path, data_cache)
    assert (result.status, result.steps) == ("finished", 0)
    assert "test/linear/top1" in reports[0] and "train/loss" not in reports[0]
    assert (tmp_path / "checkpoints" / "step_000000000.pt").is_file()


def test_a_micro_batch_that_ranks_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="micro_batch_size 16 cannot be shared evenly by 3 ranks"):
        loader.Shares(32, 16)


def test_a_step_that_is_to_be_kept_stays_when_newer_ones_come(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    seldom = {"execution.checkpoint_seconds": 600.0, "execution.keep_steps": [3, 6]}  # not saved for another reason
    run({**tiny, **seldom}, tmp_path, data_cache)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert kept == ["step_000000003.pt", "step_000000006.pt", "step_000000012.pt"]


def test_activation_checkpointing_changes_no_number(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    _, kept = run({**tiny, **FULL}, tmp_path / "a", data_cache)
    _, twice = run({**tiny, **FULL, "execution.activation_checkpointing": True}, tmp_path / "b", data_cache)
    assert kept == twice


def test_accumulation_gives_the_gradient_of_the_whole_batch(
    tiny: dict[str, Any], tmp_path: Path, data_cache: Path
) -> None:
    """With views that do not draw, since micro-batches draw their own."""
    plain = {**tiny, "deit3.crop": "none", "deit3.flip": False, "deit3.three_augment": False, "deit3.cutmix": 0.0}
    plain = {**plain, "deit3.color_jitter": 0.0, "optim.optimizer": "sgd", "optim.warmup_steps": 0}
    whole = training(plain, tmp_path / "a", data_cache)
    parts = training({**plain, "optim.micro_batch_size": 4}, tmp_path / "b", data_cache)
    for one in (whole, parts):
        shares = loader.Shares(16, one.config.optim.micro_batch_size)
        one.stepper(list(shares.parts(one._reader(shares)(0))), 0)
    for (name, first), second in zip(whole.method.named_parameters(), parts.method.parameters(), strict=True):
        assert torch.allclose(first, second, atol=1e-6), name
    assert whole.stepper.take_losses()["train/loss"] == pytest.approx(
        parts.stepper.take_losses()["train/loss"], abs=1e-5
    )


def test_token_statistics_change_nothing(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    _, with_stream = run({**tiny, **FULL}, tmp_path / "a", data_cache)
    _, without = run({**tiny, **FULL, "tokens.training_stream": False}, tmp_path / "b", data_cache)
    assert with_stream == without


def test_a_rank_uses_as_many_threads_as_it_is_told(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    torch.set_num_threads(1)
    try:
        run({**tiny, "execution.threads": 2, "optim.steps": 0}, tmp_path, data_cache)  # which sets one thread before
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_fp16_on_a_cpu_is_refused(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run({**tiny, "precision": "fp16"}, tmp_path, data_cache)


def test_a_failure_of_the_first_ranks_evaluation_is_raised_by_all() -> None:
    with pytest.raises(FloatingPointError, match="not finite"), distributed.together() as on_first:
        assert on_first
        raise FloatingPointError("features are not finite")
    with pytest.raises(MemoryError), distributed.together():
        raise MemoryError


@pytest.mark.parametrize("method", TRAINING_METHODS)
def test_bf16_trains(method: str, tmp_path: Path, data_cache: Path) -> None:
    settings = tiny_trial(method, precision="bf16", optim__steps=2, evaluation__points=1, model__num_registers=2)
    result, reports = run(settings, tmp_path, data_cache)
    assert result.status == "finished"
    _, single = run({**settings, "precision": "fp32"}, tmp_path / "fp32", data_cache)
    assert reports[1]["train/loss"] == pytest.approx(single[1]["train/loss"], rel=0.02)
    assert reports[1]["train/loss"] != single[1]["train/loss"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at all inputs
def test_a_compiled_trial_computes_what_an_eager_one_does(tmp_path: Path, data_cache: Path) -> None:
    settings = tiny_trial("dinov2", optim__steps=3, evaluation__points=1, model__num_registers=2)
    _, eager = run(settings, tmp_path / "eager", data_cache)
    result, compiled = run({**settings, "compile": True}, tmp_path / "compiled", data_cache)
    assert result.status == "finished"
    for step in (1, 2, 3):
        assert compiled[step]["train/loss"] == pytest.approx(eager[step]["train/loss"], rel=1e-4)
