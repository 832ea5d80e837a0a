"""The linear probe: equal to torch's SGD, scikit-learn on an easy set, planted codes, chance, determinism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from trainers.config import LinearConfig
from trainers.probes import linear
from trainers.probes.classification import Features, accuracies
from trainers.streams import Streams

CLASSES = 5


def _blobs(seed: int, count: int, spread: float = 1.0, width: int = 16) -> Features:
    """Normal clusters around fixed centres in both features."""
    centres = np.random.default_rng(99).normal(0, 1, (2, CLASSES, width))
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, CLASSES, count)
    cls, patch = (torch.from_numpy(rng.normal(c[classes], spread)).float() for c in centres)
    return Features(cls, patch, torch.from_numpy(classes))


def _random(seed: int, count: int) -> Features:
    rng = np.random.default_rng(seed)
    parts = (torch.from_numpy(rng.normal(0, 1, (count, 16))).float() for _ in range(2))
    return Features(*parts, torch.from_numpy(rng.integers(0, CLASSES, count)))


def _probe(
    train: Features, evaluated: Features, settings: LinearConfig, streams: Streams, num_classes: int
) -> dict[str, float]:
    predicted = linear.fit(train, settings, streams, num_classes).predict(evaluated)
    return {score.name: score.value for score in accuracies(predicted, evaluated.classes)}


def test_all_heads_at_once_equal_torch_sgd_one_by_one() -> None:
    settings = LinearConfig(learning_rates=(0.01, 0.3, 2.0), steps=40, batch_size=32)
    train = _blobs(0, 200)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, CLASSES, generator=generator) * 0.01
    batches = torch.randint(0, 200, (40, 32), generator=generator)
    weight, bias = linear.train_heads(train.cls, train.classes, start, batches, settings)
    for index, rate in enumerate(settings.learning_rates):
        head = torch.nn.Linear(16, CLASSES)
        head.weight.data, head.bias.data = start.T.clone(), torch.zeros(CLASSES)
        optimizer = torch.optim.SGD(head.parameters(), lr=rate * 32 / 256, momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0)
        for batch in batches:
            optimizer.zero_grad()
            functional.cross_entropy(head(train.cls[batch]), train.classes[batch]).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weight[:, index], head.weight.data.T, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[index], head.bias.data, rtol=1e-4, atol=1e-6)


def test_near_logistic_regression_on_an_easy_set() -> None:
    train, evaluated = _blobs(0, 2_000, spread=1.2), _blobs(1, 2_000, spread=1.2)
    ours = _probe(train, evaluated, LinearConfig(), Streams(0), CLASSES)
    for name, inputs in (
        ("linear/top1", lambda f: f.cls),
        ("linear_mean_patch/top1", lambda f: torch.cat([f.cls, f.mean_patch], dim=1)),
    ):
        reference = LogisticRegression(max_iter=1_000).fit(inputs(train).numpy(), train.classes.numpy())
        expected = reference.score(inputs(evaluated).numpy(), evaluated.classes.numpy())
        assert 0.8 < expected < 1
        assert ours[name] == pytest.approx(expected, abs=0.015)
    assert list(ours) == ["linear/top1", "linear_mean_patch/top1"]


def test_code_planted_in_the_class_token() -> None:
    def planted(seed: int) -> Features:
        noise = _random(seed, 600)
        return Features(functional.one_hot(noise.classes, 16).float() * 4, noise.mean_patch, noise.classes)

    scores = _probe(planted(0), planted(1), LinearConfig(), Streams(0), CLASSES)
    assert scores == {"linear/top1": 1.0, "linear_mean_patch/top1": 1.0}


def test_code_planted_in_the_patches_alone_is_seen_by_their_family_alone() -> None:
    def planted(seed: int) -> Features:
        noise = _random(seed, 3_000)
        return Features(noise.cls, functional.one_hot(noise.classes, 16).float() * 4, noise.classes)

    scores = _probe(planted(0), planted(1), LinearConfig(), Streams(0), CLASSES)
    assert scores["linear_mean_patch/top1"] == 1.0
    assert scores["linear/top1"] == pytest.approx(0.2, abs=0.03)  # chance; four standard errors are 0.029


def test_random_features_are_at_chance() -> None:
    scores = _probe(_random(0, 2_000), _random(1, 4_000), LinearConfig(), Streams(0), CLASSES)
    assert list(scores.values()) == pytest.approx([0.2, 0.2], abs=0.026)


def test_same_bits_again_and_after_other_draws_but_not_for_another_seed() -> None:
    train, evaluated = _blobs(0, 400, spread=2), _blobs(1, 100)
    settings = LinearConfig(steps=30)
    streams = Streams(3)
    first = linear.fit(train, settings, streams, CLASSES)
    torch.rand(7, generator=streams.torch("probe/linear"))
    torch.manual_seed(123)
    again = linear.fit(train, settings, streams, CLASSES)
    other = linear.fit(train, settings, Streams(4), CLASSES)
    for family, head in first.heads.items():
        assert torch.equal(head.weight, again.heads[family].weight)
        assert not torch.equal(head.weight, other.heads[family].weight)
    ours, theirs = first.predict(evaluated), linear.fit(train, settings, streams, CLASSES).predict(evaluated)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["linear/top1"].dtype == torch.int64 and ours["linear/top1"].shape == (100,)


def test_evaluated_split_does_not_choose_the_learning_rate() -> None:
    train = _blobs(0, 400, spread=2)
    settings = LinearConfig(learning_rates=(1e-6, 0.03), steps=50)
    chosen = linear.fit(train, settings, Streams(0), CLASSES)
    assert {head.learning_rate for head in chosen.heads.values()} == {0.03}
    mislabelled = Features(train.cls, train.mean_patch, (train.classes + 1) % CLASSES)
    worst = _probe(train, mislabelled, settings, Streams(0), CLASSES)
    assert max(worst.values()) < 0.2  # choosing on the evaluated split would take the untrained head, at chance


def test_held_out_images_are_not_trained_on() -> None:
    """Every image has a feature of its own, whose weights move only where the image is trained on."""
    train = _blobs(0, 1_000)
    marked = Features(torch.eye(1_000), train.mean_patch, train.classes)
    settings = LinearConfig(learning_rates=(0.1,), steps=20, batch_size=100)
    head = linear.fit(marked, settings, Streams(0), CLASSES).heads["linear"]
    start = torch.randn(1_000, CLASSES, generator=torch.Generator().manual_seed(Streams(0).seed_for("probe/linear")))
    moved = (head.weight - start * linear.INIT_STD).abs().amax(dim=1) > 0
    assert int(moved.sum()) == 900


def test_infinite_head_never_wins() -> None:
    inputs, classes = torch.eye(2), torch.tensor([0, 1])
    weight = torch.stack([torch.eye(2) * float("nan"), -torch.eye(2)], dim=1)  # the second is always wrong
    assert linear._best(inputs, classes, weight, torch.zeros(2, 2)) == 1


def test_without_class_token_and_with_few_images() -> None:
    few = _blobs(0, 16)
    patches = Features(None, few.mean_patch, few.classes)
    scores = _probe(patches, patches, LinearConfig(steps=20), Streams(0), CLASSES)
    assert list(scores) == ["linear_mean_patch/top1"]
    with pytest.raises(ValueError, match="at least two"):
        linear.fit(few.at(torch.tensor([0])), LinearConfig(), Streams(0), CLASSES)
