"""Exact statistics of the token norms of the probe batch, one row per layer and kind of token.

Shapes: L blocks (layers 0 … L), B images, T = class token + R registers + N patches, G groups (layer × kind).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainers.tokens import histogram, outliers
from trainers.tokens.histogram import Floats

LEVELS = (0.5, 0.9, 0.98, 0.99, 0.999)

# Norms that differ by less, relative to their mean, differ by the rounding of float32 alone: they have no kurtosis.
_LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class NormStatistics:
    """Statistics of one group of norms r; what is undefined is None.

    Quantiles interpolate linearly between order statistics (numpy's default). Kurtosis is Pearson's m₄ / m₂² (3 for a
    normal distribution, not the excess) with population moments; None where all norms are equal up to rounding, and
    `kurtosis_log` also where a norm is 0 or infinite. NaN norms are left out of everything: `count` shows how many
    norms remain. Infinite norms count as norms, in the histogram's last bin.
    """

    count: int
    mean: float | None = None
    median: float | None = None
    p90: float | None = None
    p98: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None
    max_over_median: float | None = None
    kurtosis: float | None = None
    kurtosis_log: float | None = None
    outlier_fraction: float | None = None
    outlier_fraction_150: float | None = None
    otsu_threshold: float | None = None
    histogram: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class NormRow:
    """One row of token_norms: where its norms come from, and their statistics."""

    trial_id: str
    step: int
    layer: int  # 0 enters the first block, l is the output of block l, before the final norm
    token: str  # "cls", "register_0" …, "patch"
    source: str  # "probe" or "train"
    weights: str  # "raw", "ema" or "teacher"
    statistics: NormStatistics


def token_kinds(num_registers: int, class_token: bool = True) -> tuple[str, ...]:
    """The kinds of token in their order along T: class, registers, patches."""
    return (*(("cls",) if class_token else ()), *(f"register_{i}" for i in range(num_registers)), "patch")


def probe_rows(
    norms_LBT: NDArray[np.floating],
    num_registers: int,
    *,
    trial_id: str,
    step: int,
    weights: str,
    class_token: bool = True,
) -> list[NormRow]:
    """Exact statistics of the probe batch, one row per layer and kind of token.

    Args:
        norms_LBT: L2 norms of the residual stream, [L + 1, B, T], T in the order class, registers, patches.
        num_registers: R.
        trial_id: written into the rows, as are step and weights.
        step: optimiser steps that the weights have seen.
        weights: "raw", "ema" or "teacher".
        class_token: whether T starts with a class token.

    Raises:
        ValueError: the norms have another shape than this, or no patches.
    """
    kinds = token_kinds(num_registers, class_token)
    if norms_LBT.ndim != 3 or norms_LBT.shape[2] < len(kinds) or not norms_LBT.size:
        raise ValueError(f"norms have shape {norms_LBT.shape}; needed: [layers, images, at least {len(kinds)} tokens]")
    layers = len(norms_LBT)
    single = norms_LBT[:, :, : len(kinds) - 1].transpose(0, 2, 1)  # [L + 1, kinds, B]
    patches = norms_LBT[:, :, len(kinds) - 1 :].reshape(layers, -1)
    singles = iter(describe(single.reshape(-1, single.shape[2])))
    patch = iter(describe(patches))
    return [
        NormRow(trial_id, step, layer, kind, "probe", weights, next(patch if kind == "patch" else singles))
        for layer in range(layers)
        for kind in kinds
    ]


def describe(norms_GN: NDArray[np.floating]) -> Iterator[NormStatistics]:
    """Statistics of every row of norms [G, N] ≥ 0 (see NormStatistics)."""
    missing = np.isnan(norms_GN)
    if norms_GN.size and not missing.any():
        return _describe(norms_GN)
    return (_describe_one(row[~gone]) for row, gone in zip(norms_GN, missing, strict=True))


def _describe_one(norms: NDArray[np.floating]) -> NormStatistics:
    return next(_describe(norms[None])) if norms.size else NormStatistics(count=0)


def _describe(norms_GN: NDArray[np.floating]) -> Iterator[NormStatistics]:
    values = norms_GN.astype(np.float64)
    counts = histogram.count(norms_GN)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # infinite norms
        columns = {
            "mean": values.mean(axis=1),
            **dict(zip(("median", "p90", "p98", "p99", "p999"), np.quantile(values, LEVELS, axis=1), strict=True)),
            "max": values.max(axis=1),
            "kurtosis": kurtosis(values, _LEAST_SPREAD * np.abs(values.mean(axis=1))),
            "kurtosis_log": kurtosis(np.log(values), np.full(len(values), _LEAST_SPREAD)),
            "outlier_fraction": outliers.rule3_fraction(values),
            "outlier_fraction_150": (values > outliers.FIXED_THRESHOLD).mean(axis=1),
        }
        columns["max_over_median"] = columns["max"] / columns["median"]
    for group, row in enumerate(counts):
        numbers = {name: number(column[group]) for name, column in columns.items()}
        yield NormStatistics(
            count=values.shape[1],
            **numbers,
            otsu_threshold=outliers.otsu_threshold(row),
            histogram=histogram.sparse(row),
        )


def kurtosis(values_GN: Floats, least_spread_G: Floats) -> Floats:
    """Pearson's kurtosis of every row, NaN where the standard deviation does not exceed `least_spread_G`."""
    square = (values_GN - values_GN.mean(axis=1, keepdims=True)) ** 2
    variance = square.mean(axis=1)
    fourth = (square**2).mean(axis=1)
    return np.asarray(np.where(np.sqrt(variance) > least_spread_G, fourth / variance**2, np.nan))


def number(value: float) -> float | None:
    """`value`, or None for NaN."""
    return None if np.isnan(value) else float(value)


def last_layer_metrics(rows: Iterable[NormRow]) -> dict[str, float]:
    """The metrics `tokens/…` of one evaluation: the patch tokens of the last layer, and where outliers set in.

    Only rows of the probe batch count. A metric that is undefined is absent, the onset layer where there is none too.

    Raises:
        ValueError: the rows belong to more than one evaluation.
    """
    patches = sorted((r for r in rows if r.source == "probe" and r.token == "patch"), key=lambda row: row.layer)
    if not patches:
        return {}
    if len({row.layer for row in patches}) < len(patches):
        raise ValueError("the rows belong to more than one evaluation")
    last = patches[-1].statistics
    onset = outliers.onset([row.statistics.outlier_fraction for row in patches])
    metrics = {
        "tokens/last/outlier_fraction": last.outlier_fraction,
        "tokens/last/outlier_fraction_150": last.outlier_fraction_150,
        "tokens/last/max_over_median": last.max_over_median,
        "tokens/onset_layer": onset,
    }
    return {name: float(value) for name, value in metrics.items() if value is not None}


def onset_step(rows: Iterable[NormRow]) -> dict[str, float]:
    """`tokens/onset_step`: the first evaluated step at which outliers have set in at the last layer; or nothing.

    Nothing too where they are there at the first evaluation, since then they may have come at any step before.

    Args:
        rows: of one kind of weights; only patches of the probe batch count.
    """
    patches = [row for row in rows if row.source == "probe" and row.token == "patch"]
    last = max((row.layer for row in patches), default=0)
    points = sorted((row.step, row.statistics.outlier_fraction) for row in patches if row.layer == last)
    onset = outliers.onset([fraction for _, fraction in points])
    return {} if not onset else {"tokens/onset_step": float(points[onset][0])}
