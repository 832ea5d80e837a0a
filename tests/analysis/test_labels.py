"""Metrics in words, and the units in which people read them."""

from __future__ import annotations

import pytest

from analysis.labels import metric_label, unit


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("test/linear/top1", "top-1 (linear probe, test)"),
        ("channels/last/kurtosis", "kurtosis over channels (last layer)"),
        ("attention/last/cls/outliers", "attention of the class token on outliers (last block)"),
        ("neighbors/auroc", "AUROC of similarity to neighbours for being an outlier"),
        ("locality/position/normal/top1", "top-1 of the position probe, normal patches"),
        ("locality/pixels/outlier/l2", "L2 error of the pixel probe, outlier patches"),
        ("single_token/cls/top1", "top-1 of the class token alone"),
        ("single_token/register_3/top1", "top-1 of register 3 alone"),
        ("single_token/outlier/top1_std", "deviation of top-1 over draws of one outlier patch per image alone"),
        ("val/knn/k10/top1", "top-1 (k-NN, k = 10, validation)"),
        ("test/knn/top1", "top-1 (k-NN, k = 20, test)"),
        ("interventions/registers_zeroed/test/linear/top1", "top-1 (linear probe, test), registers zeroed"),
        (
            "interventions/outliers_clamped/change/tokens/last/outlier_fraction",
            "change of outlier fraction (last layer), outliers clamped",
        ),
        (
            "test_time_registers/moved/change/test/knn/top1",
            "change of top-1 (k-NN, k = 20, test), test-time registers: moved",
        ),
        ("test/object_discovery/corloc", "CorLoc (LOST, test)"),
        ("test/object_discovery/bias", "bias (LOST, test)"),
        ("test/object_discovery/voc2012/bias_-0.5/corloc", "CorLoc (bias −0.5, voc2012, LOST, test)"),
        ("val/object_discovery/common_bias/corloc", "CorLoc (common bias, LOST, validation)"),
        ("recurrence/shift/content", "outliers that recur at the same content (shift)"),
        (
            "recurrence/scale_1_5/antialias/recurs",
            "outliers that recur at the same relative position (scale 1.5, antialiased)",
        ),
        ("tokens/location/row_cv", "variation of outlier rates over rows"),
        ("tokens/onset_step", "onset step of outliers"),
        ("mine/own", "mine/own"),
        ("interventions/alone", "interventions/alone"),
        ("test", "test"),
    ],
)
def test_words(metric: str, words: str) -> None:
    assert metric_label(metric) == words


@pytest.mark.parametrize(
    ("metric", "value", "text", "symbol"),
    [
        ("test/linear/top1", 0.5, "50.00", "%"),
        ("tokens/last/outlier_fraction_frozen", 0.0237, "2.37", "%"),
        ("attention/last/cls/outliers", 0.25, "25.00", "%"),
        ("attention/last/cls/entropy", 0.25, "0.25", ""),
        ("single_token/outlier/coverage_test", 0.125, "12.50", "%"),
        ("single_token/outlier/top1_std", 0.003, "0.30", "%"),
        ("locality/position/outlier/distance", 5.09, "5.09", "cells"),
        ("interventions/registers_zeroed/change/test/linear/top1", 0.012, "+1.20", "points"),
        ("interventions/registers_zeroed/change/test/linear/top1", -0.012, "−1.20", "points"),
        ("interventions/registers_zeroed/change/tokens/last/max_over_median", 2.0, "+2", ""),
        ("interventions/registers_zeroed/test/linear/top1", 0.012, "1.20", "%"),
        ("recurrence/flip/place", 0.5, "50.00", "%"),
        ("recurrence/scale_1_5/plain/recurs", 0.5, "50.00", "%"),
        ("channels/last/registers", 3.0, "3", ""),
    ],
)
def test_units(metric: str, value: float, text: str, symbol: str) -> None:
    kind = unit(metric)
    assert (kind.text(value), kind.symbol) == (text, symbol)


def test_a_spread_has_no_sign() -> None:
    kind = unit("interventions/registers_zeroed/change/test/linear/top1")
    assert kind.text(0.012, signed=False) == "1.20"
    assert kind.interval(0.01, 0.02) == "[+1.00, +2.00]"
    assert (kind.of_difference, unit("test/linear/top1").of_difference, unit("x").of_difference) == (
        " points",
        " points",
        "",
    )
