"""What two packages must hold alike because neither may import the other."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from analysis import histograms, schemas
from analysis.collect import collect
from analysis.labels import metric_label
from analysis.pictures import draw
from analysis.results import evaluate
from orchestrator import publish
from tests.analysis import fabricated
from tests.trainers.runs import run
from trainers.catalog import MEASUREMENTS
from trainers.tokens import histogram, outliers, statistics, table

OUTLIER_NORM = 5.0  # amidst the norms of patches of a nano model


@pytest.mark.parametrize(
    ("written", "read"),
    [(table.SCHEMA, schemas.TOKEN_NORMS), (statistics.SCHEMA, schemas.TOKEN_STATISTICS)],
    ids=["token_norms", "token_statistics"],
)
def test_tables_of_a_trial_have_one_schema(written: pa.Schema, read: pa.Schema) -> None:
    assert [(field.name, field.type) for field in written] == [(field.name, field.type) for field in read]


def test_the_histogram_grid_is_the_documented_one() -> None:
    edges = 10.0 ** (np.arange(4097) / 512 - 3)
    assert np.allclose(histogram.bin_edges(), edges, rtol=1e-12)
    assert (histogram.NUM_BINS, histogram.LOWEST) == (histograms.NUM_BINS, histograms.LOWEST)
    assert np.array_equal(histogram.bin_edges(), histograms.edge(np.arange(4097)))


def test_both_packages_read_a_histogram_alike() -> None:
    norms = np.concatenate([np.random.default_rng(0).lognormal(3, 0.2, 5_000), np.full(120, 300.0)])
    counts = histogram.count(norms[None])[0]
    written = histogram.Distribution(counts, float(norms.max()))
    entries = [{"bin": number, "count": count} for number, count in histogram.sparse(counts)]
    column = pa.array([entries], schemas.TOKEN_NORMS.field("histogram").type)
    (found,) = histograms.read(column, [float(norms.max())])
    assert found is not None
    read = found.distribution()
    median, mad = float(written.quantiles([0.5])[0]), written.median_absolute_deviation(read.median())
    assert read.median() == pytest.approx(median, rel=1e-4)
    assert read.median_absolute_deviation() == pytest.approx(mad, rel=1e-3)
    assert read.rule3_threshold() == pytest.approx(float(outliers.rule3_threshold(median, mad)), rel=1e-3)
    at = np.array([10.0, 20.0, 30.0, 299.0])
    assert read.fraction_below(at) == pytest.approx(written.fraction_below(at), abs=1e-12)


def test_what_a_trial_writes_is_what_is_published() -> None:
    tables = {"token_norms.parquet", "token_statistics.parquet", "probes.parquet", "per_image.parquet"}
    assert set(publish.RECORDS) == {*tables, "*.npz", "attention/*.png"}


def test_what_a_trial_leaves_can_be_drawn_and_named(tiny: dict[str, Any], tmp_path: Path, data_cache: Path) -> None:
    """All that is measured, with a threshold so low that so small a model has outliers too."""
    settings = tiny | {
        "model.num_registers": 2,
        "optim.steps": 2,
        "data.decode_size": 32,
        "tokens.measurements": list(MEASUREMENTS),
        "tokens.recurrence.scales": [1.5],
        "tokens.single_token.num_c": 2,
        "tokens.single_token.draws": 2,
        "tokens.locality.train_images": 32,
        "tokens.outlier_rule": "fixed",
        "tokens.outlier_norm": OUTLIER_NORM,
    }
    _, reports = run(settings, tmp_path / "trial", data_cache)
    trial = fabricated.Trial({fabricated.REGISTERS: 2}, 0, reports[2])
    folder = fabricated.publish(tmp_path / "s", [trial], baseline={fabricated.REGISTERS: 2})
    for pattern in publish.RECORDS:
        for path in (tmp_path / "trial").glob(pattern):
            if path.suffix != ".png":
                shutil.copy(path, folder / "trials" / trial.trial_id / path.name)
    frames = collect(folder)
    pictures = draw(evaluate(frames))
    assert (frames.problems, pictures.problems) == ((), ())
    drawn = {picture.name for picture in pictures.drawn}
    assert {"norm_histogram", "norms_by_kind", "norm_map", "position_map", "neighbor_similarity"} <= drawn
    assert {"attention", "attention_registers", "attention_average"} <= drawn
    assert frames.token_statistics.num_rows > 100
    assert [name for name in reports[2] if metric_label(name) == name] == []
