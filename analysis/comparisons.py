"""How a comparison of two sweeps reaches a person or a program: the terminal, JSON, and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis import comparison_text
from analysis.compare import Comparison
from analysis.publish import publish_bytes, write_tables
from analysis.terminal_tables import rendered, terminal_table
from analysis.text_tables import csv_text


def terminal_text(comparison: Comparison, metrics: Sequence[str] | None = None) -> str:
    """What changed, the numbers of `metrics` (by default the primary ones), and a sentence.

    Raises:
        ValueError: not both sweeps have a metric.
    """
    tables = [comparison_text.change_table(comparison), *comparison_text.number_tables(comparison, metrics)]
    return f"{rendered([terminal_table(table) for table in tables])}{comparison_text.answer(comparison)}\n"


def json_text(comparison: Comparison) -> str:
    """The whole comparison, of all metrics."""
    return json.dumps(comparison_text.document(comparison), indent=2, ensure_ascii=False) + "\n"


def write(path: Path, comparison: Comparison, metrics: Sequence[str] | None = None) -> Path:
    """Publishes the comparison as `path`, by its ending: text with `metrics` in Markdown, else the numbers of all.

    Raises:
        ValueError: nothing is written under such an ending, or not both sweeps have a metric.
    """
    texts: dict[str, Callable[[], str]] = {
        ".md": lambda: comparison_text.markdown(comparison, metrics),
        ".csv": lambda: csv_text(comparison.table),
        ".json": lambda: json_text(comparison),
    }
    if path.suffix == ".parquet":
        return write_tables(path.parent, {path.stem: comparison.table})[path.stem]
    if path.suffix not in texts:
        raise ValueError(f"{path} has no ending of a table; allowed: {', '.join((*texts, '.parquet'))}")
    return publish_bytes(path, texts[path.suffix]().encode("utf-8"))
