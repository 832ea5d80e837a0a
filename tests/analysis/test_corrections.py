"""Corrections by hand, against statsmodels and scipy, and against the closed test that the family's is short for."""

from __future__ import annotations

from itertools import chain, combinations, product

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from analysis import corrections, dunnett, statistics
from analysis.statistics import Difference


def pooled(t: float, freedom: int = 20) -> Difference:
    p = 2 * float(stats.t.sf(abs(t), freedom))
    return Difference(5, 0.0, t, t - 1, t + 1, statistics.POOLED_DUNNETT, p, t=t, freedom=freedom)


def paired(p: float | None) -> Difference:
    return Difference(5, 0.0, 1.0, 0.0, 2.0, statistics.PAIRED_BONFERRONI, p)


def test_holm_by_hand() -> None:
    # Sorted: .01, .02, .03, .04, times 4, 3, 2, 1 = .04, .06, .06, .04; made monotone: .04, .06, .06, .06.
    found = corrections.holm([0.04, None, 0.01, 0.03, 0.02])
    assert found == pytest.approx([0.06, None, 0.04, 0.06, 0.06], abs=1e-12)
    assert corrections.holm([0.9, 0.8]) == [1.0, 1.0]
    assert corrections.holm([None]) == [None]
    assert corrections.holm([]) == []


def test_benjamini_hochberg_by_hand() -> None:
    # Sorted: .01, .02, .03, .5, times 4/1, 4/2, 4/3, 4/4 = .04, .04, .04, .5.
    found = corrections.benjamini_hochberg([0.5, 0.03, None, 0.01, 0.02])
    assert found == pytest.approx([0.5, 0.04, None, 0.04, 0.04], abs=1e-12)
    assert corrections.benjamini_hochberg([None, 0.2]) == [None, 0.2]
    assert corrections.benjamini_hochberg([]) == []


@pytest.mark.parametrize("count", [1, 2, 30])
def test_equal_those_of_statsmodels_and_scipy(count: int) -> None:
    p = np.random.default_rng(count).uniform(size=count) ** 3
    p[-1] = p[0]  # a tie
    assert corrections.holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)
    found = corrections.benjamini_hochberg(p.tolist())
    assert found == pytest.approx(multipletests(p, method="fdr_bh")[1], rel=1e-12)
    assert found == pytest.approx(stats.false_discovery_control(p), rel=1e-12)


def test_pooled_comparisons_step_down_dunnetts_way() -> None:
    ts = (2.4, -3.5, 0.3)
    first, second, third = (dunnett.p_value(t, m, 20) for t, m in ((3.5, 3), (2.4, 2), (0.3, 1)))
    found = corrections.step_down([pooled(t) for t in ts])
    assert found == [second, first, third]
    by_holm = corrections.holm([pooled(t).p_value for t in ts])
    assert all(ours < theirs for ours, theirs in zip(found[:2], by_holm[:2], strict=True) if ours and theirs)
    assert corrections.step_down([pooled(2.0), paired(0.01)]) == corrections.holm([pooled(2.0).p_value, 0.01])
    assert corrections.step_down([paired(None)]) == [None]


def test_a_single_block_is_not_corrected_further() -> None:
    block = [pooled(3.1), pooled(2.0)]
    assert corrections.family([block]) == [corrections.step_down(block)]
    assert corrections.family([]) == []
    # A metric of which nothing has a p-value costs the others nothing.
    assert corrections.family([block, [paired(None)]]) == [corrections.step_down(block), [None]]


def closed(blocks: list[list[Difference]]) -> list[list[float]]:
    """The closed test by its definition: every intersection of hypotheses has its p-value."""
    hypotheses = [(b, i) for b, block in enumerate(blocks) for i in range(len(block))]
    subsets = chain.from_iterable(combinations(hypotheses, k) for k in range(1, len(hypotheses) + 1))
    worst: dict[tuple[int, int], float] = {}
    for subset in subsets:
        inside = {b for b, _ in subset}
        local = []
        for b in inside:
            members = [blocks[b][i] for c, i in subset if c == b]
            if members[0].method == statistics.POOLED_DUNNETT:
                local.append(min(dunnett.p_value(one.t or 0.0, len(members), 20) for one in members))
            else:
                local.append(min(1.0, len(members) * min(one.p_value or 0.0 for one in members)))
        for hypothesis in subset:
            worst[hypothesis] = max(worst.get(hypothesis, 0.0), min(1.0, len(inside) * min(local)))
    return [[worst[b, i] for i in range(len(block))] for b, block in enumerate(blocks)]


@pytest.mark.parametrize("seed", range(8))
def test_the_family_is_the_closed_test(seed: int) -> None:
    random = np.random.default_rng(seed)
    blocks = [
        [pooled(float(t)) for t in random.normal(2.2, 1.5, size=3)],
        [pooled(float(t)) for t in random.normal(2.2, 1.5, size=2)],
        [paired(float(p)) for p in random.uniform(size=3) ** 4],
    ]
    found, expected = corrections.family(blocks), closed(blocks)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def test_blocks_may_come_in_any_order() -> None:
    blocks = [[pooled(2.9), pooled(3.6)], [pooled(3.3)], [paired(0.004), paired(0.2)]]
    by_block = dict(enumerate(corrections.family(blocks)))
    for order in product(range(3), repeat=3):
        if len(set(order)) == 3:
            assert corrections.family([blocks[i] for i in order]) == [by_block[i] for i in order]


def test_null_families_are_rarely_rejected() -> None:
    """800 null sweeps of two metrics and 5 cells with 5 seeds, of which 5 % may have any corrected p below 0.05."""
    random = np.random.default_rng(0)
    any_found = 0
    for _ in range(800):
        noise = random.normal(size=(2, 6, 5))
        means = noise.mean(axis=2)
        centred = noise - means[:, :, None]
        centred = centred - centred.mean(axis=1, keepdims=True)
        error = np.sqrt(2 * (centred**2).sum(axis=(1, 2)) / 20 / 5)
        ts = (means[:, 1:] - means[:, :1]) / error[:, None]
        found = corrections.family([[pooled(float(t)) for t in row] for row in ts])
        any_found += any(p is not None and p < 0.05 for block in found for p in block)
    assert any_found / 800 == pytest.approx(0.05, abs=0.031)  # four binomial standard errors
