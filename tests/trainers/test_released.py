"""Names of released weights: where they come from, and which model they say."""

import pytest

from trainers import released
from trainers.config import resolve, trial_id
from trainers.released import Source, settings, source

OLD = {"pos_antialias": False, "pos_offset": 0.1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0123456789abcdef", Source(trial="0123456789abcdef")),
        ("0123456789abcdef@300:teacher", Source(trial="0123456789abcdef", step=300, kind="teacher")),
        ("0123456789abcdef:raw", Source(trial="0123456789abcdef", kind="raw")),
        ("dinov2_vitl14_reg4_pretrain.pth", Source(file="dinov2_vitl14_reg4_pretrain.pth")),
        ("~/weights/vit.safetensors", Source(file="~/weights/vit.safetensors")),
        ("folder/weights", Source(file="folder/weights")),
        ("vit_small_patch14_dinov2.lvd142m", Source(timm="vit_small_patch14_dinov2.lvd142m")),
        ("timm/vit_small_patch14_dinov2.lvd142m", Source(timm="vit_small_patch14_dinov2.lvd142m")),
        ("local-dir:/a/folder.pt", Source(timm="local-dir:/a/folder.pt")),
        ("hf-hub:owner/name", Source(timm="hf-hub:owner/name")),
    ],
)
def test_where_weights_come_from(name: str, expected: Source) -> None:
    assert source(name) == expected


@pytest.mark.parametrize(
    ("name", "size", "patch", "registers", "others"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", "small", 14, 4, {"layer_scale": 1e-5}),
        ("vit_large_patch14_dinov2.lvd142m", "large", 14, 0, {"layer_scale": 1e-5, **OLD}),
        ("vit_giant_patch14_reg4_dinov2.lvd142m", "giant", 14, 4, {"layer_scale": 1e-5, "mlp": "swiglu"}),
        ("dinov2_vitg14_pretrain.pth", "giant", 14, 0, {"layer_scale": 1e-5, "mlp": "swiglu", **OLD}),
        ("dinov2_vitb14_reg4_pretrain.pth", "base", 14, 4, {"layer_scale": 1e-5}),
        ("dino_vitbase16_pretrain.pth", "base", 16, 0, {"layer_scale": None, **OLD}),
        ("vit_base_patch16_224.dino", "base", 16, 0, {"layer_scale": None, **OLD}),
        ("deit3_base_patch16_224.fb_in22k_ft_in1k", "base", 16, 0, {"layer_scale": 1e-5}),
        ("deit_3_huge_224_21k.pth", "huge", 14, 0, {"layer_scale": 1e-5}),
        ("deit_small_patch16_224.fb_in1k", "small", 16, 0, {"layer_scale": None}),
        (
            "vit_base_patch16_clip_224.laion2b",
            "base",
            16,
            0,
            {"pre_norm": True, "norm_eps": 1e-5, "normalization": "clip"},
        ),
        ("vit_small_patch16_224.augreg_in21k", "small", 16, 0, {"layer_scale": None, "normalization": "inception"}),
        ("vit_large_patch14_clip_quickgelu_224.openai", "large", 14, 0, {"pre_norm": True, "mlp": "quick_gelu"}),
        ("vit_large_patch16_224.mae", "large", 16, 0, {"layer_scale": None}),
    ],
)
def test_a_name_says_the_model(name: str, size: str, patch: int, registers: int, others: dict[str, object]) -> None:
    said = {key.removeprefix("model."): value for key, value in settings(name).items()}
    expected = {"size": size, "patch_size": patch, "num_registers": registers, **others}
    assert {key: said[key] for key in expected} == expected
    model = resolve({"method": "pretrained", "model.weights": name}).model
    assert {key: getattr(model, key) for key in expected} == expected


@pytest.mark.parametrize(
    "name", ["mine.pth", "vit_medium_patch16_reg4_gap_256.sbb_in12k", "0123456789abcdef", "swin_t"]
)
def test_other_names_say_nothing(name: str) -> None:
    assert settings(name) == {}


def test_what_is_given_goes_before_what_a_name_says() -> None:
    given = {"method": "pretrained", "model.weights": "vit_small_patch14_dinov2.mine", "model.num_registers": 1}
    assert resolve(given).model.num_registers == 1
    assert released.settings("vit_small_patch14_dinov2.mine")["model.num_registers"] == 0


def test_nothing_that_only_training_sees_is_part_of_the_identity_of_measured_weights() -> None:
    base = {"method": "pretrained", "model.weights": "dinov2_vits14_pretrain.pth"}
    other = {"optim.lr": 0.5, "model.drop_path": 0.3, "precision": "bf16", "evaluation.points": 9, "compile": True}
    assert trial_id(resolve({**base, **other})) == trial_id(resolve(base))
    assert trial_id(resolve({**base, "model.image_size": 28})) != trial_id(resolve(base))
    assert trial_id(resolve({**base, "model.weights_fingerprint": "0" * 16})) != trial_id(resolve(base))
