"""Small pictures of different sizes, in folders and in tars, opened so that they are streamed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainers.config import DataConfig, ExecutionConfig
from trainers.data import DataSet, open_data
from trainers.data.streamed import Streamed
from trainers.loader import Order, Reader, Shares
from trainers.streams import Streams

SIZES = [(48, 36), (36, 52), (40, 40), (64, 33)]  # width, height in px
SIDE = 36  # of squares for a model of 32 px


def photograph(seed: int) -> Image.Image:
    """A picture of one of SIZES, whose colours say which one it is."""
    width, height = SIZES[seed % len(SIZES)]
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 3 + seed * 7, y * 3 + seed * 13, x + y + seed * 29], axis=2) % 200
    return Image.fromarray(pixels.astype(np.uint8))


def jpeg(seed: int, **more: Any) -> bytes:
    file = io.BytesIO()
    photograph(seed).save(file, "JPEG", quality=90, **more)
    return file.getvalue()


def write_folder(root: Path, count: int = 12) -> Path:
    """An image folder of two classes; names say the seed."""
    for split, start, images in (("train", 0, count), ("validation", 100, 8), ("test", 200, 8)):
        for seed in range(start, start + images):
            file = root / split / "ab"[seed % 2] / f"{seed:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(seed))
    return root


def write_shards(root: Path, count: int = 24) -> Path:
    for split, start, images in (("train", 0, count), ("validation", 100, 20), ("test", 200, 20)):
        (root / split).mkdir(parents=True)
        with tarfile.open(root / split / "0.tar", "w") as tar:
            for seed in range(start, start + images):
                for suffix, content in (("jpg", jpeg(seed)), ("txt", f"picture {seed}".encode())):
                    entry = tarfile.TarInfo(f"{seed:03}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return root


def opened(root: Path, cache: Path, train: str = "image_folder", **settings: Any) -> DataSet:
    config = {"train": train, "name": "mine", "decode_size": "original", "scenes": None, **settings}
    return open_data(DataConfig.model_validate(config), ExecutionConfig(data_root=str(root), threads=2), 32, cache)


def streamed(data: DataSet) -> Streamed:
    assert isinstance(data.train.images, Streamed)
    return data.train.images


def seed_of(data: DataSet, row: int) -> int:
    assert data.train.paths is not None
    return int(Path(data.train.paths[row].rpartition("@")[2]).stem)


def reader(
    data: DataSet, batch_size: int = 4, steps: int | None = None, needs: tuple[str, ...] = ("classes",)
) -> Reader:
    order = Order(len(data.train), batch_size, Streams(1))
    return Reader(data.train, order, Shares(batch_size, batch_size), needs, lambda _: {}, torch.device("cpu"), steps)


def row_of(data: DataSet, seed: int) -> int:
    return next(row for row in range(len(data.train)) if seed_of(data, row) == seed)


def damaged(root: Path, *seeds: int) -> Path:
    write_folder(root)
    for seed in seeds:
        (root / "train" / "ab"[seed % 2] / f"{seed:03}.jpg").write_bytes(jpeg(seed)[:-300])
    return root
