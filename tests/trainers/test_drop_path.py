"""Stochastic depth: its rates and subsets, equal draws for any ranks and registers, and what a block then computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainers import distributed, vit
from trainers.config import resolve
from trainers.drop_path import draw_factors, draw_subsets
from trainers.streams import Streams


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def backbone(registers: int = 2, **settings: object) -> vit.ViT:
    given = {"size": "nano", "patch_size": 8, "image_size": 16, "num_registers": registers, "layer_scale": None}
    return vit.ViT(resolve({"preset": "short", "model": {**given, **settings}}).model, Streams(1)).train()


def images(count: int, side: int = 16) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: size)


def test_factors_have_their_rate_and_mean_one() -> None:
    factors = draw_factors(0.3, 4, 5000, 1, generator())
    assert factors.shape == (4, 2, 5000)
    torch.testing.assert_close(factors.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (factors == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "group", "kept"),
    [(0.4, 32, 19), (0.4, 4, 2), (0.9, 8, 1), (0.99, 4, 1), (0.1, 10, 9)],  # max(int(group · (1 - rate)), 1)
)
def test_every_group_keeps_the_official_number_of_images(rate: float, group: int, kept: int) -> None:
    rows, scale = draw_subsets(rate, group, 3, group * 6, 2, generator())
    assert scale == group / kept
    assert rows.shape == (3, 2, 6 * kept)
    assert (rows.diff(dim=-1) > 0).all()
    groups = (rows // group).view(3, 2, 6, kept)
    assert torch.equal(groups, torch.arange(6)[:, None].expand(3, 2, 6, kept))


def test_every_image_is_kept_equally_often() -> None:
    rows, _ = draw_subsets(0.5, 8, 500, 32, 1, generator())
    frequency = torch.bincount(rows.flatten(), minlength=32) / 1000
    assert (frequency - 0.5).abs().max() < 5 * (0.25 / 1000) ** 0.5


def test_a_group_of_images_must_divide_what_a_rank_has_of_a_crop() -> None:
    with pytest.raises(ValueError, match="drop_path_group is 8, which does not divide the 4 images of a crop"):
        draw_subsets(0.4, 8, 3, 16, 4, generator())
    with pytest.raises(ValueError, match="drop_path_group is 4, which does not divide the 3 images"):
        backbone(drop_path=0.4, drop_path_group=4).tokens(images(3))


@pytest.mark.parametrize("crops", [1, 2])
def test_ranks_share_the_draws_of_one(crops: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, own = 2, 8  # images of one crop on a rank
    alone = draw_factors(0.5, 3, ranks * own * crops, crops, generator())
    rows_alone, _ = draw_subsets(0.5, 4, 3, ranks * own * crops, crops, generator())
    is_kept = torch.zeros(3, 2, crops, ranks, own, dtype=torch.bool)
    is_kept.view(3, 2, -1).scatter_(2, rows_alone, True)
    for rank in range(ranks):
        as_rank(monkeypatch, rank, ranks)
        factors = draw_factors(0.5, 3, own * crops, crops, generator())
        assert torch.equal(factors, alone.view(3, 2, crops, ranks, own)[:, :, :, rank].flatten(2))
        rows, _ = draw_subsets(0.5, 4, 3, own * crops, crops, generator())
        kept_here = torch.zeros(3, 2, own * crops, dtype=torch.bool).scatter_(2, rows, True)
        assert torch.equal(kept_here, is_kept[:, :, :, rank].flatten(2))


@pytest.mark.parametrize("group", [None, 4])
def test_two_ranks_compute_what_one_does(group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = images(16)  # two crops of eight images
    alone = backbone(drop_path=0.5, drop_path_group=group).tokens(given, crops=2).patches_BND
    by_rank = given.view(2, 2, 4, 3, 16, 16)
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        ours = backbone(drop_path=0.5, drop_path_group=group)
        tokens = ours.tokens(by_rank[:, rank].flatten(0, 1), crops=2).patches_BND
        torch.testing.assert_close(tokens, alone.view(2, 2, 4, 4, 64)[:, rank].flatten(0, 1))


@pytest.mark.parametrize("group", [None, 4])
def test_registers_change_no_draw(group: int | None) -> None:
    kept = []
    for registers in (0, 4):
        ours = backbone(registers, drop_path=0.5, drop_path_group=group, register_mask="detached")
        kept.append([ours.tokens(images(8)).patches_BND for _ in range(3)])
    for plain, detached in zip(*kept, strict=True):
        torch.testing.assert_close(plain, detached, rtol=1e-5, atol=1e-5)
    assert not torch.equal(kept[0][0], kept[0][1])


def reference(ours: vit.ViT, x_BTD: Tensor, factors_L2B: Tensor) -> Tensor:
    """The blocks written out, each branch of each image times its factor."""
    for block, (of_attention, of_mlp) in zip(ours.blocks, factors_L2B, strict=True):
        layer = block.attn
        query, key, value = layer.split_heads(layer.qkv(block.norm1(x_BTD)), *x_BTD.shape[:2])
        mixed = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, -1) @ value
        x_BTD = x_BTD + of_attention[:, None, None] * layer.proj(mixed.transpose(1, 2).flatten(2))
        x_BTD = x_BTD + of_mlp[:, None, None] * block.mlp(block.norm2(x_BTD))
    return x_BTD


def drawn_factors(settings: dict[str, Any], counts: tuple[int, ...]) -> list[Tensor]:
    """Factors [L, 2, B] of each group by the functions that draw them, group after group from the model's stream."""
    stream = Streams(1).torch("drop_path")
    rate, group = settings["drop_path"], settings["drop_path_group"]
    if group is None:
        return [draw_factors(rate, 4, count, 1, stream) for count in counts]
    drawn = [draw_subsets(rate, group, 4, count, 1, stream) for count in counts]
    zeros = [torch.zeros(4, 2, count) for count in counts]
    return [empty.scatter(2, rows, scale) for empty, (rows, scale) in zip(zeros, drawn, strict=True)]


