"""The probe of object discovery: planted objects, the chosen bias, which images count, whole images, files."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.trainers.discovered import (
    Bright,
    data,
    pictured,
    probe,
    rectangles,
    see,
    split,
    whole,
)
from trainers.config import EvaluationConfig, resolve
from trainers.data import DataSet
from trainers.findings import Arrays, Picture, Score
from trainers.probes import Context, lost, lost_pictures, object_discovery
from trainers.probes.fitted import Probes
from trainers.streams import Streams
from trainers.vit import ViT

BOXES = rectangles(20, seed=0)
NOWHERE = [0.0, 56.0, 8.0, 64.0]  # of no object


def scored(found: Any, seen: Any) -> dict[str, float]:
    return {score.name: score.value for score in found.score(seen) if isinstance(score, Score)}


def discovered(
    opened: DataSet, which: str = "test", backbone: nn.Module | None = None, **settings: Any
) -> dict[str, float]:
    asked, looked = probe(**settings), backbone or Bright()
    found = asked.fit(see(opened, "train", asked, looked), see(opened, "validation", asked, looked))
    return scored(found, see(opened, which, asked, looked))


def test_perfect_features_find_every_object() -> None:
    found = discovered(data(split(BOXES), split(rectangles(20, seed=1))))
    assert found == {
        "object_discovery/corloc": 1.0,
        "object_discovery/bias": 0.0,  # of two that are equally good the one nearest to 0
        "object_discovery/bias_-0.5/corloc": 1.0,
        "object_discovery/bias_0.0/corloc": 1.0,
        "object_discovery/whole_image/corloc": 0.0,
        "object_discovery/images_without_boxes": 0.0,
    }


def test_a_shared_mean_needs_a_bias() -> None:
    """Products of values: object 2, ground 2.25, both 0.5; the bias that parts them is found on validation."""
    found = discovered(data(split(BOXES), split(BOXES)), features="values", normalize=False, biases=(0.0, -1.0, 1.0))
    assert found["object_discovery/bias_0.0/corloc"] == found["object_discovery/bias_1.0/corloc"] == 0.0
    assert found["object_discovery/bias_-1.0/corloc"] == found["object_discovery/corloc"] == 1.0
    assert found["object_discovery/bias"] == -1.0


def test_normalised_values_have_other_products() -> None:
    """Of length 1 they are 1 with their own kind and 0.5 / √(2 · 2.25) = 0.236 with the other."""
    found = discovered(data(split(BOXES), split(BOXES)), features="values", biases=(-0.23, -0.24))
    assert found["object_discovery/bias_-0.23/corloc"] == 0.0
    assert found["object_discovery/bias_-0.24/corloc"] == 1.0


@pytest.mark.parametrize(
    ("method", "kind"),
    [("deit3", "values"), ("openclip", "values"), ("dino", "keys"), ("dinov2", "keys"), ("pretrained", "keys")],
)
def test_features_of_each_method(method: str, kind: str) -> None:
    assert probe(method).reads == {kind}
    assert probe(method, features="queries").reads == {"queries"}
    assert probe(method, whole=True).reads == set()
    with_mean = discovered(data(split(BOXES), split(BOXES)), method=method, biases=(0.0,))["object_discovery/corloc"]
    assert with_mean == (0.0 if kind == "values" else 1.0)


def test_queries_that_are_all_alike_find_the_whole_image() -> None:
    large = [[0.0, 0.0, 64.0, 40.0], *BOXES[:3]]
    found = discovered(data(split(large), split(large)), features="queries")
    assert found["object_discovery/corloc"] == found["object_discovery/whole_image/corloc"] == 0.25


def test_the_bias_is_of_validation_and_serves_other_sets() -> None:
    """On validation only −1 finds anything; on the other set, whose boxes are all of the image, only 0 does."""
    asked, backbone = probe(features="values", normalize=False, biases=(0.0, -1.0)), Bright()
    other = data(split(BOXES, [[[0.0, 0.0, 64.0, 64.0]]] * 20), split(BOXES, [[[0.0, 0.0, 64.0, 64.0]]] * 20))
    first = data(split(BOXES), split(BOXES))
    assert asked.transfers
    found = asked.fit(see(first, "train", asked, backbone), see(first, "validation", asked, backbone))
    transferred = scored(found, see(other, "test", asked, backbone))
    assert (transferred["object_discovery/bias"], transferred["object_discovery/corloc"]) == (-1.0, 0.0)
    assert transferred["object_discovery/bias_0.0/corloc"] == 1.0


def test_another_backbone_keeps_the_bias_and_is_looked_at_anew() -> None:
    opened, asked, backbone = data(split(BOXES), split(BOXES)), probe(), Bright()
    found = asked.fit(see(opened, "train", asked, backbone), see(opened, "validation", asked, backbone))
    seen = len(backbone.sizes)
    assert scored(found, see(opened, "validation", asked, backbone))["object_discovery/corloc"] == 1.0
    assert len(backbone.sizes) == seen  # known already
    blind = Bright(deleted=range(1, 64))
    assert scored(found, see(opened, "validation", asked, blind))["object_discovery/corloc"] == 0.0
    other = data(split(BOXES, [[NOWHERE]] * 20), split(BOXES))
    assert scored(found, see(other, "validation", asked, backbone))["object_discovery/corloc"] == 0.0


def test_images_without_boxes_are_left_out_and_any_box_counts() -> None:
    truth = [[box] for box in BOXES]
    truth[2], truth[5] = [], []
    truth[7] = [NOWHERE, BOXES[7]]
    truth[9] = [NOWHERE]
    opened = data(split(BOXES), split(BOXES, truth))
    asked, backbone = probe(), Bright()
    found = asked.fit(see(opened, "train", asked, backbone), see(opened, "validation", asked, backbone))
    (first, *rest) = [one for one in found.score(see(opened, "test", asked, backbone)) if isinstance(one, Score)]
    assert first.name == "object_discovery/corloc" and first.value == pytest.approx(17 / 18)
    expected = np.ones(20)
    expected[[2, 5]], expected[9] = np.nan, 0
    np.testing.assert_array_equal(first.per_image, expected)
    assert rest[-1] == Score("object_discovery/images_without_boxes", 2.0)


def test_boxes_move_with_the_size_of_the_images() -> None:
    """Seen at half of their size, so that patches are twice as large beside them."""
    coarse = [[0.0, 16.0, 16.0, 32.0], [16.0, 32.0, 48.0, 64.0]]
    opened, asked, backbone = data(split(coarse), split(coarse)), probe(), Bright()
    seen = [see(opened, which, asked, backbone, side=32) for which in ("train", "validation", "test")]
    assert scored(asked.fit(*seen[:2]), seen[2])["object_discovery/corloc"] == 1.0


def test_no_more_images_than_wanted() -> None:
    """Only the first 5 count, of which one has another box; the others have no value of their own."""
    truth = [[box] for box in BOXES]
    for number in range(4, 20):
        truth[number] = [NOWHERE]
    opened, asked, backbone = data(split(BOXES), split(BOXES, truth)), probe(images=5), Bright()
    found = asked.fit(see(opened, "train", asked, backbone), see(opened, "validation", asked, backbone))
    assert sum(size[0] for size in backbone.sizes) == 5  # nobody else reads the rest
    first = next(iter(found.score(see(opened, "test", asked, backbone))))
    assert isinstance(first, Score) and first.value == pytest.approx(0.8)
    np.testing.assert_array_equal(first.per_image, [1, 1, 1, 1, 0] + [np.nan] * 15)
    shared = replace(see(opened, "test", asked, backbone), reads=frozenset({"keys", "norms"}))
    assert scored(found, shared)["object_discovery/corloc"] == pytest.approx(0.8)


def test_protocol_splits_together_choose_and_count() -> None:
    """Training and validation, each with 10 images; the test split, where nothing could be found, is not looked at."""
    truth = [[BOXES[number]] if number < 5 else [NOWHERE] for number in range(10)]
    opened = data(
        split(BOXES[:10], truth),
        split(BOXES, [[NOWHERE]] * 20),
        split(BOXES[10:]),
        protocol_splits=("train", "validation"),
    )
    found = discovered(opened, protocol_splits=True)
    assert found["object_discovery/corloc"] == pytest.approx(15 / 20)
    assert discovered(opened, "validation", protocol_splits=True)["object_discovery/corloc"] == 0.5
    assert discovered(opened)["object_discovery/corloc"] == 0.0
    assert discovered(opened, protocol_splits=True, images=4)["object_discovery/corloc"] == 1.0
    asked, backbone = probe(protocol_splits=True), Bright()
    fitted = asked.fit(see(opened, "train", asked, backbone), see(opened, "validation", asked, backbone))
    assert next(iter(fitted.score(see(opened, "test", asked, backbone)))).per_image is None  # type: ignore[union-attr]
    assert sum(size[0] for size in backbone.sizes) == 20  # the images of the first set are looked at once


def test_protocol_splits_choose_the_bias() -> None:
    everything = [[[0.0, 0.0, 64.0, 64.0]]] * 20
    opened = data(split(BOXES), split(BOXES, everything), split(BOXES), protocol_splits=("test",))
    settings = {"features": "values", "normalize": False, "biases": (0.0, -1.0)}
    assert discovered(opened, **settings)["object_discovery/bias"] == -1.0
    assert discovered(opened, protocol_splits=True, **settings)["object_discovery/bias"] == 0.0


def test_whole_images_are_padded_with_zeros_below_and_on_the_right() -> None:
    """90 × 133 px are 12 × 17 patches of 8 px; an object that touches the corner ends where the image does."""
    boxes = [[8.0, 16.0, 40.0, 48.0], [112.0, 64.0, 133.0, 90.0]]
    opened, backbone = data(whole(boxes, 90, 133), whole(boxes, 90, 133)), Bright()
    found = discovered(opened, backbone=backbone, whole=True)
    assert found["object_discovery/corloc"] == 1.0
    assert set(backbone.sizes) == {(1, 3, 96, 136)}
    assert backbone.corners == [0.0] * 4


def test_a_clipped_box_meets_a_small_object() -> None:
    """Of 2 × 1 px in the corner of an image of 10 × 9: a box of the whole patch would be four times as large."""
    boxes = [[8.0, 8.0, 10.0, 9.0]]
    found = discovered(data(whole(boxes, 9, 10), whole(boxes, 9, 10)), backbone=_Corner(), whole=True)
    assert found["object_discovery/corloc"] == 1.0


class _Corner(Bright):
    """The last patch alone is an object."""

    def qkv(self, images: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count = images.shape[2] * images.shape[3] // 64
        keys = torch.tensor([[[[-1.0]] * (count - 1) + [[1.0]]]])
        return keys, keys, keys


def test_whole_squares_give_what_squares_give() -> None:
    """Where images have no other size, both ways see the same pixels, of a real ViT too."""
    noise = np.random.Generator(np.random.PCG64(5)).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    noise[:, :, :40] //= 4
    noisy = replace(split([[0.0, 0.0, 40.0, 64.0]] * 20), images=noise)
    opened = data(noisy, noisy)
    model = resolve({"model.size": "nano", "model.patch_size": 8, "model.image_size": 64}).model
    backbone = ViT(model, Streams(1)).eval().requires_grad_(False)
    values = [discovered(opened, backbone=backbone, whole=way, biases=(-0.8, -0.6, -0.4)) for way in (False, True)]
    assert values[0] == pytest.approx(values[1], abs=0.051)  # rounding may turn one image
    assert len(set(values[0].values())) > 2


def test_a_rectangle_in_a_real_vit() -> None:
    """The position embedding is resampled for a grid of 5 × 12."""
    boxes = [[8.0, 16.0, 40.0, 32.0]]
    model = resolve({"model.size": "nano", "model.patch_size": 8, "model.image_size": 64}).model
    backbone = ViT(model, Streams(1)).eval().requires_grad_(False)
    opened = data(whole(boxes, 35, 90), whole(boxes, 35, 90))
    assert "object_discovery/corloc" in discovered(opened, backbone=backbone, whole=True, pictures=1)


def test_deleted_patches_do_no_harm() -> None:
    """Without the first patch, which is no part of these objects, everything is found as before."""
    boxes = [box for box in BOXES if box[:2] != [0, 0]]
    opened = data(split(boxes), split(boxes))
    assert discovered(opened, backbone=Bright(deleted=[0]), pictures=2)["object_discovery/corloc"] == 1.0


def test_splits_without_boxes() -> None:
    none: list[list[list[float]]] = [[] for _ in BOXES]
    opened = data(split(BOXES), split(BOXES, none))
    assert discovered(opened, pictures=1) == {"object_discovery/images_without_boxes": 20.0}
    with pytest.raises(ValueError, match="planted has no boxes in validation to choose a bias on"):
        discovered(data(split(BOXES, none), split(BOXES)))


def test_files_of_the_test_set() -> None:
    """The curves, and a picture with a row for each image: the image, and three stages of three kinds of features."""
    opened, asked, backbone = data(split(BOXES[:4]), split(BOXES[4:8])), probe(pictures=3), Bright()
    found = asked.fit(see(opened, "train", asked, backbone), see(opened, "validation", asked, backbone))
    files = {type(one): one for one in found.score(see(opened, "test", asked, backbone)) if not isinstance(one, Score)}
    arrays = files[Arrays].arrays  # type: ignore[union-attr]
    np.testing.assert_array_equal(arrays["biases"], [-0.5, 0.0])
    np.testing.assert_array_equal(arrays["corloc"], [1.0, 1.0])
    np.testing.assert_array_equal(arrays["chosen_on_corloc"], [1.0, 1.0])
    said = {name: arrays[name].tolist() for name in ("chosen_bias", "images", "splits", "features", "normalized")}
    assert said == {"chosen_bias": 0.0, "images": 4, "splits": ["test"], "features": "keys", "normalized": True}
    assert files[Picture].name == files[Arrays].name == "object_discovery"
    with Image.open(io.BytesIO(files[Picture].png)) as png:  # type: ignore[union-attr]
        assert png.size == (6 + 10 * (112 + 6), 2 * 6 + 4 * 14 + 3 * (112 + 6))
        pixels = np.asarray(png.convert("RGB"))
    image = pixels[68 : 68 + 112, 6 : 6 + 112]
    x0, y0, x1, y1 = (int(value * 112 / 64) for value in BOXES[4])
    assert (image[y0 + 6 : y1 - 6, x0 + 6 : x1 - 6] == 240).all()
    assert image[y0, x0].tolist() == list(bytes.fromhex("56B4E9"))
    expansion = pixels[68 : 68 + 112, 6 + 6 * 118 :][:, :112]  # of the keys: the object in colour, the rest grey
    assert (expansion[:, : max(0, x0 - 4)] == 128).all() and (expansion[y1 + 4 :] == 128).all()
    assert not (expansion[y0 + 20 : y1 - 4, x0 + 20 : x1 - 4] == 128).all(axis=-1).any()
    validation = found.score(see(opened, "validation", asked, backbone))
    assert all(isinstance(one, Score) for one in validation)


def test_as_a_probe_of_a_trial() -> None:
    """Two sets: the second has its name in its metrics and files, and the first one's bias."""
    config = resolve({"model.size": "nano", "model.patch_size": 8, "model.image_size": 64})
    given = {"data": ("scenes", "image_folder/other"), "features": "values", "biases": (0.0, -0.3), "pictures": 1}
    settings = EvaluationConfig(probes=("object_discovery",), object_discovery=given)
    other = data(split(BOXES[:5], [[[0.0, 0.0, 64.0, 64.0]]] * 5), split(BOXES[:5], [[[0.0, 0.0, 64.0, 64.0]]] * 5))
    sets = {"scenes": data(split(BOXES), split(BOXES)), "image_folder/other": other}
    context, backbone = Context(Streams(0), None, "dino"), Bright()
    probes = Probes(settings, sets["scenes"], config.model, context, torch.device("cpu"), others=sets)
    scores = probes.fit(backbone, at_end=True).score(backbone, "test")
    assert scores.metrics["test/object_discovery/corloc"] == 1.0
    assert scores.metrics["test/object_discovery/other/bias"] == -0.3
    assert scores.metrics["test/object_discovery/other/bias_0.0/corloc"] == 1.0
    assert scores.metrics["test/object_discovery/other/corloc"] == 0.0
    names = {(type(file).__name__, file.name) for file in scores.files}
    assert names == {
        (kind, name) for kind in ("Arrays", "Picture") for name in ("object_discovery", "object_discovery_other")
    }


