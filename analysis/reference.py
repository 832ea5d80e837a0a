"""The paper's own numbers beside ours: never reproduced here, as data, model and schedule differ."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from analysis.labels import REGISTERS, unit

_ONSET_STEP = "tokens/onset_step"

# Rows of reference/downstream.csv that our metric of the same kind stands beside, and what the paper trained.
_DOWNSTREAM = {
    "imagenet1k_linear": ("test/linear/top1", "linear top-1 on ImageNet-1k, % (Table 2a)"),
    "ade20k_linear": ("test/segmentation/miou", "linear mIoU on ADE20k, % (Table 2a)"),
    "nyud_linear": ("test/depth/rmse", "linear RMSE on NYUd, m (Table 2a)"),
}
_DISCOVERY = {
    "voc2007": "CorLoc on VOC 2007 trainval, % (Table 3)",
    "voc2012": "CorLoc on VOC 2012 trainval, % (Table 3)",
    "coco20k": "CorLoc on COCO 20k, % (Table 3)",
}
_CORLOC = ("test/object_discovery/corloc", "test/object_discovery/{}/corloc")  # of the first data set, of another
_ZERO_SHOT = ("test/zero_shot/top1", "zero-shot top-1 on ImageNet-1k, % (Table 2b)")
_TRAINED = {
    "deit3": "deit3, ViT-B, ImageNet-22k",
    "openclip": "openclip, ViT-B/16, licensed pairs",
    "dinov2": "dinov2, ViT-L, ImageNet-22k",
    "dino": "dino, ViT-B/16, ImageNet-1k, as released",
}
_LOCALITY = {
    "position_top1": ("locality/position/{}/top1", "position probe, {} patches, top-1, %"),
    "position_distance": ("locality/position/{}/distance", "position probe, {} patches, distance in cells"),
    "pixel_l2": ("locality/pixels/{}/l2", "pixel probe, {} patches, L2 error"),
}
_OUTLIERS = {
    "outlier_fraction_norm_above_150": ("tokens/last/outlier_fraction_150", "patch norms above 150, %"),
    "first_layer_of_split": ("tokens/onset_layer", "layer in which norms split, of 40"),
    "first_training_fraction": (_ONSET_STEP, "fraction of training after which outliers are there"),
}
# Of Table 1, those that are shown beside any data of ours.
_DATASETS = {"imagenet1k": "ImageNet-1k", "fgvc_aircraft": "Aircraft"}


@dataclass(frozen=True)
class Comparison:
    """One of the paper's values and ours of the same kind, in the unit that `what` names."""

    what: str
    paper_model: str
    paper: float
    our_model: str
    metric: str
    ours: float


@dataclass(frozen=True)
class _Known:
    """One of the paper's values; `method` is None where any of ours may stand beside it."""

    metric: str
    what: str
    model: str
    value: float
    num_registers: int
    method: str | None = None
    dataset: str | None = None


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """The paper's values that have a counterpart among `rows` of the ablation table.

    Args:
        rows: rows with the settings of the trials behind them, under their dotted names.
    """
    by_metric: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["mean"] is not None:
            by_metric.setdefault(row["metric"], []).append(row)
    found = []
    for known in _known():
        for settings in by_metric.get(known.metric, []):
            ours = _ours(settings)
            if ours is not None and _stands_beside(known, settings):
                found.append(Comparison(known.what, known.model, known.value, _model(settings), known.metric, ours))
    return found


