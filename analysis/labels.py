"""How axes, cells, metrics and numbers are worded for people, the same in terminal, figures and report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from analysis.schemas import canonical

REGISTERS = "model.num_registers"
MINUS = "−"
NONE = "–"  # shown for null

_SPLITS = {"test": "test", "val": "validation", "train": "training"}
_WORDS = {
    "linear": "linear probe",
    "linear_mean_patch": "linear probe with mean patch",
    "knn": "k-NN, k = 20",
    "top1": "top-1",
    "miou": "mIoU",
    "rmse": "RMSE",
    "corloc": "CorLoc",
}
_TOKENS = {
    "tokens/last/outlier_fraction": "outlier fraction (last layer)",
    "tokens/last/outlier_fraction_150": "norms above 150 (last layer)",
    "tokens/last/max_over_median": "maximum / median norm (last layer)",
    "tokens/onset_layer": "onset layer of outliers",
}
_FRACTIONS = ("top1", "top5", "miou", "corloc", "outlier_fraction", "outlier_fraction_150")


@dataclass(frozen=True)
class Unit:
    """How a metric is shown: multiplied by `scale`, with `decimals` (None: four significant digits)."""

    scale: float
    symbol: str
    decimals: int | None

    def text(self, value: float | None, signed: bool = False) -> str:
        """`value` without the symbol; signs are typographic."""
        if value is None or not math.isfinite(value):
            return NONE
        shown = value * self.scale
        digits = f"{shown:.4g}" if self.decimals is None else f"{shown:.{self.decimals}f}"
        if float(digits) == 0:
            digits = digits.lstrip("-")
        sign = "+" if signed and float(digits) > 0 else ""
        return f"{sign}{digits}".replace("-", MINUS)

    def interval(self, low: float | None, high: float | None) -> str:
        """`[low, high]` with signs, or nothing where there is no interval."""
        return "" if low is None or high is None else f"[{self.text(low, True)}, {self.text(high, True)}]"


def unit(metric: str) -> Unit:
    """Fractions between 0 and 1 are shown in percent."""
    return Unit(100.0, "%", 2) if metric.rsplit("/", 1)[-1] in _FRACTIONS else Unit(1.0, "", None)


def metric_label(metric: str) -> str:
    """A metric in words: `test/linear/top1` is "top-1 (linear probe, test)"."""
    if metric in _TOKENS:
        return _TOKENS[metric]
    split, *parts = metric.split("/")
    if split not in _SPLITS or not parts:
        return metric
    words = [_WORDS.get(part, part.replace("_", " ")) for part in reversed(parts)]
    return f"{words[0]} ({', '.join([*words[1:], _SPLITS[split]])})"


def axis_labels(axes: Iterable[str]) -> dict[str, str]:
    """Each axis by the last part of its dotted name, or by all of it where two axes end alike."""
    names = list(axes)
    last = [name.rsplit(".", 1)[-1] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}


def value_text(value: Any) -> str:
    """An axis value as a person writes it."""
    if value is None:
        return NONE
    return value if isinstance(value, str) else canonical(value)


def cell_text(values: Mapping[str, Any], axes: Iterable[str], names: Mapping[str, str]) -> str:
    """A cell in words: "deit3, num_registers = 4"; text values speak for themselves."""
    parts = [
        values[axis] if isinstance(values[axis], str) else f"{names[axis]} = {value_text(values[axis])}"
        for axis in axes
        if values[axis] is not None
    ]
    return ", ".join(parts) or "the only cell"


FLAGS = {
    "baseline": "this is the baseline that others are compared with",
    "diverged": "trials diverged (NaN or infinite loss) and are not in the mean",
    "failed": "trials failed and are not in the mean",
    "missing": "trials have no score yet",
    "mixed_data": "trials saw data with different fingerprints",
    "mixed_device": "trials ran on different kinds of devices",
    "mixed_git_commit": "trials ran different commits of the code",
    "mixed_steps": "scores are of different steps",
    "mixed_threads": "trials ran with different numbers of threads",
    "mixed_versions": "trials ran with different package versions",
    "no_baseline": "there is no finished baseline to compare with",
    "no_pair": "no seed has finished both here and in the baseline",
    "no_variance": "all paired differences are equal, so there is no p-value",
    "not_finite": "a score is NaN or infinite and is not in the mean",
    "one_seed": "one seed or one pair: no spread or interval can be given",
    "partly_paired": "not every seed of the cell has a score of its baseline beside it",
    "pruned": "trials were pruned and are not in the mean",
    "stopped": "trials were stopped and are not in the mean",
}


def flag_text(flag: str) -> str:
    """What a flag of the ablation table says."""
    if flag.startswith("baseline_other_"):
        return f"trials and their baseline differ in {flag.removeprefix('baseline_other_').replace('_', ' ')}"
    return FLAGS.get(flag, flag.replace("_", " "))
