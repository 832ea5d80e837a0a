"""Benchmarks of training: FLOPs by hand, the accelerator's lines, and that lightly's side does our work."""

import itertools
import json

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks import accelerator, flops
from benchmarks.trainer_throughput import KEPT, ModelAlone
from benchmarks.trials import trial
from trainers.config import TrialConfig


def _at_224px(method: str, size: str, registers: int, **settings: object) -> TrialConfig:
    own = {name.replace("__", "."): value for name, value in settings.items()}
    return accelerator.configuration(method, size, registers, False, None, own)


@pytest.mark.parametrize(("size", "forward"), [("small", 9.20e9), ("base", 35.13e9), ("large", 123.1e9)])
def test_flops_of_deit3_are_three_forward_passes(size: str, forward: float) -> None:
    assert flops.per_image(_at_224px("deit3", size, 0), 1_000) == pytest.approx(3 * forward, rel=1e-3)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_registers_cost_dinov2_more_than_deit3(size: str) -> None:
    # Known shares of eight crops of 37 tokens and two of 197: 5 % for 4 registers, 19 to 21 % for 16.
    of = [flops.dinov2_backbones(_at_224px("dinov2", size, r, model__drop_path=0.0)) for r in (0, 4, 16)]
    assert of[1] / of[0] == pytest.approx(1.05, abs=0.004)
    assert 1.19 <= of[2] / of[0] <= 1.21


def test_flops_of_dinov2_leave_out_dropped_images_and_count_the_rows_of_the_heads() -> None:
    config = trial("dinov2 tiny/8 64px", 1)
    # 2 crops of 64 + 1 + 4 tokens and 8 of 9 + 1 + 4: the student 3 times without 3 of 10, the teacher's 2 once.
    large, small = (12 * (24 * tokens * 192**2 + 4 * tokens**2 * 192) for tokens in (69, 14))
    embedding = 6 * 192 * (3 * (2 * 64**2 + 8 * 24**2) + 2 * 64**2)
    blocks = 0.7 * 3 * (2 * large + 8 * small) + 2 * large
    assert flops.dinov2_backbones(config) == pytest.approx(embedding + blocks)
    # A row: 192 → 512 → 512 → 128 → 4,096. Rows: 10 class tokens three times and the teacher's 2 once; of 2 · 64
    # patches half the crops lose 30 %, which the student sees three times and the teacher once.
    row = 2 * (192 * 512 + 512 * 512 + 512 * 128 + 128 * 4_096)
    assert flops.dinov2_heads(config) == pytest.approx(row * (3 * 10 + 2 + 4 * 0.5 * 0.3 * 2 * 64))


def test_without_a_gpu_the_accelerator_benchmark_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator.main([]) == 2
    assert "no usable GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        accelerator.main(["--device", "cpu", "--set", "model.num_register=4"])
    assert "did you mean num_registers?" in capsys.readouterr().err


def test_the_peak_is_known_by_the_name_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(accelerator, "_name", lambda _, name=name: name)
        assert accelerator.peak_flops(torch.device("cuda"))[0] == peak


def test_the_accelerator_benchmark_runs_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator, "BLOCK_SECONDS", 0.01)
    small = ["model.image_size=32", "model.patch_size=8", "precision=fp32", "dinov2.head.prototypes=64"]
    asked = ["--sizes", "nano", "--registers", "4", "--modes", "eager", "--batch", "4", "--blocks", "2"]
    for method in ("deit3", "dinov2"):
        own = small if method == "dinov2" else small[:3]
        assert accelerator.main(["--device", "cpu", "--methods", method, *asked, "--set", *own]) == 0
        said = json.loads(capsys.readouterr().out)
        counts, (achieved, peak) = said["counts"], said["median"]
        assert (counts["method"], counts["registers"], counts["batch_size"]) == (method, 4, 4)
        assert said["ratio"] == pytest.approx(achieved / peak, rel=1e-2)
        assert achieved * 1e3 == pytest.approx(counts["images_per_second"] * counts["gflop_per_image"], rel=1e-2)
        assert said["also"] == []  # targets are an H100's


NANO = "dinov2 nano/8 32px"


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("separate_heads", [False, True])
def test_lightlys_student_has_as_many_parameters_as_ours(images: NDArray[np.uint8], separate_heads: bool) -> None:
    lightly = pytest.importorskip("benchmarks.lightly_dinov2", reason="lightly is not installed")
    config = trial(NANO, 1, dinov2__separate_heads=separate_heads)
    ours = ModelAlone(config, images).method
    theirs = lightly.Loop(config, iter(())).student
    trained = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (ours, theirs)]
    assert trained[1] - trained[0] == 4 * 64  # timm gives registers a position embedding


def test_lightlys_loop_sees_our_crops_and_masks_and_its_teacher_follows(images: NDArray[np.uint8]) -> None:
    lightly = pytest.importorskip("benchmarks.lightly_dinov2", reason="lightly is not installed")
    config = trial(NANO, 1)
    assert config.dinov2 is not None
    model = ModelAlone(config, images)
    (crops, masks), *_, again = itertools.islice(model.batches(), KEPT + 1)
    assert [list(crop.shape) for crop in crops] == [[10, 3, 32, 32]] * 2 + [[10, 3, 16, 16]] * 8
    assert masks.shape == (20, 16) and int(masks.any(dim=1).sum()) == 10  # half of the crops
    assert torch.equal(again[1], masks)

    loop = lightly.Loop(config, model.batches())
    before = [p.detach().clone() for p in loop.teacher.parameters()]
    loop.steps(1)
    momentum = config.dinov2.teacher_momentum  # of step 0
    for old, new, student in zip(before, loop.teacher.parameters(), loop.student.parameters(), strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * student)
    assert any(not torch.equal(old, new) for old, new in zip(before, loop.teacher.parameters(), strict=True))
    model.steps(KEPT + 1)
    assert lightly.attention_form(loop) == "F.scaled_dot_product_attention"
    loop.student.backbone.vit.blocks[1].attn.fused_attn = False
    assert lightly.attention_form(loop) == "explicit softmax"


def test_lightlys_workers_make_the_crops_of_the_trial(images: NDArray[np.uint8]) -> None:
    lightly = pytest.importorskip("benchmarks.lightly_dinov2", reason="lightly is not installed")
    # of 16 patches lightly cannot mask fewer than 4
    config = trial(NANO, 1, dinov2__mask_ratio=(0.3, 0.5))
    batches = lightly.from_workers(config, images, 1)
    crops, masks = next(batches)
    assert masks is None
    assert [list(crop.shape) for crop in crops] == [[10, 3, 32, 32]] * 2 + [[10, 3, 16, 16]] * 8
    loop = lightly.Loop(config, batches)
    assert loop.steps(1) > 0.0
    assert int(loop._blocks(20).flatten(1).any(dim=1).sum()) == 10