def read(name: str) -> list[dict[str, str]]:
    """The rows of analysis/reference/NAME.csv."""
    text = resources.files("analysis").joinpath("reference", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _known() -> Iterator[_Known]:
    for row in read("downstream"):
        yield _of_table(*_DOWNSTREAM[row["task"]], row)
    for row in read("zero_shot"):
        yield _of_table(*_ZERO_SHOT, row)
    for row in read("object_discovery"):
        for name in _CORLOC:
            yield _of_table(name.format(row["dataset"]), _DISCOVERY[row["dataset"]], row, row["dataset"])
    for row in read("outliers"):
        metric, what = _OUTLIERS[row["quantity"]]
        yield _Known(metric, what, f"{row['model']}, 0 registers", float(row["value"]), 0)
    for row in read("locality"):
        metric, what = (text.format(row["token"]) for text in _LOCALITY[row["metric"]])
        yield _Known(metric, f"{what} (Fig. 5b)", f"{row['model']}, 0 registers", float(row["value"]), 0)
    for row in read("single_token_classification"):
        yield _single_token(row, 0, "Table 1")
    for row in read("registers"):
        registers = int(row["num_registers"])
        if row["dataset"]:
            yield _single_token(row, registers, f"Table {row['table']}")
        else:
            metric, what = (text.format(row["token"]) for text in _LOCALITY[row["metric"]])
            model = f"{row['model']}, {registers} registers"
            yield _Known(metric, f"{what} (Table {row['table']})", model, float(row["value"]), registers)


def _of_table(metric: str, what: str, row: Mapping[str, str], dataset: str | None = None) -> _Known:
    """A value of a model that the paper trained, or of DINO, which it took as released."""
    model = f"{_TRAINED[row['method']]}, {row['num_registers']} registers"
    return _Known(metric, what, model, float(row["value"]), int(row["num_registers"]), row["method"], dataset)


_OF = ("", " that has one (see coverage)")


def _single_token(row: Mapping[str, str], registers: int, table: str) -> _Known:
    token = {"cls": "class token", "normal": "normal patch", "outlier": "outlier patch"}.get(row["token"], "register")
    dataset = _DATASETS.get(row["dataset"], row["dataset"])
    return _Known(
        metric=f"single_token/{row['token']}/top1",
        what=f"one {token} per image{_OF[row['token'] == 'outlier']}, top-1 on {dataset}, % ({table})",
        model=f"{row['model']}, {registers} register{'' if registers == 1 else 's'}",
        value=float(row["value"]),
        num_registers=registers,
        dataset=row["dataset"],
    )


def _stands_beside(known: _Known, settings: Mapping[str, Any]) -> bool:
    """Whether ours has the paper's registers and method; of the paper's data sets the same one, or those named here."""
    if settings.get(REGISTERS) != known.num_registers or known.method not in (None, settings.get("method")):
        return False
    if known.dataset is None or known.dataset in _DATASETS:
        return True
    return known.dataset == _data_of(settings)


def _data_of(settings: Mapping[str, Any]) -> str | None:
    """The data set that a row's metric is of: that in its name, the first that its probe names, or the trial's own."""
    own: str | None = settings.get("data.name") or settings.get("data.train")
    split, _, rest = str(settings["metric"]).partition("/")
    probe, *between = rest.split("/")
    if split not in ("val", "test"):
        return own
    named = settings.get(f"evaluation.{probe}.data") or ()
    sets = [str(name) for name in (json.loads(named) if isinstance(named, str) else named)]
    inside = [name for name in sets if between[:1] == [name.rpartition("/")[2]]]
    return next(iter((*inside, *sets)), own)


def _ours(settings: Mapping[str, Any]) -> float | None:
    """Our mean in the paper's unit; None where the length of training that it refers to is not known."""
    mean, steps = float(settings["mean"]), settings.get("optim.steps")
    if settings["metric"] == _ONSET_STEP:
        return mean / steps if isinstance(steps, int) and steps > 0 else None
    return mean * unit(settings["metric"]).scale


def _model(settings: Mapping[str, Any]) -> str:
    named = ("model.weights", "method", "model.size")
    parts = [str(settings[name]) for name in named if settings.get(name)]
    parts += [data] if (data := _data_of(settings)) else []
    return ", ".join([*parts, f"{settings[REGISTERS]} registers"])
