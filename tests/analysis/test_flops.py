"""The price of registers against values worked out by hand, the paper's Fig. 12, and the estimate of the planner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.flops import Shape, flops_increase, forward_flops, parameters, parameters_increase
from analysis.plan_file import parse_plan
from orchestrator import estimate
from orchestrator.plan import build_plan
from orchestrator.spec import read_sweep
from trainers.catalog import MODEL_SIZES

SWEEP = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"

LARGE_14 = Shape(width=1024, depth=24, patch_size=14, image_size=224)
BASE_16 = Shape(width=768, depth=12, patch_size=16, image_size=224)


def test_a_small_model_by_hand() -> None:
    shape = Shape(width=64, depth=4, patch_size=8, image_size=32)
    # 17 tokens: 4 · (24 · 17 · 64² + 4 · 17² · 64) + 6 · 8² · 16 · 64.
    assert forward_flops(shape) == 4 * (1_671_168 + 73_984) + 393_216 == 7_373_824
    assert forward_flops(shape, 1) == 4 * (1_769_472 + 82_944) + 393_216
    # (192 + 1) · 64 + 17 · 64 + 64, four blocks of 12 · 64² + 13 · 64, and the last norm.
    assert parameters(shape) == 13_504 + 4 * 49_984 + 128
    assert parameters(shape, 2) - parameters(shape) == 128


@pytest.mark.parametrize(("count", "percent"), [(1, 0.40), (2, 0.81), (4, 1.62), (8, 3.24), (16, 6.48)])
def test_the_price_in_a_large_model_is_the_papers(count: int, percent: float) -> None:
    """The paper's Fig. 12: less than 2 % with 4 registers and about 6 % with 16."""
    assert round(100 * flops_increase(LARGE_14, count), 2) == percent
    assert parameters_increase(LARGE_14, count) < 1e-4


def test_four_registers_cost_more_than_two_percent_in_a_base_model() -> None:
    assert round(100 * flops_increase(BASE_16, 4), 2) == 2.10


@pytest.mark.parametrize(("width", "depth", "gigaflops"), [(384, 12, 9.20), (768, 12, 35.13), (1024, 24, 123.1)])
def test_published_sizes(width: int, depth: int, gigaflops: float) -> None:
    shape = Shape(width, depth, 16, 224, num_classes=1000)
    assert forward_flops(shape) / 1e9 == pytest.approx(gigaflops, rel=5e-4)


def test_parameters_are_those_of_the_published_base_model() -> None:
    assert parameters(Shape(768, 12, 16, 224, num_classes=1000)) == 86_567_656  # timm's vit_base_patch16_224


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_the_planner_counts_alike(name: str) -> None:
    size = MODEL_SIZES[name]
    shape = Shape(size.width, size.depth, 14, 98)
    assert forward_flops(shape, 5) == estimate.forward_flops(size, 49, 5, 14, num_classes=0)
    assert parameters(shape, 5) == estimate.parameters(size, 49, 5, 14)


def test_the_plan_says_what_sizes_are() -> None:
    content = build_plan(read_sweep(SWEEP)).to_json()
    sizes = parse_plan(json.dumps(content).encode(), "plan.json").model_sizes
    assert sizes == {name: (size.width, size.depth) for name, size in MODEL_SIZES.items()}
    assert all(trial["training_flops"] > 0 for trial in content["trials"])


@pytest.mark.parametrize(("count", "low", "high"), [(4, 0.048, 0.053), (16, 0.19, 0.21)])
@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_a_register_is_dearer_where_small_crops_are_trained_on(name: str, count: int, low: float, high: float) -> None:
    """DINOv2's student learns from two crops of 224 px and eight of 96 px, its teacher sees the two; without heads."""
    size = MODEL_SIZES[name]
    globals_, locals_ = (Shape(size.width, size.depth, 16, side) for side in (224, 96))
    without, with_ = (
        (3 * 2 + 2) * forward_flops(globals_, registers) + 3 * 8 * forward_flops(locals_, registers)
        for registers in (0, count)
    )
    assert low < with_ / without - 1 < high
