"""The linear probe: equal to torch's SGD, scikit-learn on an easy set, planted codes, chance, determinism."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from trainers.config import LinearConfig
from trainers.probes import HeadDiverged, heads, linear, linear_inputs
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


@pytest.mark.parametrize("classes", [CLASSES, 40])  # few and many; the softmax of few is our own
def test_all_heads_at_once_equal_torch_sgd_one_by_one(classes: int) -> None:
    rates = (0.01, 0.1, 0.3, 1.0, 2.0, 3.0)  # with three groups more heads than fit one kernel's short cut
    steps, batch = 30, 32
    generator = torch.Generator().manual_seed(0)
    wide, labels = torch.randn(200, 24, generator=generator), torch.randint(0, classes, (200,), generator=generator)
    columns = (slice(8, 16), slice(8, 24), slice(0, 24))
    starts = [torch.randn(part.stop - part.start, classes, generator=generator) * 0.01 for part in columns]
    batches = torch.randint(0, 200, (steps, batch), generator=generator)
    groups = [heads.Group(*pair) for pair in zip(columns, starts, strict=True)]
    pairs = ((wide[index], labels[index]) for index in batches)
    learned = heads.train(pairs, steps, groups, torch.tensor(rates) * batch / 256)
    for part, start, found in zip(columns, starts, learned, strict=True):
        for index, rate in enumerate(rates):
            head = torch.nn.Linear(len(start), classes)
            head.weight.data, head.bias.data = start.T.clone(), torch.zeros(classes)
            optimizer = torch.optim.SGD(head.parameters(), lr=rate * batch / 256, momentum=0.9, weight_decay=0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
            for rows in batches:
                optimizer.zero_grad()
                functional.cross_entropy(head(wide[rows][:, part]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
            torch.testing.assert_close(found.weight_FKC[:, index], head.weight.data.T, rtol=1e-3, atol=2e-6)
            torch.testing.assert_close(found.bias_KC[index], head.bias.data, rtol=1e-3, atol=2e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.zeros(4, 2, 13, CLASSES)
    logits[..., 1] = 500.0
    expected = functional.one_hot(torch.ones(4, 2, 13, dtype=torch.int64), CLASSES).float()
    torch.testing.assert_close(heads._softmax(logits), expected)


def _blocks(seed: int, count: int) -> Features:
    """Noise in the class tokens of four blocks, 3 wide, and in the patches."""
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.normal(0, 1, (count, 4, 8))).float()
    classes = torch.from_numpy(rng.integers(0, CLASSES, count))
    return Features(tokens[:, -1], torch.from_numpy(rng.normal(0, 1, (count, 8))).float(), classes, tokens)


@pytest.mark.parametrize("most", [4, 3])
def test_the_wide_input_is_that_of_dinov2(most: int) -> None:
    """create_linear_input: class tokens of the last blocks, the last one last, then the last block's mean patch."""
    seen = _blocks(0, 6)
    inputs = linear_inputs.inputs_of(seen, (1, most))
    names = [(part.family, part.blocks) for part in inputs]
    assert names == [("linear", 1), ("linear", most), ("linear_mean_patch", 1), ("linear_mean_patch", most)]
    for part in inputs:
        parts = [seen.cls_blocks[:, block] for block in range(4 - part.blocks, 4)]
        parts += [seen.mean_patch] if part.family == "linear_mean_patch" else []
        assert torch.equal(linear_inputs.wide(seen, most)[:, part.columns], torch.cat(parts, dim=1))
    starts = [linear._start(part, CLASSES, Streams(0))[:8] for part in inputs]
    assert not any(torch.equal(starts[one], starts[other]) for one in range(4) for other in range(one))


