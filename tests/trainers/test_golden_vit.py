"""The ViT and its position embedding against the official DINOv2: all outputs and layers, at three input shapes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.golden_files import Golden, weights
from trainers.catalog import ModelSize
from trainers.config import ModelConfig
from trainers.position import interpolate_position
from trainers.streams import Streams
from trainers.vit import Tokens, ViT
from trainers.weight_layouts import convert

pytestmark = pytest.mark.golden

MODELS = ("dinov2_vit_reg", "dinov2_vit_noreg")
INPUTS = ("native", "interp", "rect")
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def settings(golden: Golden) -> ModelConfig:
    return ModelConfig(
        patch_size=golden["patch_size"],
        image_size=golden["img_size"],
        num_registers=golden["num_register_tokens"],
        reg_init_std=1e-6,
        layer_scale=1.0,
        norm_eps=golden["ln_eps"],
        pos_antialias=bool(golden["interpolate_antialias"]),
        pos_offset=golden["interpolate_offset"],
    )


def official(name: str) -> tuple[Golden, ViT]:
    """The file of vectors, and our ViT with the official weights in it."""
    golden = Golden(name)
    shape = ModelSize(golden["embed_dim"], golden["depth"], golden["num_heads"])
    vit = ViT(settings(golden), Streams(0), shape, mlp_ratio=golden["mlp_ratio"])
    vit.add_mask_token(Streams(0))
    vit.load_state_dict(convert(weights(name)).tensors, strict=True)
    return golden, vit.eval()


def joined(tokens: Tokens) -> Tensor:
    assert tokens.cls_BD is not None
    return torch.cat([tokens.cls_BD[:, None], tokens.registers_BRD, tokens.patches_BND], dim=1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", INPUTS)
@torch.no_grad()
def test_outputs(name: str, shape: str) -> None:
    golden, vit = official(name)
    images = golden[f"{shape}_x"]
    close(joined(vit.tokens(images, normed=False)), golden[f"{shape}_x_prenorm"])
    normed = vit.tokens(images)
    assert normed.cls_BD is not None
    close(normed.cls_BD, golden[f"{shape}_x_norm_clstoken"])
    close(normed.registers_BRD, golden[f"{shape}_x_norm_regtokens"])
    close(normed.patches_BND, golden[f"{shape}_x_norm_patchtokens"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", INPUTS)
@torch.no_grad()
def test_embedding_and_norms_of_every_layer(name: str, shape: str) -> None:
    golden, vit = official(name)
    layers = [joined(tokens) for tokens in vit.residuals(golden[f"{shape}_x"])]
    close(layers[0], golden[f"{shape}_tokens_after_embed"])
    close(torch.stack([x_BTD.norm(dim=-1) for x_BTD in layers]), golden[f"{shape}_layer_norms"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", ["native", "rect"])
@torch.no_grad()
def test_queries_keys_and_values_of_the_last_block(name: str, shape: str) -> None:
    golden, vit = official(name)
    qkv = torch.stack(vit.qkv(golden[f"{shape}_x"], vit.depth))  # [3, B, H, T, C]
    close(qkv.permute(1, 3, 0, 2, 4).flatten(2), golden[f"{shape}_last_qkv"])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_masked_patches(name: str) -> None:
    golden, vit = official(name)
    seen: dict[int, Tensor] = {}
    vit.tap = seen.__setitem__
    (tokens,) = vit.forward_groups([golden["native_x"]], golden["native_masks"])
    close(seen[vit.depth], golden["native_masked_x_prenorm"])
    close(joined(tokens), vit.norm(golden["native_masked_x_prenorm"]))
    assert (golden["native_masked_x_prenorm"] - golden["native_x_prenorm"]).abs().max() > 0.1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normed", [False, True])
@torch.no_grad()
def test_features_of_first_and_last_block(name: str, normed: bool) -> None:
    golden, vit = official(name)
    tokens = vit.intermediate(golden["rect_x"], [1, vit.depth], normed=normed)
    expected = golden[f"rect_inter_patches_norm{int(normed)}"]
    close(torch.stack([of_layer.patches_BND.mT for of_layer in tokens]), expected.flatten(3))
    classes = [of_layer.cls_BD for of_layer in tokens if of_layer.cls_BD is not None]
    close(torch.stack(classes), golden[f"rect_inter_cls_norm{int(normed)}"])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_groups_of_all_shapes_in_one_pass(name: str) -> None:
    golden, vit = official(name)
    groups = vit.forward_groups([golden[f"{shape}_x"] for shape in INPUTS])
    for shape, tokens in zip(INPUTS, groups, strict=True):
        close(joined(tokens), vit.norm(golden[f"{shape}_x_prenorm"]))


def variants() -> list[str]:
    return [key for key in Golden("posembed_interp").keys() if "out_" in key]  # noqa: SIM118 - not a mapping


@pytest.mark.parametrize("key", variants())
def test_position_embedding(key: str) -> None:
    golden = Golden("posembed_interp")
    found = re.fullmatch(r"(big_)?out_aa(\d)_off(\d)(\d)_(\d+)x(\d+)", key)
    assert found is not None
    prefix, antialias, whole, tenths, height, width = found.groups()
    offset = int(whole) + int(tenths) / 10
    pos_embed = golden[f"{prefix or ''}pos_embed"]
    resampled = interpolate_position(pos_embed, int(height), int(width), antialias=antialias == "1", offset=offset)
    torch.testing.assert_close(resampled, golden[key], rtol=0.0, atol=1e-5)


def test_position_embedding_of_its_own_grid_is_itself() -> None:
    golden = Golden("posembed_interp")
    for offset in (0.0, 0.1):
        side = golden["grid"]
        same = interpolate_position(golden["pos_embed"], side, side, antialias=True, offset=offset)
        assert same is golden["pos_embed"] or torch.equal(same, golden["pos_embed"])


def test_variants_of_the_position_embedding_differ() -> None:
    # The default of the official code without registers is no antialiasing and an offset of 0.1.
    pos_embed = Golden("posembed_interp")["pos_embed"]
    first, second = (
        interpolate_position(pos_embed, 7, 7, antialias=antialias, offset=offset)
        for antialias, offset in ((True, 0.0), (False, 0.1))
    )
    assert (first - second).abs().max() > 0.01
