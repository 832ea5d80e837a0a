"""How axes, cells, metrics and numbers are worded for people, the same in terminal, figures and report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
    "zero_shot": "zero-shot",
    "segmentation": "linear segmentation",
    "depth": "linear depth",
    "object_discovery": "LOST",
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "rmse": "RMSE",
    "corloc": "CorLoc",
}
_LABELS = {
    "tokens/last/outlier_fraction": "outlier fraction (last layer)",
    "tokens/last/outlier_fraction_150": "norms above 150 (last layer)",
    "tokens/last/outlier_fraction_frozen": "norms above the baseline's threshold (last layer)",
    "tokens/last/max_over_median": "maximum / median norm (last layer)",
    "tokens/onset_layer": "onset layer of outliers",
    "tokens/onset_step": "onset step of outliers",
    "score/step": "scoring step",
    "tokens/padding_fraction": "patches of padding",
    "tokens/location/images_with_outliers": "images with outliers",
    "tokens/location/outliers_per_image": "outliers per image",
    "tokens/location/border_over_centre": "outlier rate at the border / in the centre",
    "tokens/location/row_cv": "variation of outlier rates over rows",
    "tokens/location/column_cv": "variation of outlier rates over columns",
    "tokens/location/threshold": "threshold of the outlier rule",
    "channels/last/kurtosis": "kurtosis over channels (last layer)",
    "channels/last/max_over_median": "largest / median channel of a token (last layer)",
    "channels/last/massive": "massive activations per image (last layer)",
    "attention/last/cls/outliers": "attention of the class token on outliers (last block)",
    "attention/last/cls/registers": "attention of the class token on registers (last block)",
    "attention/last/cls/self": "attention of the class token on itself (last block)",
    "attention/last/cls/sink": "attention of the class token on the sink (last block)",
    "attention/last/cls/entropy": "entropy of the class token's attention, relative (last block)",
    "attention/last/patch/outliers": "attention of patches on outliers (last block)",
    "attention/last/patch/registers": "attention of patches on registers (last block)",
    "attention/last/sink_score": "attention on the token that gets most (last block)",
    "attention/last/register_divergence": "Jensen–Shannon divergence of registers' attention (last block)",
    "similarity/last/cls_patch": "cosine of class token and patches (last layer)",
    "similarity/last/neighbors": "cosine of neighbouring patches (last layer)",
    "similarity/last/registers": "cosine between registers (last layer)",
    "similarity/last/registers_max": "largest cosine between registers (last layer)",
    "neighbors/gap": "similarity to neighbours at entry, outliers − normal patches",
    "neighbors/auroc": "AUROC of similarity to neighbours for being an outlier",
    "locality/outlier_fraction": "outliers among the scored patches",
    "single_token/outlier/coverage_train": "training images with an outlier",
    "single_token/outlier/coverage_test": "test images with an outlier",
    "interventions/layer": "layer whose outliers are treated",
    "interventions/outlier_fraction": "outliers that are treated",
    "added/norm_over_median": "norm of the added token / median patch",
    "test_time_registers/score_share": "share of the neurons found in all scores",
}
_KINDS = {
    "cls": "the class token",
    "normal": "one normal patch per image",
    "outlier": "one outlier patch per image",
    "normal_where_outlier": "one normal patch per image with an outlier",
}
_PROBES = {
    "top1": "top-1 of the position probe",
    "distance": "distance of the position probe",
    "l2": "L2 error of the pixel probe",
}
_RECURRENCE = {
    "content": "outliers that recur at the same content",
    "place": "outliers that recur at the same place",
    "recurs": "outliers that recur at the same relative position",
    "base_rate": "outliers among all patches afterwards",
}
_FRACTIONS = (
    *("top1", "top1_std", "top5", "miou", "accuracy", "mean_accuracy", "corloc", "delta1", "delta2", "delta3"),
    *(
        "outlier_fraction",
        "outlier_fraction_150",
        "outlier_fraction_frozen",
        "padding_fraction",
        "images_with_outliers",
    ),
    *("coverage_train", "coverage_test", "content", "place", "recurs", "base_rate", "score_share", "treated"),
)
_CHANGE = "change"
_GROUPS = {"interventions": "", "test_time_registers": "test-time registers: "}


@dataclass(frozen=True)
class Unit:
    """How a metric is shown: multiplied by `scale`, with `decimals` (None: four significant digits).

    A metric that is a change already has its sign shown.
    """

    scale: float
    symbol: str
    decimals: int | None
    change: bool = False

    def text(self, value: float | None, signed: bool | None = None) -> str:
        """`value` without the symbol; signs are typographic. By default a plus is shown of changes alone."""
        if value is None or not math.isfinite(value):
            return NONE
        shown = value * self.scale
        digits = f"{shown:.4g}" if self.decimals is None else f"{shown:.{self.decimals}f}"
        if float(digits) == 0:
            digits = digits.lstrip("-")
        sign = "+" if (self.change if signed is None else signed) and float(digits) > 0 else ""
        return f"{sign}{digits}".replace("-", MINUS)

    def interval(self, low: float | None, high: float | None) -> str:
        """`[low, high]` with signs, or nothing where there is no interval."""
        return "" if low is None or high is None else f"[{self.text(low, True)}, {self.text(high, True)}]"

    @property
    def of_difference(self) -> str:
        """What a difference of two values is counted in, after a space; nothing where there is no unit."""
        symbol = "points" if self.symbol == "%" else self.symbol
        return f" {symbol}" if symbol else ""


def unit(metric: str) -> Unit:
    """Fractions between 0 and 1 are shown in percent, changes of fractions in points."""
    parts = metric.split("/")
    change = _CHANGE in parts
    if parts[-1] in _FRACTIONS or _is_mass(parts):
        return Unit(100.0, "points" if change else "%", 2, change)
    return Unit(1.0, "cells" if parts[-1] == "distance" else "", None, change)


def _is_mass(parts: Sequence[str]) -> bool:
    """Whether a metric is a share of attention."""
    return parts[0] == "attention" and parts[-1] in ("outliers", "registers", "self", "sink", "sink_score")


def metric_label(metric: str) -> str:
    """A metric in words: `test/linear/top1` is "top-1 (linear probe, test)"; a name that is not known stays itself."""
    known = _LABELS | _RECURRENCE
    if metric in known:
        return known[metric]
    first, *parts = metric.split("/")
    if first in _SPLITS and parts:
        words = [_word(part) for part in reversed(_with_k(parts))]
        return f"{words[0]} ({', '.join([*words[1:], _SPLITS[first]])})"
    if first in _GROUPS and len(parts) > 1:
        return _changed(_GROUPS[first], parts)
    if first == "locality" and len(parts) == 3 and parts[2] in _PROBES:
        return f"{_PROBES[parts[2]]}, {parts[1]} patches"
    if first == "single_token" and len(parts) == 2:
        token = _KINDS.get(parts[0], parts[0].replace("_", " "))
        return f"{'top-1' if parts[1] == 'top1' else 'deviation of top-1 over draws'} of {token} alone"
    if first == "recurrence" and len(parts) > 1 and parts[-1] in _RECURRENCE:
        return f"{_RECURRENCE[parts[-1]]} ({done_text('/'.join(parts[:-1]))})"
    return metric


def _word(part: str) -> str:
    """Part of a metric's name in words; the bias of object discovery with a typographic sign."""
    if part.startswith("bias_"):
        return part.replace("_", " ").replace("-", MINUS)
    return _WORDS.get(part, part.replace("_", " "))


