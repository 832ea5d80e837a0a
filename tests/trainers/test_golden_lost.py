"""LOST against the official implementation's boxes, seeds and degrees, which must be equal."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.golden_files import Golden
from trainers.probes import lost

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("lost")


def cases(golden: Golden) -> list[str]:
    return [f"case{number:02}" for number in range(len(golden["case_names"]))]


def found(golden: Golden, case: str, biases: tuple[float, ...]) -> list[lost.Found]:
    features, there = lost.prepare(golden[f"{case}_feats"][None], normalize=False)
    rows, columns = golden[f"{case}_dims"].tolist()
    return lost.discover(features, there, biases, (rows, columns), golden[f"{case}_k_patches"])


def assert_equal(golden: Golden, case: str, ours: lost.Found) -> None:
    name = golden["case_names"][int(case.removeprefix("case"))]
    _, height, width = golden[f"{case}_init_image_size"].tolist()
    row_scale, column_scale = golden[f"{case}_scales"].tolist()
    box: Any = lost.boxes(ours.cells_B4.numpy(), (row_scale, column_scale), (height, width))
    np.testing.assert_array_equal(ours.degree_BN[0], golden[f"{case}_degree"], err_msg=name)
    if golden[f"{case}_tie_robust"]:  # else upstream's unstable sort decides
        assert int(ours.seed_B[0]) == golden[f"{case}_seed"], name
        np.testing.assert_array_equal(box[0], golden[f"{case}_pred"], err_msg=name)


def test_box_seed_and_degree_of_every_case(golden: Golden) -> None:
    for case in cases(golden):
        (ours,) = found(golden, case, (golden[f"{case}_bias"],))
        assert_equal(golden, case, ours)


def test_a_curve_of_biases_finds_the_same_as_each_alone(golden: Golden) -> None:
    for case in cases(golden):
        bias = golden[f"{case}_bias"]
        assert_equal(golden, case, found(golden, case, (bias - 1, bias, bias + 1))[1])


def test_the_map_of_expansion(golden: Golden) -> None:
    """Equal where no tie at the last candidate decides, which is where all patches are candidates."""
    for case in cases(golden):
        (ours,) = found(golden, case, (golden[f"{case}_bias"],))
        patches, degree = golden[f"{case}_k_patches"], golden[f"{case}_degree"].sort().values
        if patches >= len(degree) or degree[patches - 1] != degree[patches]:
            torch.testing.assert_close(ours.map_BN[0], golden[f"{case}_expansion_map"], rtol=1e-5, atol=1e-4)


def test_blocks_of_rows_give_the_same(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost, "_PRODUCTS", 1_000)
    for case in cases(golden):
        (ours,) = found(golden, case, (golden[f"{case}_bias"],))
        assert_equal(golden, case, ours)