@pytest.mark.parametrize("group", [None, 4])
def test_blocks_add_what_the_draws_say(group: int | None) -> None:
    settings: dict[str, Any] = {"drop_path": 0.6, "drop_path_group": group}
    ours = backbone(**settings)
    given = [images(8), images(12, side=24)]
    tokens = ours.forward_groups(given)
    for of_group, group_images, factors in zip(tokens, given, drawn_factors(settings, (8, 12)), strict=True):
        expected = ours.norm(reference(ours, ours._embed(group_images), factors))
        torch.testing.assert_close(of_group.patches_BND, expected[:, 3:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(of_group.cls_BD, expected[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [None, 4])
def test_gradients_are_those_of_the_written_out_blocks(group: int | None) -> None:
    settings: dict[str, Any] = {"drop_path": 0.6, "drop_path_group": group}
    ours = backbone(**settings)
    ours.tokens(images(8), normed=False).patches_BND.sin().sum().backward()
    gradients = {name: value.grad.clone() for name, value in ours.named_parameters() if value.grad is not None}
    ours.zero_grad()
    (factors,) = drawn_factors(settings, (8,))
    reference(ours, ours._embed(images(8)), factors)[:, 3:].sin().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, ours.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


def test_only_the_kept_images_are_computed() -> None:
    ours = backbone(drop_path=0.5, drop_path_group=4)
    seen: list[int] = []
    ours.blocks[1].mlp.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    ours.tokens(images(12))
    assert seen == [6]


def test_evaluation_draws_nothing() -> None:
    ours = backbone(drop_path=0.5, drop_path_group=4).eval()
    before = ours.drop_path_generator.get_state()
    assert torch.equal(ours.tokens(images(3)).patches_BND, backbone().eval().tokens(images(3)).patches_BND)
    assert torch.equal(ours.drop_path_generator.get_state(), before)
