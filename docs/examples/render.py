"""Runs a script of `# %%` cells on a sweep's folder and writes it with its output as Markdown beside the script.

    python docs/examples/render.py SCRIPT FOLDER

Markdown cells are taken as they are; below a cell of code stand what it prints and the value of its last expression:
tables as Markdown, figures as pictures, sentences as they are, everything else as text.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.notebook import Picture, Table
from analysis.text_tables import escaped_markdown

_CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)


def render(script: Path, folder: Path) -> dict[str, bytes]:
    """The files that come of `script`, by name: its Markdown, and the figures that it shows.

    Args:
        folder: the sweep's, which the script gets as its argument, and which is called runs/NAME in the text.
    """
    parts = _CELL.split(script.read_text(encoding="utf-8"))[1:]
    space: dict[str, Any] = {"__name__": "__main__"}
    written: list[str] = []
    files: dict[str, bytes] = {}
    before, sys.argv = sys.argv, [str(script), str(folder)]
    try:
        for kind, source in zip(parts[::2], parts[1::2], strict=True):
            if "[markdown]" in kind:
                written.append("\n".join(_text(line) for line in source.splitlines() if line.startswith("#")))
                continue
            written.append(f"```python\n{source.strip()}\n```")
            printed, value = _run(source, space)
            if isinstance(value, Picture):
                name = f"{script.stem}_{len(files) + 1}.png"
                files[name] = value.png
                written.append(f"![{value.drawn.alternative}]({name})")
            else:
                written += _blocks(printed, value)
    finally:
        sys.argv = before
    text = "\n\n".join(written).replace(str(folder), f"runs/{folder.name}") + "\n"
    return {f"{script.stem}.md": text.encode("utf-8"), **files}


def _text(line: str) -> str:
    return line.removeprefix("#").removeprefix(" ")


def _run(source: str, space: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last statement where that is an expression."""
    *statements, last = ast.parse(source).body
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        if isinstance(last, ast.Expr):
            exec(compile(ast.Module(statements, []), "<cell>", "exec"), space)
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), space)
        else:
            exec(compile(ast.Module([*statements, last], []), "<cell>", "exec"), space)
    return printed.getvalue(), value


def _blocks(printed: str, value: Any) -> list[str]:
    found = [f"```text\n{printed.rstrip()}\n```"] if printed.strip() else []
    if value is None:
        return found
    if isinstance(value, Table):
        return [*found, value.to_markdown().strip()]
    if isinstance(value, str):
        return [*found, f"> {escaped_markdown(value)}"]
    with pd.option_context("display.width", 110, "display.max_columns", 20):
        return [*found, f"```text\n{value!r}\n```"]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for name, content in render(place, Path(sys.argv[2]).resolve()).items():
        (place.parent / name).write_bytes(content)
