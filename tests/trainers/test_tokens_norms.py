"""Exact statistics of the probe batch against independent numpy and scipy, planted outliers, edge cases, histograms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

from trainers.config import resolve
from trainers.streams import Streams
from trainers.tokens import histogram, norms
from trainers.vit import Tokens, ViT, norms_of, token_norms

KEYS = {"trial_id": "t", "step": 5, "weights": "raw"}


@pytest.fixture(scope="module")
def real_norms() -> np.ndarray:
    """Norms [5, 12, 1 + 2 + 16] of a small ViT whose residual streams differ much among tokens."""
    config = resolve({"model.size": "nano", "model.num_registers": 2, "model.image_size": 32, "model.patch_size": 8})
    backbone = ViT(config.model, Streams(3)).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(3).add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        norms, _ = token_norms(backbone, torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
        return norms.numpy()


def _by_hand(group: np.ndarray) -> dict[str, float]:
    r = group.astype(np.float64).ravel()
    median, mad = np.percentile(r, 50), scipy.stats.median_abs_deviation(r, scale="normal")
    return {
        "count": r.size,
        "mean": r.sum() / r.size,
        "median": median,
        "p90": np.percentile(r, 90),
        "p98": np.percentile(r, 98),
        "p99": np.percentile(r, 99),
        "p999": np.percentile(r, 99.9),
        "max": np.sort(r)[-1],
        "max_over_median": np.sort(r)[-1] / median,
        "kurtosis": scipy.stats.kurtosis(r, fisher=False),
        "kurtosis_log": scipy.stats.kurtosis(np.log(r), fisher=False),
        "outlier_fraction": np.mean((r > median + 5 * mad) & (r > 1.5 * median)),
        "outlier_fraction_150": np.mean(r > 150),
    }


def test_agrees_with_direct_computation(real_norms: np.ndarray) -> None:
    rows = norms.probe_rows(real_norms, 2, **KEYS)
    assert [(row.layer, row.token) for row in rows] == [
        (layer, token) for layer in range(5) for token in ("cls", "register_0", "register_1", "patch")
    ]
    columns = {"cls": [0], "register_0": [1], "register_1": [2], "patch": range(3, 19)}
    compared = 0
    for row in rows:
        group = real_norms[row.layer][:, columns[row.token]]
        if group.std() < 1e-5:  # class and registers enter the first block equal in all images
            assert row.layer == 0 and row.statistics.kurtosis is None and row.statistics.kurtosis_log is None
            continue
        for name, value in _by_hand(group).items():
            assert getattr(row.statistics, name) == pytest.approx(value, rel=1e-5, abs=1e-12), (row, name)
            compared += 1
        expected = np.histogram(group, bins=np.concatenate([[0], histogram.bin_edges(), [np.inf]]))[0]
        assert row.statistics.histogram == tuple((int(b), int(expected[b])) for b in np.flatnonzero(expected))
    assert compared == 13 * 17
    assert {(row.trial_id, row.step, row.source, row.weights) for row in rows} == {("t", 5, "probe", "raw")}


def _planted(layers: int, first: int, fraction: float, factor: float) -> np.ndarray:
    """Norms [layers, 100, 1 + 4 + 100]: bulk 20 ± 1, from layer `first` on a known share of patches lies higher."""
    rng = np.random.default_rng(0)
    planted = rng.normal(20, 1, (layers, 100, 105)).astype(np.float32)
    patches = planted[:, :, 5:].reshape(layers, -1)
    for layer in range(first, layers):
        chosen = rng.choice(10_000, round(fraction * 10_000), replace=False)
        patches[layer, chosen] = factor * 20
    planted[:, :, 5:] = patches.reshape(layers, 100, 100)
    return planted


@pytest.mark.parametrize(("fraction", "factor"), [(0.0237, 10.0), (0.003, 1.6), (0.0001, 20.0)])
def test_planted_outliers_are_recovered(fraction: float, factor: float) -> None:
    rows = norms.probe_rows(_planted(8, 5, fraction, factor), 4, **KEYS)
    found = [row.statistics.outlier_fraction for row in rows if row.token == "patch"]
    assert found == pytest.approx([0] * 5 + [fraction] * 3, abs=1e-9)
    metrics = norms.last_layer_metrics(rows)
    assert metrics["tokens/last/outlier_fraction"] == pytest.approx(fraction)
    assert metrics["tokens/last/outlier_fraction_150"] == pytest.approx(fraction if factor >= 10 else 0)
    assert metrics["tokens/last/max_over_median"] == pytest.approx(factor, rel=0.01)
    assert metrics.get("tokens/onset_layer") == (5.0 if fraction > 0.005 else None)


def test_no_outliers_no_onset() -> None:
    metrics = norms.last_layer_metrics(norms.probe_rows(_planted(4, 4, 0.5, 9.0), 4, **KEYS))
    assert metrics["tokens/last/outlier_fraction"] == 0.0
    assert "tokens/onset_layer" not in metrics


def test_outlying_registers_do_not_count_as_patches() -> None:
    planted = _planted(3, 3, 0, 1)
    planted[:, :, 1:5] = 130.0  # as register 2 of the paper's Fig. 15
    rows = norms.probe_rows(planted, 4, **KEYS)
    assert norms.last_layer_metrics(rows)["tokens/last/outlier_fraction"] == 0.0
    register = next(row.statistics for row in rows if row.token == "register_2")
    assert (register.count, register.median, register.max_over_median) == (100, 130.0, 1.0)
    assert register.kurtosis is None


def test_without_class_token_and_without_registers() -> None:
    planted = _planted(2, 2, 0, 1)
    rows = norms.probe_rows(planted, 0, class_token=False, **KEYS)
    assert [(row.token, row.statistics.count) for row in rows] == [("patch", 10_500)] * 2
    rows = norms.probe_rows(planted, 0, **KEYS)
    assert [(row.token, row.statistics.count) for row in rows] == [("cls", 100), ("patch", 10_400)] * 2


def test_shapes_that_cannot_be_right() -> None:
    for shape in ((2, 3), (2, 3, 5), (2, 0, 9)):
        with pytest.raises(ValueError, match="norms have shape"):
            norms.probe_rows(np.ones(shape, np.float32), 4, **KEYS)


def test_nan_is_left_out_and_infinity_is_a_norm() -> None:
    values = np.array([[1.0, 2.0, 3.0, np.nan], [np.nan] * 4, [0.0, 1.0, 2.0, np.inf]], np.float32)
    first, second, third = norms.describe(values)
    assert (first.count, first.mean, first.median, first.max) == (3, 2.0, 2.0, 3.0)
    assert second == norms.NormStatistics(count=0)
    assert (third.count, third.median, third.max, third.mean) == (4, 1.5, np.inf, np.inf)
    assert third.kurtosis is None and third.kurtosis_log is None
    assert third.histogram[0] == (0, 1) and third.histogram[-1] == (histogram.NUM_BINS + 1, 1)


def test_all_zero_norms_have_no_ratio() -> None:
    (zero,) = norms.describe(np.zeros((1, 4), np.float32))
    assert (zero.median, zero.max, zero.outlier_fraction) == (0.0, 0.0, 0.0)
    assert zero.max_over_median is None and zero.kurtosis_log is None


def test_metrics_of_two_evaluations_are_refused() -> None:
    rows = norms.probe_rows(_planted(2, 2, 0, 1), 4, **KEYS)
    later = [dataclasses.replace(row, step=9) for row in rows]
    with pytest.raises(ValueError, match="more than one evaluation"):
        norms.last_layer_metrics([*rows, *later])
    training = [dataclasses.replace(row, source="train") for row in rows]
    assert norms.last_layer_metrics(training) == {}
    assert norms.last_layer_metrics([*rows, *training]) == norms.last_layer_metrics(rows)


def _evaluated(*fractions: float | None) -> list[norms.NormRow]:
    """Patch rows of consecutive steps 10, 20, … of two layers; these are the last layer's outlier fractions."""
    rows = []
    for number, fraction in enumerate(fractions, start=1):
        for layer, value in ((0, 0.9), (1, fraction)):
            statistics = norms.NormStatistics(count=100, outlier_fraction=value)
            rows.append(norms.NormRow("t", 10 * number, layer, "patch", "probe", "raw", statistics))
    return rows


