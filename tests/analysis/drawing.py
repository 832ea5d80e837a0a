"""Pictures of a made-up sweep by their names, and how to leave out the rendering, which takes most of the time."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

from analysis import figures
from analysis.collect import collect
from analysis.figures.style import Drawn
from analysis.pictures import Pictures, draw
from analysis.results import evaluate


def pictures_of(folder: Path) -> Pictures:
    """All pictures of the sweep in `folder`."""
    return draw(evaluate(collect(folder)))


def named(pictures: Pictures) -> dict[str, Drawn]:
    """Pictures by the names of their files, each of which there is once."""
    found = {drawn.name: drawn for drawn in pictures.drawn}
    assert len(found) == len(pictures.drawn)
    return found


def leave_out_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures have no bytes until the end of the test; all else is as ever."""
    for module in pkgutil.iter_modules(figures.__path__):
        monkeypatch.setattr(
            importlib.import_module(f"analysis.figures.{module.name}"),
            "render",
            lambda figure: (b"", b""),
            raising=False,
        )
