"""The paper's values beside ours: only of the same kind, in the same unit."""

from __future__ import annotations

from typing import Any

import pytest

from analysis.reference import Comparison, comparisons

BASE = {"method": "dinov2", "model.size": "nano", "data.train": "scenes", "model.num_registers": 0, "optim.steps": 200}


def compared(metric: str, mean: float | None, **settings: Any) -> list[Comparison]:
    return comparisons([{**BASE, "metric": metric, "mean": mean, **settings}])


@pytest.mark.parametrize(
    ("metric", "mean", "paper", "ours"),
    [
        ("locality/position/normal/top1", 0.4, [41.7, 66.3], 40.0),
        ("locality/position/outlier/top1", 0.2, [22.8], 20.0),
        ("locality/position/normal/distance", 1.5, [0.79], 1.5),
        ("locality/position/outlier/distance", 5.0, [5.09], 5.0),
        ("locality/pixels/normal/l2", 2.0, [18.38, 15.9], 2.0),
        ("locality/pixels/outlier/l2", 2.5, [25.23], 2.5),
        ("single_token/cls/top1", 0.9, [86.0, 87.3, 84.6], 90.0),
        ("single_token/normal/top1", 0.5, [65.8, 17.1, 15.5], 50.0),
        ("single_token/outlier/top1", 0.6, [69.0, 79.1, 73.3], 60.0),
        ("tokens/last/outlier_fraction_150", 0.01, [2.37], 1.0),
        ("tokens/onset_layer", 3.0, [15.0], 3.0),
        ("tokens/onset_step", 50.0, [0.333], 0.25),
        ("test/depth/rmse", 0.4, [0.378], 0.4),
        ("locality/position/all/top1", 0.4, [], None),
    ],
)
def test_values_of_models_without_registers(metric: str, mean: float, paper: list[float], ours: float | None) -> None:
    found = compared(metric, mean)
    assert [known.paper for known in found] == paper
    assert [known.ours for known in found] == [pytest.approx(ours)] * len(paper)
    assert compared(metric, None) == []


def test_registers_of_table_4_and_5() -> None:
    (known,) = compared("single_token/register_0/top1", 0.5, **{"model.num_registers": 1})
    assert (known.paper, known.paper_model) == (71.1, "DINOv2, 1 register")
    assert known.what == "one register per image, top-1 on Aircraft, % (Table 4)"
    assert known.our_model == "dinov2, nano, scenes, 1 registers"
    assert compared("single_token/register_0/top1", 0.5, **{"model.num_registers": 4}) == []
    (known,) = compared("locality/position/normal/top1", 0.5, **{"model.num_registers": 4})
    assert known.paper == 65.8


def test_the_same_data_set_stands_beside_its_own_value() -> None:
    found = compared("single_token/cls/top1", 0.9, **{"data.name": "cifar10"})
    assert [known.paper for known in found] == [86.0, 87.3, 99.4, 84.6]


def test_a_method_stands_beside_itself_alone() -> None:
    (known,) = compared("test/linear/top1", 0.8, **{"method": "openclip", "model.num_registers": 4})
    assert (known.paper, known.paper_model) == (78.1, "openclip, ViT-B/16, licensed pairs, 4 registers")
    assert compared("test/linear/top1", 0.8, method="dino") == []


@pytest.mark.parametrize(
    ("metric", "method", "registers", "paper"),
    [
        ("test/zero_shot/top1", "openclip", 4, 60.1),
        ("test/segmentation/miou", "deit3", 4, 39.1),
    ],
)
def test_downstream_tables_stand_beside_the_probe_of_the_same_kind(
    metric: str, method: str, registers: int, paper: float
) -> None:
    (known,) = compared(metric, 0.5, **{"method": method, "model.num_registers": registers})
    assert (known.paper, known.ours) == (paper, 50.0) and known.paper_model.startswith(method)


@pytest.mark.parametrize(
    ("metric", "data", "paper"),
    [
        ("corloc", '["voc2007","coco20k"]', [35.3]),
        ("coco20k/corloc", '["voc2007","coco20k"]', [26.9]),
        ("corloc", '["coco20k","voc2007"]', [26.9]),
        ("voc2007/corloc", ["coco20k", "voc2007"], [35.3]),
        ("voc2012/corloc", '["voc2007","voc2012"]', [40.2]),
        ("corloc", "[]", []),  # scenes
        ("corloc", None, []),
    ],
)
def test_corloc_stands_beside_that_of_its_own_data_set(metric: str, data: Any, paper: list[float]) -> None:
    found = compared(f"test/object_discovery/{metric}", 0.5, **{"evaluation.object_discovery.data": data})
    assert [known.paper for known in found] == paper


def test_ours_is_named_by_the_data_that_the_probe_ran_on() -> None:
    (known,) = compared("test/segmentation/miou", 0.5, **{"evaluation.segmentation.data": '["voc2012_segmentation"]'})
    assert known.our_model == "dinov2, nano, voc2012_segmentation, 0 registers"


def test_without_known_length_an_onset_is_not_compared() -> None:
    assert compared("tokens/onset_step", 50.0, **{"optim.steps": None}) == []
    assert compared("tokens/onset_step", 50.0, **{"optim.steps": 0}) == []