def test_settings() -> None:
    assert pictured(BOXES[:1]).shape == (1, 64, 64, 3)
    paper = resolve(
        {"method": "dino", "evaluation.object_discovery.preset": "paper", "evaluation.probes": ["object_discovery"]}
    )
    section = paper.evaluation.object_discovery
    assert section is not None
    assert (section.normalize, section.patches, section.whole, section.protocol_splits, section.at) == (
        False,
        100,
        True,
        True,
        "end",
    )
    assert 0.0 in section.biases and min(section.biases) < -100


def test_an_overlap_of_exactly_a_half_counts() -> None:
    """The object is found; the true box is twice as wide, or a pixel more than that."""
    boxes = [[8.0, 8.0, 24.0, 24.0]] * 2
    opened = data(split(boxes), split(boxes, [[[8.0, 8.0, 40.0, 24.0]], [[8.0, 8.0, 41.0, 24.0]]]))
    assert discovered(opened)["object_discovery/corloc"] == 0.5


def test_no_more_whole_images_than_wanted() -> None:
    opened, backbone = data(whole(BOXES[:5], 64, 72), whole(BOXES[:5], 64, 72)), Bright()
    discovered(opened, backbone=backbone, whole=True, images=2)
    assert len(backbone.sizes) == 2 + 2


