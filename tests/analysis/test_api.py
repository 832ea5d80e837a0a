"""The Python API: frames with nulls, pivots, curves, figures, comparisons, and the example in docs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

import analysis
from analysis.api import Sweep, Sweeps
from analysis.collect import collect
from analysis.frames import Frames
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep
from tests.analysis.latex_checker import read

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "analyse_a_sweep.py"
BASELINE = {REGISTERS: 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 4 register counts × 3 seeds, of which the last trial diverged."""
    trials = registers_sweep()
    trials[-1].status = "diverged"
    return publish(tmp_path_factory.mktemp("api") / "registers", trials, baseline=BASELINE)


@pytest.fixture(scope="module")
def sweep(folder: Path) -> Sweep:
    return analysis.load(folder)


def test_importing_is_quick() -> None:
    """Nothing but the standard library comes with the package: what a call needs is imported by it."""
    said = "import sys, analysis; print(sorted({n.split('.')[0] for n in sys.modules} & set(sys.argv[1:])))"
    names = ("pandas", "numpy", "pyarrow", "scipy", "matplotlib", "rich", "mlflow")
    done = subprocess.run([sys.executable, "-c", said, *names], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_what_a_sweep_is(sweep: Sweep) -> None:
    assert repr(sweep) == "<Sweep registers: 4 cells, 12 trials>"
    assert sweep.question == "How many registers does a small ViT need?"
    assert sweep.axes == {REGISTERS: (0, 1, 2, 4)}
    assert sweep.primary == (TOP1, OUTLIERS)
    assert "outlier fraction" in sweep.answer.lower()
    assert sweep.warnings == ()


def test_frames_keep_nulls_and_whole_numbers(sweep: Sweep) -> None:
    assert set(sweep.runs["status"]) == {"finished", "diverged"}
    row = sweep.ablation.set_index([REGISTERS, "metric"]).loc[(0, TOP1)]
    assert row["delta"] is pd.NA
    assert row["mean"] == pytest.approx(0.70 + (0.01 - 0.01 + 0.004) / 3)
    assert sweep.ablation["n"].dtype == "int64[pyarrow]"
    assert list(sweep.metrics.columns) == ["trial_id", "step", "name", "value"]
    assert {"layer", "token", "histogram"} <= set(sweep.token_norms.columns)
    assert sweep.frame("token_statistics").empty
    with pytest.raises(ValueError, match="there is no table 'nothing'; allowed: runs, metrics"):
        sweep.frame("nothing")


def test_a_pivot_of_numbers(sweep: Sweep) -> None:
    means = sweep.pivot(OUTLIERS)
    assert means.columns.name == "num_registers"
    assert means.loc["all"].tolist() == pytest.approx([0.154 / 3, 0.122 / 3, 0.092 / 3, 0.0405 / 2])
    assert sweep.pivot(OUTLIERS, values="n", rows=REGISTERS)["all"].to_dict() == {0: 3, 1: 3, 2: 3, 4: 2}
    assert sweep.pivot(OUTLIERS, values="delta").isna().loc["all"].tolist() == [True, False, False, False]


def test_a_pivot_of_two_axes(tmp_path: Path) -> None:
    trials = [
        Trial({"method": method, "model.size": size, REGISTERS: count}, 0, {TOP1: 0.1 * number})
        for number, (method, size, count) in enumerate(
            [("deit3", "nano", 0), ("deit3", "tiny", 0), ("dino", "nano", 0), ("dino", "nano", 4)]
        )
    ]
    found = analysis.load(publish(tmp_path / "s", trials, primary=[TOP1])).pivot(TOP1)
    assert list(found.index) == [("deit3", "nano"), ("deit3", "tiny"), ("dino", "nano")]
    assert found.index.names == ["method", "size"]
    assert found.loc[("dino", "nano"), 4] == pytest.approx(0.3)
    assert found.loc[("deit3", "nano"), 4] is pd.NA


def test_an_axis_of_lists_is_labelled_by_its_text(tmp_path: Path) -> None:
    trials = [Trial({"evaluation.linear.blocks": blocks}, 0, {TOP1: 0.5}) for blocks in ([1], [1, 4])]
    found = analysis.load(publish(tmp_path / "s", trials, primary=[TOP1])).pivot(TOP1)
    assert list(found.columns) == ["[1,4]", "[1]"]


def test_a_table_for_readers(sweep: Sweep, tmp_path: Path) -> None:
    table = sweep.table(OUTLIERS, show="spread")
    assert "**2.03 ± 0.04 (n = 2, 1 diverged)**" in table.to_markdown().replace("\\", "")
    assert any("2.03 ± 0.04 (n = 2, 1 diverged)" in row for row in read(table.to_latex()).rows)
    assert table.to_frame()["best"].tolist() == [False, False, False, True]
    assert table.to_csv().splitlines()[0].startswith(f"sweep,{REGISTERS},metric,primary,n,")
    assert "<b>2.03" in table._repr_html_()
    assert "Outlier fraction" in str(table)
    assert table.save(tmp_path / "t.tex").read_text() == table.to_latex()
    assert [pivot.metric for pivot in sweep.table().pivots] == [TOP1]
    with pytest.raises(ValueError, match=r"values is 'flags'; allowed: mean, std"):
        sweep.pivot(TOP1, values="flags")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"show is 'wrong'; allowed: both, spread, difference"):
        sweep.table(show="wrong")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no metric 'nothing'"):
        sweep.table("nothing")