@pytest.mark.parametrize(
    ("fractions", "step"),
    [
        ((0.01,), None),  # it may have come at any step before
        ((0.0,), None),
        ((None,), None),
        ((0.0, 0.01), 20.0),
        ((0.01, 0.0), None),
        ((0.01, None), None),
        ((0.01, None, 0.01), 30.0),
        ((0.0, 0.01, 0.01), 20.0),
        ((0.0, 0.01, 0.01, 0.01, 0.0), 20.0),
        ((0.01, 0.01, 0.0, 0.0, 0.01), 50.0),
        ((), None),
    ],
)
def test_onset_step_of_short_runs(fractions: tuple[float | None, ...], step: float | None) -> None:
    rows = _evaluated(*fractions)
    expected = {} if step is None else {"tokens/onset_step": step}
    assert norms.onset_step(rows) == expected
    assert norms.onset_step(rows[::-1]) == expected  # rows come in any order
    other = [dataclasses.replace(row, source="train") for row in rows]
    registers = [dataclasses.replace(row, token="register_0") for row in rows]
    assert norms.onset_step([*other, *registers]) == {}


def test_onset_layer_of_one_layer_and_of_two() -> None:
    assert norms.last_layer_metrics(_evaluated(0.01)) == {
        "tokens/last/outlier_fraction": 0.01,
        "tokens/onset_layer": 0.0,
    }
    (only,) = (row for row in _evaluated(0.01) if row.layer == 0)
    assert norms.last_layer_metrics([only])["tokens/onset_layer"] == 0.0
    assert norms.last_layer_metrics(_evaluated(None)) == {}  # no patches at the last layer: nothing to say of it


