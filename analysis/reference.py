"""The paper's own numbers beside ours: never reproduced here, as data, model and schedule differ."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from analysis.labels import REGISTERS

# Rows of reference/downstream.csv that our metric of the same kind stands beside.
_DOWNSTREAM = {
    "imagenet1k_linear": ("test/linear/top1", "ImageNet-1k linear top-1, %"),
    "ade20k_linear": ("test/segmentation/miou", "ADE20k linear mIoU, %"),
    "nyud_linear": ("test/depth/rmse", "NYUd linear RMSE, m"),
}
_OUTLIERS = ("tokens/last/outlier_fraction_150", "patch norms above 150, %")
_PERCENT = ("top1", "miou", "outlier_fraction_150")


@dataclass(frozen=True)
class Comparison:
    """One of the paper's values and ours of the same kind, in the unit that `what` names."""

    what: str
    paper_model: str
    paper: float
    our_model: str
    metric: str
    ours: float


def comparisons(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[Comparison]:
    """The paper's values that have a counterpart among `rows` of the ablation table.

    Args:
        rows: rows with their axes; a setting that is not an axis is looked up in `base`.
        base: settings that all trials share, under their dotted names.
    """
    return [*_downstream(rows, base), *_outliers(rows, base)]


def read(name: str) -> list[dict[str, str]]:
    """The rows of analysis/reference/NAME.csv."""
    text = resources.files("analysis").joinpath("reference", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _downstream(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> Iterator[Comparison]:
    for known in read("downstream"):
        metric, what = _DOWNSTREAM[known["task"]]
        for row in rows:
            settings = {**base, **row}
            same = (settings.get("method"), settings.get(REGISTERS)) == (known["method"], int(known["num_registers"]))
            if same and row["metric"] == metric and row["mean"] is not None:
                paper_model = f"{known['method']}, {known['num_registers']} registers"
                yield Comparison(what, paper_model, float(known["value"]), _model(settings), metric, _ours(row))


def _outliers(rows: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> Iterator[Comparison]:
    metric, what = _OUTLIERS
    known = next(row for row in read("outliers") if row["quantity"] == "outlier_fraction_norm_above_150")
    for row in rows:
        settings = {**base, **row}
        if row["metric"] == metric and settings.get(REGISTERS) == 0 and row["mean"] is not None:
            paper_model = f"{known['model']}, 0 registers"
            yield Comparison(what, paper_model, float(known["value"]), _model(settings), metric, _ours(row))


def _ours(row: Mapping[str, Any]) -> float:
    return float(row["mean"]) * (100 if row["metric"].rsplit("/", 1)[-1] in _PERCENT else 1)


def _model(settings: Mapping[str, Any]) -> str:
    parts = [str(settings[name]) for name in ("method", "model.size", "data.train") if settings.get(name)]
    return ", ".join([*parts, f"{settings[REGISTERS]} registers"])
