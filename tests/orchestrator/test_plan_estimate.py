"""Costs: FLOPs against published numbers and a count by hand, parameters against timm's published counts."""

import pytest

from orchestrator.estimate import (
    ASSUMED_CPU_FLOPS,
    ASSUMED_GPU_FLOPS,
    ASSUMED_TRIAL_SECONDS,
    checkpoint_bytes,
    estimate,
    forward_flops,
    memory_bytes,
    parameters,
    trial_flops,
)
from orchestrator.plan import build_plan
from orchestrator.sweep import Resources, Sweep
from trainers.catalog import MODEL_SIZES, ModelSize
from trainers.config import resolve


@pytest.mark.parametrize(("size", "gigaflops"), [("small", 9.20), ("base", 35.13), ("large", 123.1)])
def test_flops_of_published_models_at_224_px(size: str, gigaflops: float) -> None:
    assert forward_flops(MODEL_SIZES[size], num_patches=196) / 1e9 == pytest.approx(gigaflops, rel=5e-4)


@pytest.mark.parametrize(("registers", "percent"), [(4, 2.1), (16, 8.4)])
def test_the_price_of_registers(registers: int, percent: float) -> None:
    size = MODEL_SIZES["base"]
    ratio = forward_flops(size, 196, registers) / forward_flops(size, 196)
    assert 100 * (ratio - 1) == pytest.approx(percent, abs=0.05)


def test_flops_by_hand() -> None:
    # one block, width 2, one patch of 1 px, no registers: T = 2 tokens
    # q, k, v, projection: 4 products of [2×2]·[2×2] at 2·2·2·2; MLP: 2 of [2×2]·[2×8]; attention: 2 of [2×2]·[2×2]
    blocks = 4 * 16 + 2 * 64 + 2 * 16
    assert forward_flops(ModelSize(2, 1, 1), 1, 0, patch_size=1, num_classes=3) == blocks + 2 * 3 * 2 + 2 * 2 * 3


@pytest.mark.parametrize(
    ("size", "published"),
    [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656), ("large", 304_326_632)],
)
def test_parameters_are_those_that_timm_publishes(size: str, published: int) -> None:
    head = 1000 * MODEL_SIZES[size].width + 1000
    assert parameters(MODEL_SIZES[size], num_patches=196) + head == published
    assert parameters(MODEL_SIZES[size], 196, 4) - parameters(MODEL_SIZES[size], 196) == 4 * MODEL_SIZES[size].width


def test_a_trial_trains_at_three_forward_passes_and_evaluates_at_one() -> None:
    settings = {"model.size": "tiny", "model.patch_size": 8, "optim.steps": 100, "optim.batch_size": 8}
    forward = forward_flops(MODEL_SIZES["tiny"], 64, 0, 8)
    off = {"evaluation.probes": [], "evaluation.points": 1, "tokens.probe_images": 1}
    assert trial_flops(resolve({**settings, **off})) == pytest.approx(forward * (3 * 100 * 8 + 1))
    on = {"evaluation.points": 5, "evaluation.train_images": 100, "tokens.probe_images": 10}
    assert trial_flops(resolve({**settings, **on})) == pytest.approx(forward * (3 * 100 * 8 + 5 * 110))


def test_memory_and_disk_grow_with_what_they_hold() -> None:
    base = {"model.size": "tiny", "model.patch_size": 8}
    weights = parameters(MODEL_SIZES["tiny"], 64, 0, 8)
    plain = resolve(base)
    assert checkpoint_bytes(plain) == 4 * 3 * weights  # weights and two moments
    assert checkpoint_bytes(resolve({**base, "optim.ema_decay": 0.9})) == 4 * 4 * weights
    assert checkpoint_bytes(resolve({**base, "execution.keep_checkpoints": 5})) == 5 * 4 * 3 * weights
    activations = 34 * 2 * 128 * 65 * 192 * 12
    assert memory_bytes(plain) == 4 * 4 * weights + activations
    assert memory_bytes(resolve({**base, "optim.micro_batch_size": 64})) == 4 * 4 * weights + activations // 2


def test_a_plan_is_priced_where_its_trials_run() -> None:
    trial = {"model.size": "nano", "model.patch_size": 8}
    axes: dict[str, tuple[object, ...]] = {"model.num_registers": (0, 4)}
    on_cpu = build_plan(Sweep(name="x", trial=trial, axes=axes)).trials
    on_gpu = build_plan(Sweep(name="x", trial=trial, axes=axes, resources=Resources(gpus=0.5))).trials
    flops = sum(trial_flops(t.config) for t in on_cpu)
    overhead = 2 * ASSUMED_TRIAL_SECONDS
    cost = estimate(on_cpu)
    assert (cost.trials, cost.gpu_hours) == (2, 0)
    assert cost.cpu_core_hours == pytest.approx((flops / ASSUMED_CPU_FLOPS + overhead) / 3600)
    assert estimate(on_gpu).cpu_core_hours == 0
    assert estimate(on_gpu).gpu_hours == pytest.approx((flops / ASSUMED_GPU_FLOPS + overhead) / 3600)
    assert "GFLOP/s" in str(cost.to_json()["assumed"])


def test_no_trials_cost_nothing() -> None:
    cost = estimate([])
    assert (cost.trials, cost.flops, cost.gpu_hours, cost.memory_bytes) == (0, 0, 0, 0)
