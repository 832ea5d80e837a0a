"""The data set `hugging_face`: images and classes from the hub that lie in a folder, read by timm's reader."""

from __future__ import annotations

import importlib.util
import io
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainers.config import DataConfig, ExecutionConfig
from trainers.data import SPLITS
from trainers.data.cache import Source
from trainers.data.encoded import leads_out
from trainers.data.listing import Description, Listing, root_of, source, stamps

NAMES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
IMAGES = ("image", "img")  # columns, the first that is there
LABELS = ("label", "labels", "fine_label")
_REFERENCE = re.compile(r"(\w+)\[(\d+)\]")


def build(config: DataConfig, execution: ExecutionConfig, side: int, cache: Path) -> Source:
    """The source of the data set under `execution.data_root`: parquet files, or what `save_to_disk` wrote.

    Whatever `datasets.load_dataset` opens by the path of a folder without running code; its own copy goes into `cache`.
    Needed are a column image or img, and a column label, labels or fine_label of type ClassLabel. Splits that are not
    there are fixed fractions of training. Images without a class (-1, as in test sets of challenges) are left out and
    named.

    Raises:
        ValueError: the package `datasets` is missing, the folder is no such data set, or columns are missing.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            "data.train hugging_face needs the package datasets; install it with pip install 'register-ablations[hf]'"
        )
    root = root_of(config, execution)
    readers = _readers(root, cache / "hugging_face")
    listings, faults = {}, []
    class_names: tuple[str, ...] = ()
    for split, reader in readers.items():
        names = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
        if not names or (class_names and names != class_names):
            raise ValueError(f"{root}: split {split} has {'other' if names else 'no'} names of classes (ClassLabel)")
        class_names = names
        classes = [-1 if number is None else int(number) for number in reader.iter_targets()]
        known = [row for row, number in enumerate(classes) if 0 <= number < len(names)]
        if not known and split == "test":  # a challenge, whose labels are secret
            continue
        faults += [(f"{split}[{row}]", f"has class {n}") for row, n in enumerate(classes) if not 0 <= n < len(names)]
        targets = {"classes": np.array([classes[row] for row in known], np.int64)}
        listings[split] = Listing(tuple(f"{split}[{row}]" for row in known), targets)
    _check_names(root, readers, class_names)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    described = Description(class_names, faults=tuple(faults), open=_Open(readers))
    return source(config, execution, root, listings, described, stamps(root, files), side)


def _readers(root: Path, cache: Path) -> dict[str, Any]:
    """timm's reader of each split that is there.

    Raises:
        ValueError: there is none for training, it is no data set, or damaged, or has other columns.
    """
    import datasets
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    found: dict[str, Any] = {}
    try:
        known = datasets.load_dataset_builder(str(root), cache_dir=str(cache)).config.data_files
        for split in SPLITS:
            name = next((name for name in NAMES[split] if name in known), None)
            if name is not None:
                found[split] = _reader(root, name, cache)
    # What `datasets` raises on folders with other content, besides errors of its own.
    except (
        *(TypeError, LookupError, AttributeError, OSError, RuntimeError),
        *(pa.ArrowException, DatasetsError),
    ) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"{root} is no data set that `datasets` reads, or damaged: {reason[:200]}") from error
    if "train" not in found:
        raise ValueError(f"{root} has no split train; there are: {', '.join(known)}")
    return found


def _reader(root: Path, split: str, cache: Path) -> Any:
    """timm's reader of a split, with the columns that it takes for granted."""
    import datasets
    from timm.data.readers.reader_factory import create_reader

    columns = datasets.load_dataset(str(root), split=split, cache_dir=str(cache)).column_names
    image, label = (next((name for name in allowed if name in columns), None) for allowed in (IMAGES, LABELS))
    if image is None or label is None:
        raise ValueError(
            f"{root}: split {split} has the columns {', '.join(columns)}; needed: {' or '.join(IMAGES)}, and "
            f"{' or '.join(LABELS)}"
        )
    return create_reader(f"hfds/{root}", root=str(cache), split=split, input_key=image, target_key=label)


def _check_names(root: Path, readers: Mapping[str, Any], class_names: tuple[str, ...]) -> None:
    """Files may number classes otherwise than the first one, by which `datasets` reads the numbers of all of them.

    Raises:
        ValueError: one does.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    labels = {reader.label_key for reader in readers.values()}
    for file in sorted(path for path in root.rglob("*") if path.suffix in (".parquet", ".arrow")):
        if file.suffix == ".parquet":
            schema = pq.read_schema(file)
        else:
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                schema = stream.schema
        features = Features.from_arrow_schema(schema)
        for label in labels & set(features):
            names = getattr(features[label], "names", None)
            if names is not None and tuple(names) != class_names:
                odd = next(
                    (n for n, known in zip(names, class_names, strict=False) if n != known), f"{len(names)} names"
                )
                raise ValueError(f"{file} names its classes otherwise than the files before: {odd}")


def _within(root: Path, path: str) -> Path:
    """A file that a table names instead of holding it; links are followed, as the hub's own folders have them.

    Raises:
        OSError: it lies elsewhere than in the data set's folder.
    """
    inner = path
    for folder in (str(root), str(root.resolve())):
        inner = inner.removeprefix(f"{folder.rstrip('/')}/")
    if leads_out(inner):
        raise OSError("leads out of the folder of the data set")
    return root / inner


class _Open:
    """Gives the bytes of an image by its reference, SPLIT[ROW]."""

    def __init__(self, readers: Mapping[str, Any]) -> None:
        self._readers, self._lock = readers, threading.Lock()

    def __call__(self, root: Path, path: str) -> io.BytesIO:
        found = _REFERENCE.fullmatch(path)
        assert found is not None
        with self._lock:  # one reader of a memory-mapped table for all threads that decode
            stored = self._readers[found[1]].dataset[int(found[2])][self._readers[found[1]].image_key]
        if stored is None:
            raise OSError("is empty")
        content = stored["bytes"] if stored.get("bytes") is not None else _within(root, stored["path"]).read_bytes()
        if not content:
            raise OSError("is empty")
        return io.BytesIO(content)

    def __getstate__(self) -> dict[str, Any]:
        return {"_readers": self._readers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._readers, self._lock = state["_readers"], threading.Lock()
