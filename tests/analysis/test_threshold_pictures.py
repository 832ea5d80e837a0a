"""The picture of any threshold: simultaneous bands, and where a difference does not depend on the threshold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.collect import collect
from analysis.figures.thresholds import Shares, above_every_threshold
from analysis.pictures import draw
from analysis.results import evaluate
from analysis.thresholds import RATIOS
from tests.analysis import drawing
from tests.analysis.fabricated import REGISTERS, publish, registers_sweep

BASELINE = {REGISTERS: 0}


def test_stretches_are_said_and_drawn() -> None:
    fractions = [np.linspace(0.5, 0.0, len(RATIOS))] * 2
    plain = Shares("plain", fractions, 400)
    banded = Shares("banded", fractions, 400, (fractions[0] * 0.9, fractions[0] * 1.1), ((1.2, 2.0), (3.0, 4.5)))
    drawn = above_every_threshold({"": [plain, banded]}, RATIOS, {"": None})
    assert "differs from the baseline for τ 1.2 to 2 and 3 to 4.5" in drawn.alternative
    assert drawn.alternative.count("differs from the baseline") == 1
    without = above_every_threshold({"": [plain, plain]}, RATIOS, {"": None})
    assert drawn.svg != without.svg


def test_bands_are_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing.leave_out_rendering(monkeypatch)
    seen: list[Shares] = []
    monkeypatch.setattr("analysis.figures.thresholds._draw_shares", lambda axes, cell, *rest: seen.append(cell))
    results = evaluate(collect(publish(tmp_path / "s", registers_sweep(counts=(0, 4)), baseline=BASELINE)))
    draw(results)
    assert [cell.label for cell in seen] == ["0 registers", "4 registers"]
    for cell, bands in zip(seen, results.bands.values(), strict=True):
        assert bands.fraction is not None and cell.band is not None
        for ours, theirs in zip(cell.band, (bands.fraction.low, bands.fraction.high), strict=True):
            assert theirs is not None and np.array_equal(ours, theirs)
        assert list(cell.holds) == [(stretch.first, stretch.last) for stretch in bands.holds()]


def test_one_seed_has_no_band(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing.leave_out_rendering(monkeypatch)
    seen: list[Shares] = []
    monkeypatch.setattr("analysis.figures.thresholds._draw_shares", lambda axes, cell, *rest: seen.append(cell))
    drawing.pictures_of(publish(tmp_path / "s", registers_sweep(counts=(0, 4), seeds=(0,)), baseline=BASELINE))
    assert [(cell.band, cell.holds) for cell in seen] == [(None, ()), (None, ())]
