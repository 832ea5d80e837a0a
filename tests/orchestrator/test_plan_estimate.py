"""Costs: FLOPs against published numbers and a count by hand, parameters against timm's published counts."""

from typing import Any

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
    training_flops,
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


def test_probes_that_see_new_views_at_every_step_are_priced() -> None:
    settings = {"model.size": "tiny", "model.patch_size": 16, "model.image_size": 224, "data.decode_size": 256}
    fast = {"evaluation.probes": ["linear", "segmentation", "depth"], "evaluation.points": 1}
    paper = {f"evaluation.{name}.preset": "paper" for name in ("linear", "segmentation", "depth")}
    size = MODEL_SIZES["tiny"]
    by_hand = 12_500 * 1_024 * forward_flops(size, 196)
    by_hand += 40_000 * 16 * forward_flops(size, 32 * 32, num_classes=0)
    by_hand += 38_400 * 16 * forward_flops(size, 26 * 34, num_classes=0)
    more = trial_flops(resolve({**settings, **fast, **paper})) - trial_flops(resolve({**settings, **fast}))
    assert more == pytest.approx(by_hand)


def test_a_trial_trains_at_three_forward_passes_and_evaluates_at_one() -> None:
    settings = {"model.size": "tiny", "model.patch_size": 8, "optim.steps": 100, "optim.batch_size": 8}
    forward = forward_flops(MODEL_SIZES["tiny"], 64, 0, 8)
    off = {"evaluation.probes": [], "evaluation.points": 1, "tokens.probe_images": 1, "tokens.measurements": []}
    assert trial_flops(resolve({**settings, **off})) == pytest.approx(forward * (3 * 100 * 8 + 1))
    on = {"evaluation.points": 5, "evaluation.train_images": 100, "tokens.probe_images": 10}
    on |= {"tokens.measurements": ["channels", "single_token", "recurrence"], "tokens.detail_images": 3}
    on |= {
        "tokens.single_token.train_images": 20,
        "tokens.single_token.test_images": 30,
        "tokens.recurrence.scales": [1.5],
    }
    measured = 5 * 3 + 20 + 30 + 10 * 5  # two shifts, a flip, one other resolution with and without antialiasing
    assert trial_flops(resolve({**settings, **on})) == pytest.approx(forward * (3 * 100 * 8 + 5 * 110 + measured))


def test_what_trains_nothing_keeps_no_checkpoint_and_no_gradients() -> None:
    config = resolve({"method": "pretrained", "model.weights": "dinov2_vitl14_pretrain.pth", "model.image_size": 224})
    weights = 4 * parameters(MODEL_SIZES["large"], 256, 0, 14)
    assert checkpoint_bytes(config) == 0
    assert weights < memory_bytes(config) < 3 * weights


def per_image(settings: dict[str, Any]) -> float:
    return training_flops(resolve(settings))


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_deit3_pays_three_forward_passes(size: str) -> None:
    settings = {"model.size": size, "model.image_size": 224, "data.decode_size": 256}
    assert per_image(settings) == 3 * forward_flops(MODEL_SIZES[size], 196)
    assert per_image({**settings, "method": "my.own:Method"}) == per_image(settings)
    assert per_image({**settings, "execution.activation_checkpointing": True}) == pytest.approx(
        4 / 3 * per_image(settings)
    )


def test_batch_subset_stochastic_depth_saves_its_rate_of_the_blocks() -> None:
    settings = {"model.size": "tiny", "model.patch_size": 8, "model.drop_path": 0.5}
    blocks = 12 * (24 * 65 * 192**2 + 4 * 65**2 * 192)  # 64 patches of 64 px images
    whole = per_image(settings)
    assert whole == 3 * forward_flops(MODEL_SIZES["tiny"], 64, 0, 8)
    assert whole - per_image({**settings, "model.drop_path_group": 32}) == pytest.approx(3 * 0.5 * blocks)
    # of 4 images int(4 · 0.7) = 2 are kept
    few = {**settings, "model.drop_path": 0.3, "model.drop_path_group": 4}
    assert whole - per_image(few) == pytest.approx(3 * 0.5 * blocks)


