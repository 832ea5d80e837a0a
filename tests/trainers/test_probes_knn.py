"""kNN against an independent brute force in numpy, votes by hand, planted codes, chance, and which k exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainers.config import KnnConfig
from trainers.probes import classification, knn
from trainers.probes.classification import Features, accuracies

CLASSES = 6


def _features(seed: int, count: int, spread: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(0, 1, (CLASSES, 12))
    classes = rng.integers(0, CLASSES, count)
    # Lengths vary over two decades: only directions count.
    cls = rng.normal(centres[classes], spread) * rng.uniform(0.1, 10, (count, 1))
    return Features(torch.from_numpy(cls).float(), torch.zeros(count, 12), torch.from_numpy(classes))


def _probe(train: Features, evaluated: Features, settings: KnnConfig) -> dict[str, float]:
    predicted = knn.fit(train, settings, CLASSES).predict(evaluated)
    return {score.name: score.value for score in accuracies(predicted, evaluated.classes)}


def _brute_force(train: Features, evaluated: Features, k: int, temperature: float) -> np.ndarray:
    a, b = train.cls.double().numpy(), evaluated.cls.double().numpy()
    predicted = []
    for query in b:
        cosine = [float(query @ row / np.sqrt(query @ query) / np.sqrt(row @ row)) for row in a]
        nearest = sorted(range(len(a)), key=lambda i: -cosine[i])[:k]
        votes = np.zeros(CLASSES)
        for i in nearest:
            votes[int(train.classes[i])] += np.exp(cosine[i] / temperature)
        predicted.append(int(np.argmax(votes)))
    return np.array(predicted)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_brute_force(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    train, evaluated = _features(0, 150, spread=2), _features(1, 40, spread=2)
    settings = KnnConfig(k=(1, 5, 20, 100), temperature=temperature)
    predicted = knn.fit(train, settings, CLASSES).predict(evaluated)
    assert list(predicted) == ["knn/k1/top1", "knn/k5/top1", "knn/top1", "knn/k100/top1"]
    for k, ours in zip(settings.k, predicted.values(), strict=True):
        np.testing.assert_array_equal(ours, _brute_force(train, evaluated, k, temperature))
    assert len({tuple(ours.tolist()) for ours in predicted.values()}) >= 3  # the cases tell the k apart
    monkeypatch.setattr(knn, "_QUERIES", 7)
    monkeypatch.setattr(knn, "_KNOWN", 11)  # fewer than most k
    chunked = knn.fit(train, settings, CLASSES).predict(evaluated)
    assert all(torch.equal(chunked[name], predicted[name]) for name in predicted)


def _exact(seed: int, count: int) -> Tensor:
    """Features whose cosines are multiples of 1/4 or so, rounded alike by every matrix product: many are equal."""
    signs = np.random.default_rng(seed).integers(0, 2, (count, 4)) * 2.0 - 1.0
    return torch.from_numpy(signs * 2.0 ** np.random.default_rng(seed).integers(-3, 4, (count, 1))).float()


@pytest.mark.parametrize(("queries", "known"), [(512, 16_384), (3, 16), (40, 7), (1, 1), (512, 50)])
@pytest.mark.parametrize("k", [1, 9, 60, 200])
def test_of_equal_neighbours_the_lower_index_is_nearer(
    queries: int, known: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "_QUERIES", queries)
    monkeypatch.setattr(knn, "_KNOWN", known)
    asked, others = _exact(0, 23), _exact(1, 200)
    found = knn.neighbors(asked, others, k, torch.device("cpu"))
    cosine = (functional.normalize(asked, dim=1) @ functional.normalize(others, dim=1).T).numpy()
    assert len(np.unique(cosine)) == 5
    expected = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.indices, expected)
    np.testing.assert_array_equal(found.similarity, np.take_along_axis(cosine, expected, axis=1))


def test_only_a_chunk_of_the_known_features_is_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    highest = knn._highest

    def watched(similarity: Tensor, k: int) -> knn.Neighbors:
        nonlocal largest
        largest = max(largest, similarity.numel())
        return highest(similarity, k)

    monkeypatch.setattr(knn, "_highest", watched)
    monkeypatch.setattr(knn, "_QUERIES", 8)
    monkeypatch.setattr(knn, "_KNOWN", 32)
    train, evaluated = _features(0, 200), _features(1, 50)
    knn.fit(train, KnnConfig(), CLASSES).predict(evaluated)
    assert largest == 8 * 32


def test_features_in_a_file_give_the_same(tmp_path: Path) -> None:
    train, evaluated = _features(0, 150, spread=2), _features(1, 40, spread=2)
    file = np.memmap(tmp_path / "features", np.float32, "w+", shape=(150, 12))
    file[:] = train.cls.numpy()
    mapped = Features(torch.from_numpy(file), train.mean_patch, train.classes)
    expected, ours = (knn.fit(part, KnnConfig(), CLASSES).predict(evaluated) for part in (train, mapped))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    probe = knn.fit(mapped, KnnConfig(), CLASSES)
    assert probe.features.data_ptr() == mapped.cls.data_ptr()  # no copy in memory


def test_votes_by_hand() -> None:
    similarity = torch.tensor([[1.0, 0.5, 0.5]])
    classes = torch.tensor([[2, 0, 0]])
    total = np.exp(2) + 2 * np.exp(1)
    votes = knn.votes(similarity, classes, (1, 3), 0.5, 3)
    np.testing.assert_allclose(votes[1], [[0, 0, np.exp(2) / total]])
    np.testing.assert_allclose(votes[3], [[2 * np.e / total, 0, np.exp(2) / total]])  # one near beats two far
    assert knn.votes(similarity, classes, (3,), 5.0, 3)[3].argmax() == 0  # at a high temperature two beat one


def test_planted_code_and_chance() -> None:
    rng = np.random.default_rng(0)
    classes = torch.from_numpy(rng.integers(0, CLASSES, 1_200))
    code = functional.one_hot(classes, 12).float() + 0.1 * torch.from_numpy(rng.normal(0, 1, (1_200, 12))).float()
    noise = torch.from_numpy(rng.normal(0, 1, (1_200, 12))).float()
    half = torch.arange(600)
    for cls, low, high in ((code, 1.0, 1.0), (noise, 1 / 6 - 0.06, 1 / 6 + 0.06)):
        whole = Features(cls, cls, classes)
        scores = _probe(whole.at(half), whole.at(half + 600), KnnConfig())
        assert list(scores) == ["knn/k10/top1", "knn/top1", "knn/k100/top1", "knn/k200/top1"]
        assert all(low <= score <= high for score in scores.values())


def test_k_beyond_the_training_set_is_absent() -> None:
    train, evaluated = _features(0, 20), _features(1, 9)
    assert list(_probe(train, evaluated, KnnConfig())) == ["knn/k10/top1", "knn/top1"]
    assert _probe(train, evaluated, KnnConfig(k=(21,))) == {}


def test_k_beyond_the_training_set_are_said_once_in_a_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train: Any = MagicMock()
    train.__len__.return_value = 20
    train.data.class_names = tuple("abcdef")
    monkeypatch.setattr(classification, "features", lambda seen: _features(0, 20))
    for k in ((10, 20), (10, 21, 100)):
        context: Any = None
        knn.Knn(KnnConfig(k=k), context).fit(train, train)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["k-NN has 20 training images and leaves out k = 21, 100"]


def test_without_class_token_the_mean_patch_is_the_feature() -> None:
    train, evaluated = _features(0, 100, spread=0.3), _features(1, 30, spread=0.3)
    patches = [Features(None, part.cls, part.classes) for part in (train, evaluated)]
    expected = knn.fit(train, KnnConfig(), CLASSES).predict(evaluated)
    ours = knn.fit(patches[0], KnnConfig(), CLASSES).predict(patches[1])
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_votes_are_held_for_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    train, evaluated = _features(0, 300), _features(1, 60)
    whole = knn.fit(train, KnnConfig(), CLASSES).predict(evaluated)
    largest: list[int] = []
    votes = knn.votes

    def watched(*arguments: Any) -> Any:
        found = votes(*arguments)
        largest.append(sum(part.numel() for part in found.values()))
        return found

    monkeypatch.setattr(knn, "votes", watched)
    monkeypatch.setattr(knn, "_VOTES", 8 * CLASSES)
    few = knn.fit(train, KnnConfig(), CLASSES).predict(evaluated)
    assert max(largest) <= 8 * CLASSES and len(largest) == 30
    assert all(torch.equal(whole[name], few[name]) for name in whole) and whole.keys() == few.keys()
