"""Weights of other projects' models, built for real where their package is here, give our ViT the same outputs."""

from collections.abc import Mapping
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from tests.golden_files import Golden, close, weights
from trainers import catalog, vit
from trainers.config import ModelConfig, resolve
from trainers.streams import Streams
from trainers.weight_layouts import Converted, convert
from trainers.weights import load_into

SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2, "img_size": 32, "patch_size": 8}  # our nano


def model(registers: int = 0, **settings: object) -> ModelConfig:
    given = {
        "size": "nano",
        "patch_size": 8,
        "image_size": 32,
        "layer_scale": 0.1,
        "num_registers": registers,
        **settings,
    }
    return resolve({"model": given}).model


def backbone(registers: int = 0, **settings: object) -> vit.ViT:
    return vit.ViT(model(registers, **settings), Streams(0)).eval()


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7))


def randomised(module: nn.Module) -> nn.Module:
    """All parameters far from their initialisation, so that a mistaken name shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
    return module.eval()


def theirs(name: str, **arguments: Any) -> Any:
    return randomised(timm.create_model(name, **{**SMALL, **arguments}))


def assert_same(ours: vit.ViT, expected_BTD: Tensor) -> None:
    close(ours.forward_features(images()), expected_BTD, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "arguments"),
    [
        ("vit_small_patch16_224", {"layer_scale": None}, {}),  # as deit and dino: class with a position
        ("deit3_small_patch16_224", {}, {}),  # class without a position
        ("vit_small_patch14_dinov2", {}, {}),
        ("vit_small_patch14_reg4_dinov2", {"registers": 4}, {}),  # positions of patches alone
        ("vit_small_patch16_224", {"registers": 4}, {"reg_tokens": 4, "init_values": 0.1}),  # positions of all tokens
        ("vit_small_patch16_224", {"registers": 1, "layer_scale": None}, {"reg_tokens": 1, "no_embed_class": True}),
        ("vit_base_patch16_clip_224", {"pre_norm": True, "norm_eps": 1e-5, "layer_scale": None}, {}),
        ("vit_giant_patch14_dinov2", {"mlp": "swiglu"}, {"mlp_ratio": 2.75 * 2}),
    ],
)
def test_timm_models_give_the_same_tokens(name: str, settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    other = theirs(name, num_classes=5, **arguments)
    ours = backbone(**settings)
    converted = convert(other.state_dict())
    report = load_into(ours, converted)
    assert report.layout == "timm"
    assert report.notes == ("left out, a head: head.bias, head.weight",)
    assert_same(ours, other.forward_features(images()))


def official_deit3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for name, t in state.items()}
    return {f"module.{name}": tensor for name, tensor in renamed.items()}


def test_official_deit3_has_no_position_of_the_class() -> None:
    other = theirs("deit3_small_patch16_224")
    converted = convert(official_deit3(other.state_dict()))
    assert converted.layout == "deit3"
    assert not converted.tensors["pos_embed"][:, 0].any()
    ours = backbone()
    load_into(ours, converted)
    assert_same(ours, other.forward_features(images()))


def official_dinov2(state: Mapping[str, Tensor], chunks: int = 1) -> dict[str, Tensor]:
    """timm's names and positions as facebookresearch/dinov2 has them, blocks in `chunks` chunks of 4 in all."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "blocks" and chunks > 1:
            parts.insert(1, str(int(parts[1]) // (4 // chunks)))
        new = ".".join(parts).replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        renamed[new.replace("reg_token", "register_tokens")] = tensor
    if "register_tokens" in renamed:  # timm has the class token take up its position
        position = torch.full((1, 1, 64), 0.3)
        renamed["cls_token"] = renamed["cls_token"] - position
        renamed["pos_embed"] = torch.cat([position, renamed["pos_embed"]], dim=1)
    return {**renamed, "mask_token": torch.full((1, 64), 0.7)}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_official_dinov2_with_swiglu_registers_and_chunks(registers: int, chunks: int) -> None:
    name = "vit_giant_patch14_reg4_dinov2" if registers else "vit_giant_patch14_dinov2"
    other = theirs(name, mlp_ratio=2.75 * 2, num_classes=0)
    inside = {f"backbone.{key}": tensor for key, tensor in official_dinov2(other.state_dict(), chunks).items()}
    converted = convert({**inside, "dino_head.mlp.0.weight": torch.zeros(2, 2)})
    assert converted.layout == "dinov2"
    assert converted.left_out == {"dino_head.mlp.0.weight": "not of the backbone"}
    ours = backbone(registers, mlp="swiglu")
    ours.add_mask_token(Streams(0))
    report = load_into(ours, converted)
    assert report.loaded == len(list(ours.parameters()))
    assert torch.equal(ours.mask_token, torch.full((1, 64), 0.7))
    assert_same(ours, other.forward_features(images()))


def clip(**vision: Any) -> Any:
    tower = {"image_size": 32, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8, **vision}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    return randomised(open_clip.model.CLIP(16, tower, text))


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_open_clips_image_tower(layer_scale: float | None) -> None:
    other = clip(ls_init_value=layer_scale)
    converted = convert(other.state_dict())
    assert converted.layout == "open_clip"
    assert converted.left_out["logit_scale"] == "not of the image tower"
    assert converted.left_out["proj"] == "a head"
    ours = backbone(pre_norm=True, norm_eps=1e-5, layer_scale=layer_scale)
    load_into(ours, converted)
    with torch.no_grad():
        expected = other.visual(images())
        given = ours.tokens(images()).cls_BD @ other.visual.proj
        close(given, expected, rtol=0, atol=2e-5)
        own = [tokens.patches_BND for tokens in ours.residuals(images())]
        close(own[0], other.visual._embeds(images())[:, 1:], rtol=0, atol=1e-5)
    alone = convert(other.visual.state_dict())
    assert all(torch.equal(alone.tensors[name], tensor) for name, tensor in converted.tensors.items())


def test_open_clip_with_a_tower_of_timms() -> None:
    state = theirs("vit_small_patch16_224", num_classes=0).state_dict()
    inside = {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
    converted = convert({"module.logit_scale": torch.ones(()), **{f"module.{name}": t for name, t in inside.items()}})
    assert converted.layout == "timm"
    assert converted.tensors.keys() == state.keys()


@pytest.mark.parametrize("prefix", ["teacher.backbone.", "_orig_mod.module.backbone.", "student.backbone."])
def test_wrappers_of_training_code_are_taken_off(prefix: str) -> None:
    state = theirs("vit_small_patch16_224", num_classes=0).state_dict()
    converted = convert({f"{prefix}{name}": tensor for name, tensor in state.items()} | {"head.x": torch.zeros(1)})
    assert converted.tensors.keys() == state.keys()
    assert list(converted.left_out) == ["head.x"]


def test_the_teacher_goes_before_the_student() -> None:
    state = theirs("vit_small_patch16_224", num_classes=0).state_dict()
    student = {f"student.backbone.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    teacher = {f"teacher.backbone.{name}": tensor for name, tensor in state.items()}
    converted = convert({**student, **teacher})
    assert torch.equal(converted.tensors["norm.weight"], state["norm.weight"])
    assert len(converted.left_out) == len(state)


def plain(**changes: Tensor | None) -> dict[str, Tensor]:
    """A state dict in timm's names with entries replaced, or removed where None; two underscores stand for a dot."""
    state = theirs("vit_small_patch16_224", num_classes=0).state_dict()
    named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in {**state, **named}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: {"a": torch.zeros(1), "b": torch.zeros(1)},
            r"not known \(2 names, such as a, b\); known: dinov2, dino",
        ),
        (lambda: {"embeddings.cls_token": torch.zeros(1, 1, 4)}, "layout of the weights is not known"),
        (lambda: plain(cls_token=None), "have no cls_token"),
        (lambda: plain(pos_embed=None), "have no pos_embed"),
        (lambda: plain(dist_token=torch.zeros(1, 1, 64)), r"a distillation token \(dist_token\)"),
        (lambda: theirs("vit_small_patch16_224", qk_norm=True).state_dict(), "normalised queries and keys"),
        (lambda: theirs("vit_small_patch16_224", global_pool="avg").state_dict(), "final norm after pooling"),
        (lambda: clip(attentional_pool=True).state_dict(), "attention pooling before the final norm"),
        (lambda: plain(norm__bias=torch.zeros(64, dtype=torch.int64)), "norm.bias is torch.int64"),
        (lambda: plain(norm__bias=torch.full((64,), float("nan"))), "norm.bias holds numbers that are not finite"),
        (lambda: plain(pos_embed=torch.zeros(1, 15, 64)), "has 15 entries; allowed: a square grid and 0 or 1 besides"),
        (lambda: plain(pos_embed=torch.zeros(17, 64)), r"pos_embed is \(17, 64\)"),
        (lambda: plain(cls_token=torch.zeros(1, 1, 32)), r"cls_token is \(1, 1, 32\)"),
        (lambda: plain(blocks__0__0__norm1__bias=torch.zeros(64)), "hold blocks.0.norm1.bias twice"),
    ],
)
def test_what_cannot_be_expressed_is_said_in_one_line(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        convert(state())
    assert "\n" not in str(caught.value)


def test_a_position_embedding_of_two_readings_needs_the_number_of_patches() -> None:
    state = plain(reg_token=torch.ones(1, 8, 64), pos_embed=torch.arange(25.0)[None, :, None].expand(1, 25, 64))
    with pytest.raises(ValueError, match="25 entries may stand for grids of different sizes"):
        convert(state)  # 5 × 5 patches alone, or 4 × 4 with class and 8 registers
    alone = convert(state, num_patches=25).tensors
    assert alone["pos_embed"][0, :, 0].tolist() == [0.0, *range(25)]
    assert alone["reg_token"][0, :, 0].tolist() == [1.0] * 8
    folded = convert(state, num_patches=16).tensors
    assert folded["pos_embed"][0, :, 0].tolist() == [0.0, *range(9, 25)]
    assert folded["reg_token"][0, :, 0].tolist() == [1.0 + n for n in range(1, 9)]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["dinov2_vit_reg", "dinov2_vit_noreg"])
def test_official_weights_load_strictly_and_give_the_official_outputs(name: str) -> None:
    golden = Golden(name)
    shape = catalog.ModelSize(golden["embed_dim"], golden["depth"], golden["num_heads"])
    config = resolve(
        {
            "model.patch_size": golden["patch_size"],
            "model.image_size": golden["img_size"],
            "model.num_registers": golden["num_register_tokens"],
            "model.norm_eps": golden["ln_eps"],
        }
    ).model
    ours = vit.ViT(config, Streams(0), shape).eval()
    ours.add_mask_token(Streams(0))
    converted: Converted = convert(weights(name))
    assert converted.layout == "dinov2"
    assert load_into(ours, converted).loaded == len(list(ours.parameters()))
    assert {n: t.shape for n, t in ours.named_parameters()} == {n: t.shape for n, t in converted.tensors.items()}
    with torch.no_grad():
        tokens = ours.tokens(golden["native_x"])
        (masked,) = ours.forward_groups([golden["native_x"]], masks=golden["native_masks"])
    close(tokens.cls_BD, golden["native_x_norm_clstoken"], rtol=0, atol=1e-4)
    close(tokens.registers_BRD, golden["native_x_norm_regtokens"], rtol=0, atol=1e-4)
    close(tokens.patches_BND, golden["native_x_norm_patchtokens"], rtol=0, atol=1e-4)
    prenorm = ours.norm(golden["native_masked_x_prenorm"])[:, 0]
    close(masked.cls_BD, prenorm.detach(), rtol=0, atol=1e-4)
