"""The training stream: equal to the exact statistics up to its grid, mergeable, resumable, never synchronising."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.tokens import histogram, norms
from trainers.tokens.stream import TrainingStream

KEYS = {"trial_id": "t", "step": 5, "weights": "raw"}
LAYERS, REGISTERS = 3, 2


def _norms(seed: int, batch: int = 8, patches: int = 64) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = rng.normal(20, 1.5, (LAYERS, batch, 1 + REGISTERS + patches))
    values[1:, :, 1] = rng.normal(130, 4, (LAYERS - 1, batch))
    high = rng.random((batch, patches)) < 0.02
    values[2, :, 1 + REGISTERS :][high] = rng.uniform(160, 400, int(high.sum()))
    return torch.from_numpy(values).float()


def _fed(seeds: range) -> TrainingStream:
    stream = TrainingStream(LAYERS, REGISTERS)
    for seed in seeds:
        stream.update(_norms(seed))
    return stream


def test_rows_equal_exact_statistics_up_to_the_grid() -> None:
    exact = norms.probe_rows(torch.cat([_norms(seed) for seed in range(40)], dim=1).numpy(), REGISTERS, **KEYS)
    rows = _fed(range(40)).drain(**KEYS)
    assert [(row.layer, row.token) for row in rows] == [(row.layer, row.token) for row in exact]
    assert {row.source for row in rows} == {"train"}
    for row, reference in zip(rows, exact, strict=True):
        got, want = row.statistics, reference.statistics
        assert got.count == want.count and got.max == want.max
        assert got.mean == pytest.approx(want.mean, rel=1e-12)
        assert got.kurtosis == pytest.approx(want.kurtosis, rel=1e-3)
        assert got.kurtosis_log == pytest.approx(want.kurtosis_log, rel=0.03)
        for name in ("median", "p90", "p98", "p99", "p999", "max_over_median"):
            assert getattr(got, name) == pytest.approx(getattr(want, name), rel=0.005), (row.layer, row.token, name)
        assert got.outlier_fraction == pytest.approx(want.outlier_fraction, abs=1e-3)
        assert got.outlier_fraction_150 == pytest.approx(want.outlier_fraction_150, abs=1e-3)
        assert sum(count for _, count in got.histogram) == want.count
    last = rows[-1].statistics
    assert last.outlier_fraction == pytest.approx(0.02, abs=0.003)
    assert last.otsu_threshold is not None and 30 < last.otsu_threshold < 160
    assert rows[3].statistics.outlier_fraction == 0.0 and rows[3].statistics.otsu_threshold is None


def test_counts_equal_those_of_numpy() -> None:
    values = _norms(0)
    rows = TrainingStream(LAYERS, REGISTERS)
    rows.update(values)
    patch = rows.drain(**KEYS)[-1].statistics
    expected = histogram.sparse(histogram.count(values[2, :, 3:].reshape(1, -1).numpy())[0])
    assert patch.histogram == expected


def test_merged_shards_equal_one_stream_in_any_order() -> None:
    whole = _fed(range(12))
    for order in ((0, 3, 6, 9), (6, 9, 0, 3)):  # four shards of three batches
        merged = TrainingStream(LAYERS, REGISTERS)
        for start in order:
            merged.merge(_fed(range(start, start + 3)))
        ours, theirs = merged.state_dict(), whole.state_dict()
        assert torch.equal(ours["counts"], theirs["counts"]) and torch.equal(ours["max"], theirs["max"])
        torch.testing.assert_close(ours["sums"], theirs["sums"], rtol=1e-13, atol=0)


def test_resumed_stream_goes_on_to_the_bit() -> None:
    first = _fed(range(3))
    second = TrainingStream(LAYERS, REGISTERS)
    second.load_state_dict(first.state_dict())
    first.update(_norms(10))
    second.update(_norms(10))
    assert first.drain(**KEYS) == second.drain(**KEYS)


def test_state_does_not_share_memory_and_drain_starts_anew() -> None:
    stream = _fed(range(2))
    before = stream.state_dict()
    rows = stream.drain(**KEYS)
    assert int(before["counts"].sum()) == sum(row.statistics.count for row in rows)
    assert all(row.statistics == norms.NormStatistics(count=0) for row in stream.drain(**KEYS))
    stream.update(_norms(0))
    assert stream.drain(**KEYS) == _fed(range(1)).drain(**KEYS)


def test_zero_infinity_and_nan() -> None:
    stream = TrainingStream(1, 0)
    values = torch.tensor([[[1.0, 0.0, 5e-4, 2e5, 7.0], [torch.nan, torch.nan, 3.0, 3.0, 3.0]]])
    stream.update(values)
    cls, patch = (row.statistics for row in stream.drain(**KEYS))
    assert (cls.count, cls.mean, cls.max) == (1, 1.0, 1.0)
    assert patch.count == 7  # NaN is counted nowhere
    assert patch.histogram[0] == (0, 2) and patch.histogram[-1] == (histogram.NUM_BINS + 1, 1)
    assert patch.max == 2e5 and patch.kurtosis_log is None
    assert patch.mean == pytest.approx((5e-4 + 2e5 + 7 + 9) / 7)
    assert patch.median == pytest.approx(3.0, rel=0.005)

    stream.update(torch.tensor([[[1.0, torch.inf, 1.0]]]))
    _, patch = (row.statistics for row in stream.drain(**KEYS))
    assert (patch.max, patch.mean, patch.kurtosis) == (torch.inf, torch.inf, None)
    assert patch.histogram[-1] == (histogram.NUM_BINS + 1, 1)


def test_equal_norms_have_no_kurtosis() -> None:
    stream = TrainingStream(1, 0)
    for _ in range(50):
        stream.update(torch.full((1, 4, 3), 19.3))
    _, patch = (row.statistics for row in stream.drain(**KEYS))
    assert patch.kurtosis is None and patch.kurtosis_log is None
    assert (patch.max, patch.outlier_fraction) == (pytest.approx(19.3), 0.0)
    assert patch.median == pytest.approx(19.3, rel=0.005)


@pytest.mark.parametrize(("spread", "kept"), [(0.05, True), (0.002, False)])
def test_kurtosis_where_the_sums_hold_enough_digits_and_null_elsewhere(spread: float, kept: bool) -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(20, spread, (200, 1, 32, 17))).float()
    stream = TrainingStream(1, 0)
    for batch in values:
        stream.update(batch)
    _, patch = (row.statistics for row in stream.drain(**KEYS))
    (exact,) = norms.describe(values[:, :, :, 1:].reshape(1, -1).numpy())
    assert exact.kurtosis == pytest.approx(3, abs=0.05)
    assert patch.kurtosis == (pytest.approx(exact.kurtosis, rel=1e-3) if kept else None)


def test_batches_may_differ_in_resolution() -> None:
    stream = TrainingStream(LAYERS, REGISTERS)
    stream.update(_norms(0, patches=64))
    stream.update(_norms(1, patches=16))
    rows = stream.drain(**KEYS)
    assert [row.statistics.count for row in rows[:4]] == [16, 16, 16, 8 * 64 + 8 * 16]


def test_other_layers_or_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be merged"):
        _fed(range(1)).merge(TrainingStream(LAYERS, REGISTERS + 1))
    with pytest.raises(ValueError, match="the state has shape"):
        TrainingStream(LAYERS + 1, REGISTERS).load_state_dict(_fed(range(1)).state_dict())


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_update_never_waits_for_the_device() -> None:
    stream = TrainingStream(LAYERS, REGISTERS)
    values = _norms(0)
    with _Recorder() as recorder:
        stream.update(values)
    waits = (
        "_local_scalar_dense",
        "nonzero",
        "bincount",
        "masked_select",
        "index.Tensor",
        "unique",
        "equal.",
        "_to_cpu",
    )
    assert not [name for name in recorder.names if any(wait in name for wait in waits)]
    kernels = [name for name in recorder.names if not any(v in name for v in ("view", "slice", "select", "expand"))]
    assert len(kernels) < 40
    # On "meta" tensors there are no values: whatever needed one would raise.
    TrainingStream(LAYERS, REGISTERS, device="meta").update(values.to("meta"))