def test_learning_curves_are_tidy(sweep: Sweep) -> None:
    curves = sweep.curves("train/loss")
    assert list(curves.columns) == [REGISTERS, "seed", "trial_id", "status", "step", "value"]
    assert len(curves) == 12 * 2
    own = curves[(curves[REGISTERS] == 4) & (curves["seed"] == 2)]
    assert own["step"].tolist() == [10, 20]
    assert own["value"].tolist() == [9.0, 1.2]
    assert set(own["status"]) == {"diverged"}
    with pytest.raises(ValueError, match=r"no trial has reported 'loss'; allowed: .*train/loss"):
        sweep.curves("loss")


def test_figures_display_themselves(sweep: Sweep, tmp_path: Path) -> None:
    assert "outlier_fraction" in sweep.figures()
    picture = sweep.figure("outlier_fraction")
    assert picture.png.startswith(b"\x89PNG")
    assert picture.save(tmp_path / "x.svg").read_bytes() == picture.svg
    assert picture._repr_mimebundle_()["image/png"] == picture._repr_png_()
    assert all("drawn" in reason for reason in sweep.missing_figures)
    with pytest.raises(ValueError, match=r"allowed: \.png, \.svg"):
        picture.save(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match=r"there is no figure 'x'; allowed: .*outlier_fraction"):
        sweep.figure("x")


def test_a_notebook_shows_the_answer_and_nothing_is_markup(sweep: Sweep, tmp_path: Path) -> None:
    page = sweep._repr_html_()
    assert sweep.question in page and page.count("<table>") == 2
    evil = "<img src=x onerror=alert(1)>"
    trials = [Trial({evil: count}, 0, {TOP1: 0.5}) for count in (0, 1)]
    other = analysis.load(publish(tmp_path / evil.replace("/", ""), trials, question=evil, primary=[TOP1]))
    assert "<img" not in other._repr_html_()


def test_two_sweeps(sweep: Sweep, tmp_path: Path) -> None:
    trials = registers_sweep()
    for trial in trials:
        trial.scores[TOP1] += 0.1 if trial.cell[REGISTERS] == 4 else 0.0
        trial.result = {"started": "2025-01-01T00:00:00+00:00", "git_commit": "def456"}
    other = analysis.load(publish(tmp_path / "other", trials, baseline=BASELINE))
    changes = sweep.compare(other)
    assert changes.changes.to_dict("records") == [
        {"kind": "provenance", "name": "git_commit", "a": "abc123", "b": "def456", "cells": 4, "everywhere": True}
    ]
    row = changes.frame.set_index([REGISTERS, "metric"]).loc[(4, TOP1)]
    assert (row["n_paired"], row["delta"]) == (2, pytest.approx(0.1))
    assert "git_commit" in changes._repr_html_() and "git\\_commit" in changes.to_markdown()
    assert "git_commit" in str(changes)
    assert changes.save(tmp_path / "c.csv").is_file()


def test_several_sweeps_are_one_frame(folder: Path, tmp_path: Path) -> None:
    methods = publish(tmp_path / "methods", [Trial({"method": "dino"}, 0, {TOP1: 0.5})], primary=[TOP1])
    both = analysis.load(folder, methods)
    assert isinstance(both, Sweeps)
    assert [one.name for one in both] == ["registers", "methods"]
    assert [one.name for one in both[:1]] == ["registers"]
    last = both.ablation[both.ablation["sweep"] == "methods"]
    assert both.ablation.columns[0] == "sweep"
    assert last["method"].tolist() == ["dino"] * len(last)
    assert last[REGISTERS].isna().all()
    assert len(both.runs) == 13 and both.runs.columns[0] == "sweep"
    assert set(both.metrics["sweep"]) == {"registers", "methods"}


def test_a_sweep_from_mlflow_alone_is_collected_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def collected(uri: str, name: str, storage: str | None) -> Frames:
        asked.append((uri, name, storage))
        return collect(folder)

    monkeypatch.setattr("analysis.collect_mlflow.collect_mlflow", collected)
    sweep = analysis.load_mlflow("sqlite:///mlflow.db", "registers", storage="/runs")
    assert (sweep.name, asked) == ("registers", [("sqlite:///mlflow.db", "registers", "/runs")])


def test_a_folder_that_is_no_sweep(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="those of sweeps in it: registers"):
        analysis.load(folder.parent)
    with pytest.raises(ValueError, match=r"no plan\.json"):
        analysis.load(tmp_path)


def test_a_sweep_before_any_score(tmp_path: Path) -> None:
    trials = registers_sweep()
    for trial in trials:
        trial.status = "missing"
    sweep = analysis.load(publish(tmp_path / "s", trials, baseline=BASELINE))
    assert "3 missing" in sweep.table().to_markdown()
    assert sweep.pivot(TOP1).isna().all(axis=None)
    assert "3 missing" in sweep._repr_html_()
    empty = analysis.load(publish(tmp_path / "empty", [], axes={}))
    assert "none of 0 trials" in empty._repr_html_()
    with pytest.raises(ValueError, match="empty has no metric yet"):
        empty.table()


def renderer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", EXAMPLE.parent / "render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)


def test_the_example_runs_and_its_page_is_of_the_same_cells(folder: Path) -> None:
    files: dict[str, Any] = renderer().render(EXAMPLE, folder)
    page, kept = files[f"{EXAMPLE.stem}.md"].decode(), EXAMPLE.with_suffix(".md").read_text(encoding="utf-8")
    assert cells(page) == cells(kept)
    assert "<Sweep registers: 4 cells, 12 trials>" in page
    assert "of the same trials: their numbers are equal by construction" in page
    assert str(folder) not in page and "/tmp" not in kept
    for name in files:
        assert (EXAMPLE.parent / name).is_file()
    assert set(re.findall(r"\]\((\S+\.png)\)", kept)) == set(files) - {f"{EXAMPLE.stem}.md"}
