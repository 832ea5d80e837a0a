"""What two packages must hold alike because neither may import the other."""

import numpy as np

from analysis import schemas
from orchestrator import publish
from trainers.tokens import histogram, table


def test_token_norms_have_one_schema() -> None:
    written = {field.name: field.type for field in table.SCHEMA}
    read = {field.name: field.type for field in schemas.TOKEN_NORMS}
    assert list(written) == list(read)
    for name, type_ in written.items():
        assert read[name] == type_, name


def test_the_histogram_grid_is_the_documented_one() -> None:
    edges = 10.0 ** (np.arange(4097) / 512 - 3)
    assert np.allclose(histogram.bin_edges(), edges, rtol=1e-12)


def test_what_a_trial_writes_is_what_is_published() -> None:
    tables = {"token_norms.parquet", "token_statistics.parquet", "probes.parquet", "per_image.parquet"}
    assert set(publish.RECORDS) == {*tables, "*.npz", "attention/*.png"}