def test_one_step_by_hand() -> None:
    """Learning rates are per 256 images: of a batch of 64 the gradient counts a quarter."""
    train = _blobs(0, 120)
    settings = LinearConfig(learning_rates=(0.8,), steps=1, batch_size=64, select_on="val")
    streams = Streams(0)
    probe = linear.fit(train, settings, streams, CLASSES, chosen_on=train)
    (index,) = linear._batches(120, settings, torch.Generator().manual_seed(streams.seed_for("probe/linear")))
    head = torch.nn.Linear(16, CLASSES)
    head.weight.data = linear._start(probe.heads["linear"].input, CLASSES, streams).T.clone()
    head.bias.data.zero_()
    functional.cross_entropy(head(train.cls[index]), train.classes[index]).backward()
    torch.testing.assert_close(probe.heads["linear"].weight, (head.weight - 0.8 / 4 * head.weight.grad).T.detach())


def test_a_shallow_backbone_gives_the_blocks_that_it_has() -> None:
    seen = _blocks(0, 6)
    shallow = Features(seen.cls, seen.mean_patch, seen.classes, seen.cls_blocks[:, 1:])
    inputs = linear_inputs.inputs_of(shallow, (1, 3, 4))
    assert [part.blocks for part in inputs] == [1, 3, 1, 3]
    assert [(part.columns.start, part.columns.stop) for part in inputs] == [(16, 24), (0, 24), (16, 32), (0, 32)]
    assert linear_inputs.wide(shallow, 3).shape == (6, 32)


@pytest.mark.parametrize(("block", "blocks", "scores"), [(0, (1,), "low"), (0, (4,), "high"), (1, (1, 3), "high")])
def test_code_planted_in_an_earlier_block(block: int, blocks: tuple[int, ...], scores: str) -> None:
    def planted(seed: int) -> Features:
        noise = _blocks(seed, 1_500)
        noise.cls_blocks[:, block] = functional.one_hot(noise.classes, 8).float() * 4
        return noise

    settings = LinearConfig(blocks=blocks)
    probe = linear.fit(planted(0), settings, Streams(0), CLASSES)
    evaluated = planted(1)
    found = {score.name: score.value for score in accuracies(probe.predict(evaluated), evaluated.classes)}
    if scores == "high":
        assert list(found.values()) == pytest.approx([1.0, 1.0], abs=0.01)
        assert {head.input.blocks for head in probe.heads.values()} == {blocks[-1]}
    else:
        assert list(found.values()) == pytest.approx([0.2, 0.2], abs=0.05)


def test_a_head_does_not_depend_on_which_others_are_trained_beside_it() -> None:
    train = _blocks(0, 300)
    few, many = (LinearConfig(blocks=b, learning_rates=r, steps=20) for b, r in (((1,), (0.1,)), ((1, 4), (0.01, 0.1))))
    alone = linear.fit(train, few, Streams(0), CLASSES).trained
    together = linear.fit(train, many, Streams(0), CLASSES).trained
    assert len(alone) == 2 and len(together) == 8
    for head in alone:
        (same,) = (
            h for h in together if (h.input.family, h.input.blocks, h.learning_rate) == (head.input.family, 1, 0.1)
        )
        torch.testing.assert_close(same.weight, head.weight)