def _with_k(parts: Sequence[str]) -> Sequence[str]:
    """`knn/k10/top1` with its k in the name of the probe; k = 20 has the short name."""
    if len(parts) > 2 and parts[0] == "knn" and parts[1][1:].isdigit():
        return [f"k-NN, k = {parts[1][1:]}", *parts[2:]]
    return parts


def _changed(group: str, parts: Sequence[str]) -> str:
    """What was done and the metric after it: `registers_zeroed/change/test/linear/top1`."""
    what, *rest = parts
    change = "change of " if rest[0] == _CHANGE and len(rest) > 1 else ""
    of = "/".join(rest[1:] if change else rest)
    return f"{change}{metric_label(of)}, {group}{done_text(what)}"


def done_text(what: str) -> str:
    """What was done to a model or to images, in words: `scale_1_5/antialias` is "scale 1.5, antialiased"."""
    parts = [
        f"scale {part.removeprefix('scale_').replace('_', '.')}"
        if part.startswith("scale_")
        else part.replace("_", " ")
        for part in what.split("/")
    ]
    return ", ".join({"antialias": "antialiased"}.get(part, part) for part in parts)


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


def cell_name(values: Mapping[str, Any], varying: Iterable[str], names: Mapping[str, str]) -> str:
    """The same, and "4 registers" where cells differ in nothing else."""
    return registers([values[REGISTERS]]) if list(varying) == [REGISTERS] else cell_text(values, varying, names)