def test_openclip_pays_for_both_towers() -> None:
    """ViT-B-16: 35.13 GFLOPs for an image, 5.96 for a caption (mlfoundations/open_clip:docs/model_profile.csv)."""
    settings = {"method": "openclip", "preset": "laion400m"}
    assert per_image(settings) / 1e9 == pytest.approx(3 * (35.13 + 5.96), rel=5e-4)
    # the features of all micro-batches are computed once more, without gradient
    parts = {**settings, "optim.micro_batch_size": 33_792 // 4}
    assert per_image(parts) == pytest.approx(4 / 3 * per_image(settings))


NARROW = {  # 16 patches and 4 of a local crop, of 8 px; heads of 64 · 8 + 8 · 4 + 4 · 32 = 672 weights
    "model.size": "nano",
    "model.num_registers": 0,
    "optim.batch_size": 64,
    "dino.head.hidden": 8,
    "dino.head.layers": 2,
    "dino.head.bottleneck": 4,
    "dino.head.prototypes": 32,
    "dino.crops.num_local": 3,
    "dino.crops.local_size": 16,
}
NARROW_2 = {name.replace("dino.", "dinov2."): value for name, value in NARROW.items()}
NARROW_2 |= {name.replace("dinov2.head", "dinov2.ibot_head"): value for name, value in NARROW_2.items()}


def crop(tokens: int) -> int:
    """Forward pass of a crop of `tokens` tokens through the nano model, its class token among them."""
    return 4 * (24 * tokens * 64**2 + 4 * tokens**2 * 64) + 6 * 8**2 * (tokens - 1) * 64


def test_dino_pays_for_all_crops_and_the_teachers_by_hand() -> None:
    backbone = 3 * (2 * crop(17) + 3 * crop(5)) + 2 * crop(17)
    heads = 2 * 672 * (3 * (2 + 3) + 2)
    assert per_image({"method": "dino", **NARROW}) == backbone + heads


def test_dinov2_pays_for_masked_patches_besides_by_hand() -> None:
    backbone = 3 * (2 * crop(17) + 3 * crop(5)) + 2 * crop(17)
    masked = 2 * 0.5 * 0.3 * 16  # crops, share of them that is masked, mean share of their patches
    heads = 2 * 672 * (3 * (2 + 3) + 2 + (3 + 1) * masked)
    assert per_image({"method": "dinov2", **NARROW_2}) == pytest.approx(backbone + heads)
    shared = {name: value for name, value in NARROW_2.items() if "ibot_head" not in name}
    shared |= {"method": "dinov2", "dinov2.separate_heads": False}
    assert per_image(shared) == pytest.approx(backbone + heads)
    without = per_image({**shared, "dinov2.ibot_weight": 0.0})
    assert without == pytest.approx(backbone + 2 * 672 * (3 * (2 + 3) + 2))


def test_equal_crops_are_counted_each() -> None:
    same = {"method": "dino", **NARROW, "dino.crops.local_size": 32}
    assert per_image(same) == 3 * 5 * crop(17) + 2 * crop(17) + 2 * 672 * (3 * 5 + 2)


@pytest.mark.parametrize("size", ["small", "base", "large"])
@pytest.mark.parametrize("method", ["dino", "dinov2"])
def test_the_price_of_registers_with_eight_local_crops(method: str, size: str) -> None:
    """5 % at 4 registers and 19 to 21 % at 16; DINOv2's head on masked patches, which see none, takes from that."""
    settings = {"method": method, "preset": "imagenet1k", "model.size": size, "model.drop_path_group": None}
    none, four, sixteen = (per_image({**settings, "model.num_registers": n}) for n in (0, 4, 16))
    assert 100 * (four / none - 1) == pytest.approx(5.0, abs=0.7)
    assert 17 < 100 * (sixteen / none - 1) < 21


def test_memory_and_disk_of_a_teacher_and_heads_by_hand() -> None:
    head = (64 * 8 + 8) + (8 * 4 + 4) + 4 * 32
    learned = parameters(MODEL_SIZES["nano"], 16, 0, 8) + head
    config = resolve({"method": "dino", **NARROW})
    assert checkpoint_bytes(config) == 4 * (3 + 1) * learned  # weights and two moments, and the teacher
    blocks = 34 * 2 * 64 * (2 * 17 + 3 * 5) * 64 * 4  # fp32, 64 images, width 64, 4 blocks
    logits = 4 * 64 * 32 * (2 * (2 + 3) + 2)
    assert memory_bytes(config) == 4 * (4 + 1) * learned + blocks + logits
    kept = resolve({"method": "dino", **NARROW, "execution.keep_steps": [100, 200]})
    assert checkpoint_bytes(kept) == 3 * checkpoint_bytes(config)
    both = resolve({"method": "dinov2", **NARROW_2})
    assert checkpoint_bytes(both) == 4 * (3 + 1) * (learned + head)
    shared = {name: value for name, value in NARROW_2.items() if "ibot_head" not in name}
    shared |= {"method": "dinov2", "dinov2.separate_heads": False}
    assert checkpoint_bytes(resolve(shared)) == 4 * (3 + 1) * learned


def test_memory_of_openclip() -> None:
    """ViT-B-16's text tower has 63,428,096 parameters (mlfoundations/open_clip:docs/model_profile.csv: 63.43 M)."""
    config = resolve({"method": "openclip", "preset": "laion400m", "optim.batch_size": 64, "optim.warmup_steps": 1})
    learned = parameters(MODEL_SIZES["base"], 196) + 63_428_096 + 768 * 512
    assert checkpoint_bytes(config) == 4 * 3 * learned
    activations = 34 * 64 * (197 * 768 * 12 + 77 * 512 * 12)
    assert memory_bytes(config) == 4 * 4 * learned + activations + 4 * 2 * 64 * 64


def test_activation_checkpointing_keeps_the_inputs_of_blocks() -> None:
    base = {"model.size": "tiny", "model.patch_size": 8}
    plain = resolve(base)
    small = resolve({**base, "execution.activation_checkpointing": True})
    tokens = 2 * 128 * 65 * 192
    assert memory_bytes(plain) - memory_bytes(small) == 34 * tokens * 12 - (2 * tokens * 12 + 34 * tokens)


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
