"""The ViT against timm's, its attention against SDPA, and what models share that differ only in registers."""

import copy
from functools import partial

import pytest
import torch
from timm.layers.norm import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

from trainers import catalog, vit
from trainers.config import ModelConfig, resolve
from trainers.streams import Streams


def model(registers: int = 0, **settings: object) -> ModelConfig:
    given = {"size": "nano", "patch_size": 8, "image_size": 32, "num_registers": registers, **settings}
    return resolve({"preset": "short", "model": given}).model


def images(count: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(7))


def timm_twin(ours: vit.ViT, config: ModelConfig, **settings: object) -> VisionTransformer:
    shape = catalog.MODEL_SIZES[config.size]
    twin = VisionTransformer(
        img_size=32,
        patch_size=8,
        num_classes=0,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        init_values=config.layer_scale,
        dynamic_img_size=True,
        **settings,
    )
    twin.load_state_dict(ours.state_dict(), strict=True)
    return twin.eval()


@pytest.mark.parametrize("layer_scale", [1e-4, None])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 24)])
def test_without_registers_it_is_timms_plain_vit(layer_scale: float | None, height: int, width: int) -> None:
    config = model(layer_scale=layer_scale)
    ours = vit.ViT(config, Streams(0)).eval()
    twin = timm_twin(ours, config)
    x = images(height=height, width=width)
    expected = twin.forward_features(x)
    assert torch.equal(ours.forward_features(x), expected)
    assert torch.equal(ours.tokens(x).cls_BD, expected[:, 0])
    assert torch.equal(ours.tokens(x).patches_BND, expected[:, 1:])


def test_pre_norm_is_timms_with_registers_normed_too() -> None:
    config = model(pre_norm=True, norm_eps=1e-5)
    ours = vit.ViT(config, Streams(0)).eval()
    twin = timm_twin(ours, config, pre_norm=True, norm_layer=partial(LayerNorm, eps=1e-5))
    assert ours.patch_embed.proj.bias is None
    assert torch.equal(ours.forward_features(images()), twin.forward_features(images()))
    with_registers = vit.ViT(model(2, pre_norm=True, reg_init_std=1.0), Streams(0)).eval()
    first = next(with_registers.residuals(images()))
    raw = with_registers.reg_token[0]
    expected = (raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True, correction=0)
    assert torch.allclose(first.registers_BRD[1], expected, atol=1e-5)


def test_all_norms_have_the_epsilon_asked_for() -> None:
    norms = [m for m in vit.ViT(model(pre_norm=True, norm_eps=3e-5), Streams(0)).modules() if isinstance(m, LayerNorm)]
    assert len(norms) == 1 + 2 * 4 + 1
    assert {norm.eps for norm in norms} == {3e-5}


def test_quick_gelu_is_a_sigmoid_of_1_702_x() -> None:
    mlp = vit.ViT(model(mlp="quick_gelu"), Streams(0)).blocks[1].mlp
    x = torch.randn(3, 5, 64)
    hidden = mlp.fc1(x)
    assert torch.allclose(mlp(x), mlp.fc2(hidden * torch.sigmoid(1.702 * hidden)), atol=1e-6)


def test_swiglu_gates_with_the_first_half_as_in_dinov2() -> None:
    mlp = vit.ViT(model(mlp="swiglu"), Streams(0)).blocks[1].mlp
    hidden = 176  # 4 · 64 · 2 / 3 = 170.7, rounded up to a multiple of 8
    assert mlp.fc1.weight.shape == (2 * hidden, 64)
    assert mlp.fc2.weight.shape == (64, hidden)
    x = torch.randn(3, 5, 64)
    gate, value = mlp.fc1(x)[..., :hidden], mlp.fc1(x)[..., hidden:]
    assert torch.allclose(mlp(x), mlp.fc2(functional.silu(gate) * value), atol=1e-6)


