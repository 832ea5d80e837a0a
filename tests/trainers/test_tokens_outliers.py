"""Outlier rules: thresholds by hand, the qualitative table of paper.md §5, gated Otsu, onset."""

from __future__ import annotations

import numpy as np
import pytest

from trainers.tokens import histogram, outliers

NUM = 51_200


def _otsu(norms: np.ndarray) -> float | None:
    return outliers.otsu_threshold(histogram.count(norms[None])[0])


def _mix(bulk: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Norms and which of them were planted."""
    return np.concatenate([bulk, high]), np.arange(len(bulk) + len(high)) >= len(bulk)


def _planted(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Imitations of the models' published ranges of norms."""
    rng = np.random.default_rng(7)
    if kind == "dinov2_g":  # bulk up to 100, 2.37 % above 150
        return _mix(rng.lognormal(np.log(40), 0.25, NUM), rng.uniform(200, 500, 1_240))
    if kind == "openclip":
        return _mix(rng.normal(55, 6, NUM), rng.uniform(250, 330, 1_000))
    if kind == "dinov2_l":  # bulk around 20, tail to 200: most of it is below 150
        return _mix(rng.normal(20, 1.5, NUM), rng.uniform(60, 200, 1_000))
    return _mix(rng.normal(450, 60, NUM), rng.uniform(900, 1_400, 1_000))  # deit3


NULLS = {
    "normal": lambda rng, n: np.abs(rng.normal(20, 1.5, n)),
    "wide": lambda rng, n: rng.normal(450, 60, n),
    "narrow": lambda rng, n: rng.normal(8, 0.01, n),
    "uniform": lambda rng, n: rng.uniform(20, 27, n),
    "lognormal": lambda rng, n: rng.lognormal(3, 0.08, n),
    "gamma": lambda rng, n: rng.gamma(50, 0.4, n),
}


def test_threshold_by_hand() -> None:
    assert outliers.rule3_threshold(20.0, 1.0) == 30.0  # 1.5 m outweighs 20 + 7.413
    assert outliers.rule3_threshold(20.0, 2.0) == pytest.approx(34.826)  # 20 + 5 · 1.4826 · 2


def test_fraction_by_hand() -> None:
    norms = np.array([[8.0, 9.0, 10.0, 11.0, 12.0, 15.0, 17.5, 30.0, 10.0, 10.0], [5.0] * 9 + [7.6]])
    # First row: median 10.5, MAD 1.5, threshold 21.62; second: median 5, MAD 0, threshold 7.5.
    assert outliers.rule3_fraction(norms) == pytest.approx([0.1, 0.1])
    assert outliers.rule3_fraction(np.array([[5.0] * 9 + [7.5]])) == [0.0]  # the threshold itself is no outlier


@pytest.mark.parametrize(("kind", "false"), [("dinov2_g", 0.0025), ("openclip", 0), ("dinov2_l", 0), ("deit3", 0.0022)])
def test_rule3_finds_planted_outliers_at_every_scale(kind: str, false: float) -> None:
    norms, planted = _planted(kind)
    mad = np.median(np.abs(norms - np.median(norms)))
    flagged = norms > outliers.rule3_threshold(np.median(norms), mad)
    assert flagged[planted].mean() >= 0.94
    assert flagged[~planted].mean() <= false
    assert outliers.rule3_fraction(norms[None]) == pytest.approx(flagged.mean())


def test_fixed_150_holds_only_where_it_was_chosen() -> None:
    quality = {}
    for kind in ("dinov2_g", "openclip", "dinov2_l", "deit3"):
        norms, planted = _planted(kind)
        flagged = norms > outliers.FIXED_THRESHOLD
        quality[kind] = (flagged[planted].mean(), planted[flagged].mean())  # recall, precision
    assert min(*quality["dinov2_g"], *quality["openclip"]) > 0.99
    assert quality["dinov2_l"][0] < 0.5
    assert quality["deit3"][1] < 0.05


@pytest.mark.parametrize(("median", "spread"), [(20.0, 1.0), (450.0, 15.0), (0.5, 0.02)])
def test_three_in_a_thousand_at_sixteen_tenths_of_the_bulk(median: float, spread: float) -> None:
    rng = np.random.default_rng(1)
    bulk = rng.normal(median, spread, 9_970)
    norms = np.concatenate([bulk, rng.choice(bulk, 30) * 0 + 1.6 * median])
    assert outliers.rule3_fraction(norms[None]) == pytest.approx([0.003], abs=1e-12)


@pytest.mark.parametrize("kind", NULLS)
@pytest.mark.parametrize("count", [256, NUM])
def test_nothing_where_there_is_nothing(kind: str, count: int) -> None:
    for seed in range(20 if count < NUM else 3):
        norms = NULLS[kind](np.random.default_rng(seed), count)
        assert outliers.rule3_fraction(norms[None])[0] <= 1e-4
        assert _otsu(norms) is None


@pytest.mark.parametrize(("kind", "low", "high"), [("openclip", 80, 250), ("dinov2_g", 90, 200), ("dinov2_l", 26, 60)])
def test_otsu_separates_clear_modes(kind: str, low: float, high: float) -> None:
    threshold = _otsu(_planted(kind)[0])
    assert threshold is not None and low <= threshold <= high


def test_otsu_misses_overlapping_and_very_rare_modes() -> None:
    rng = np.random.default_rng(3)
    overlapping = np.concatenate([rng.normal(450, 60, NUM), rng.normal(700, 80, 3_000)])
    assert _otsu(overlapping) is None
    rare = np.concatenate([rng.normal(55, 6, NUM), rng.uniform(250, 330, 51)])
    assert _otsu(rare) is None
    assert outliers.rule3_fraction(rare[None])[0] == pytest.approx(0.001, rel=0.02)  # which rule 3 sees


def test_otsu_needs_a_valley_and_not_only_distant_classes() -> None:
    rng = np.random.default_rng(4)
    merged = rng.lognormal(3, 0.45, 20_000) * np.where(rng.random(20_000) < 0.5, 3.0, 1.0)  # valley 0.9 of the modes
    assert _otsu(merged) is None
    assert _otsu(np.exp(rng.uniform(1, 6, 20_000))) is None
    apart = rng.lognormal(3, 0.25, 20_000) * np.where(rng.random(20_000) < 0.5, 4.0, 1.0)
    assert _otsu(apart) == pytest.approx(np.exp(3) * 2, rel=0.05)


def test_otsu_does_not_take_the_noise_of_few_norms_for_modes() -> None:
    for seed in range(10):
        assert _otsu(np.random.default_rng(seed).uniform(10, 40, 256)) is None


def test_split_and_ashman_by_hand() -> None:
    # Classes {0, 1} and {5, 6}: means 0.5 and 5.5, standard deviations 0.5, D = √2 · 5 / √0.5 = 10.
    split, ashman = outliers._otsu_split(np.array([1.0, 1, 0, 0, 0, 1, 1]), np.arange(7.0))
    assert (split, ashman) == (2, pytest.approx(10.0))


def test_otsu_minimises_the_variance_within_classes() -> None:
    rng = np.random.default_rng(5)
    norms = np.concatenate([rng.lognormal(2, 0.3, 3_000), rng.lognormal(4.2, 0.4, 1_500)])
    values = np.sort(np.log(norms))
    within = [k * values[:k].var() + (len(values) - k) * values[k:].var() for k in range(1, len(values))]
    threshold = _otsu(norms)
    assert threshold is not None
    below = int((values < np.log(threshold)).sum())
    assert within[below - 1] <= min(within) * (1 + 1e-4)


def test_otsu_gap_middle_and_degenerate_counts() -> None:
    assert _otsu(np.array([1.0] * 50 + [100.0] * 50)) == pytest.approx(10.0, rel=0.005)
    assert _otsu(np.array([3.0] * 50)) is None
    assert _otsu(np.array([0.0] * 50 + [np.inf] * 3)) is None
    assert _otsu(np.array([1.0] * 50 + [1.9] * 50)) is None  # modes nearer than a factor of 2


@pytest.mark.parametrize(
    ("fractions", "onset"),
    [
        ([0, 0, 0.006, 0.006, 0.006, 0], 2),
        ([0, 0.01, 0.01, 0, 0.01, 0.01, 0.01], 4),
        ([0, 0.005, 0.005, 0.005, 0.0051], 4),  # 0.5 % itself is not enough
        ([0.01, 0.01, 0.01], 0),
        ([0, 0, 0, 0, 0.01], 4),  # one point remains
        ([0, 0.01, 0.01], 1),
        ([0.01, 0], None),
        ([0, None, 0.01, 0.01], 2),
        ([0, 0, 0], None),
        ([], None),
        # One, two and three points: as many as there are must exceed it, and a missing one never does.
        ([0.01], 0),
        ([0.005], None),
        ([None], None),
        ([0.01, 0.01], 0),
        ([0, 0.01], 1),
        ([None, 0.01], 1),
        ([0.01, None], None),
        ([0, 0, 0.01], 2),
        ([0.01, 0, 0.01], 2),
        ([0.01, None, 0.01], 2),
        ([0.01, 0.01, None], None),
        ([0.01, 0.01, 0], None),
        # A missing fraction parts a run in two.
        ([0.01, 0.01, None, 0.01, 0.01, 0.01, 0], 3),
        ([0.01, None, 0.01, None, 0, 0], None),
    ],
)
def test_onset(fractions: list[float | None], onset: int | None) -> None:
    assert outliers.onset(fractions) == onset
