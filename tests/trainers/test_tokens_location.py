"""Where outliers are: planted counts, shares, maps, onset, borders, stripes and padding are recovered exactly."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from tests.trainers.planted import BULK, HIGH, by_number, metrics, numbered, statistics, subject
from trainers.measurement import Arrays, PerImage
from trainers.tokens import location, norms
from trainers.tokens.location import Location, locate, summary

IMAGES, SIDE = 12, 4
KEYS = {"trial_id": "t", "weights": "raw"}


def plant(cells: list[tuple[int, int]], every: int = 1, first_layer: int = 0, layers: int = 3) -> np.ndarray:
    """Norms [layers, IMAGES, 16]: outliers at these cells of every `every`-th image, from a layer on."""
    planted = np.full((layers, IMAGES, SIDE, SIDE), BULK)
    for row, column in cells:
        planted[first_layer:, ::every, row, column] = HIGH
    return planted.reshape(layers, IMAGES, SIDE**2)


def measured(norms_LBN: np.ndarray, **settings):
    return list(location.measure(subject(by_number(norms_LBN), numbered(IMAGES, 32), **settings), None))


def test_planted_outliers_are_found_where_they_are() -> None:
    # (0, 0) and (0, 3) are on the border, (1, 2) is not; in images 0, 3, 6 and 9.
    found = measured(plant([(0, 0), (0, 3), (1, 2)], every=3, first_layer=2))
    border, centre = 8 / (IMAGES * 12), 4 / (IMAGES * 4)
    assert metrics(found) == pytest.approx(
        {
            "tokens/location/images_with_outliers": 4 / 12,
            "tokens/location/outliers_per_image": 1.0,
            "tokens/location/border_over_centre": border / centre,
            # shares of rows are to one another as 2, 1, 0, 0: mean 0.75, variance 5 / 4 - 0.75²
            "tokens/location/row_cv": np.sqrt(5 / 4 - 0.75**2) / 0.75,
            # of columns as 1, 0, 1, 1
            "tokens/location/column_cv": np.sqrt(3 / 4 - 0.75**2) / 0.75,
            "tokens/location/threshold": 1.5 * BULK,
        }
    )
    (per_image,) = (f for f in found if isinstance(f, PerImage))
    assert per_image.name == "tokens/location/outliers"
    assert per_image.values.tolist() == [3, 0, 0] * 4
    (arrays,) = (f.arrays for f in found if isinstance(f, Arrays))
    expected = np.zeros((SIDE, SIDE), int)
    expected[0, 0] = expected[0, 3] = expected[1, 2] = 4
    assert (arrays["counts"] == expected).all()
    assert (arrays["images"] == IMAGES).all()
    assert (float(arrays["threshold"]), int(arrays["layer"])) == (15.0, 2)
    assert (arrays["layer_counts"] == [0 * expected, 0 * expected, expected]).all()
    assert arrays["layer_thresholds"].tolist() == [15.0] * 3


def test_every_layer_has_its_own_threshold() -> None:
    planted = plant([(1, 1)])
    planted[0] *= 1_000
    by_layer = statistics(measured(planted))
    assert [by_layer["location/threshold", layer] for layer in range(3)] == [15_000.0, 15.0, 15.0]
    assert [by_layer["location/outliers_per_image", layer] for layer in range(3)] == [1.0] * 3
    assert by_layer["location/centre_rate", 1] == 1 / 4
    assert by_layer["location/border_rate", 1] == by_layer["location/border_over_centre", 1] == 0.0


def test_the_layer_that_decides_can_be_another() -> None:
    planted = plant([(0, 0)])
    planted[2] = BULK
    found = measured(planted, tokens__outlier_layer=1)
    assert metrics(found)["tokens/location/outliers_per_image"] == 1.0
    assert metrics(found)["tokens/location/images_with_outliers"] == 1.0
    (arrays,) = (f.arrays for f in found if isinstance(f, Arrays))
    assert (int(arrays["layer"]), int(arrays["counts"].sum())) == (1, IMAGES)
    with pytest.raises(ValueError, match="the layer 4 is not there; allowed: -3 to 2"):  # a backbone of fewer blocks
        measured(planted, tokens__outlier_layer=4)


@pytest.mark.parametrize("rule", ["mad", "otsu"])
def test_without_outliers_there_is_no_place(rule: str) -> None:
    found = measured(plant([]), tokens__outlier_rule=rule)
    rates = {"tokens/location/images_with_outliers": 0.0, "tokens/location/outliers_per_image": 0.0}
    assert metrics(found) == rates | ({"tokens/location/threshold": 15.0} if rule == "mad" else {})
    assert ("location/row_cv", 2) not in statistics(found)


def test_where_no_patch_has_a_norm_nothing_is_said() -> None:
    assert summary(locate(np.full((3, 16), np.nan), (SIDE, SIDE), 15.0)) == {}
    nothing = measured(np.full((3, IMAGES, 16), np.nan))
    assert metrics(nothing) == statistics(nothing) == {}


def test_all_outliers_at_the_border_have_no_ratio() -> None:
    numbers = summary(locate(plant([(0, 0)])[0], (SIDE, SIDE), 15.0))
    assert (numbers["border_rate"], numbers["centre_rate"]) == (1 / 12, 0.0)
    assert "border_over_centre" not in numbers
    small = summary(locate(np.array([[BULK, BULK, BULK, HIGH]]), (2, 2), 15.0))  # all border
    assert small["border_rate"] == 0.25
    assert not {"centre_rate", "border_over_centre"} & set(small)
    assert "row_cv" not in summary(locate(np.array([[BULK, HIGH]]), (1, 2), 15.0))


def test_variation_is_that_of_the_papers_figure_11() -> None:
    for antialias, expected in ((False, 0.934), (True, 0.080)):
        embedding = torch.zeros(1, 1, 16, 16, requires_grad=True)
        interpolate(embedding, size=(7, 7), mode="bicubic", antialias=antialias).sum().backward()
        assert embedding.grad is not None
        gradient = embedding.grad[0, 0].double().numpy()
        stripes = Location(np.zeros(1, int), gradient, np.ones((16, 16), int), 0.0)
        assert location.variation(stripes, axis=0) == pytest.approx(expected, abs=5e-4)
        assert location.variation(stripes, axis=1) == pytest.approx(expected, abs=5e-4)


def test_stripes_vary_along_one_axis_alone() -> None:
    numbers = summary(locate(plant([(row, 1) for row in range(SIDE)])[0], (SIDE, SIDE), 15.0))
    assert (numbers["row_cv"], numbers["column_cv"]) == (0.0, pytest.approx(np.sqrt(3)))


def content(images: int = IMAGES) -> np.ndarray:
    """Even images are whole; odd ones have content in rows 8 … 23 of 32 px: their first and last row is padding."""
    boxes = np.tile(np.array([0, 0, 32, 32], np.float32), (images, 1))
    boxes[1::2] = [0, 8, 32, 24]
    return boxes


def test_padding_is_left_out_and_counted() -> None:
    planted = plant([(0, 1), (1, 1)])
    looked_at = subject(by_number(planted), numbered(IMAGES, 32), content=content())
    found = list(location.measure(looked_at, None))
    numbers = metrics(found)
    assert numbers["tokens/padding_fraction"] == 0.25
    assert numbers["tokens/location/outliers_per_image"] == (6 * 2 + 6 * 1) / 12
    assert numbers["tokens/location/border_over_centre"] == pytest.approx((6 / (6 * 12 + 6 * 4)) / (12 / (12 * 4)))
    # Rows: 6 outliers of 6 · 4 patches, 12 of 12 · 4, none, none.
    shares = np.array([0.25, 0.25, 0, 0])
    assert numbers["tokens/location/row_cv"] == pytest.approx(shares.std() / shares.mean())
    (arrays,) = (f.arrays for f in found if isinstance(f, Arrays))
    assert arrays["images"].tolist() == [[6] * 4, [12] * 4, [12] * 4, [6] * 4]
    assert arrays["counts"].tolist() == [[0, 6, 0, 0], [0, 12, 0, 0], [0] * 4, [0] * 4]
    norms_LBT, class_token = looked_at.norms
    rows = norms.probe_rows(norms_LBT, 0, step=0, class_token=class_token, **KEYS)
    assert [row.statistics.count for row in rows] == [IMAGES * 16 - 6 * 8] * 3
    assert rows[2].statistics.outlier_fraction == 18 / (IMAGES * 16 - 6 * 8)
    assert "tokens/padding_fraction" not in metrics(measured(planted))


def test_a_patch_is_padding_where_nothing_of_it_is_content() -> None:
    # Side 24 px seen at 16 px in patches of 8 px: a cell is 12 px of the picture.
    boxes = np.array([[0, 0, 24, 12], [12, 0, 24, 24], [11, 0, 24, 24], [0, 13, 13, 24]], np.float32)
    looked_at = subject(by_number(plant([])), numbered(4, 24), content=boxes, model__image_size=16)
    padded = looked_at.padding(looked_at.data.validation, np.arange(4))
    assert padded is not None
    assert padded.tolist() == [
        [False, False, True, True],
        [True, False, True, False],
        [False, False, False, False],
        [True, True, False, False],
    ]
    larger = looked_at.padding(looked_at.data.validation, np.array([3]), image_size=24)  # cells of 8 px
    assert larger is not None
    assert larger.reshape(3, 3).tolist() == [[True] * 3, [False, False, True], [False, False, True]]


def test_edges_of_content_that_meet_patches_do_not_round_into_them() -> None:
    boxes = np.array([[15, 0, 22, 22]], np.float32)  # 15 / 22 · 22 is 14.999… in floating point
    looked_at = subject(by_number(plant([])), numbered(1, 22), content=boxes, model__image_size=22, model__patch_size=1)
    padded = looked_at.padding(looked_at.data.validation, np.arange(1))
    assert padded is not None
    assert padded.reshape(22, 22)[0].tolist() == [True] * 15 + [False] * 7


def test_another_number_of_patches_is_said() -> None:
    with pytest.raises(ValueError, match="gives 16 patches an image, not the 8 × 8"):
        measured(plant([]), model__patch_size=4)


def test_onset_is_the_planted_layer_and_step() -> None:
    rows = []
    for step, first_layer in ((10, 4), (20, 4), (30, 2), (40, 1), (50, 1)):  # 3 layers: 4 is never
        looked_at = subject(by_number(plant([(1, 2)], first_layer=first_layer)), numbered(IMAGES, 32), step=step)
        rows.append(norms.probe_rows(looked_at.norms[0], 0, step=step, class_token=False, **KEYS))
    onsets = [norms.last_layer_metrics(of_step).get("tokens/onset_layer") for of_step in rows]
    assert onsets == [None, None, 2.0, 1.0, 1.0]
    assert norms.onset_step([row for of_step in rows for row in of_step]) == {"tokens/onset_step": 30.0}
    assert norms.onset_step([row for of_step in rows[:2] for row in of_step]) == {}
