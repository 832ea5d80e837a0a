"""Fashion-MNIST: where its files are looked for, its splits, its colours, and damaged files."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from trainers.config import DataConfig, ExecutionConfig
from trainers.data import DataSet, fashion_mnist, open_data

TRAIN, TEST = 40, 20


def idx(array: np.ndarray) -> bytes:
    """The idx format: two zero bytes, 8 for uint8, the number of axes, their lengths (big endian), the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def contents() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    files = {}
    for prefix, n in (("train", TRAIN), ("t10k", TEST)):
        files[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), np.uint8)
        files[f"{prefix}-labels-idx1-ubyte"] = rng.permutation(np.arange(n) % 10).astype(np.uint8)
    return files


def place(folder: Path, packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in contents().items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return folder


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Neither Debian's package nor a network."""
    system = tmp_path / "system"
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", system)

    def unreachable(folder: Path) -> None:
        raise URLError(f"no network\nfor {folder.name}")

    monkeypatch.setattr(fashion_mnist, "_download", unreachable)
    return system


def opened(cache: Path, root: Path | None = None, side: int = 28, seed: int = 0) -> DataSet:
    config = DataConfig(train="fashion_mnist", scenes=None, decode_size=side, seed=seed)
    return open_data(config, ExecutionConfig(data_root=None if root is None else str(root)), 28, cache)


def test_every_image_is_in_one_split_with_its_label(tmp_path: Path) -> None:
    files = contents()
    data = opened(tmp_path / "cache", place(tmp_path / "root"))
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 20)
    assert data.class_names[9] == "Ankle boot"
    assert data.provides == ("classes",)
    labels = dict(zip(map(bytes, files["train-images-idx3-ubyte"]), files["train-labels-idx1-ubyte"], strict=True))
    images = np.concatenate([data.train.images, data.validation.images])
    classes = np.concatenate([data.train.targets["classes"], data.validation.targets["classes"]])
    assert {bytes(image[..., 0].copy()) for image in images} == set(labels)
    assert [labels[bytes(image[..., 2].copy())] for image in images] == classes.tolist()
    assert (images == images[..., :1]).all()
    np.testing.assert_array_equal(data.test.images[..., 1], files["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test.targets["classes"], files["t10k-labels-idx1-ubyte"])
    assert data.test.targets["classes"].dtype == np.int64


def test_the_validation_split_is_fixed_by_the_data_seed(tmp_path: Path) -> None:
    root = place(tmp_path / "root")
    first, again, other = (
        opened(tmp_path / "a", root),
        opened(tmp_path / "b", root),
        opened(tmp_path / "a", root, seed=1),
    )
    np.testing.assert_array_equal(first.validation.images, again.validation.images)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert (first.validation.images != other.validation.images).any()
    np.testing.assert_array_equal(first.test.images, other.test.images)


def test_other_sizes_are_resized_as_pillow_does(tmp_path: Path) -> None:
    root = place(tmp_path / "root")
    data = opened(tmp_path / "cache", root, side=40)
    grey = Image.fromarray(contents()["t10k-images-idx3-ubyte"][7])
    expected = np.asarray(grey.resize((40, 40), Image.Resampling.BICUBIC).convert("RGB"))
    np.testing.assert_array_equal(data.test.images[7], expected)


@pytest.mark.parametrize("where", ["root", "root/fashion-mnist", "root/FashionMNIST/raw", "system"])
@pytest.mark.parametrize("packed", [False, True])
def test_files_are_found_plain_or_packed(tmp_path: Path, where: str, packed: bool) -> None:
    place(tmp_path / where, packed)
    (tmp_path / "root").mkdir(exist_ok=True)
    assert len(opened(tmp_path / "cache", tmp_path / "root").test) == TEST


def test_where_nothing_is_found_it_says_how_to_get_it(tmp_path: Path) -> None:
    for root, target in ((None, tmp_path / "cache" / "downloads"), (tmp_path / "root", tmp_path / "root")):
        with pytest.raises(ValueError, match="cannot be downloaded into") as raised:
            opened(tmp_path / "cache", root)
        message = str(raised.value)
        assert "\n" not in message
        assert f"into {target} (" in message
        assert "no network for" in message
        assert "apt-get install dataset-fashion-mnist" in message
        assert "execution.data_root" in message


def test_a_download_is_used_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []

    def download(folder: Path) -> None:
        folders.append(folder)
        place(folder / "FashionMNIST" / "raw")

    monkeypatch.setattr(fashion_mnist, "_download", download)
    fingerprints = {opened(tmp_path / "cache").fingerprint for _ in range(2)}
    assert folders == [tmp_path / "cache" / "downloads"]
    assert len(fingerprints) == 1


def damaged(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], str]:
    def damage(root: Path) -> str:
        (root / name).write_bytes(change((root / name).read_bytes()))
        return name

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damaged("train-images-idx3-ubyte.gz", lambda data: data[:-100]),
        damaged("train-images-idx3-ubyte.gz", lambda _: b"<html>not found</html>"),
        damaged("train-images-idx3-ubyte.gz", lambda _: gzip.compress(b"short")),
        damaged("train-labels-idx1-ubyte.gz", lambda _: gzip.compress(idx(np.zeros(7, np.uint8)))),
        damaged("t10k-labels-idx1-ubyte.gz", lambda _: gzip.compress(idx(np.full(TEST, 10, np.uint8)))),
        damaged("t10k-images-idx3-ubyte.gz", lambda _: gzip.compress(idx(np.zeros((TEST, 28, 28), np.uint8))[:-9])),
        damaged("t10k-images-idx3-ubyte.gz", lambda _: b""),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    root = place(tmp_path / "root", packed=True)
    name = damage(root)
    with pytest.raises(ValueError, match="is damaged or not a file of Fashion-MNIST") as raised:
        opened(tmp_path / "cache", root)
    assert str(root / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "_LARGEST_FILE", 1_000)
    with pytest.raises(ValueError, match="unpacks to more than 1,000 bytes"):
        opened(tmp_path / "cache", place(tmp_path / "root", packed=True))
