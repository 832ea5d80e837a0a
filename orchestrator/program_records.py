"""Which of the files that a program leaves are records in the form of ours; others are set aside and named."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orchestrator import publish

log = logging.getLogger("orchestrator.program")  # whose log an attempt keeps

REFUSED = "refused"  # folder of an attempt

_WHOLE, _NUMBER, _TEXT = "whole numbers", "numbers", "texts"
_TYPES: Mapping[str, Callable[[pa.DataType], bool]] = {
    _WHOLE: pa.types.is_integer,
    _NUMBER: lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind),
    _TEXT: lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
}

# Columns without which a table says nothing, and those that may be left out.
_NORMS = (
    *("mean", "median", "p90", "p98", "p99", "p999", "max", "max_over_median", "kurtosis", "kurtosis_log"),
    *("outlier_fraction", "outlier_fraction_150", "otsu_threshold"),
)
_NEEDED: Mapping[str, Mapping[str, str]] = {
    "token_norms": {"step": _WHOLE, "layer": _WHOLE, "token": _TEXT, "source": _TEXT, "weights": _TEXT},
    "token_statistics": {"step": _WHOLE, "weights": _TEXT, "name": _TEXT, "value": _NUMBER},
    "probes": {"step": _WHOLE, "name": _TEXT, "value": _NUMBER},
    "per_image": {"split": _TEXT, "metric": _TEXT, "index": _WHOLE, "value": _NUMBER},
}
_OPTIONAL: Mapping[str, Mapping[str, str]] = {
    "token_norms": {"count": _WHOLE, **dict.fromkeys(_NORMS, _NUMBER)},
    "token_statistics": {"layer": _WHOLE, "head": _WHOLE, "token": _TEXT},
}


def sort_out(folder: Path) -> None:
    """Move records of an attempt's `folder` that are not in the form of ours to `refused/`, and say why in the log."""
    for path in publish.records_in(folder):
        if (reason := wrong(path)) is None:
            continue
        aside = folder / REFUSED / path.relative_to(folder)
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.replace(aside)
        log.warning("%s is not published: %s", path.relative_to(folder), reason)


def wrong(path: Path) -> str | None:
    """What is wrong with a record; None where it is as ours are."""
    if path.is_symlink():
        return "it is a link"
    try:
        if path.suffix == ".parquet":
            return _wrong_columns(path.stem, pq.read_schema(path))
        if path.suffix == ".npz" and not zipfile.is_zipfile(path):
            return "it is no npz file"
        if path.suffix == ".png" and path.read_bytes()[:8] != b"\x89PNG\r\n\x1a\n":
            return "it is no PNG file"
    except (OSError, pa.ArrowException) as error:
        return f"it cannot be read ({error})"
    return None


def _wrong_columns(table: str, schema: pa.Schema) -> str | None:
    for column, kind in _NEEDED[table].items():
        if column not in schema.names:
            return f"it has no column {column}; needed are {', '.join(_NEEDED[table])}"
        if not _TYPES[kind](schema.field(column).type):
            return f"its column {column} is {schema.field(column).type}; needed are {kind}"
    for column, kind in _OPTIONAL.get(table, {}).items():
        held = schema.field(column).type if column in schema.names else pa.null()
        if not pa.types.is_null(held) and not _TYPES[kind](held):
            return f"its column {column} is {held}; allowed are {kind}"
    return None
