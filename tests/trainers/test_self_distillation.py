"""The projection head and the cross-entropy against PyTorch's own, and a teacher's path in closed form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.method_settings import HeadConfig
from trainers.methods import self_distillation
from trainers.methods.self_distillation import PrototypeHead, cross_entropy, divided, move_teacher_, teacher_copy
from trainers.streams import Streams

SETTINGS = HeadConfig(prototypes=12, hidden=16, bottleneck=6, layers=3)


def head(learned_gain: bool = False, seed: int = 0, purpose: str = "head", **sizes: int) -> PrototypeHead:
    settings = SETTINGS.model_copy(update=sizes)
    return PrototypeHead(8, settings, Streams(seed), purpose, learned_gain=learned_gain)


def official(ours: PrototypeHead) -> nn.Sequential:
    """PyTorch's weight norm around a linear layer, as the official head has it, with our weights."""
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(6, 12, bias=False))
    parts = reference.parametrizations.weight
    with torch.no_grad():
        parts.original1.copy_(ours.last_layer.weight_v)
        parts.original0.copy_(ours.last_layer.weight_g if ours.last_layer.learned_gain else torch.ones(12, 1))
    return reference


@pytest.mark.parametrize("learned_gain", [False, True])
def test_last_layer_is_pytorchs_weight_norm_with_gain_one(learned_gain: bool) -> None:
    ours = head(learned_gain)
    reference = official(ours)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    bottleneck = F.normalize(ours.mlp(x), dim=-1)
    torch.testing.assert_close(ours(x), reference(bottleneck))
    weights = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    (ours(x) * weights).sum().backward()
    (reference(bottleneck.detach()) * weights).sum().backward()
    parts = reference.parametrizations.weight
    torch.testing.assert_close(ours.last_layer.weight_v.grad, parts.original1.grad)
    if learned_gain:
        torch.testing.assert_close(ours.last_layer.weight_g.grad, parts.original0.grad)


def test_logits_are_cosines_so_that_only_directions_of_prototypes_count() -> None:
    ours = head()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    before = ours(x)
    assert before.shape == (5, 12) and float(before.detach().abs().max()) <= 1.0 + 1e-6
    with torch.no_grad():
        ours.last_layer.weight_v.mul_(torch.arange(1.0, 13.0)[:, None])
    torch.testing.assert_close(ours(x), before)
    assert [name for name, _ in ours.named_parameters() if "last_layer" in name] == ["last_layer.weight_v"]


@pytest.mark.parametrize(("layers", "sizes"), [(1, [8, 6]), (2, [8, 16, 6]), (4, [8, 16, 16, 16, 6])])
def test_layers_of_the_mlp(layers: int, sizes: list[int]) -> None:
    linear = [layer for layer in head(layers=layers).mlp if isinstance(layer, nn.Linear)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == sizes
    assert len(head(layers=layers).mlp) == 2 * layers - 1  # a GELU between any two


def test_initialisation_is_the_official_one() -> None:
    large = head(prototypes=4096, hidden=512, bottleneck=64)
    for layer in large.mlp:
        if isinstance(layer, nn.Linear):
            assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not layer.bias.any()
    directions = large.last_layer.weight_v.detach()
    bound = 1 / math.sqrt(64)  # kaiming_uniform_(a=√5), the default of nn.Linear
    assert 0.999 * bound < float(directions.abs().max()) <= bound
    assert float(directions.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert torch.equal(head(learned_gain=True).last_layer.weight_g, torch.ones(12, 1))


def test_initialisation_depends_on_the_seed_and_the_purpose_alone() -> None:
    first = head().state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        again = head().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (head(seed=1), head(purpose="ibot")):
        for name, value in other.state_dict().items():
            assert name.endswith(".bias") or not torch.equal(value, first[name]), name


def test_half_precision_changes_the_products_alone() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    ours = head()
    with torch.autocast("cpu", torch.bfloat16):
        logits = ours(x)
    torch.testing.assert_close(logits.float(), ours(x), rtol=0, atol=0.03)


def test_a_teacher_starts_as_the_student_without_gradients_and_in_evaluation_mode() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    teacher = teacher_copy(student)
    assert student.training and not any(module.training for module in teacher.modules())
    for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
        assert torch.equal(own, other) and own is not other and other.requires_grad and not own.requires_grad


def test_a_teacher_follows_a_student_that_stands_still_geometrically() -> None:
    student, momenta = head(), (0.9, 0.5, 0.99)
    teacher = teacher_copy(student)
    start = [value.clone() for value in teacher.parameters()]
    with torch.no_grad():
        for value in student.parameters():
            value.add_(1.0)
    for momentum in momenta:
        move_teacher_(teacher, student, momentum)
    left = math.prod(momenta)  # of the distance to the student
    for own, first, other in zip(teacher.parameters(), start, student.parameters(), strict=True):
        torch.testing.assert_close(own, left * first + (1 - left) * other.detach())


def test_momentum_one_leaves_the_teacher_and_momentum_zero_copies_the_student() -> None:
    student, teacher = head(seed=1), teacher_copy(head())
    before = [value.clone() for value in teacher.parameters()]
    move_teacher_(teacher, student, 1.0)
    assert all(torch.equal(own, first) for own, first in zip(teacher.parameters(), before, strict=True))
    move_teacher_(teacher, student, 0.0)
    assert all(torch.equal(own, other) for own, other in zip(teacher.parameters(), student.parameters(), strict=True))


def test_a_teacher_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError):
        move_teacher_(head(layers=2), head(), 0.5)


def plain_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher * F.log_softmax(student / 0.1, dim=-1)).sum(dim=-1)


@pytest.mark.parametrize("cached", [1, 50, 2**18])
def test_cross_entropy_and_its_gradient_whatever_is_worked_on_at_once(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_distillation, "_CACHE_VALUES", cached)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 7, 5, generator=generator).requires_grad_()
    teacher = 2 * torch.softmax(torch.randn(7, 5, generator=generator), dim=-1)  # two targets at once
    weights = torch.rand(3, 7, generator=generator)
    ours = cross_entropy(student, teacher, 0.1)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    plain = plain_cross_entropy(student, teacher)
    (expected,) = torch.autograd.grad((plain * weights).sum(), student)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradient, expected)


def test_cross_entropy_of_half_precision_logits_is_single_and_its_gradient_half() -> None:
    student = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    teacher = torch.full((4, 6), 1 / 6)
    loss = cross_entropy(student, teacher, 0.1)
    assert torch.equal(loss, cross_entropy(student.detach().float(), teacher, 0.1))
    loss.sum().backward()
    assert student.grad is not None and student.grad.dtype == torch.bfloat16


def test_a_gpu_works_on_512_rows_of_two_views_of_65536_prototypes_at_once() -> None:
    pieces = self_distillation._pieces(torch.empty(2, 1100, 65_536, device="meta"))
    assert pieces == [slice(0, 512), slice(512, 1024), slice(1024, 1536)]
    assert self_distillation._pieces(torch.empty(2, 0, 65_536, device="meta")) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_divided_in_single_precision_and_stay_as_they_are(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, -3.0]], dtype=dtype)
    result = divided(logits, 0.1)
    torch.testing.assert_close(result, torch.tensor([[10.0, -30.0]]))
    assert logits.tolist() == [[1.0, -3.0]]
