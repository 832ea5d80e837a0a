"""Attention statistics on tensors worked out by hand, against q and k, and on whole backbones."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainers.attended import PREFIX, backbone, ended, given, images, pixels, rows
from tests.trainers.planted import metrics, numbered, subject
from trainers import vit
from trainers.attention import SINKS
from trainers.measurement import Arrays, Picture
from trainers.probes.fitted import FittedProbes, _Views
from trainers.tokens import attention
from trainers.tokens.attention import divergence, group_keys

MASKS = ("full", "patches_cannot_read", "registers_cannot_write", "detached")


def of(weights_BHTT: Tensor, outliers: list[list[int]], padded=None, prefix=PREFIX, has_sink: bool = False):
    """Statistics [B, H] by name and kind; `outliers` and `padded` are 0 or 1 for every patch."""
    gone = None if padded is None else np.array(padded, bool)
    return attention.statistics(weights_BHTT, group_keys(np.array(outliers, bool), gone, prefix), has_sink=has_sink)


def test_uniform_attention() -> None:
    found = of(torch.full((2, 3, 7, 7), 1 / 7), [[1, 0, 0, 0], [0, 0, 1, 1]])
    for query in ("cls", "patch"):
        torch.testing.assert_close(found[f"{query}/outliers", None], torch.tensor([[1 / 7] * 3, [2 / 7] * 3]))
        torch.testing.assert_close(found[f"{query}/normal", None], torch.tensor([[3 / 7] * 3, [2 / 7] * 3]))
        torch.testing.assert_close(found[f"{query}/registers", None], torch.full((2, 3), 2 / 7))
        torch.testing.assert_close(found[f"{query}/registers", "register_1"], torch.full((2, 3), 1 / 7))
    torch.testing.assert_close(found["cls/entropy", None], torch.ones(2, 3))
    torch.testing.assert_close(found["sink_score", None], torch.full((2, 3), 1 / 7))


# Rows and columns: class, two registers, three patches.
BY_HAND = torch.tensor([
    [0.10, 0.20, 0.30, 0.15, 0.20, 0.05],
    [0.50, 0.10, 0.10, 0.10, 0.10, 0.10],
    [0.00, 0.00, 1.00, 0.00, 0.00, 0.00],
    [0.25, 0.05, 0.10, 0.40, 0.20, 0.00],
    [0.05, 0.15, 0.30, 0.00, 0.40, 0.10],
    [0.10, 0.10, 0.00, 0.30, 0.20, 0.30],
])[None, None]  # fmt: skip

EXPECTED = {
    ("cls/self", None): 0.10,
    ("cls/registers", None): 0.50,
    ("cls/registers", "register_0"): 0.20,
    ("cls/registers", "register_1"): 0.30,
    ("cls/outliers", None): 0.20,
    ("cls/normal", None): 0.20,
    ("cls/padding", None): 0.0,
    ("cls/entropy", None): -sum(a * math.log(a) for a in (0.1, 0.2, 0.3, 0.15, 0.2, 0.05)) / math.log(6),
    ("patch/cls", None): 0.4 / 3,
    ("patch/registers", None): 0.7 / 3,
    ("patch/registers", "register_0"): 0.3 / 3,
    ("patch/registers", "register_1"): 0.4 / 3,
    ("patch/outliers", None): 0.8 / 3,
    ("patch/normal", None): 1.1 / 3,
    ("patch/padding", None): 0.0,
    ("sink_score", None): (0.3 + 0.1 + 1.0 + 0.1 + 0.3 + 0.0) / 6,  # of register 1
}


def test_every_statistic_by_hand() -> None:
    found = {name: values.item() for name, values in of(BY_HAND, [[0, 1, 0]]).items()}
    assert found == pytest.approx(EXPECTED, abs=1e-6)


def test_padding_is_no_query_and_no_normal_patch() -> None:
    found = {name: values.item() for name, values in of(BY_HAND, [[0, 1, 1]], [[0, 0, 1]]).items()}
    expected = EXPECTED | {
        ("cls/outliers", None): 0.20,
        ("cls/normal", None): 0.15,
        ("cls/padding", None): 0.05,
        ("patch/cls", None): 0.3 / 2,
        ("patch/registers", None): 0.6 / 2,
        ("patch/registers", "register_0"): 0.2 / 2,
        ("patch/registers", "register_1"): 0.4 / 2,
        ("patch/outliers", None): 0.6 / 2,
        ("patch/normal", None): 0.4 / 2,
        ("patch/padding", None): 0.1 / 2,
        ("sink_score", None): (0.3 + 0.1 + 1.0 + 0.1 + 0.3) / 5,
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_without_class_token_or_registers() -> None:
    no_class = of(BY_HAND[:, :, 1:, 1:], [[0, 1, 0]], prefix=PREFIX[1:])
    assert not any("cls" in name for name, _ in no_class)
    assert no_class["patch/registers", "register_0"].item() == pytest.approx(0.3 / 3)
    assert no_class["sink_score", None].item() == pytest.approx((0.1 + 1.0 + 0.1 + 0.3) / 5)
    patches = of(BY_HAND[:, :, 3:, 3:], [[0, 1, 0]], prefix=())
    assert {name for name, _ in patches} == {"patch/outliers", "patch/normal", "patch/padding", "sink_score"}
    no_registers = of(BY_HAND[:, :, [0, 3, 4, 5]][..., [0, 3, 4, 5]], [[0, 1, 0]], prefix=("cls",))
    assert not any("registers" in name for name, _ in no_registers)
    assert no_registers["cls/self", None].item() == pytest.approx(0.1)


def test_a_sink_is_one_of_the_keys() -> None:
    found = of(torch.full((1, 1, 6, 6), 1 / 7), [[0, 1, 0]], has_sink=True)
    for name in ("cls/sink", "patch/sink", "sink_slot", "sink_score", "cls/self"):
        assert found[name, None].item() == pytest.approx(1 / 7, rel=1e-5)
    assert found["cls/entropy", None].item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("sink", ["softmax1", "attention_bias"])
def test_sinks_count_as_computed_from_q_and_k(sink: str) -> None:
    ours = backbone(sink=sink)
    outliers = np.zeros((2, 16), bool)
    outliers[0, 3] = True
    for layer in (1, 4):
        query, key, _ = ours.qkv(images(), layer)
        of_sink = torch.zeros(2, 1, 32) if sink == "softmax1" else ours.blocks[layer - 1].attn.bias_k.detach()
        keys = torch.cat([key, of_sink.expand(2, -1, -1, -1)], dim=2)
        shares = torch.softmax(query @ keys.mT / 32**0.5, dim=-1).detach().double()
        found = attention.statistics(
            ours.attention(images(), layer).detach(), group_keys(outliers, None, PREFIX), has_sink=True
        )
        entropy = -(shares[:, :, 0] * shares[:, :, 0].log()).sum(-1) / math.log(1 + 2 + 16 + 1)
        expected = {
            "cls/sink": shares[:, :, 0, -1],
            "cls/entropy": entropy,
            "cls/outliers": shares[:, :, 0, 6] * torch.tensor([[1.0], [0.0]]),
            "patch/sink": shares[:, :, 3:, -1].mean(-1),
            "sink_slot": shares[..., -1].mean(-1),
            "sink_score": shares[..., :-1].mean(2).amax(-1),
        }
        assert shares[..., -1].min() > 1e-3
        for name, values in expected.items():
            torch.testing.assert_close(found[name, None].double(), values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_in_one_pass_is_that_of_each_block_and_explains_its_output(sink: str, mask: str) -> None:
    ours = backbone(sink=sink, register_mask=mask)
    residuals = [vit.together(tokens) for tokens in ours.residuals(images())]
    blocks = list(vit.attentions(ours, images()))
    assert len(blocks) == 4
    for layer, weights in enumerate(blocks, start=1):
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, ours.attention(images(), layer), rtol=0, atol=0)
        block, value = ours.blocks[layer - 1], ours.qkv(images(), layer)[2]
        mixed = weights @ value
        if sink == "attention_bias":
            mixed = mixed + (1 - weights.sum(-1, keepdim=True)) * block.attn.bias_v
        heads = mixed.transpose(1, 2).flatten(2)
        middle = residuals[layer - 1] + block.attn.proj(block.attn.gated(heads))
        torch.testing.assert_close(middle + block.mlp(block.norm2(middle)), residuals[layer], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("prefix", [PREFIX, PREFIX[1:], ()])
@pytest.mark.parametrize("has_sink", [False, True])
def test_masses_sum_to_1(prefix: tuple[str, ...], has_sink: bool) -> None:
    length = len(prefix) + 5
    weights = torch.softmax(4 * torch.randn(3, 2, length, length + has_sink), -1)[..., :length]
    outliers, padded = [[0, 1, 0, 0, 1]] * 3, [[0, 0, 0, 1, 1]] * 3
    found = of(weights, outliers, padded, prefix, has_sink=has_sink)
    for query in {"patch", "cls"} & {"patch", *prefix}:
        parts = ("outliers", "normal", "padding", "registers", "self", "cls", "sink")
        total = sum(found[f"{query}/{part}", None] for part in parts if (f"{query}/{part}", None) in found)
        torch.testing.assert_close(total, torch.ones(3, 2))


def test_divergence_by_hand() -> None:
    equal = torch.tensor([[[0.1, 0.2, 0.1, 0.0]] * 3])
    assert divergence(equal).tolist() == [0.0]
    disjoint = torch.tensor([[[0.2, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.7]]])
    assert divergence(disjoint).item() == pytest.approx(1.0, rel=1e-12)
    # Two equal ones and one apart from both: pairs 0, 1 and 1.
    assert divergence(torch.cat([disjoint[:, :1], disjoint], 1)).item() == pytest.approx(2 / 3, rel=1e-12)
    # (1, 0) and (1/2, 1/2): H(3/4, 1/4) − (0 + 1) / 2 bits, however the maps are scaled.
    half = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert divergence(torch.tensor([[[0.02, 0.0], [0.3, 0.3]]])).item() == pytest.approx(half, rel=1e-7)
    assert divergence(torch.cat([equal[:, :2], disjoint])).tolist() == pytest.approx([0.0, 1.0])
    assert divergence(equal + 1e-8 * torch.rand(1, 3, 4)).item() < 1e-7
    # There have to be two maps, which are not all zeros.
    assert divergence(torch.ones(2, 0, 4)).isnan().all() and divergence(torch.ones(2, 1, 4)).isnan().all()
    assert divergence(torch.stack([torch.ones(1, 4), torch.zeros(1, 4)], 1)).isnan().all()


def test_rows_and_metrics_are_means_over_images() -> None:
    model = given()
    found = list(attention.measure(subject(model, numbered(5, 32)), None))
    table, outliers = model.table.double(), torch.from_numpy(model.norms.numpy() > 10)
    by_row = rows(found)
    for block in (1, 2):
        to_patches = table[block - 1, :, :, 0, 3:]
        on_outliers = (to_patches * outliers[:, None]).sum(-1).mean(0)
        on_normal = (to_patches * ~outliers[:, None]).sum(-1).mean(0)
        for head in range(3):
            at = (block, head, None)
            assert by_row["attention/cls/outliers", *at] == pytest.approx(float(on_outliers[head]), rel=1e-5)
            ratio = float(on_outliers[head] / 3 / (on_normal[head] / 77))
            assert by_row["attention/cls/outlier_over_normal", *at] == pytest.approx(ratio, rel=1e-5)
            second = table[block - 1, :, head, 0, 2].mean().item()
            assert by_row["attention/cls/registers", block, head, "register_1"] == pytest.approx(second, rel=1e-5)
            to_class = table[block - 1, :, head, 3:, 0].mean().item()
            assert by_row["attention/patch/cls", *at] == pytest.approx(to_class, rel=1e-5)
            score = table[block - 1, :, head].mean(1).amax(-1).mean().item()
            assert by_row["attention/sink_score", *at] == pytest.approx(score, rel=1e-5)
    assert not any(name.endswith(("/padding", "/sink", "sink_slot")) for name, *_ in by_row)
    names = ("cls/outliers", "cls/registers", "cls/self", "cls/entropy", "patch/outliers", "patch/registers")
    expected = {
        f"attention/last/{name}": sum(by_row[f"attention/{name}", 2, head, None] for head in range(3)) / 3
        for name in (*names, "sink_score")
    }
    maps = table[1].mean(1)[:, 1:3, 3:]
    expected["attention/last/register_divergence"] = divergence(maps).mean().item()
    assert metrics(found) == pytest.approx(expected, rel=1e-5)
    assert (
        by_row["attention/register_divergence", 2, None, None] == metrics(found)["attention/last/register_divergence"]
    )
    assert not any(isinstance(finding, Arrays | Picture) for finding in found)  # not before the end


def test_batches_do_not_matter_and_memory_decides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention._CHUNK_VALUES < 24 * 1_300**2  # ViT-g at 504 px, image by image
    looked_at = subject(given(), numbered(5, 32), tokens__detail_images=4)
    whole = rows(list(attention.measure(looked_at, None)))
    sizes: list[int] = []
    see = attention._Survey._see

    def seen(self: Any, block: int, weights: Tensor, *rest: Any) -> None:
        sizes.append(len(weights))
        see(self, block, weights, *rest)

    monkeypatch.setattr(attention._Survey, "_see", seen)
    monkeypatch.setattr(attention, "_CHUNK_VALUES", 3 * 19 * 19 * 2)
    assert rows(list(attention.measure(looked_at, None))) == pytest.approx(whole, rel=1e-6)
    monkeypatch.setattr(attention, "_CHUNK_VALUES", 7)  # less than an image
    assert rows(list(attention.measure(looked_at, None))) == pytest.approx(whole, rel=1e-6)
    assert sizes == [2] * 4 + [1] * 8


@pytest.mark.parametrize("prefix", [PREFIX, PREFIX[1:], ("cls",), ()])
@pytest.mark.parametrize("sink", [False, True])
def test_a_backbone_of_the_users_own(prefix: tuple[str, ...], sink: bool) -> None:
    model = given(prefix=prefix, sink=sink)
    found = list(attention.measure(ended(subject(model, numbered(5, 32))), None))
    numbers = metrics(found)
    assert ("attention/last/cls/sink" in numbers) == (sink and "cls" in prefix)
    assert ("attention/sink_slot", 1, 0, None) in rows(found) if sink else "attention/sink_slot" not in str(found)
    assert ("attention/last/cls/entropy" in numbers) == ("cls" in prefix)
    assert ("attention/last/register_divergence" in numbers) == (len(prefix) > 1)
    assert numbers["attention/last/patch/outliers"] > 0
    kept = [finding for finding in found if isinstance(finding, Arrays)]
    assert bool(kept) == bool(prefix)
    if kept:
        assert kept[0].arrays["tokens"].tolist() == list(prefix)
        assert ("cls_heads" in kept[0].arrays) == ("cls" in prefix)
    if "cls" in prefix:
        shares = model.table[-1, :, :, 0].double()
        rest = (1 - shares.sum(-1)).clamp(min=1e-12)
        nats = -(shares * shares.log()).sum(-1) - (rest * rest.log() if sink else 0)
        entropy = float(nats.mean()) / math.log(len(prefix) + 16 + sink)
        assert numbers["attention/last/cls/entropy"] == pytest.approx(entropy, rel=1e-5)


def test_without_outliers_nothing_goes_to_them() -> None:
    model = given()
    model.norms.fill_(1.0)
    found = list(attention.measure(subject(model, numbered(5, 32)), None))
    assert metrics(found)["attention/last/cls/outliers"] == 0.0
    assert not any("outlier_over_normal" in name for name, *_ in rows(found))


def test_attention_over_other_tokens_is_said() -> None:
    model = given()
    model.table = model.table[..., 1:, 1:]
    with pytest.raises(ValueError, match=r"block 1 is \[5, 3, 18, 18\], not over the 19 tokens"):
        list(attention.measure(subject(model, numbered(5, 32)), None))


def test_fitted_probes_alone_are_not_the_end_of_a_trial() -> None:
    looked_at = subject(given(), numbered(5, 32))
    fitted = dataclasses.replace(
        looked_at, fitted=FittedProbes(looked_at.probes, [], _Views(looked_at.probes, looked_at.backbone, True))
    )
    assert not any(isinstance(finding, Arrays | Picture) for finding in attention.measure(fitted, None))
    variant = ended(looked_at).with_backbone(given())
    assert not any(isinstance(finding, Arrays | Picture) for finding in attention.measure(variant, None))


def test_patches_that_fill_no_grid_are_said_where_maps_are_drawn() -> None:
    looked_at = subject(given(), numbered(5, 32), model__patch_size=4)
    assert metrics(list(attention.measure(looked_at, None)))
    with pytest.raises(ValueError, match="16 patches an image, not the 8 × 8"):
        list(attention.measure(ended(looked_at), None))


@pytest.mark.parametrize("mask", ["registers_cannot_write", "detached"])
def test_registers_that_read_no_patches_have_no_divergence(mask: str) -> None:
    found = list(attention.measure(ended(subject(backbone(register_mask=mask), pixels(3))), None))
    assert "register_divergence" not in str(metrics(found))
    assert all(math.isfinite(value) for value in rows(found).values())
    own = backbone(register_mask="patches_cannot_read")
    found = list(attention.measure(subject(own, pixels(3)), None))
    assert metrics(found)["attention/last/patch/registers"] == 0.0
    assert metrics(found)["attention/last/cls/registers"] > 0.01
    assert 0 < metrics(found)["attention/last/register_divergence"] < 1


@pytest.mark.parametrize("sink", SINKS)
def test_the_built_in_vit(sink: str) -> None:
    found = list(attention.measure(subject(backbone(sink=sink), pixels(3)), None))
    has_sink = sink in ("softmax1", "attention_bias")
    assert ("attention/last/cls/sink" in metrics(found)) == has_sink
    assert {(layer, head) for name, layer, head, _ in rows(found) if name == "attention/cls/self"} == {
        (layer, head) for layer in (1, 2, 3, 4) for head in (0, 1)
    }
