"""OpenCLIP's towers on random weights against open_clip's own model, and where registers enter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from trainers import text, vit
from trainers.catalog import MODEL_SIZES
from trainers.config import TrialConfig, resolve
from trainers.methods import Progress
from trainers.methods.openclip import OpenCLIP
from trainers.streams import Streams

EMBED, CONTEXT, TEXT_WIDTH, TEXT_LAYERS = 24, 20, 32, 2
SHAPES = [("nano", 8, 16), ("nano", 4, 28), ("nano", 14, 42), ("tiny", 16, 48)]  # size, patch and image in px


def config(size: str, patch_size: int, image_size: int, **settings: object) -> TrialConfig:
    structure = {"model.pre_norm": True, "model.norm_eps": 1e-5, "model.layer_scale": None}
    shape = {"model.size": size, "model.patch_size": patch_size, "model.image_size": image_size}
    tower = {
        "openclip.embed_dim": EMBED,
        "openclip.context_length": CONTEXT,
        "openclip.text_width": TEXT_WIDTH,
        "openclip.text_layers": TEXT_LAYERS,
        "openclip.text_heads": 4,
    }
    return resolve({"method": "openclip", "preset": "short", **structure, **shape, **tower, **settings})


def method(trial: TrialConfig) -> OpenCLIP:
    """OpenCLIP with weights so random that nothing is 0 or 1 any more."""
    streams = Streams(0)
    built = OpenCLIP(trial, vit.build(trial.model, streams), 0, streams).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name not in ("logit_scale", "text.token_embedding.weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return built


def official(trial: TrialConfig) -> CLIP:
    """open_clip's model of the same shape, with weights of its own."""
    shape = MODEL_SIZES[trial.model.size]
    vision = CLIPVisionCfg(
        layers=shape.depth,
        width=shape.width,
        head_width=shape.width // shape.heads,
        patch_size=trial.model.patch_size,
        image_size=trial.model.image_size,  # type: ignore[arg-type]
    )
    texts = CLIPTextCfg(context_length=CONTEXT, width=TEXT_WIDTH, layers=TEXT_LAYERS, heads=4)
    with torch.random.fork_rng(devices=[]):
        return CLIP(EMBED, vision, texts, init_logit_scale=0.5).eval()


TIMMS = {  # where open_clip's name has this, timm's has that
    "visual.proj": "image_projection",
    "visual.class_embedding": "backbone.cls_token",
    "visual.positional_embedding": "backbone.pos_embed",
    "visual.conv1": "backbone.patch_embed.proj",
    "visual.ln_pre": "backbone.norm_pre",
    "visual.ln_post": "backbone.norm",
    "visual.transformer.resblocks": "backbone.blocks",
    ".ln_1": ".norm1",
    ".ln_2": ".norm2",
    ".attn.in_proj_": ".attn.qkv.",
    ".attn.out_proj": ".attn.proj",
    ".mlp.c_fc": ".mlp.fc1",
    ".mlp.c_proj": ".mlp.fc2",
}


def ours(name: str) -> str:
    """What a parameter of open_clip's model is called in our method."""
    if not name.startswith("visual."):
        return name if name == "logit_scale" else f"text.{name}"
    for theirs, timms in TIMMS.items():
        name = name.replace(theirs, timms)
    return name


def pair(size: str, patch_size: int, image_size: int) -> tuple[OpenCLIP, CLIP]:
    """Our method without registers and open_clip's model with equal weights, every one of which fits."""
    trial = config(size, patch_size, image_size)
    trained, reference = method(trial), official(trial)
    weights = trained.state_dict()
    assert sorted(weights) == sorted(ours(name) for name in reference.state_dict())
    for name, weight in reference.state_dict().items():
        weight.copy_(weights[ours(name)].reshape(weight.shape))  # class token and positions are [D], [1 + N, D] there
    return trained, reference


def images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("size", "patch_size", "image_size"), SHAPES)
def test_image_features_equal_open_clips(size: str, patch_size: int, image_size: int) -> None:
    trained, reference = pair(size, patch_size, image_size)
    seen = images(3, image_size)
    reference.visual.output_tokens = True
    features, patches = reference.visual(seen)
    tokens = trained.backbone.tokens(seen)  # type: ignore[operator]
    torch.testing.assert_close(tokens.cls_BD @ trained.image_projection, features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.patches_BND, patches, rtol=1e-5, atol=1e-5)
    assert features.std().item() > 0.1


def test_text_features_loss_and_gradients_equal_open_clips() -> None:
    trained, reference = pair("nano", 8, 16)
    written = ["a large 3 over a photograph of a cat", "it's 21 °C", "", "a small 1 " * 12]
    views = {"images": images(4, 16), "text": text.tokens_of(written, CONTEXT)}
    assert views["text"].shape == (4, CONTEXT)
    features = reference.encode_text(views["text"])
    torch.testing.assert_close(text.encode(trained.text, views["text"]), features, rtol=1e-5, atol=1e-5)
    loss = trained.losses(views, Progress(0, 1))["contrastive"]
    image_features = reference.encode_image(views["images"], normalize=True)
    expected = ClipLoss()(image_features, F.normalize(features, dim=-1), reference.logit_scale.exp())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    learned = dict(trained.named_parameters())
    for name, parameter in reference.named_parameters():
        gradient = learned[ours(name)].grad
        assert gradient is not None and parameter.grad is not None, name
        torch.testing.assert_close(gradient.reshape(parameter.shape), parameter.grad, rtol=1e-4, atol=1e-5)


def test_the_tower_has_open_clips_structure() -> None:
    backbone = method(config("nano", 8, 16)).backbone
    assert backbone.patch_embed.proj.bias is None  # type: ignore[union-attr]
    norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 + 2 * 4 and {norm.eps for norm in norms} == {1e-5}


def test_registers_enter_before_ln_pre() -> None:
    backbone = method(config("nano", 8, 16, **{"model.num_registers": 4})).backbone
    seen = images(2, 16)
    patches = backbone.patch_embed(seen).flatten(1, 2) + backbone.pos_embed[:, 1:]  # type: ignore[operator,index]
    cls = (backbone.cls_token + backbone.pos_embed[:, :1]).expand(2, -1, -1)  # type: ignore[operator,index]
    registers = backbone.reg_token.expand(2, -1, -1)  # type: ignore[operator,union-attr]
    expected = backbone.norm_pre(torch.cat([cls, registers, patches], dim=1))  # type: ignore[operator]
    first = next(iter(backbone.residuals(seen)))  # type: ignore[operator]
    entered = torch.cat([first.cls_BD[:, None], first.registers_BRD, first.patches_BND], dim=1)
    torch.testing.assert_close(entered, expected, rtol=1e-6, atol=1e-6)
    assert float(first.registers_BRD.detach().std()) > 0.5  # normalised, where they had 0.1
