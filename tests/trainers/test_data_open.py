"""Opening data by name: a user's own builder, sizes that are not available; the random numbers behind fixed splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trainers.config import DataConfig, ExecutionConfig
from trainers.data import open_data
from trainers.data.splits import held_out, uniforms

OWN = """
import numpy as np
from trainers.data import SPLITS
from trainers.data.cache import Source

def build(config, execution, side, cache):
    def write(writer, progress):
        for i, split in enumerate(SPLITS):
            writer.append(split, np.full((4, side, side, 3), i, np.uint8), {"classes": np.arange(4)})
    return Source("own", {"side": side}, ("a", "b", "c", "d"), write)
"""


def test_a_users_own_data_set_by_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data_of_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = DataConfig(train="own_data_of_test:build", name="mine", decode_size=8)
    data = open_data(config, ExecutionConfig(), 224, tmp_path / "cache")
    assert data.test.images.shape == (4, 8, 8, 3)
    assert set(data.test.images.ravel().tolist()) == {2}
    assert data.provides == ("classes",)
    automatic = open_data(config.model_copy(update={"decode_size": "auto"}), ExecutionConfig(), 28, tmp_path / "cache")
    assert automatic.train.images.shape[1] == 32
    for wrong in ("own_data_of_test:missing", "no_such_module_of_test:build"):
        with pytest.raises(ValueError, match=f"'{wrong}' cannot be loaded"):
            open_data(config.model_copy(update={"train": wrong}), ExecutionConfig(), 28, tmp_path)


def test_original_sizes_are_refused_where_a_builder_gives_decoded_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_data_without_files.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = DataConfig(train="own_data_without_files:build", name="mine", decode_size="original")
    with pytest.raises(ValueError, match=r"data\.decode_size original: own_data_without_files:build gives decoded"):
        open_data(config, ExecutionConfig(data_root=str(tmp_path)), 224, tmp_path)


def test_uniforms_of_a_row_depend_on_its_number_alone() -> None:
    whole = uniforms(5, 1, 0, 2_000, 10)
    np.testing.assert_array_equal(uniforms(5, 1, 700, 900, 10), whole[700:900])
    assert whole.shape == (2_000, 10)
    assert whole.min() >= 0
    assert whole.max() < 1
    assert abs(whole.mean() - 0.5) < 4 / np.sqrt(12 * whole.size)
    assert len(np.unique(whole)) == whole.size
    others = (uniforms(6, 1, 0, 2_000, 10), uniforms(5, 2, 0, 2_000, 10))
    assert not any(np.isin(other, whole).any() for other in others)


def test_held_out_is_a_fixed_stratified_share() -> None:
    classes = np.repeat([0, 1, 2], [50, 33, 17]).astype(np.int64)
    held = held_out(classes, 0.1, seed=3, stream=0)
    assert held.sum() == 10
    for c, n in enumerate((50, 33, 17)):
        assert abs(held[classes == c].sum() - n / 10) < 1
    np.testing.assert_array_equal(held, held_out(classes, 0.1, seed=3, stream=0))
    assert (held != held_out(classes, 0.1, seed=4, stream=0)).any()
    assert (held != held_out(classes, 0.1, seed=3, stream=1)).any()
    assert held_out(np.zeros(4, np.int64), 0.1, 0, 0).sum() == 0
