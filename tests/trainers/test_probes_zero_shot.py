"""Zero-shot classification: by hand, against open_clip's own classifier, planted texts, and a trial that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import tokenize
from torch import Tensor, nn

from tests.trainers import coded
from tests.trainers.runs import run
from tests.trainers.test_openclip import config, method
from trainers import text
from trainers.config import EvaluationConfig, ZeroShotConfig
from trainers.probes import Context, zero_shot
from trainers.probes.fitted import Probes, Scores
from trainers.probes.zero_shot import Classifier, ZeroShot, class_features
from trainers.streams import Streams


class Joint(nn.Module):
    """A joint space whose texts a test plants; images are their class tokens."""

    def __init__(self, texts: dict[str, Sequence[float]]) -> None:
        super().__init__()
        self.texts = texts
        self.part = nn.Dropout()

    def text_features(self, texts: Sequence[str]) -> Tensor:
        assert not self.part.training
        return F.normalize(torch.tensor([self.texts[text] for text in texts]), dim=-1)

    def image_features(self, cls_BD: Tensor) -> Tensor:
        return F.normalize(cls_BD, dim=-1)


def test_a_class_is_the_mean_of_its_texts_at_unit_length() -> None:
    joint = Joint({"a cat.": [10, 0], "cat": [0, 1], "a {dog}.": [0.6, 0.8], "{dog}": [0.6, 0.8]}).eval()
    found = class_features(joint, ("cat", "{dog}"), ("a {}.", "{}"))
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.6, 0.8]]))  # long texts count no more


def test_other_braces_of_a_template_stay() -> None:
    joint = Joint({"{x} a cat {0}": [3.0, 4.0]}).eval()
    assert class_features(joint, ["cat"], ["{x} a {} {0}"]).tolist() == [pytest.approx([0.6, 0.8])]


def test_texts_of_few_classes_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    names, templates = [f"c{index}" for index in range(7)], ("a {}.", "{}", "the {}")
    texts = {form.replace("{}", name): rng.normal(size=4).tolist() for name in names for form in templates}
    joint = Joint(texts).eval()
    whole = class_features(joint, names, templates)
    asked: list[int] = []
    features = joint.text_features
    monkeypatch.setattr(joint, "text_features", lambda some: (asked.append(len(some)), features(some))[1])
    for most, expected in ((8, [6, 6, 6, 3]), (2, [3] * 7)):
        asked.clear()
        monkeypatch.setattr(zero_shot, "_TEXTS", most)
        assert torch.equal(class_features(joint, names, templates), whole) and asked == expected


def test_ranks_by_hand_and_of_equal_classes_the_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "_CHUNK", 2)
    classifier = Classifier(Joint({}), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]))
    cls_nD = torch.tensor([[5.0, 1.0]] * 4 + [[0.0, 3.0]])
    assert classifier.ranks(cls_nD, torch.tensor([0, 1, 2, 3, 1])).tolist() == [0, 2, 1, 3, 0]
    with pytest.raises(FloatingPointError, match="diverged"):
        classifier.ranks(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))


def scored(joint: nn.Module, cls_nD: Tensor, classes: np.ndarray, names: Sequence[str], **settings: Any) -> Scores:
    """The probe through all of its seams, on images whose class tokens are given; the last half is the test set."""
    count = len(cls_nD)
    pixels = np.zeros((count, 16, 16, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = (part[:, None, None] for part in np.divmod(np.arange(count), 256))
    backbone = coded.Coded(cls_nD[:, None], torch.zeros(count, 1, dtype=torch.bool), cls_nD)
    subject = coded.coded_subject(backbone, pixels, classes, count // 2)
    data = replace(subject.data, class_names=tuple(names), templates=("one {}.",))
    evaluation = EvaluationConfig(probes=("zero_shot",), zero_shot=settings)
    context = Context(Streams(0), joint, "openclip")
    probes = Probes(evaluation, data, subject.model, context, subject.device)
    return probes.fit(backbone).score(backbone, "test")


def one_hot_texts(form: str, count: int) -> dict[str, list[float]]:
    return {form.replace("#", f"c{index}"): torch.eye(8)[index].tolist() for index in range(count)}


def test_texts_that_say_what_images_show_give_all_and_noise_gives_chance() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 8, 1_000)
    names = [f"c{index}" for index in range(8)]
    joint = Joint(one_hot_texts("one #.", 8)).train()
    tokens = 3 * torch.eye(8)[torch.from_numpy(classes)]
    found = scored(joint, tokens, classes, names)
    assert found.metrics == {"test/zero_shot/top1": 1.0, "test/zero_shot/top5": 1.0}
    assert joint.part.training  # the method is left as it was
    assert found.per_image["test/zero_shot/top1"].tolist() == [1.0] * 500
    noise = scored(joint, torch.from_numpy(rng.normal(0, 1, (1_000, 8))).float(), classes, names)
    assert noise.metrics["test/zero_shot/top1"] == pytest.approx(1 / 8, abs=0.06)  # four standard errors
    assert noise.metrics["test/zero_shot/top5"] == pytest.approx(5 / 8, abs=0.087)
    constant = scored(joint, torch.ones(1_000, 8), classes, names).metrics
    assert constant["test/zero_shot/top1"] == float((classes[500:] == 0).mean())
    assert constant["test/zero_shot/top5"] == float((classes[500:] < 5).mean())


def test_own_templates_replace_those_of_the_data_set_and_few_classes_have_no_top5() -> None:
    classes = np.arange(40) % 5
    joint = Joint(one_hot_texts("two #", 5) | one_hot_texts("#!", 5))
    tokens = torch.eye(8)[torch.from_numpy(classes)]
    found = scored(joint, tokens, classes, [f"c{index}" for index in range(5)], templates=("two {}", "{}!"))
    assert found.metrics == {"test/zero_shot/top1": 1.0}


def test_what_it_needs() -> None:
    with pytest.raises(ValueError, match="probe zero_shot needs a method that compares images with texts; method is d"):
        ZeroShot(ZeroShotConfig(), Context(Streams(0), nn.Identity(), "deit3"))
    with pytest.raises(ValueError, match="method is none"):
        ZeroShot(ZeroShotConfig(), Context(Streams(0), None, "none"))
    with pytest.raises(ValueError, match="'a cat', which has no place for a class"):
        ZeroShotConfig(templates=("a {}", "a cat"))


class Official(nn.Module):
    """Our text tower as open_clip's functions ask for it."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self._ours = ours

    def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
        features = text.encode(self._ours.text, tokens)
        return F.normalize(features, dim=-1) if normalize else features