def registers(counts: Sequence[Any]) -> str:
    """Counts of registers in words: "1 register", "1, 2 and 4 registers"."""
    return f"{joined([value_text(count) for count in counts], 'and')} register{'' if list(counts) == [1] else 's'}"


def joined(parts: Sequence[str], word: str) -> str:
    """A list in words; `parts` are one or more."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


_METHODS = {
    "paired_t": "Student's t of paired differences",
    "paired_t_bonferroni": "Student's t of paired differences, simultaneous by Bonferroni",
    "pooled_dunnett": "Dunnett's simultaneous intervals with residuals pooled over cells",
    "stein two-stage t": "Stein's two-stage t",
}


def method_text(method: str) -> str:
    """How an interval was made, in words."""
    return _METHODS.get(method, method.replace("_", " "))


FLAGS = {
    "adaptive": "more seeds than the first ones were run, as many as the variance of those asked for",
    "best_checkpoint": "scores are of the step at which the declared validation metric was best, so that this metric "
    "itself is optimistic",
    "baseline": "this is the baseline that others are compared with",
    "censored": "a scheduler stopped trials early by their scores, so those in the mean are no fair sample",
    "chosen_on_val": "the best linear head was chosen on the validation images, where scores are therefore optimistic",
    "diverged": "trials diverged (NaN or infinite loss) and are not in the mean",
    "failed": "trials failed and are not in the mean",
    "imported": "results come from another tool, and nothing but their settings is known of how they were made",
    "missing": "trials have no score yet",
    "mixed_data": "trials saw data with different fingerprints",
    "mixed_device": "trials ran on different kinds of devices",
    "mixed_git_commit": "trials ran different commits of the code",
    "mixed_precision": "trials computed in different precisions",
    "mixed_steps": "scores are of different steps",
    "mixed_threads": "trials ran with different numbers of threads",
    "mixed_versions": "trials ran with different package versions",
    "no_baseline": "there is no finished baseline to compare with",
    "no_frozen_threshold": "the baseline has no outliers, or has not finished, so its threshold cannot be frozen",
    "no_pair": "no seed has finished both here and in the baseline",
    "no_variance": "all paired differences are equal, so there is no p-value",
    "not_finite": "a score is NaN or infinite and is not in the mean",
    "observational": "released weights differ in more than the axis, so a difference is not its effect",
    "over_images": "the interval is over test images of two given models, and says nothing of further runs",
    "one_seed": "one seed or one pair: no spread or interval can be given",
    "partly_paired": "not every seed of the cell has a score of its baseline beside it",
    "pruned": "trials were pruned and are not in the mean",
    "scored_early": "scores are of a declared step before the end of training",
    "stopped": "trials were stopped and are not in the mean",
    "unequal_flops": "training cost more or less FLOPs than the baseline's, by over 1 %, as registers do: the report "
    "says what each costs",
    "unequal_steps": "trials trained for more or fewer steps than the baseline's",
}


def flag_text(flag: str) -> str:
    """What a flag of the ablation table says."""
    if flag.startswith("baseline_other_"):
        return f"trials and their baseline differ in {flag.removeprefix('baseline_other_').replace('_', ' ')}"
    return FLAGS.get(flag, flag.replace("_", " "))
