"""Sinks and register masks against their closed forms, and what they leave alone."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainers import vit
from trainers.attention import SINKS, Attention, RegisterMask, attention_mask
from trainers.config import resolve
from trainers.streams import Streams

CPU = torch.device("cpu")
MASKS = ("full", "patches_cannot_read", "registers_cannot_write", "detached")


def backbone(registers: int = 3, seed: int = 0, **settings: object) -> vit.ViT:
    """A small model whose branches, registers and biases are large enough to see what they do."""
    given = {"size": "nano", "patch_size": 8, "image_size": 32, "num_registers": registers, "layer_scale": None}
    model = resolve({"preset": "short", "model": {**given, "reg_init_std": 0.5, **settings}}).model
    ours = vit.ViT(model, Streams(seed)).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for block in ours.blocks:
            block.attn.qkv.weight.mul_(4)
            for name, bias in block.attn.named_parameters():
                if name in ("bias_k", "bias_v", "value_bias"):
                    bias.copy_(torch.randn(bias.shape, generator=generator))
    return ours


def images(count: int = 2, seed: int = 7) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def attention_of(ours: vit.ViT, layer: int) -> Attention:
    return cast(Attention, ours.blocks[layer - 1].attn)


def joined(tokens: vit.Tokens) -> Tensor:
    assert tokens.cls_BD is not None
    return torch.cat([tokens.cls_BD[:, None], tokens.registers_BRD, tokens.patches_BND], dim=1)


def test_softmax1_is_e_to_the_x_over_one_plus_their_sum() -> None:
    ours = backbone(sink="softmax1")
    query, key, _ = ours.qkv(images(), 2)
    exponentials = (query @ key.mT / 32**0.5).exp()
    expected = exponentials / (1 + exponentials.sum(-1, keepdim=True))
    torch.testing.assert_close(ours.attention(images(), 2), expected)
    assert (ours.attention(images(), 2).sum(-1) < 1).all()


def test_attention_bias_of_zeros_is_softmax1() -> None:
    biased, softmax1 = backbone(sink="attention_bias"), backbone(sink="softmax1")
    with torch.no_grad():
        for block in biased.blocks:
            block.attn.bias_k.zero_()
            block.attn.bias_v.zero_()
    torch.testing.assert_close(biased.tokens(images()).patches_BND, softmax1.tokens(images()).patches_BND)
    torch.testing.assert_close(biased.attention(images(), 4), softmax1.attention(images(), 4))


def test_attention_bias_is_a_learned_key_and_value_in_the_softmax() -> None:
    ours = backbone(sink="attention_bias")
    attention = attention_of(ours, 3)
    query, key, value = ours.qkv(images(), 3)
    logits = query @ key.mT / 32**0.5
    to_sink = torch.einsum("bhtc,hoc->bhto", query, attention.bias_k) / 32**0.5
    shares = torch.softmax(torch.cat([to_sink, logits], -1), -1)
    torch.testing.assert_close(ours.attention(images(), 3), shares[..., 1:])
    mixed = shares[..., 1:] @ value + shares[..., :1] * attention.bias_v
    before, after = (joined(tokens) for tokens in list(ours.residuals(images()))[2:4])
    middle = before + attention.proj(mixed.transpose(1, 2).flatten(2))
    block = ours.blocks[2]
    torch.testing.assert_close(middle + block.mlp(block.norm2(middle)), after, rtol=1e-5, atol=1e-5)


def test_value_gate_adds_a_vector_before_the_projection() -> None:
    ours = backbone(sink="value_gate")
    attention = attention_of(ours, 2)
    assert attention.value_bias.shape == (64,)
    _, _, value = ours.qkv(images(), 2)
    weights = ours.attention(images(), 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    mixed = (weights @ value).transpose(1, 2).flatten(2) + attention.value_bias
    before, after = (joined(tokens) for tokens in list(ours.residuals(images()))[1:3])
    middle = before + attention.proj(mixed)
    block = ours.blocks[1]
    torch.testing.assert_close(middle + block.mlp(block.norm2(middle)), after, rtol=1e-5, atol=1e-5)


def test_value_gate_has_no_effect_at_initialisation() -> None:
    streams = Streams(0), Streams(0)
    models = [resolve({"model": {"size": "nano", "patch_size": 8, "image_size": 32, "sink": sink}}).model for sink in
              ("none", "value_gate")]  # fmt: skip
    plain, gated = (vit.ViT(model, own).eval() for model, own in zip(models, streams, strict=True))
    assert torch.equal(plain.tokens(images()).patches_BND, gated.tokens(images()).patches_BND)


def test_learned_sinks_start_as_at_their_source() -> None:
    model = resolve({"model": {"size": "small", "patch_size": 16, "image_size": 32, "sink": "attention_bias"}}).model
    ours = vit.ViT(model, Streams(0))
    for name in ("bias_k", "bias_v"):
        values = torch.stack([getattr(block.attn, name).detach() for block in ours.blocks])
        assert values.shape == (12, 6, 1, 64)
        assert values.std().item() == pytest.approx(0.02, rel=0.05)
        assert torch.pdist(values.flatten(0, 2)).min() > 0.1  # each block and head has its own


@pytest.mark.parametrize("sink", SINKS)
def test_sinks_and_masks_leave_the_start_of_all_other_weights_alone(sink: str) -> None:
    start: dict[str, object] = {"size": "nano", "patch_size": 8, "image_size": 32, "num_registers": 2}
    plain = vit.ViT(resolve({"model": start}).model, Streams(5)).state_dict()
    other = resolve({"model": {**start, "sink": sink, "register_mask": "detached"}}).model
    state = vit.ViT(other, Streams(5)).state_dict()
    assert all(torch.equal(state[name], weights) for name, weights in plain.items())


def test_masks_by_hand() -> None:
    # Class, two registers, three patches; a row reads the columns that have a 1.
    expected = {
        "patches_cannot_read": ["111111", "111111", "111111", "100111", "100111", "100111"],
        "registers_cannot_write": ["111111", "011000", "011000", "111111", "111111", "111111"],
        "detached": ["100111", "011000", "011000", "100111", "100111", "100111"],
    }
    for kind, rows in expected.items():
        mask = attention_mask(cast(RegisterMask, kind), 2, 6, False, CPU)
        assert mask is not None
        may = torch.tensor([[cell == "1" for cell in row] for row in rows])
        assert torch.equal(mask, torch.where(may, 0.0, -torch.inf)), kind
        with_sink = attention_mask(cast(RegisterMask, kind), 2, 6, True, CPU)
        assert with_sink is not None
        assert torch.equal(with_sink, functional.pad(mask, (0, 1)))
    assert attention_mask("full", 2, 6, True, CPU) is None
    assert attention_mask("detached", 0, 6, False, CPU) is None
    assert attention_mask(None, 0, 6, False, CPU) is None


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("mask", MASKS)
def test_explicit_attention_explains_what_a_block_does(sink: str, mask: str) -> None:
    ours = backbone(sink=sink, register_mask=mask)
    attention = attention_of(ours, 1)
    query, key, value = ours.qkv(images(), 1)
    weights = ours.attention(images(), 1)
    allowed = attention_mask(cast(RegisterMask, mask), 3, 20, False, CPU)
    assert allowed is None or not weights[..., allowed == -torch.inf].any()
    shares = 1 - weights.sum(-1, keepdim=True)
    assert (shares > 1e-4).all() if attention.has_sink else (shares.abs() < 1e-6).all()
    mixed = weights @ value
    if sink == "attention_bias":
        mixed = mixed + shares * attention.bias_v
    through_sdpa = attention._mix(query, key, value, ours._mask(20, CPU))
    torch.testing.assert_close(mixed.transpose(1, 2).flatten(2), through_sdpa, rtol=1e-5, atol=1e-5)


def test_patches_cannot_read_registers_but_the_class_token_can() -> None:
    # One block: later ones carry what the class token has read to the patches.
    first, second = (backbone(register_mask="patches_cannot_read", seed=0) for _ in range(2))
    with torch.no_grad():
        second.reg_token.neg_()
    (_, one), (_, other) = (model.intermediate(images(), [0, 1], normed=False) for model in (first, second))
    assert torch.equal(one.patches_BND, other.patches_BND)
    assert (one.cls_BD - other.cls_BD).abs().max() > 1e-2  # type: ignore[operator]
    assert (one.registers_BRD[0] - one.registers_BRD[1]).abs().max() > 1e-2  # they read both images


@pytest.mark.parametrize("sink", SINKS)
def test_registers_that_cannot_be_written_to_are_the_same_for_every_image(sink: str) -> None:
    ours = backbone(register_mask="registers_cannot_write", sink=sink)
    for tokens in ours.residuals(images()):
        torch.testing.assert_close(tokens.registers_BRD[0], tokens.registers_BRD[1])
    before = ours.tokens(images()).patches_BND
    with torch.no_grad():
        ours.reg_token.neg_()
    assert (before - ours.tokens(images()).patches_BND).abs().max() > 1e-2  # yet patches read them


@pytest.mark.parametrize("sink", SINKS)
def test_detached_registers_are_as_good_as_none(sink: str) -> None:
    detached, without = backbone(3, register_mask="detached", sink=sink), backbone(0, sink=sink)
    given, expected = detached.tokens(images()), without.tokens(images())
    torch.testing.assert_close(given.cls_BD, expected.cls_BD, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.patches_BND, expected.patches_BND, rtol=1e-5, atol=1e-5)
    full = backbone(3, sink=sink).tokens(images())
    assert (full.patches_BND - expected.patches_BND).abs().max() > 1e-2


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_order_of_registers_means_nothing(sink: str, mask: str) -> None:
    ours = backbone(4, sink=sink, register_mask=mask)
    before = ours.tokens(images())
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        ours.reg_token.copy_(ours.reg_token[:, order])
    after = ours.tokens(images())
    torch.testing.assert_close(after.registers_BRD, before.registers_BRD[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.patches_BND, before.patches_BND, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.cls_BD, before.cls_BD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("mask", MASKS)
def test_everything_learns_also_in_bf16(sink: str, mask: str) -> None:
    ours = backbone(sink=sink, register_mask=mask).train()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = ours.tokens(images())
    assert torch.isfinite(joined(tokens)).all()
    joined(tokens).square().sin().sum().backward()
    assert [name for name, value in ours.named_parameters() if value.grad is None or not value.grad.any()] == []
