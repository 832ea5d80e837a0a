"""Weighted k-nearest-neighbour classification against the official implementation's numbers."""

from typing import Any

import pytest
import torch

from tests.golden_files import Golden, close
from trainers.config import KnnConfig
from trainers.probes import knn
from trainers.probes.classification import Features

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("knn")


def features(golden: Golden, split: str) -> Features:
    tokens = golden[f"{split}_features"]
    return Features(tokens, torch.zeros_like(tokens), golden[f"{split}_labels"])


def fitted(golden: Golden, ks: tuple[int, ...]) -> Any:
    settings = KnnConfig(k=ks, temperature=golden["T"])
    return knn.fit(features(golden, "train"), settings, golden["num_classes"])


def votes(probe: knn.KnnProbe, queries: torch.Tensor) -> dict[int, torch.Tensor]:
    return probe._votes(*probe._neighbors(queries))


def ks_of(golden: Golden) -> tuple[int, ...]:
    return tuple(golden["ks"].tolist())


def test_votes_of_the_given_neighbours(golden: Golden) -> None:
    most = max(ks_of(golden))
    similarity, classes = golden[f"neighbor_sims_k{most}"], golden[f"neighbor_labels_k{most}"]
    found = knn.votes(similarity, classes, ks_of(golden), golden["T"], golden["num_classes"])
    for k in ks_of(golden):
        close(found[k].float(), golden[f"probas_k{k}"])
        alone = knn.votes(similarity[:, :k], classes[:, :k], (k,), golden["T"], golden["num_classes"])
        close(alone[k].float(), golden[f"probas_k{k}_alone"])


def test_neighbours_and_votes_of_features(golden: Golden) -> None:
    found = votes(fitted(golden, ks_of(golden)), golden["test_features"])
    for k in ks_of(golden):
        close(found[k].float(), golden[f"probas_k{k}"])
        close(votes(fitted(golden, (k,)), golden["test_features"])[k].float(), golden[f"probas_k{k}_alone"])


def test_predicted_classes(golden: Golden) -> None:
    predicted = fitted(golden, ks_of(golden)).predict(features(golden, "test"))
    names = {k: "knn/top1" if k == 20 else f"knn/k{k}/top1" for k in ks_of(golden)}
    for k, name in names.items():
        assert torch.equal(predicted[name], golden[f"pred_k{k}"]), k