def test_grid() -> None:
    edges = histogram.bin_edges()
    assert histogram.NUM_BINS >= 2_048 and len(edges) == histogram.NUM_BINS + 1
    np.testing.assert_allclose(edges, np.geomspace(1e-3, 1e5, len(edges)), rtol=1e-12)
    middle = np.sqrt(edges[:-1] * edges[1:])
    np.testing.assert_array_equal(histogram.bin_index(middle), np.arange(1, histogram.NUM_BINS + 1))
    extremes = np.array([0.0, 9.99e-4, 1e-3, 9.99e4, 1.0001e5, np.inf])
    np.testing.assert_array_equal(
        histogram.bin_index(extremes), [0, 0, 1, histogram.NUM_BINS, histogram.NUM_BINS + 1, histogram.NUM_BINS + 1]
    )


@pytest.mark.parametrize("count", [1, 2, 17, 20_000])
@pytest.mark.parametrize("shape", ["bulk", "two_modes", "tail"])
def test_quantiles_of_a_histogram_err_by_less_than_a_bin(count: int, shape: str) -> None:
    rng = np.random.default_rng(count)
    values = {
        "bulk": rng.normal(20, 1.5, count),
        "two_modes": np.where(rng.random(count) < 0.02, 300, 50) * rng.uniform(0.9, 1.1, count),
        "tail": rng.lognormal(1, 2, count),
    }[shape]
    distribution = histogram.Distribution(histogram.count(values[None])[0], values.max())
    exact = np.quantile(values, norms.LEVELS)
    # A quantile between two order statistics inherits the wider of their two bins.
    above = np.quantile(values, norms.LEVELS, method="higher")
    width = above * (10 ** (1 / histogram.BINS_PER_DECADE) - 1)
    assert np.all(np.abs(distribution.quantiles(norms.LEVELS) - exact) <= width)
    assert distribution.quantiles([1.0])[0] <= values.max()
    median = np.median(values)
    if count > 100:
        mad = scipy.stats.median_abs_deviation(values)
        assert distribution.median_absolute_deviation(median) == pytest.approx(mad, rel=0.01)
        assert distribution.fraction_below(np.array([1.5 * median]))[0] == pytest.approx(
            np.mean(values < 1.5 * median), abs=0.003
        )


def test_norms_of_bf16_tokens_are_near_those_of_float32() -> None:
    """bf16 keeps 8 bits: each component is off by 2⁻⁹ at most, so the norm is too; it is itself summed in float32."""
    generator = torch.Generator().manual_seed(3)
    tokens = Tokens(*(30 * torch.randn(4, count, 384, generator=generator) for count in (1, 2, 16)))
    tokens = tokens._replace(cls_BD=tokens.cls_BD[:, 0])
    halves = Tokens(*(part.bfloat16() for part in tokens))
    exact, near = norms_of(tokens), norms_of(halves)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=2**-9, atol=0)
    torch.testing.assert_close(near, norms_of(Tokens(*(part.float() for part in halves))), rtol=1e-6, atol=0)
