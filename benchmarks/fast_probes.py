"""The whole fast set of probes on 2,000 images of scenes for a nano ViT, fitted and scored, against a minute."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import Comparison, Goal, Report, Settings
from trainers.config import TrialConfig, resolve
from trainers.data import DataSet, open_data
from trainers.methods.openclip import OpenCLIP
from trainers.probes import Context
from trainers.probes.fitted import Probes
from trainers.streams import Streams
from trainers.vit import ViT

IMAGES = 2_000  # that probes learn from, and as many that they are scored on
SECONDS = 60.0
PROBES = ("linear", "knn", "zero_shot", "segmentation", "depth", "object_discovery")


def measure(settings: Settings) -> Report:
    """Wall seconds of fitting all probes and scoring them on test images, as shares of what is allowed."""
    torch.set_num_threads(settings.threads)
    together: list[float] = []
    alone: dict[str, list[float]] = {probe: [] for probe in PROBES}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        config = _config(PROBES)
        assert isinstance(config.model.image_size, int)
        data = open_data(config.data, config.execution, config.model.image_size, Path(folder))
        for _ in range(settings.pairs):
            together.append(_seconds(PROBES, data))
            for probe in PROBES:
                alone[probe].append(_seconds((probe,), data))
    name = f"all fast probes, nano, {config.model.image_size} px, {IMAGES} training and {IMAGES} test images"
    sides = ("fit on training images and score on test images, features extracted once", "what is allowed")
    allowed = [SECONDS] * settings.pairs
    parts = [
        Comparison(f"{probe} by itself", (f"the same of {probe} alone", "what is allowed"), times, allowed, "s", None)
        for probe, times in alone.items()
    ]
    return Report([Comparison(name, sides, together, allowed, "s", Goal(1.0)), *parts])


def _config(probes: Sequence[str]) -> TrialConfig:
    """Of openclip, which alone has all probes, on scenes of 64 px with 64 patches."""
    return resolve(
        {
            "method": "openclip",
            "model": {"size": "nano", "patch_size": 8},
            "data": {"decode_size": 64, "scenes": {"num_train": IMAGES, "num_validation": 500, "num_test": IMAGES}},
            "evaluation": {"probes": list(probes), "train_images": IMAGES},
        }
    )


def _seconds(probes: Sequence[str], data: DataSet) -> float:
    config = _config(probes)
    backbone = ViT(config.model, Streams(0))
    method = OpenCLIP(config, backbone, len(data.class_names), Streams(0))
    context = Context(Streams(0), method, config.method)
    started = time.perf_counter()
    fitted = Probes(config.evaluation, data, config.model, context, torch.device("cpu")).fit(backbone, at_end=True)
    scores = fitted.score(backbone, "test").metrics
    seconds = time.perf_counter() - started
    assert {name.split("/")[1] for name in scores} >= set(probes), "a probe gave no metric"
    return seconds