@pytest.mark.parametrize("blocks", [(1,), (1, 4)])
def test_features_too_large_to_lay_out_give_the_same(blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    train, settings = _blocks(0, 300), LinearConfig(blocks=blocks, steps=20)
    laid_out = linear.fit(train, settings, Streams(0), CLASSES).trained
    monkeypatch.setattr(linear_inputs, "_SMALL", 0)
    for one, other in zip(laid_out, linear.fit(train, settings, Streams(0), CLASSES).trained, strict=True):
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_the_heads_are_reported_with_what_they_scored_where_they_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_CHUNK", 33)
    train = _blobs(0, 400, spread=2)
    settings = LinearConfig(learning_rates=(1e-6, 0.03), steps=50)
    probe = linear.fit(train, settings, Streams(0), CLASSES)
    name, arrays = probe.report()
    assert name == "linear_heads"
    assert arrays["family"].tolist() == ["linear"] * 2 + ["linear_mean_patch"] * 2
    assert arrays["blocks"].tolist() == [1, 1, 1, 1]
    assert arrays["learning_rate"].tolist() == [1e-6, 0.03] * 2
    assert arrays["chosen"].tolist() == [False, True, False, True]
    held_out = torch.randperm(400, generator=torch.Generator().manual_seed(Streams(0).seed_for("probe/linear")))[:50]
    judged = train.at(held_out)
    for index, head in enumerate(probe.trained):
        logits = linear_inputs.wide(judged, 1)[:, head.input.columns] @ head.weight + head.bias
        assert arrays["accuracy"][index] == pytest.approx(float((logits.argmax(1) == judged.classes).float().mean()))
        assert arrays["loss"][index] == pytest.approx(float(functional.cross_entropy(logits, judged.classes)), rel=1e-5)


def test_chosen_on_validation_all_training_images_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_CHUNK", 33)  # chunks do not divide the images
    train = _blobs(0, 300, spread=2)
    marked = Features(torch.eye(300), train.mean_patch, train.classes)
    settings = LinearConfig(learning_rates=(1e-6, 0.03), steps=20, batch_size=100, select_on="val")
    # To be right on these is to be wrong on the training images: the untrained head is the best.
    mislabelled = Features(marked.cls, train.mean_patch, (train.classes + 1) % CLASSES)
    probe = linear.fit(marked, settings, Streams(0), CLASSES, chosen_on=mislabelled)
    assert {head.learning_rate for head in probe.heads.values()} == {1e-6}
    start = torch.randn(300, CLASSES, generator=torch.Generator().manual_seed(Streams(0).seed_for("probe/linear")))
    trained = next(head for head in probe.trained if head.learning_rate == 0.03)
    assert bool(((trained.weight - start * linear.INIT_STD).abs().amax(dim=1) > 0).all())
    judged = sum(probe.predict(mislabelled)["linear/top1"] == mislabelled.classes)
    assert probe.heads["linear"].right == int(judged) and probe.num_chosen_on == 300


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


def test_the_best_head_is_right_most_often_then_of_lower_loss_then_first() -> None:
    def head(right: int, loss: float) -> linear.Head:
        read = linear_inputs.Input("linear", 1, slice(0, 1))
        return linear.Head(read, torch.zeros(1, 2), torch.zeros(2), 0.1, right, loss)

    nan, inf, worst, poor, good, same = (
        head(9, float("nan")),
        head(9, float("inf")),
        head(0, 9.0),
        head(3, 0.5),
        head(3, 0.4),
        head(3, 0.4),
    )
    assert linear._best([nan, inf, worst]) is worst
    assert linear._best([worst, poor, good, same]) is good


def test_a_family_without_finite_head_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    train = _blobs(0, 200)
    patches = train.mean_patch * 1e30  # finite, but heads on them are not
    probe = linear.fit(replace(train, mean_patch=patches), LinearConfig(steps=20), Streams(0), CLASSES)
    assert set(probe.predict(train)) == {"linear/top1"}
    assert "no linear_mean_patch/top1: the logits of all its heads are infinite or NaN" in caplog.text
    columns = probe.report().arrays
    assert columns["family"][columns["chosen"]].tolist() == ["linear"]
    with pytest.raises(HeadDiverged, match="lower learning_rates may help"):
        linear.fit(replace(train, cls=patches, mean_patch=patches), LinearConfig(steps=20), Streams(0), CLASSES)


def test_without_class_token_and_with_few_images() -> None:
    few = _blobs(0, 16)
    patches = Features(None, few.mean_patch, few.classes)
    scores = _probe(patches, patches, LinearConfig(steps=20), Streams(0), CLASSES)
    assert list(scores) == ["linear_mean_patch/top1"]
    with pytest.raises(ValueError, match="at least two"):
        linear.fit(few.at(torch.tensor([0])), LinearConfig(), Streams(0), CLASSES)
