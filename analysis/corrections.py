"""Corrections of p-values for many comparisons: families of declared metrics, and exploratory ones; pure."""

from __future__ import annotations

from collections.abc import Sequence

from analysis import dunnett
from analysis.statistics import POOLED_DUNNETT, Difference

Corrected = list[float | None]


def holm(p_values: Sequence[float | None]) -> Corrected:
    """Holm's (1979) step-down adjusted p-values in the given order; a null stays null and is not counted.

    They control the chance of any false positive in the family, whatever the tests' dependence.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: Corrected = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = highest
    return adjusted


def benjamini_hochberg(p_values: Sequence[float | None]) -> Corrected:
    """Benjamini and Hochberg's (1995) step-up adjusted p-values in the given order; a null stays null, uncounted.

    They bound the expected share of false positives among those below a level, for tests that are independent or
    positively dependent (Benjamini and Yekutieli 2001), as those against one baseline are. As
    scipy.stats.false_discovery_control, whose import takes longer than a whole analysis may.
    """
    known = sorted(((p, index) for index, p in enumerate(p_values) if p is not None), reverse=True)
    adjusted: Corrected = [None] * len(p_values)
    lowest = 1.0
    for rank, (p, index) in enumerate(known):
        lowest = min(lowest, p * len(known) / (len(known) - rank))
        adjusted[index] = lowest
    return adjusted


def step_down(comparisons: Sequence[Difference]) -> Corrected:
    """Adjusted p-values of the comparisons with one baseline by one metric, in the given order.

    Where residuals are pooled it is the step-down form of Dunnett's test (Dunnett and Tamhane 1991, Statistics in
    Medicine 10), which uses that all comparisons share the baseline; else Holm's. Nulls are not counted.
    """
    if any(one.p_value is not None and one.method != POOLED_DUNNETT for one in comparisons):
        return holm([one.p_value for one in comparisons])
    known = sorted((one.p_value, index) for index, one in enumerate(comparisons) if one.p_value is not None)
    adjusted: Corrected = [None] * len(comparisons)
    highest = 0.0
    for rank, (_, index) in enumerate(known):
        one = comparisons[index]
        assert one.t is not None and one.freedom is not None
        highest = max(highest, dunnett.p_value(one.t, len(known) - rank, one.freedom))
        adjusted[index] = highest
    return adjusted


def family(blocks: Sequence[Sequence[Difference]]) -> list[Corrected]:
    """Adjusted p-values over all `blocks`, each the comparisons of one metric with one baseline, in the given order.

    They control the chance of any false positive among all of them: `step_down` within a block, Holm over blocks.
    It is a closed test (Marcus, Peritz and Gabriel 1976, Biometrika 63): an intersection of hypotheses is rejected
    where the smallest of its blocks' p-values, times the number of its blocks, is small; the hypotheses of a block
    that are not in it make its p-value no larger than `step_down`'s largest. So a block stops counting once all of its
    hypotheses are rejected, and within a block nothing is lost to comparisons that are correlated.
    """
    within = [step_down(block) for block in blocks]
    largest = [max((p for p in block if p is not None), default=None) for block in within]
    return [
        [None if p is None else _closed(p, [q for j, q in enumerate(largest) if j != i]) for p in block]
        for i, block in enumerate(within)
    ]


def _closed(p: float, others: Sequence[float | None]) -> float:
    """The largest p-value of the intersections with one hypothesis, given the largest of every other block."""
    falling = sorted((q for q in others if q is not None), reverse=True)
    return min(1.0, max([p, *((k + 2) * min(p, q) for k, q in enumerate(falling))]))
