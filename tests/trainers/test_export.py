"""What is exported is, loaded by timm alone, the same function as our ViT."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from trainers import augment, export, vit
from trainers.catalog import ModelSize
from trainers.config import ModelConfig, resolve
from trainers.streams import Streams
from trainers.weights import load_weights


def model(registers: int = 0, **settings: object) -> ModelConfig:
    given = {"size": "nano", "patch_size": 8, "image_size": 32, "layer_scale": 0.1, "num_registers": registers}
    return resolve({"model": {**given, **settings}}).model


def randomised(config: ModelConfig, shape: ModelSize | None = None) -> vit.ViT:
    """Our ViT with all parameters, those of the class's position too, far from zero."""
    ours = vit.ViT(config, Streams(0), shape).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
    return ours


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(7))


CASES: list[dict[str, Any]] = [
    {},
    {"registers": 1},
    {"registers": 16, "layer_scale": None},
    {"registers": 4, "pre_norm": True, "norm_eps": 1e-5, "layer_scale": None},  # openclip
    {"pre_norm": True, "norm_eps": 1e-5, "mlp": "quick_gelu"},
    {"registers": 2, "mlp": "quick_gelu"},
    {"registers": 4, "mlp": "swiglu"},
    {"mlp": "swiglu", "layer_scale": None, "pre_norm": True},
    {"norm_eps": 1e-5},
    {"registers": 2, "pos_antialias": False, "pos_offset": 0.1},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: "-".join(map(str, settings.values())) or "plain")
def test_timm_computes_what_we_do(settings: dict[str, Any], tmp_path: Path) -> None:
    config = model(**settings)
    ours = randomised(config)
    export.write(tmp_path, *export.to_timm(ours.state_dict(), config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        for size in [(32, 32), *([(48, 24)] if export.resizes_alike(config) else [])]:
            expected = ours.forward_features(images(*size))
            assert expected.abs().max() > 1
            assert torch.allclose(theirs.forward_features(images(*size)), expected, rtol=0, atol=1e-5)
        assert torch.allclose(theirs(images()), ours.tokens(images()).cls_BD, rtol=0, atol=1e-5)
    assert theirs.num_prefix_tokens == 1 + config.num_registers


def test_without_registers_the_weights_are_ours_to_the_bit(tmp_path: Path) -> None:
    config = model()
    ours = randomised(config)
    ours.add_mask_token(Streams(0))
    tensors, configuration = export.to_timm(ours.state_dict(), config)
    assert tensors.keys() == ours.state_dict().keys() - {"mask_token"}
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in tensors.items())
    assert configuration["model_args"]["no_embed_class"] is False


def test_registers_leave_the_class_its_position() -> None:
    config = model(2)
    ours = randomised(config)
    tensors, _ = export.to_timm(ours.state_dict(), config)
    own = ours.state_dict()
    assert torch.equal(tensors["cls_token"], own["cls_token"] + own["pos_embed"][:, :1])
    assert torch.equal(tensors["pos_embed"], own["pos_embed"][:, 1:])
    assert torch.equal(tensors["reg_token"], own["reg_token"])
    assert own["pos_embed"].shape == (1, 17, 64), "ours is left as it was"


def test_where_timm_would_resize_otherwise_it_refuses_other_sizes(tmp_path: Path) -> None:
    config = model(pos_offset=0.1)
    assert not export.resizes_alike(config)
    export.write(tmp_path, *export.to_timm(randomised(config).state_dict(), config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    with pytest.raises(AssertionError, match="doesn't match model"):
        theirs(images(48, 24))


def test_an_own_shape_and_patch_size(tmp_path: Path) -> None:
    config, shape = model(3, patch_size=4, image_size=16), ModelSize(width=48, depth=3, heads=3)
    ours = randomised(config, shape)
    export.write(tmp_path, *export.to_timm(ours.state_dict(), config, shape))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(16, 16)
    assert torch.allclose(theirs.forward_features(x), ours.forward_features(x), rtol=0, atol=1e-5)


def test_timm_prepares_images_as_our_evaluation_does(tmp_path: Path) -> None:
    config = model()
    export.write(tmp_path, *export.to_timm(randomised(config).state_dict(), config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    settings = timm.data.resolve_model_data_config(theirs)
    assert (list(settings["input_size"]), settings["crop_pct"]) == ([3, 32, 32], 1.0)
    pixels = torch.randint(0, 256, (1, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    prepared = timm.data.create_transform(**settings, is_training=False)(Image.fromarray(pixels[0].numpy()))
    assert torch.allclose(prepared, augment.evaluation_view(pixels, 32)[0], atol=1e-6)


def test_a_classifier_can_be_put_on_top(tmp_path: Path) -> None:
    config = model(4)
    export.write(tmp_path, *export.to_timm(randomised(config).state_dict(), config))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)
    assert theirs(images()).shape == (2, 7)


@pytest.mark.parametrize("registers", [0, 4])
def test_an_exported_folder_is_a_starting_point(registers: int, tmp_path: Path) -> None:
    config = model(registers)
    ours = randomised(config)
    export.write(tmp_path, *export.to_timm(ours.state_dict(), config))
    again = vit.ViT(config, Streams(3)).eval()
    assert load_weights(tmp_path / "model.safetensors", again).notes == ()
    assert torch.allclose(again.forward_features(images()), ours.forward_features(images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sink": "softmax1"}, "timm's ViT has no attention sinks; model.sink is softmax1"),
        ({"sink": "value_gate"}, "model.sink is value_gate"),
        ({"registers": 2, "register_mask": "detached"}, "has no masks of registers; model.register_mask is detached"),
        ({"norm_eps": 1e-4}, "timm builds no ViT with model.norm_eps 0.0001 and model.mlp gelu"),
        ({"norm_eps": 1e-5, "mlp": "swiglu"}, "model.norm_eps 1e-05 and model.mlp swiglu"),
        ({"factory": "a.b:c"}, "only the built-in ViT can be exported; model.factory names a.b:c"),
    ],
)
def test_what_timm_cannot_express_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.to_timm({}, model(**settings))


def test_the_weights_of_a_checkpoint_are_told_apart() -> None:
    def under(prefix: str, value: float) -> dict[str, Tensor]:
        return {f"{prefix}{name}": torch.full((1,), value) for name in ("patch_embed.proj.weight", "norm.bias")}

    head = {"head.weight": torch.zeros(1), "teacher_head.weight": torch.zeros(1)}
    method = {**under("backbone.", 1.0), **under("teacher_backbone.", 2.0), **head}
    found = export.weights_in({"method": method, "ema": under("", 3.0)})
    expected = {"raw": under("", 1.0), "teacher": under("", 2.0), "ema": under("", 3.0)}
    assert found == expected
    assert export.weights_in({"method": under("backbone.", 1.0), "ema": None}) == {"raw": under("", 1.0)}
    assert export.weights_in({"method": head, "ema": None}) == {}


def test_the_configuration_is_json_with_what_timm_needs(tmp_path: Path) -> None:
    config = model(4, mlp="quick_gelu", pre_norm=True, norm_eps=1e-5)
    export.write(tmp_path / "new" / "folder", *export.to_timm(randomised(config).state_dict(), config))
    written = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert written["architecture"] == "vit_base_patch16_clip_224"
    assert written["model_args"]["act_layer"] == "quick_gelu"
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"config.json", "model.safetensors"}
