"""Test-time registers: a hand-built neuron that makes outliers is found and moved, random neurons are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainers.labelled import IMAGES, PATCHES, labelled, pixels
from tests.trainers.planted import Planted, metrics
from trainers import test_time_registers as remedy
from trainers import vit
from trainers.measurement import Arrays, Finding, Subject
from trainers.token_settings import TestTimeRegistersConfig
from trainers.vit import ViT

BLOCK, UNIT = 2, 7
HIGH = 60.0  # about what the neuron writes


def striped() -> tuple[np.ndarray, np.ndarray]:
    """Noise with one striped patch in two of three images, another place in each, and where these are, [n, N]."""
    images, marked = pixels(), np.zeros((IMAGES, PATCHES), bool)
    for number in range(IMAGES):
        if number % 3:
            cell = (5 * number) % PATCHES
            row, column = divmod(cell, 4)
            patch = images[number, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            patch[::2], patch[1::2] = 255, 0
            marked[number, cell] = True
    return images, marked


def before_mlp(ours: ViT, images: Tensor, block: int) -> Tensor:
    """What enters the MLP of a block, [B, T, D]."""
    states = vit.together(list(ours.residuals(images))[block - 1])
    module: Any = ours.blocks[block - 1]
    normed: Tensor = module.norm2(states + module._attend(states, ours._layout([states])))
    return normed


def with_neuron(images: Tensor, marked: np.ndarray, sign: float = 1.0) -> Any:
    """Gives a backbone a neuron that fires on marked patches alone and writes a vector of norm HIGH there."""

    def build(ours: ViT) -> ViT:
        first = 1 + ours.num_registers
        normed, of_patch = before_mlp(ours, images, BLOCK), torch.from_numpy(marked)
        direction = normed[:, first:][of_patch].mean(0) - normed[:, first:][~of_patch].mean(0)
        along = normed @ direction
        fires, quiet = along[:, first:][of_patch].min(), along[:, first:][~of_patch].max()
        assert fires > along[:, :first].max() and fires > quiet + 1.0
        gain = 20 / (fires - quiet)  # the activation is about 10 or more where it fires, 0 elsewhere
        mlp: Any = ours.blocks[BLOCK - 1].mlp
        mlp.fc1.weight[UNIT], mlp.fc1.bias[UNIT] = gain * direction, -gain * (fires + quiet) / 2
        if ours.settings.mlp == "swiglu":  # the second half is what the gate lets through
            hidden = mlp.fc2.in_features
            mlp.fc1.weight[hidden + UNIT], mlp.fc1.bias[hidden + UNIT] = 0.0, sign
        mlp.fc2.weight[:, UNIT] = HIGH / 10 * torch.nn.functional.normalize(torch.arange(64.0) - 30, dim=0)
        return ours

    return build


def asked(mlp: str = "gelu", sign: float = 1.0, registers: int = 0, **settings: Any) -> Subject:
    images, marked = striped()
    shown = labelled(images=images).view(images)
    change = with_neuron(shown, marked, sign)
    return labelled(change, images, registers, model__mlp=mlp, **settings)


def measured(given: Subject, **settings: Any) -> list[Finding]:
    return list(remedy.measure(given, TestTimeRegistersConfig(**settings)))


@pytest.mark.parametrize(
    ("mlp", "sign", "registers"), [("gelu", 1, 0), ("quick_gelu", 1, 2), ("swiglu", 1, 0), ("swiglu", -1, 1)]
)
def test_the_neuron_is_found_and_moved_and_random_ones_are_not(mlp: str, sign: float, registers: int) -> None:
    given, marked = asked(mlp, sign, registers), striped()[1]
    assert (given.outliers == marked).all()  # rule 3 at the last layer
    found = measured(given, neurons=1, controls=2)
    (arrays,) = (finding.arrays for finding in found if isinstance(finding, Arrays))
    assert arrays["neurons"].tolist() == [[BLOCK, UNIT]]
    numbers = metrics(found)
    share = marked.mean()
    last = "tokens/last/outlier_fraction"
    assert numbers[f"test_time_registers/moved/{last}"] == numbers[f"test_time_registers/zeroed/{last}"] == 0.0
    assert numbers[f"test_time_registers/moved/change/{last}"] == -share
    assert numbers[f"test_time_registers/random/{last}"] == share
    assert numbers["test_time_registers/moved/added/norm_over_median"] > 3
    assert numbers["test_time_registers/random/added/norm_over_median"] < 2
    assert "test_time_registers/zeroed/added/norm_over_median" not in numbers
    largest = "tokens/last/max_over_median"
    assert numbers[f"test_time_registers/moved/{largest}"] < 2 < 3 < numbers[f"test_time_registers/random/{largest}"]
    for what in ("moved", "random", "zeroed"):
        for name in ("val/knn/top1", "test/knn/top1"):
            assert {f"test_time_registers/{what}/{name}", f"test_time_registers/{what}/change/{name}"} <= set(numbers)


def test_the_added_token_has_a_high_norm_where_a_patch_had_one() -> None:
    given, marked = asked(), striped()[1]
    remedied = remedy.with_test_time_register(given.backbone, np.array([[BLOCK, UNIT]]))
    *_, last = remedied.residuals(given.view(given.data.train.images))
    *_, before = given.backbone.residuals(given.view(given.data.train.images))
    added, had = last.registers_BRD[:, 0].norm(dim=-1), torch.from_numpy(marked.any(1))
    assert last.registers_BRD.shape == (IMAGES, 1, 64)
    assert added[had].min() > 3 * added[~had].max()
    high = before.patches_BND.norm(dim=-1)[torch.from_numpy(marked)]
    assert (added[had] / high).min() > 0.8
    assert last.patches_BND.norm(dim=-1).max() < 0.5 * high.min()


def test_scores_are_mean_activations_over_outliers_of_images_that_have_some() -> None:
    given, marked = asked(tokens__probe_images=12), striped()[1][:12]
    marked[1, :4] = True  # several in one image: each image counts alike
    vars(given)["outliers"] = marked
    found = remedy.find_neurons(given, TestTimeRegistersConfig(neurons=5, deepest=0.5))
    assert found is not None and found.scores.shape == (2, 256)
    ours: Any = given.backbone
    for block in (1, 2):
        mlp = ours.blocks[block - 1].mlp
        active = torch.nn.functional.gelu(mlp.fc1(before_mlp(ours, given.view(given.probe_images()), block)))
        means = [active[i, 1:][torch.from_numpy(row)].abs().mean(0) for i, row in enumerate(marked) if row.any()]
        assert len(means) == 8
        np.testing.assert_allclose(found.scores[block - 1], torch.stack(means).mean(0).numpy(), rtol=1e-4, atol=1e-6)
    flat = np.sort(found.scores, axis=None)[::-1][:5]
    np.testing.assert_array_equal(found.of_neurons, flat)
    assert found.neurons[:, 0].min() >= 1


def test_neurons_that_are_active_on_most_tokens_are_left_out_where_asked_for() -> None:
    given = asked()
    mlp: Any = given.backbone.blocks[0].mlp
    mlp.fc1.bias[3], mlp.fc2.weight[:, 3] = 1_000.0, 0.0  # always on, and without effect
    everywhere = remedy.find_neurons(given, TestTimeRegistersConfig(neurons=1))
    sparse = remedy.find_neurons(given, TestTimeRegistersConfig(neurons=1, sparse=True))
    assert everywhere is not None and everywhere.neurons.tolist() == [[1, 3]]
    assert sparse is not None and sparse.scores[0, 3] == 0.0 and sparse.neurons.tolist() == [[BLOCK, UNIT]]


def test_each_neuron_takes_its_own_largest_activation_of_each_image_with_its_sign() -> None:
    given = labelled(registers=1)
    remedied = remedy.with_test_time_register(given.backbone, np.array([[1, 4], [3, 0], [3, 2]]))
    zeroed = remedy.with_zeroed_neurons(given.backbone, np.array([[3, 0], [3, 2]]))
    neurons = torch.zeros(2, 1 + 1 + 1 + 4, 5)  # class, register, added register, patches
    neurons[:, :2] = 9.0
    neurons[0, 3:, 0] = torch.tensor([1.0, -7.0, 2.0, 3.0])
    neurons[0, 3:, 2] = torch.tensor([5.0, 0.0, -4.0, 1.0])
    neurons[1, 3:, 0] = torch.tensor([0.5, 0.25, 0.0, 0.0])
    neurons[:, 3:, 1] = 8.0
    given_neurons, moved = neurons.clone(), remedied.neurons[3](neurons)
    assert torch.equal(neurons, given_neurons)
    assert moved[:, 2].tolist() == [[-7.0, 0.0, 5.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0, 0.0]]
    assert (moved[:, 3:, [0, 2]] == 0).all() and (moved[:, 3:, 1] == 8).all()
    assert (moved[:, :2] == 9).all()
    assert set(remedied.neurons) == {1, 3} and remedied.num_registers == 2
    without = zeroed.neurons[3](neurons[:, :6])  # class, register, patches
    assert (without[:, :2] == 9).all()
    assert (without[:, 2:, [0, 2]] == 0).all() and zeroed.num_registers == 1
    assert torch.equal(without[:, :, [1, 3, 4]], neurons[:, :6, [1, 3, 4]])


def test_random_neurons_are_as_many_of_each_block_and_none_of_those_found() -> None:
    found = remedy.RegisterNeurons(np.array([[1, 0], [1, 4], [2, 3], [1, 2]]), np.ones((2, 7)))
    drawn = remedy.random_neurons(found, np.random.Generator(np.random.PCG64(0)))
    assert sorted(drawn[:, 0].tolist()) == [1, 1, 1, 2] and len(np.unique(drawn, axis=0)) == 4
    assert not {tuple(row) for row in drawn.tolist()} & {tuple(row) for row in found.neurons.tolist()}
    assert ((drawn[:, 1] >= 0) & (drawn[:, 1] < 7)).all()


def test_without_outliers_nothing_is_said() -> None:
    assert measured(labelled()) == []


def test_without_controls_there_is_no_random_variant() -> None:
    numbers = metrics(measured(asked(), controls=0))
    assert {name.split("/")[1] for name in numbers} == {"score_share", "moved", "zeroed"}


def test_probes_are_fitted_on_the_remedied_backbone() -> None:
    given = asked()
    found = remedy.find_neurons(given, TestTimeRegistersConfig(neurons=200))
    numbers = metrics(measured(given, neurons=200))
    assert found is not None and given.fitted is not None
    remedied = remedy.with_test_time_register(given.backbone, found.neurons)
    score = given.probes.fit(remedied).score(remedied, "test").metrics
    assert {name: numbers[f"test_time_registers/moved/{name}"] for name in score} == score
    assert score != given.fitted.score(remedied, "test").metrics
    untouched = given.fitted.score(given.backbone, "test").metrics
    changes = {name: score[name] - untouched[name] for name in score}
    assert {name: numbers[f"test_time_registers/moved/change/{name}"] for name in score} == changes


def test_scores_of_the_untouched_that_are_known_are_used() -> None:
    given = asked()
    assert given.fitted is not None
    known = {n: v for s in ("validation", "test") for n, v in given.fitted.score(given.backbone, s).metrics.items()}
    computed = metrics(measured(given, neurons=1))
    assert metrics(measured(replace(given, scores=known), neurons=1)) == computed
    lower = {name: value - 0.25 for name, value in known.items()}
    change = "test_time_registers/moved/change/val/knn/top1"
    changed = metrics(measured(replace(given, scores=lower), neurons=1))
    assert changed[change] == pytest.approx(computed[change] + 0.25)


def test_the_share_of_the_scores_is_that_of_the_neurons_found() -> None:
    given = asked()
    found = remedy.find_neurons(given, TestTimeRegistersConfig(neurons=3))
    assert found is not None
    expected = np.sort(found.scores, axis=None)[-3:].sum() / found.scores.sum()
    assert metrics(measured(given, neurons=3))["test_time_registers/score_share"] == pytest.approx(expected)


def test_equal_seeds_give_equal_findings() -> None:
    assert metrics(measured(asked())) == metrics(measured(asked()))


def test_what_cannot_be_remedied_is_said() -> None:
    given = asked()
    for neurons in ([[5, 0]], [[0, 0]], [[2, 256]], [[2, -1]]):
        with pytest.raises(ValueError, match=r"block \d has no neurons .*: they belong to another model"):
            remedy.with_test_time_register(given.backbone, np.array(neurons))
    remedied = remedy.with_test_time_register(given.backbone, np.array([[2, 0]]))
    with pytest.raises(ValueError, match="neurons of this backbone are edited already"):
        measured(replace(given, backbone=remedied))
    own = Planted(lambda images: torch.ones(2, len(images), PATCHES, 8))
    with pytest.raises(ValueError, match="only the built-in ViT can be edited, and this backbone is a Planted"):
        measured(replace(given, backbone=own))