def test_equals_open_clips_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.methods.openclip._TEXTS", 4)  # chunks do not divide the texts
    ours = method(config())
    templates = ("a photo of a {}.", "many {}", "{}")
    names = ("cat", "Dog", "church bell", "8")
    expected = open_clip.build_zero_shot_classifier(
        Official(ours),
        lambda texts: tokenize(texts, context_length=24),
        names,
        [lambda name, form=form: form.format(name) for form in templates],
        num_classes_per_batch=None,
    )
    before = ours.streams.state_dict()
    found = class_features(ours, names, templates)
    torch.testing.assert_close(found, expected.T, rtol=1e-5, atol=1e-6)
    assert not found.requires_grad and str(ours.streams.state_dict()) == str(before)
    cls_BD = torch.randn(5, ours.image_projection.shape[0], generator=torch.Generator().manual_seed(0))
    images = ours.image_features(cls_BD)
    expected_images = cls_BD @ ours.image_projection.detach()
    torch.testing.assert_close(images, expected_images / expected_images.norm(dim=1, keepdim=True))
    assert not images.requires_grad


def test_checkpointed_towers_give_the_same() -> None:
    plain, saving = (method(config(**{"execution.activation_checkpointing": on})) for on in (False, True))
    assert torch.equal(plain.text_features(["a cat"]), saving.text_features(["a cat"]))


@pytest.mark.slow
def test_a_trained_model_tells_digits_apart_that_an_untrained_one_does_not(tmp_path: Path) -> None:
    """Three hundred steps of the nano recipe on digits and their captions; chance is a tenth."""
    settings = {
        "method": "openclip",
        "model.size": "nano",
        "evaluation.probes": ["zero_shot"],
        "evaluation.points": 1,
        "tokens.measurements": [],
        "data.scenes.num_train": 4_000,
        "data.scenes.num_validation": 500,
        "data.scenes.num_test": 1_000,
    }
    found = {}
    for steps in (5, 300):
        _, reports = run({**settings, "optim.steps": steps}, tmp_path / str(steps), tmp_path / "cache")
        found[steps] = reports[steps]["test/zero_shot/top1"]
    assert found[5] < 0.2
    assert found[300] > 0.3 + found[5]
