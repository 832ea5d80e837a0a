"""Which way each metric is better: one table; a metric that is not in it has no better way, so none of it is best."""

from __future__ import annotations

HIGHER = 1
LOWER = -1

# By the last part of a metric's name, of scores on val/…, test/… and train/…
_OF_SCORES = {
    **dict.fromkeys(
        ("top1", "top5", "accuracy", "mean_accuracy", "miou", "corloc", "delta1", "delta2", "delta3"), HIGHER
    ),
    **dict.fromkeys(("rmse", "abs_rel", "loss"), LOWER),
}
# By the last part too, of what is measured of tokens: what the paper calls artifacts.
_OF_TOKENS = dict.fromkeys(
    ("outlier_fraction", "outlier_fraction_150", "outlier_fraction_frozen", "max_over_median", "images_with_outliers"),
    LOWER,
)
_TABLES = {"test": _OF_SCORES, "val": _OF_SCORES, "train": _OF_SCORES, "tokens": _OF_TOKENS}


def direction(metric: str) -> int | None:
    """HIGHER or LOWER where that is better; None where neither is: descriptions, and metrics of other programs."""
    first, _, rest = metric.partition("/")
    return _TABLES.get(first, {}).get(rest.rpartition("/")[2])