def test_stages_by_hand() -> None:
    """On a grid of 2 × 3 the seed is patch 4, in row 1 and column 1: the only one with a product above 1.5."""
    features, there = lost.prepare(torch.tensor([[[-1.0], [-1.0], [0.5], [-1.0], [2.0], [1.0]]]), normalize=False)
    (found,) = lost.discover(features, there, (-0.9,), (2, 3), 1)
    assert found.degree_BN.tolist() == [[2, 2, 1, 2, 2, 1]]
    found = replace(found, seed_B=torch.tensor([4]))
    stages = lost_pictures.stages(features[0], found, -0.9, (2, 3), np.array([8.0, 8.0, 24.0, 15.0]))
    np.testing.assert_allclose(stages.score, [[1 / 3, 1 / 3, 1 / 2], [1 / 3, 1 / 3, 1 / 2]])
    np.testing.assert_allclose(stages.similarity, [[-2.9, -2.9, 0.1], [-2.9, 3.1, 1.1]], rtol=1e-5)
    assert (stages.seed, stages.box) == ((1, 1), (8.0, 8.0, 24.0, 15.0))
    assert lost_pictures.stages(features[0], found, -0.9, (2, 3), np.zeros(4)).box is None


def test_boxes_of_pictures_end_where_the_image_does(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = [[112.0, 64.0, 133.0, 90.0]]
    drawn: list[Any] = []
    monkeypatch.setattr(lost_pictures, "draw", lambda title, examples: drawn.extend(examples) or b"")
    discovered(data(whole(boxes, 90, 133), whole(boxes, 90, 133)), whole=True, pictures=1)
    (example,) = drawn
    assert example.stages["keys"].box == tuple(boxes[0]) and example.truth.tolist() == boxes
    assert list(example.stages) == ["queries", "keys", "values"]
    assert example.stages["keys"].score.shape == (12, 17) and example.pixels.shape == (96, 136, 3)


def test_pictures_show_the_padding_that_maps_cover() -> None:
    pixels = np.zeros((36, 48, 3), np.uint8)
    looked = object_discovery._Looked(torch.zeros(1, 3, 40, 48), pixels, np.zeros((0, 4)), (5, 6))
    assert looked.padded.shape == (40, 48, 3)
    assert (looked.padded[:36] == 0).all() and (looked.padded[36:] == 255).all()