@pytest.mark.parametrize("width", [384, 768, 1024, 1536])
def test_swiglu_has_the_official_width(width: int) -> None:
    with torch.device("meta"):
        mlp = vit._mlp("swiglu", width, 4.0)
        fc1 = mlp["mlp_layer"](width, int(width * mlp["mlp_ratio"])).fc1
    assert fc1.out_features == 2 * ((int(width * 4 * 2 / 3) + 7) // 8 * 8)


def test_a_shape_of_its_own() -> None:
    ours = vit.ViT(model(2), Streams(0), catalog.ModelSize(width=48, depth=3, heads=4), mlp_ratio=2.0).eval()
    assert ours.tokens(images()).registers_BRD.shape == (3, 2, 48)
    assert ours.attention(images(), 3).shape == (3, 4, 19, 19)
    assert ours.blocks[2].mlp.fc1.out_features == 96


def test_the_class_token_starts_as_small_as_asked() -> None:
    small, usual = (vit.ViT(model(cls_init_std=std), Streams(0)) for std in (1e-6, 0.02))
    assert torch.allclose(small.cls_token * 2e4, usual.cls_token, rtol=1e-5)
    assert 0.01 < float(usual.cls_token.detach().std()) < 0.03


def test_registers_stand_between_class_and_patches_without_position_embedding() -> None:
    ours = vit.ViT(model(4, reg_init_std=0.5), Streams(0)).eval()
    first = next(ours.residuals(images()))
    assert first.registers_BRD.shape == (3, 4, 64)
    assert torch.equal(first.registers_BRD[1], ours.reg_token[0])
    assert first.patches_BND.shape == (3, 16, 64)


@pytest.mark.parametrize("registers", [0, 4, 16])
def test_residuals_end_where_tokens_begin_and_norm_gives_tokens(registers: int) -> None:
    ours = vit.ViT(model(registers), Streams(0)).eval()
    layers = list(ours.residuals(images()))
    assert len(layers) == 1 + 4
    raw, normed = ours.tokens(images(), normed=False), ours.tokens(images())
    for last, unnormed, final in zip(layers[-1], raw, normed, strict=True):
        assert torch.equal(last, unnormed)
        assert torch.equal(ours.norm(last), final)


@pytest.mark.parametrize("layer", [1, 4])
def test_explicit_attention_equals_the_sdpa_path(layer: int) -> None:
    ours = vit.ViT(model(3, layer_scale=None), Streams(0)).eval()
    query, key, value = ours.qkv(images(), layer)
    explicit = ours.attention(images(), layer)
    assert explicit.shape == (3, 2, 20, 20)
    assert torch.allclose(explicit.sum(-1), torch.ones(3, 2, 20), atol=1e-6)
    expected = functional.scaled_dot_product_attention(query, key, value)
    assert (explicit @ value - expected).abs().max() < 1e-5


def test_attention_of_a_layer_explains_that_blocks_output() -> None:
    ours = vit.ViT(model(2, layer_scale=None), Streams(0)).eval()
    before, after = (torch.cat([t.cls_BD[:, None], *t[1:]], 1) for t in list(ours.residuals(images()))[2:4])
    value = ours.qkv(images(), 3)[2]
    block = ours.blocks[2]
    mixed = (ours.attention(images(), 3) @ value).transpose(1, 2).flatten(2)
    middle = before + block.attn.proj(mixed)
    assert torch.allclose(middle + block.mlp(block.norm2(middle)), after, atol=1e-5)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    ours = vit.ViT(model(), Streams(0))
    with pytest.raises(ValueError, match="allowed: 1 to 4"):
        ours.attention(images(), 5)
    with pytest.raises(ValueError, match="layer is 0"):
        ours.qkv(images(), 0)


def test_models_that_differ_only_in_registers_start_with_equal_shared_weights() -> None:
    plain, four, sixteen = (vit.ViT(model(n), Streams(5)).state_dict() for n in (0, 4, 16))
    for name, weights in plain.items():
        assert torch.equal(weights, four[name]), name
        assert torch.equal(weights, sixteen[name]), name
    assert set(four) - set(plain) == {"reg_token"}
    assert not torch.equal(plain["blocks.0.attn.qkv.weight"], vit.ViT(model(), Streams(6)).blocks[0].attn.qkv.weight)


def test_registers_start_different_from_each_other() -> None:
    registers = vit.ViT(model(16), Streams(0)).reg_token.detach()[0]
    assert abs(registers.std().item() - 0.02) < 0.002
    assert torch.pdist(registers).min() > 0.1


def test_initialisation_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    vit.ViT(model(), Streams(0))
    assert torch.equal(torch.rand(1), expected)


def test_drop_path_acts_in_training_only_and_a_dropped_block_is_the_identity() -> None:
    ours = vit.ViT(model(drop_path=0.999999), Streams(0)).train()
    layers = list(ours.residuals(images()))
    assert torch.equal(layers[0].patches_BND, layers[-1].patches_BND)
    with torch.no_grad():
        assert not torch.equal(ours.eval().tokens(images()).cls_BD, ours.norm(layers[0].cls_BD))


def test_intermediate_layers_are_those_of_the_residual_stream() -> None:
    ours = vit.ViT(model(2), Streams(0)).eval()
    layers = list(ours.residuals(images()))
    raw, normed = (ours.intermediate(images(), [4, 0], normed=normed) for normed in (False, True))
    for of_layer, layer in zip(raw, (4, 0), strict=True):
        assert torch.equal(of_layer.patches_BND, layers[layer].patches_BND)
    assert torch.equal(normed[1].registers_BRD, ours.norm(layers[0].registers_BRD))


def test_a_copy_is_equal_and_apart() -> None:
    ours = vit.ViT(model(2, drop_path=0.2), Streams(0)).eval()
    ours.add_mask_token(Streams(0))
    twin = copy.deepcopy(ours)
    assert torch.equal(twin.tokens(images()).cls_BD, ours.tokens(images()).cls_BD)
    with torch.no_grad():
        twin.cls_token.add_(1.0)
    assert not torch.equal(twin.tokens(images()).cls_BD, ours.tokens(images()).cls_BD)


def test_token_norms_are_those_of_the_residual_stream() -> None:
    ours = vit.ViT(model(2), Streams(0)).eval()
    norms, class_token = vit.token_norms(ours, images())
    assert class_token
    assert norms.shape == (5, 3, 1 + 2 + 16)
    third = list(ours.residuals(images()))[3]
    assert torch.allclose(norms[3, 1, 1], third.registers_BRD[1, 0].norm())
    assert torch.allclose(norms[3, 2, -1], third.patches_BND[2, -1].norm())


def own_backbone(model: ModelConfig, streams: Streams) -> torch.nn.Module:
    return torch.nn.Linear(1, 1)


def test_a_users_own_backbone_is_checked() -> None:
    with pytest.raises(ValueError, match="gave no torch module with embed_dim"):
        vit.build(model(factory=f"{__name__}:own_backbone"), Streams(0))
    with pytest.raises(ValueError, match="cannot be loaded"):
        vit.build(model(factory="no.such.module:build"), Streams(0))
