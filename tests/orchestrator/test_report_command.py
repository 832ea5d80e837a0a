"""The commands report and compare: what they print and write, and what they say of a wrong option."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep
from tests.analysis.latex_checker import read

BASELINE = {REGISTERS: 0}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sweeps `first` and `second`, whose top-1 is 10 points higher with 4 registers, and `other` with another axis."""
    folder = tmp_path_factory.mktemp("storage")
    publish(folder / "first", registers_sweep(), baseline=BASELINE)
    trials = registers_sweep()
    for trial in trials:
        trial.scores[TOP1] += 0.1 + 0.001 * trial.seed if trial.cell[REGISTERS] == 4 else 0.0
        trial.result = {"started": "2025-01-01T00:00:00+00:00", "git_commit": "def456"}
        trial.config = {"optim.lr": 0.01}
    publish(folder / "second", trials, baseline=BASELINE)
    publish(folder / "other", [Trial({"model.new": new}, 0, {TOP1: 0.5}) for new in (1, 2)])
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: Path, *arguments: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command on `storage`."""
    monkeypatch.setattr("sys.argv", ["orchestrate", *arguments, "--storage", str(storage)])
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main())
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err


def test_report_prints_a_table_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: Path
) -> None:
    code, out, _ = run(monkeypatch, capsys, storage, "report", "first", "--metric", OUTLIERS, "--rows", "num_registers")
    assert code == 0
    assert "Outlier fraction (last layer), %" in out and "5.13 ± 0.15" in out and "Top-1" not in out
    assert not (storage / "first" / "report.html").exists()


def test_report_prints_latex_and_csv(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: Path
) -> None:
    _, out, _ = run(monkeypatch, capsys, storage, "report", "first", "--format", "latex", "--show", "spread")
    tables = out.split("\\end{table}")
    assert [read(f"{table}\\end{{table}}").rows[1] for table in tables[:2]] == [["0", "1", "2", "4"]] * 2
    _, out, _ = run(monkeypatch, capsys, storage, "report", "first", "second", "--format", "csv", "--metric", TOP1)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["sweep"] for row in rows] == ["first"] * 4 + ["second"] * 4
    assert float(rows[0]["mean"]) == pytest.approx(0.70 + 0.004 / 3)


def test_report_writes_by_the_ending_of_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: Path, tmp_path: Path
) -> None:
    code, out, _ = run(monkeypatch, capsys, storage, "report", "first", "--output", str(tmp_path / "t.md"))
    assert (code, out) == (0, "")
    assert (tmp_path / "t.md").read_text().startswith("**Top-1 (linear probe, test), %**")


def test_what_cannot_be_read_is_said_beside_tables_and_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    publish(tmp_path / "first", registers_sweep(), baseline=BASELINE)
    publish(tmp_path / "again", registers_sweep(), baseline=BASELINE)
    next(path for path in sorted((tmp_path / "first" / "trials").iterdir())).joinpath("result.json").write_text("{")
    for arguments in (("report", "first", "--format", "csv"), ("compare", "first", "again", "--json")):
        code, out, err = run(monkeypatch, capsys, tmp_path, *arguments)
        assert code == 0
        assert "note: " not in out
        assert err.startswith("note: trial ") and "result.json is unreadable" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--metric", "nothing"), f"first has no metric 'nothing'; allowed: {TOP1}, {OUTLIERS}"),
        (("--rows", "size"), f"'size' is not an axis; allowed: {REGISTERS}"),
        (("--output", "t.doc"), "t.doc has no ending of a table; allowed: .md, .tex, .csv, .parquet"),
        (("--format", "html"), "--format is html; allowed: terminal, markdown, latex, csv"),
        (("--show", "mean"), "--show is mean; allowed: both, spread, difference"),
    ],
)
def test_report_says_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    storage: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    code, out, err = run(monkeypatch, capsys, storage, "report", "first", *arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_compare_prints_what_changed_and_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: Path
) -> None:
    code, out, _ = run(monkeypatch, capsys, storage, "compare", "first", "second")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    assert "optim.lr all cells 0.001 0.01" in words
    assert "git_commit all cells abc123 def456" in words
    assert "4 3 3 70.13 ± 1.03" in words and "+10.10 [+9.85, +10.35]" in words  # 0.1, 0.101, 0.102
    assert (
        "first and second have 4 cells in both: top-1 (linear probe, test) is higher in second by 10.10 points" in words
    )


def test_compare_gives_json_and_files_of_sweeps_and_folders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], storage: Path, tmp_path: Path
) -> None:
    arguments = ("compare", str(storage / "first"), "second", "--json", "--output", str(tmp_path / "c.csv"))
    code, out, _ = run(monkeypatch, capsys, storage, *arguments)
    assert code == 0
    document = json.loads(out)
    assert (document["a"], document["b"], document["axes"]) == ("first", "second", [REGISTERS])
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert [row["delta"] for row in rows] == [
        "" if row["delta"] is None else repr(row["delta"]) for row in document["rows"]
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("first", "first"), "first and first are the same sweep; compare takes two"),
        (("first", "nothing"), "there is no sweep 'nothing'"),
        (("first", "other"), "cells of other differ in model.new"),
        (("first", "second", "--metric", "x"), "first and second do not both have x; allowed: "),
        (
            ("first", "second", "--output", "x.doc"),
            "x.doc has no ending of a table; allowed: .md, .csv, .json, .parquet",
        ),
    ],
)
def test_compare_says_why_not(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    storage: Path,
    names: tuple[str, ...],
    said: str,
) -> None:
    code, out, err = run(monkeypatch, capsys, storage, "compare", *names)
    assert (code, out) == (2, "")
    assert said in err
