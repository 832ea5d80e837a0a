"""The input path's benchmark: both forms hold the same photographs, every side works through all of them, once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import input_path
from trainers.config import DataConfig, ExecutionConfig
from trainers.data import open_data
from trainers.data.streamed import Streamed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    size = input_path.write_photographs(root / "files", images=6)
    assert 10_000 < size < 100_000
    input_path.pack(root / "files", root / "shards")
    return root


def test_files_and_shards_hold_the_same_photographs(root: Path) -> None:
    found = {}
    for folder, family in (("files", "image_folder"), ("shards", "image_text")):
        config = DataConfig(train=family, name=folder, decode_size="original", scenes=None)
        images = open_data(config, ExecutionConfig(data_root=str(root)), 224, root / "cache").train.images
        assert isinstance(images, Streamed)
        found[folder] = sorted(images.original(row)[1].tobytes() for row in range(len(images)))
    assert len(found["files"]) == 6 and found["files"] == found["shards"]
    for file in (root / "files" / "train").rglob("*.jpg"):
        with Image.open(file) as image:
            assert sorted(image.size) == [375, 500]


@pytest.mark.parametrize(("folder", "size"), [("files", "original"), ("shards", "original"), ("files", 256)])
def test_our_side_makes_views_of_all_images(
    folder: str, size: object, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_path, "IMAGES", 6)
    monkeypatch.setattr(input_path, "BATCH", 3)
    made = []

    def finish(images: input_path.Images, generator: torch.Generator) -> torch.Tensor:
        made.append(input_path._views(images, generator))
        return made[-1]

    assert input_path._ours(root, folder, size, 1, finish)() > 0
    assert [tuple(views.shape) for views in made] == [(3, 3, 224, 224)] * 2
    assert abs(torch.cat(made).mean()) < 2 and not np.array_equal(made[0], made[1])


def test_the_first_turns_do_not_count() -> None:
    count = iter(range(100))
    side = lambda: float(next(count))  # noqa: E731
    assert input_path._in_turns([side, side], 3) == [[2.0, 4.0, 6.0], [3.0, 5.0, 7.0]]
