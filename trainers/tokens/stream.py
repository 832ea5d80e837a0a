"""Norm statistics of the training stream: counts and moments on the device, without synchronisation per step.

Shapes: L blocks (layers 0 … L), B images, T = class token + R registers + N patches, K kinds of token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers import distributed
from trainers.tokens.histogram import BINS_PER_DECADE, LOWEST, NUM_BINS, Counts, Distribution, Floats, sparse
from trainers.tokens.norms import LEVELS, NormRow, NormStatistics, number, token_kinds
from trainers.tokens.outliers import FIXED_THRESHOLD, otsu_threshold, rule3_threshold

_NAN_BIN = NUM_BINS + 2  # beyond the grid: NaN is counted apart, in neither overflow nor moments
_WIDTH = NUM_BINS + 3

# Below this standard deviation, relative to the mean, fourth moments from raw sums hold too few digits.
_LEAST_SPREAD = 2e-3


class TrainingStream:
    """Counts int64, Σr … Σr⁴ float64 and max of the norms of every layer and kind of token.

    Counts and max are exact and do not depend on the order of updates and merges; the sums do by rounding alone. Bins
    are found with a float32 logarithm: a norm within 1e-6 (relative) of an edge may fall on either side of it. NaN
    norms are counted apart and left out of all else; infinite ones count as overflow and make the moments infinite.

    Args:
        num_layers: L + 1, the embedding included.
        num_registers: R.
        device: where the norms are.
        class_token: whether T starts with a class token.
    """

    def __init__(
        self, num_layers: int, num_registers: int, device: torch.device | str = "cpu", class_token: bool = True
    ) -> None:
        self.kinds = token_kinds(num_registers, class_token)
        kinds = len(self.kinds)
        self._counts_LKW = torch.zeros(num_layers, kinds, _WIDTH, dtype=torch.int64, device=device)
        self._sums_LK4 = torch.zeros(num_layers, kinds, 4, dtype=torch.float64, device=device)
        self._max_LK = torch.zeros(num_layers, kinds, dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)
        first = torch.arange(num_layers * kinds, device=device).reshape(num_layers, 1, kinds) * _WIDTH
        self._first_single, self._first_patch = first[:, :, :-1], first[:, :, -1:]  # where a group's bins start

    @torch.no_grad()
    def update(self, norms_LBT: Tensor) -> None:
        """Add the norms [L + 1, B, T] of one batch; N may differ from batch to batch. Never waits for the device."""
        norms_LBT = norms_LBT.float()
        single = len(self.kinds) - 1
        index = _bins(norms_LBT)
        index[:, :, :single] += self._first_single
        index[:, :, single:] += self._first_patch
        flat = index.reshape(-1)
        self._counts_LKW.view(-1).scatter_add_(0, flat, self._one.expand(len(flat)))

        numbers = norms_LBT.nan_to_num(nan=0.0, posinf=math.inf)
        largest = numbers.amax(dim=1)  # [L + 1, T]
        power = numbers.double()
        sums = [power.sum(dim=1)]
        square = power * power
        sums += [square.sum(dim=1), power.mul_(square).sum(dim=1), square.mul_(square).sum(dim=1)]
        moments = torch.stack(sums, dim=2)  # [L + 1, T, 4]
        self._sums_LK4[:, :single] += moments[:, :single]
        self._sums_LK4[:, single] += moments[:, single:].sum(dim=1)
        peaks = torch.cat([largest[:, :single], largest[:, single:].amax(dim=1, keepdim=True)], dim=1)
        torch.maximum(self._max_LK, peaks, out=self._max_LK)

    def merge(self, other: TrainingStream) -> None:
        """Add what another stream of the same layers and kinds has seen.

        Raises:
            ValueError: the layers or kinds differ.
        """
        if other.kinds != self.kinds or other._max_LK.shape != self._max_LK.shape:
            raise ValueError(
                f"streams of {len(other._max_LK)} layers × {other.kinds} and "
                f"{len(self._max_LK)} layers × {self.kinds} cannot be merged"
            )
        device = self._max_LK.device
        self._counts_LKW += other._counts_LKW.to(device)
        self._sums_LK4 += other._sums_LK4.to(device)
        torch.maximum(self._max_LK, other._max_LK.to(device), out=self._max_LK)

    def reduce_to_first(self) -> None:
        """With several ranks: add what all of them have seen to the first one's, and start the others from zero."""
        if distributed.world_size() == 1:
            return
        distributed.sum_(self._counts_LKW)
        distributed.sum_(self._sums_LK4)
        distributed.max_(self._max_LK)
        if distributed.rank() > 0:
            self._reset()

    def _reset(self) -> None:
        for total in (self._counts_LKW, self._sums_LK4, self._max_LK):
            total.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything counted so far."""
        return {"counts": self._counts_LKW.clone(), "sums": self._sums_LK4.clone(), "max": self._max_LK.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: the state has other layers or kinds.
        """
        if state["counts"].shape != self._counts_LKW.shape:
            raise ValueError(
                f"the state has shape {tuple(state['counts'].shape)}; needed: {tuple(self._counts_LKW.shape)}"
            )
        self._counts_LKW.copy_(state["counts"])
        self._sums_LK4.copy_(state["sums"])
        self._max_LK.copy_(state["max"])

    def drain(self, *, trial_id: str, step: int, weights: str) -> list[NormRow]:
        """Rows of all that was seen since the last drain, one per layer and kind; then start from zero.

        Max and mean are exact, kurtosis to about 1e-3, all else comes from the histogram, whose bins are 0.45 % wide.
        """
        counts = self._counts_LKW.cpu().numpy()[:, :, :_NAN_BIN]
        sums, largest = self._sums_LK4.cpu().numpy(), self._max_LK.cpu().numpy()
        rows = [
            NormRow(trial_id, step, layer, kind, "train", weights, _statistics(counts[at], sums[at], largest[at]))
            for layer in range(len(counts))
            for kind, at in ((kind, (layer, index)) for index, kind in enumerate(self.kinds))
        ]
        self._reset()
        return rows


