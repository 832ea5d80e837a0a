"""Tables are written when files, plan or code have changed, and only then; and which cells are compared, of many."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from analysis import results, run, up_to_date
from analysis.cells import Cell, compared_with
from analysis.collect import CACHE, collect
from analysis.results import evaluate
from analysis.terminal_tables import rendered
from orchestrator.cells import baseline_of
from tests.analysis.fabricated import REGISTERS, publish, registers_sweep


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that tables are computed."""
    calls: list[int] = []

    def watched(frames: Any) -> Any:
        calls.append(1)
        return evaluate(frames)

    monkeypatch.setattr(results, "evaluate", watched)
    return calls


def test_tables_are_those_of_the_analysis_and_are_not_written_twice(tmp_path: Path, evaluated: list[int]) -> None:
    folder = publish(tmp_path / "s", registers_sweep(), baseline={REGISTERS: 0})
    written = run.tables(folder)
    expected = evaluate(collect(folder, keep=False)).tables()
    assert written.keys() == expected.keys()
    for name, path in written.items():
        assert path == folder / "tables" / f"{name}.parquet"
        assert pq.read_table(path).equals(expected[name]), name
    stamps = {name: path.stat().st_mtime_ns for name, path in written.items()}
    assert run.tables(folder) == written
    assert {name: path.stat().st_mtime_ns for name, path in written.items()} == stamps
    assert len(evaluated) == 1


def test_whatever_changes_makes_them_anew(
    tmp_path: Path, evaluated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(tmp_path / "s", registers_sweep(), baseline={REGISTERS: 0})
    written = run.tables(folder)
    whole = {name: path.read_bytes() for name, path in written.items()}

    def again() -> bool:
        before = len(evaluated)
        run.tables(folder)
        return len(evaluated) > before

    result = folder / "trials" / "id-4-0" / "result.json"
    result.write_text(result.read_text().replace("abc123", "abc124"))
    assert again() and not again()
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"question": "Why?"}))
    assert again() and not again()
    (folder / "mlflow.json").unlink()
    assert again() and not again()
    (folder / "trials" / "id-4-0" / "metrics.parquet").unlink()
    assert again() and not again()
    written["ablation"].write_bytes(b"spoilt")
    assert again() and not again()
    written["runs"].unlink()
    assert again() and not again()
    (folder / CACHE / "tables.json").write_text('{"fingerprint": 1, "files": []}')
    assert again() and not again()
    monkeypatch.setattr(up_to_date, "_code", lambda: b"other code")
    assert again() and not again()
    assert {name: path.read_bytes() for name, path in written.items()}.keys() == whole.keys()


def test_a_whole_analysis_is_made_once_and_says_the_same_again(tmp_path: Path, evaluated: list[int]) -> None:
    trials = registers_sweep(counts=(0, 4))
    folder = publish(tmp_path / "s", trials, baseline={REGISTERS: 0})
    (folder / "trials" / trials[0].trial_id / "token_norms.parquet").write_bytes(b"spoilt")
    first = run.analyse(folder)
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    second = run.analyse(folder)
    assert len(evaluated) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == stamps
    for name in ("answer", "tables", "figures", "report", "problems", "note", "readable"):
        assert getattr(second, name) == getattr(first, name), name
    assert any("unreadable" in problem for problem in second.problems)
    assert rendered([second.terminal]) == rendered([first.terminal])
    for spoilt in (first.report, first.figures[-1], first.readable[-1], first.tables["trends"]):
        before = spoilt.read_bytes()
        spoilt.write_bytes(b"spoilt")
        run.analyse(folder)
        assert spoilt.read_bytes() == before, spoilt


def test_a_folder_that_cannot_keep_a_mark_gets_its_tables(tmp_path: Path, evaluated: list[int]) -> None:
    folder = publish(tmp_path / "s", registers_sweep())
    (folder / CACHE).write_text("in the way")
    assert run.tables(folder)["ablation"].is_file()
    run.tables(folder)
    assert len(evaluated) == 2


def test_the_cells_that_all_are_compared_with_are_those_of_each() -> None:
    draw = random.Random(0)
    for _ in range(300):
        choices: tuple[list[Any], ...] = ([None, 0, 1, 1.0, True], [None, "a", [1, 2], {"b": 1}], [0, 1])
        drawn = [{axis: draw.choice(some) for axis, some in zip("xyz", choices, strict=True)} for _ in range(8)]
        everything = tuple({cell.key: cell for cell in (Cell(values, ()) for values in drawn)}.values())
        names = draw.sample("xyz", draw.randint(0, 3))
        baseline = {name: draw.choice(choices["xyz".index(name)]) for name in names} if draw.random() < 0.9 else None
        found = compared_with(everything, baseline)
        values = [cell.values for cell in everything]
        for cell in everything:
            theirs = found[cell.key]
            alone = None if baseline is None else baseline_of(cell.values, values, baseline)
            assert (None if theirs is None else theirs.values) == alone
