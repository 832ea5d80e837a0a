"""What all tests share: one thread of torch, a tiny trial, and a cache of decoded data for the session."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two busy threads on two cores crawl

import pytest

TINY: dict[str, Any] = {
    "model.size": "nano",
    "model.patch_size": 8,
    "data.decode_size": 16,
    "data.scenes.num_train": 128,
    "data.scenes.num_validation": 32,
    "data.scenes.num_test": 32,
    "optim.steps": 12,
    "optim.batch_size": 16,
    "evaluation.points": 3,
    "evaluation.train_images": 64,
    "evaluation.linear.steps": 20,
    "evaluation.linear.batch_size": 16,
    "evaluation.knn.k": [10, 20],
    "tokens.probe_images": 16,
    "execution.threads": 1,
    "execution.device": "cpu",
    "execution.checkpoint_seconds": 0.0,
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Dotted settings of a trial that trains in about a second."""
    return dict(TINY)


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of decoded data sets that all tests share."""
    return tmp_path_factory.mktemp("cache")