def _bins(norms: Tensor) -> Tensor:
    """The bin of every norm: 0 … NUM_BINS + 1 as in the grid, _NAN_BIN for NaN; int64, one logarithm."""
    position = torch.log2(norms).mul_(BINS_PER_DECADE * math.log10(2)).add_(1 - BINS_PER_DECADE * math.log10(LOWEST))
    return position.clamp_(0, NUM_BINS + 1).nan_to_num_(nan=_NAN_BIN).to(torch.int64)


def _statistics(counts: Counts, sums: Floats, maximum: float) -> NormStatistics:
    """Statistics of one group from its counts [NUM_BINS + 2], sums of four powers and maximum."""
    total = int(counts.sum())
    if total == 0:
        return NormStatistics(count=0)
    distribution = Distribution(counts, float(maximum))
    with np.errstate(invalid="ignore", divide="ignore"):  # infinite norms, a median of zero
        median, p90, p98, p99, p999 = map(number, distribution.quantiles(LEVELS))
        middle = np.float64(np.nan if median is None else median)
        threshold = rule3_threshold(middle, distribution.median_absolute_deviation(float(middle)))
        ratio = number(maximum / middle)
    above = 1 - distribution.fraction_below(np.array([threshold, FIXED_THRESHOLD]))
    return NormStatistics(
        count=total,
        mean=number(sums[0] / total),
        median=median,
        p90=p90,
        p98=p98,
        p99=p99,
        p999=p999,
        max=float(maximum),
        max_over_median=ratio,
        kurtosis=number(_kurtosis(sums / total)),
        kurtosis_log=number(distribution.kurtosis_log()),
        outlier_fraction=number(above[0]),
        outlier_fraction_150=number(above[1]),
        otsu_threshold=otsu_threshold(counts),
        histogram=sparse(counts),
    )


def _kurtosis(raw: Floats) -> float:
    """Pearson's kurtosis from the raw moments E[r] … E[r⁴]; NaN where they hold too few digits."""
    mean, second, third, fourth = (float(moment) for moment in raw)
    variance = second - mean**2
    if not (math.isfinite(fourth) and variance > (_LEAST_SPREAD * mean) ** 2):
        return math.nan
    return (fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4) / variance**2
