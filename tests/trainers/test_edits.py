"""Edited forward passes: shared weights, tokens removed by hand, registers of others, hand-made neighbourhoods."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.trainers.planted import Planted
from trainers import edits, vit
from trainers.config import resolve
from trainers.edits import EditedViT, State
from trainers.probes.features import extract
from trainers.streams import Streams
from trainers.vit import Tokens, ViT

SIDE, PATCHES = 4, 16
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_registers": 0, "pre_norm": True, "mlp": "swiglu"},
    {"sink": "attention_bias", "register_mask": "patches_cannot_read"},
    {"sink": "softmax1", "register_mask": "detached"},
    {"sink": "value_gate", "register_mask": "registers_cannot_write", "mlp": "quick_gelu"},
]


def backbone(**settings: Any) -> ViT:
    """A ViT of 4 blocks on 4 × 4 patches, whose branches and registers are large enough to see what they do."""
    given = {"size": "nano", "patch_size": 8, "image_size": 32, "num_registers": 2, "layer_scale": None, **settings}
    if given["num_registers"]:
        given["reg_init_std"] = 0.5
    ours = ViT(resolve({"preset": "short", "model": given}).model, Streams(1)).eval()
    with torch.no_grad():
        for block in ours.blocks:
            block.attn.qkv.weight.mul_(4)
    return ours.requires_grad_(False)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def draw(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def treating(chosen_BN: Tensor, layer: int, treatment: edits.Treatment) -> edits.Edit:
    """Treat these patches at one layer."""
    return lambda _images: lambda state: treatment(state, chosen_BN, chosen_BN) if state.layer == layer else state


def same(actual: Tokens, expected: Tokens) -> bool:
    return all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("settings", VARIANTS)
def test_without_an_edit_everything_is_the_originals_to_the_bit(settings: dict[str, Any]) -> None:
    ours = backbone(**settings)
    edited = EditedViT(ours)
    assert isinstance(edited, vit.Backbone)
    assert same(edited.tokens(images()), ours.tokens(images()))
    assert same(edited.tokens(images(), normed=False), ours.tokens(images(), normed=False))
    for actual, expected in zip(edited.residuals(images()), ours.residuals(images()), strict=True):
        assert same(actual, expected)
    assert same(edited.intermediate(images(), [2])[0], ours.intermediate(images(), [2])[0])
    assert torch.equal(edited.attention(images(), 3), ours.attention(images(), 3))
    for actual, expected in zip(vit.attentions(edited, images()), vit.attentions(ours, images()), strict=True):
        assert torch.equal(actual, expected)
    assert all(torch.equal(a, b) for a, b in zip(edited.qkv(images(), 2), ours.qkv(images(), 2), strict=True))
    assert torch.equal(edited.forward_features(images()), ours.forward_features(images()))


@pytest.mark.parametrize("mlp", ["gelu", "quick_gelu", "swiglu"])
def test_neurons_are_what_enters_the_second_linear_layer(mlp: str) -> None:
    ours = backbone(mlp=mlp)
    seen: dict[str, Tensor] = {}
    ours.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _module, args: seen.update(inside=args[0]))
    expected = ours.tokens(images())

    def look(neurons: Tensor) -> Tensor:
        assert torch.equal(neurons, seen["inside"])
        return neurons

    assert same(EditedViT(ours, neurons={2: look}).tokens(images()), expected)
    changed = EditedViT(ours, neurons={2: torch.zeros_like}).residuals(images())
    states, biases = list(ours.residuals(images())), ours.blocks[1].mlp.fc2.bias
    before, after = list(itertools.islice(changed, 1, 3))
    x, layout = vit.together(before), ours._layout([vit.together(before)])
    assert same(before, states[1])
    torch.testing.assert_close(vit.together(after), x + ours.blocks[1]._attend(x, layout) + biases)


def test_weights_are_shared_and_the_original_stays_as_it_is() -> None:
    ours = backbone()
    before, names = ours.tokens(images()), set(ours.state_dict())
    edited = EditedViT(
        ours, edits.replace_registers(edits.constant_registers([torch.zeros(64)] * 5)), extra_registers=1
    )
    edited.tokens(images())
    theirs = dict(edited.named_parameters())
    assert all(theirs[name] is value for name, value in ours.named_parameters() if name != "reg_token")
    assert ours.reg_token.shape[1] == ours.num_registers == 2
    assert edited.reg_token.shape[1] == edited.num_registers == edited.num_prefix_tokens - 1 == 3
    assert same(ours.tokens(images()), before) and set(ours.state_dict()) == names
    edited.extra = nn.Linear(1, 1)
    assert "extra" not in dict(ours.named_children())


def test_a_tap_of_training_does_not_see_edited_passes() -> None:
    ours = backbone()
    ours.tap = lambda _layer, _x: pytest.fail("the tap was called")
    EditedViT(ours).tokens(images())


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_an_added_register_starts_as_zeros_before_the_first_norm(registers: int, pre_norm: bool) -> None:
    edited = EditedViT(backbone(num_registers=registers, pre_norm=pre_norm), extra_registers=1)
    if pre_norm:
        edited.norm_pre.bias.fill_(0.25)  # all that LayerNorm leaves of zeros
    first = next(edited.residuals(images()))
    assert first.registers_BRD.shape == (3, registers + 1, 64)
    assert (first.registers_BRD[:, -1] == (0.25 if pre_norm else 0.0)).all()
    assert edited.attention(images(), 1).shape[-1] == 1 + registers + 1 + PATCHES


def test_registers_are_replaced_at_every_layer() -> None:
    ours = backbone()
    given = [torch.full((2, 64), float(layer)) for layer in range(5)]
    edited = EditedViT(ours, edits.replace_registers(edits.constant_registers(given)))
    layers = list(edited.residuals(images()))
    assert [layer.registers_BRD.unique().tolist() for layer in layers] == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert torch.equal(layers[0].patches_BND, next(ours.residuals(images())).patches_BND)
    assert not torch.allclose(layers[1].patches_BND, list(ours.residuals(images()))[1].patches_BND)


def test_patches_that_cannot_read_registers_do_not_change_when_these_do() -> None:
    apart, together = backbone(register_mask="detached"), backbone()
    zeros = edits.replace_registers(edits.constant_registers([torch.zeros(64)] * 5))
    actual, expected = EditedViT(apart, zeros).tokens(images()), apart.tokens(images())
    assert torch.equal(actual.patches_BND, expected.patches_BND) and torch.equal(actual.cls_BD, expected.cls_BD)
    assert not torch.allclose(EditedViT(together, zeros).tokens(images()).patches_BND, together.tokens(images())[2])


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (3, 1), (3, 2), (3, 3), (9, 4)])
def test_shuffled_registers_are_those_of_another_image_undisturbed(count: int, seed: int) -> None:
    ours = backbone()
    others = edits.registers_of_others(ours, lambda: draw(seed), images(1))
    edited = EditedViT(ours, edits.replace_registers(others))
    layers, clean = list(edited.residuals(images(count))), list(ours.residuals(images(count)))
    found: list[list[int]] = []
    for actual, expected in zip(layers[1:], clean[1:], strict=True):
        equal = (actual.registers_BRD[:, None] == expected.registers_BRD[None]).flatten(2).all(-1)
        assert (equal.sum(0) == 1).all() and (equal.sum(1) == 1).all()  # a permutation: marginals are unchanged
        assert not equal.diagonal().any()
        found.append(equal.int().argmax(1).tolist())
    assert all(permutation == found[0] for permutation in found)
    assert same(edited.tokens(images(count)), edited.tokens(images(count)))


def test_an_image_that_is_alone_gets_the_registers_of_the_spare_one() -> None:
    ours = backbone()
    spare = images(2)[1:]
    edited = EditedViT(ours, edits.replace_registers(edits.registers_of_others(ours, draw, spare)))
    for actual, expected in zip(edited.residuals(images(1)), ours.residuals(spare), strict=True):
        assert torch.equal(actual.registers_BRD, expected.registers_BRD)


def removed(ours: ViT, one: Tensor, gone_N: Tensor, layer: int) -> list[Tensor]:
    """The residual stream at `layer` … L of a pass from which patches were taken out at `layer`."""
    (x_BTD,), _ = next(itertools.islice(ours._layers([one]), layer, None))
    first = 1 + ours.num_registers
    stays = torch.cat([torch.ones(first, dtype=torch.bool), ~gone_N])
    states = [x_BTD[:, stays]]
    for block in ours.blocks[layer:]:
        states += block([states[-1]], ours._layout([states[-1]]), None)
    return states


@pytest.mark.parametrize("layer", [0, 2, 4])
@pytest.mark.parametrize("settings", VARIANTS)
def test_deleted_patches_are_as_if_they_were_not_there(settings: dict[str, Any], layer: int) -> None:
    ours = backbone(**settings)
    gone_BN = torch.zeros(3, PATCHES, dtype=torch.bool)
    gone_BN[0, [0, 5, 6]] = gone_BN[2, 15] = True  # none of image 1
    edited = EditedViT(ours, treating(gone_BN, layer, edits.deleted))
    states, features = list(edited.residuals(images())), edited.tokens(images())
    for number, gone_N in enumerate(gone_BN):
        expected = removed(ours, images()[number : number + 1], gone_N, layer)
        for reached, alone in zip(states[layer:], expected, strict=True):
            patches = reached.patches_BND[number]
            assert patches[gone_N].isnan().all()
            of_image = torch.cat([reached.cls_BD[number, None], reached.registers_BRD[number], patches[~gone_N]])
            torch.testing.assert_close(of_image, alone[0], rtol=1e-4, atol=1e-5)
        normed = ours.norm(expected[-1])
        torch.testing.assert_close(features.cls_BD[number], normed[0, 0], rtol=1e-4, atol=1e-5)
        mean = normed[0, 1 + ours.num_registers :].mean(0)
        torch.testing.assert_close(features.patches_BND[number].mean(0), mean, rtol=1e-4, atol=1e-5)
    (again,) = edited.intermediate(images(), [4])
    assert same(again, features) and torch.equal(edited.forward_features(images()), vit.together(features))


@pytest.mark.parametrize("settings", VARIANTS)
def test_no_query_attends_to_a_deleted_patch(settings: dict[str, Any]) -> None:
    ours = backbone(**settings)
    gone_BN = torch.zeros(3, PATCHES, dtype=torch.bool)
    gone_BN[0, 4] = True
    edited, first = EditedViT(ours, treating(gone_BN, 2, edits.deleted)), 1 + ours.num_registers
    maps, plain = list(edited.attentions(images())), list(ours.attentions(images()))
    assert torch.equal(maps[1], plain[1])  # block 2 comes before layer 2
    for layer in (3, 4):
        assert (maps[layer - 1][0, :, :, first + 4] == 0).all()
        assert (maps[layer - 1][1:, :, first:, first + 4] > 0).all()
        assert torch.equal(maps[layer - 1], edited.attention(images(), layer))
    if settings.get("sink") not in ("attention_bias", "softmax1"):
        torch.testing.assert_close(maps[3].sum(-1), torch.ones_like(maps[3][..., 0]))


def test_an_image_never_loses_all_of_its_patches() -> None:
    ours, gone_BN = backbone(), torch.zeros(3, PATCHES, dtype=torch.bool)
    gone_BN[1] = True
    edited = EditedViT(ours, treating(gone_BN, 2, edits.deleted))
    torch.testing.assert_close(edited.tokens(images()).patches_BND, ours.tokens(images()).patches_BND)


def hand_made(values: list[list[float]]) -> State:
    """A pass of one image whose patches hold the number of their cell and its square; after a class token."""
    cells = torch.tensor(values)
    patches = torch.stack([cells.flatten(), cells.flatten().square()], dim=1)[None]
    return State(2, torch.cat([torch.full((1, 1, 2), -1.0), patches], dim=1), 1, tuple(cells.shape))


def cells(*places: tuple[int, int], rows: int = 3, columns: int = 4) -> Tensor:
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    for place in places:
        chosen[place] = True
    return chosen.flatten()[None]


def test_neighbours_are_averaged_without_outliers_and_treated_ones() -> None:
    given = hand_made([[1, 2, 3, 4], [5, 99, 98, 6], [7, 8, 9, 97]])
    chosen, outliers = cells((1, 1), (2, 3)), cells((1, 1), (1, 2), (2, 3))
    x = edits.averaged(given, chosen, outliers).x_BTD
    middle = [1, 2, 3, 5, 7, 8, 9]  # of 8 neighbours, the outlier (1, 2) does not count
    corner = [6, 9]
    after = x[0, 1:, 0].reshape(3, 4)
    assert float(after[1, 1]) == pytest.approx(sum(middle) / 7)
    assert float(after[2, 3]) == pytest.approx(sum(corner) / 2)
    assert float(x[0, 1 + 5, 1]) == pytest.approx(sum(value**2 for value in middle) / 7)
    untouched = ~cells((1, 1), (2, 3))[0]
    assert torch.equal(x[0, 1:][untouched], given.x_BTD[0, 1:][untouched])
    assert torch.equal(x[:, 0], given.x_BTD[:, 0])


def test_without_normal_neighbours_the_images_normal_patches_are_averaged() -> None:
    given = hand_made([[90, 91, 1, 2], [92, 93, 3, 4]])
    chosen = cells((0, 0), (0, 1), (1, 0), (1, 1), rows=2)
    after = edits.averaged(given, chosen, chosen).x_BTD[0, 1:, 0].reshape(2, 4)
    assert after[:, 0].tolist() == [2.5, 2.5]  # 1, 2, 3 and 4 of the whole image
    assert after[:, 1].tolist() == [2.0, 2.0]  # 1 and 3
    everything = torch.ones_like(chosen)
    assert torch.equal(edits.averaged(given, everything, everything).x_BTD, given.x_BTD)


def test_clamped_patches_keep_their_direction() -> None:
    given = hand_made([[3, 4, 0, 1]])
    x = edits.clamped(5.0)(given, cells((0, 0), (0, 2), rows=1), torch.zeros(1, 4, dtype=torch.bool)).x_BTD
    assert float(x[0, 1].norm()) == pytest.approx(5.0)
    assert float(x[0, 1, 1] / x[0, 1, 0]) == pytest.approx(3.0)
    assert x[0, 3].tolist() == [0.0, 0.0]
    assert torch.equal(x[0, [2, 4]], given.x_BTD[0, [2, 4]])


def high_norms() -> edits.Edit:
    """At layer 1, patch 3 of all images and patch 9 of the first become ten times as large."""

    def begin(_images: Tensor) -> edits.Step:
        def step(state: State) -> State:
            if state.layer != 1:
                return state
            factor = torch.ones(len(state.x_BTD), PATCHES, 1)
            factor[:, 3] = factor[0, 9] = 10.0
            return state.with_patches(state.patches_BND * factor)

        return step

    return begin


def treated(layers: Iterator[Tokens], plain: Iterator[Tokens], layer: int) -> Tensor:
    """Which patches differ at a layer, [B, N]."""
    one, other = (next(itertools.islice(states, layer, None)).patches_BND for states in (layers, plain))
    return (one != other).any(-1)


def test_outliers_are_found_by_their_norm_and_the_control_takes_as_many_others() -> None:
    ours = EditedViT(backbone(), high_norms())
    norms = next(itertools.islice(ours.residuals(images()), 1, None)).patches_BND.norm(dim=-1)
    threshold = 3 * float(norms.median())
    outliers = norms > threshold
    assert outliers.sum(1).tolist() == [2, 1, 1] and outliers[:, 3].all() and outliers[0, 9]
    halved = edits.clamped(0.5)
    edited = EditedViT(ours, edits.treat_patches(1, threshold, halved))  # on top of the edits of `ours`
    assert torch.equal(treated(edited.residuals(images()), ours.residuals(images()), 1), outliers)
    assert torch.equal(next(edited.residuals(images())).patches_BND, next(ours.residuals(images())).patches_BND)
    control = EditedViT(ours, edits.treat_patches(1, threshold, halved, normal=draw))
    chosen = treated(control.residuals(images()), ours.residuals(images()), 1)
    assert chosen.sum(1).tolist() == [2, 1, 1] and not (chosen & outliers).any()
    assert torch.equal(chosen, treated(control.residuals(images()), ours.residuals(images()), 1))
    other = EditedViT(ours, edits.treat_patches(1, threshold, halved, normal=lambda: draw(6)))
    assert not torch.equal(chosen, treated(other.residuals(images()), ours.residuals(images()), 1))


def test_the_control_takes_all_normal_patches_where_they_are_fewer() -> None:
    outliers = torch.tensor([[True, True, True, False, False], [False] * 5])
    draws = edits._draws(torch.zeros(2, 3, 8, 8), 5, draw())
    assert edits._as_many_normal(outliers, draws).tolist() == [[False, False, False, True, True], [False] * 5]


def test_the_control_of_an_image_is_the_same_in_every_batch_and_another_in_other_images() -> None:
    marked = torch.zeros(1, PATCHES, dtype=torch.bool)
    marked[0, 3] = True
    ours = EditedViT(backbone(), treating(marked, 1, edits.clamped(500.0)))
    control = EditedViT(ours, edits.treat_patches(1, 499.0, edits.clamped(0.5), normal=draw))

    def chosen(batch: Tensor) -> Tensor:
        return treated(control.residuals(batch), ours.residuals(batch), 1)

    together = chosen(images(9))
    assert together.sum(1).tolist() == [1] * 9 and not together[:, 3].any()
    assert torch.equal(torch.cat([chosen(part) for part in images(9).split([2, 4, 3])]), together)
    assert torch.equal(chosen(images(9).flip(0)), together.flip(0))
    assert len(together.unique(dim=0)) > 4


def test_patches_are_drawn_evenly_and_by_the_image_alone() -> None:
    shown = torch.randint(0, 256, (4_000, 3, 4, 4), generator=draw(1)) / 255
    draws = edits._draws(shown, PATCHES, draw())
    none_left = torch.zeros(len(shown), PATCHES, dtype=torch.bool)
    none_left[:, :2] = True
    chosen = edits._as_many_normal(none_left, draws)
    counts = chosen[:, 2:].sum(0)
    expected = 2 * len(shown) / 14  # 571, with a standard deviation of 22
    assert (chosen.sum(1) == 2).all() and (counts - expected).abs().max() < 4 * 22
    pairs = (chosen[:, 2:, None] & chosen[:, None, 2:]).sum(0)[torch.triu_indices(14, 14, 1).unbind()]
    assert (pairs - len(shown) / 91).abs().max() < 5 * 6.6  # each of 91 pairs as often, 44 ± 6.6
    assert torch.equal(edits._draws(shown.flip(0)[:7], PATCHES, draw()), draws.flip(0)[:7])
    nearly = shown[:1].clone()
    nearly[0, 0, 0, 0] += 1 / 255
    assert not torch.equal(edits._draws(nearly, PATCHES, draw()).argsort(), draws[:1].argsort())


def test_probes_read_the_mean_of_the_patches_that_are_left() -> None:
    ours, gone_BN = backbone(), torch.zeros(2, PATCHES, dtype=torch.bool)
    gone_BN[:, :3] = True
    edited = EditedViT(ours, treating(gone_BN, 4, edits.deleted))
    features = extract(edited, [images(2)], 2, {"mean_patch", "norms"})
    expected = ours.tokens(images(2)).patches_BND[:, 3:].mean(1)
    torch.testing.assert_close(features["mean_patch"], expected)


def test_what_cannot_be_edited_is_said() -> None:
    ours = backbone()
    with pytest.raises(ValueError, match=r"only the built-in ViT can be edited, and this backbone is a Planted: leave"):
        EditedViT(Planted(lambda given: given))
    with pytest.raises(ValueError, match="one group of images at a time, without masks"):
        EditedViT(ours).forward_groups([images(), images()])
    remedied = EditedViT(ours, neurons={1: lambda neurons: neurons})
    with pytest.raises(ValueError, match="neurons of this backbone are edited already"):
        EditedViT(remedied, extra_registers=1)
    with pytest.raises(ValueError, match="layer is 5; allowed: 1 to 4"):
        EditedViT(ours).qkv(images(), 5)
