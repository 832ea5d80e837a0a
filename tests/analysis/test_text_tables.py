"""Tables as CSV, Markdown, HTML and LaTeX: what a parser reads from them is what was meant, whatever names hold."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.collect import collect
from analysis.pivots import pivot, tidy
from analysis.readable import form_of, safe_names, text, write, write_readable
from analysis.results import evaluate
from analysis.text_tables import TextCell, TextTable, csv_text, escaped_latex, html_table, latex, markdown, of_pivot
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, Trial, publish, registers_sweep
from tests.analysis.latex_checker import read

EVIL = '<script>alert("x")</script> | 100% & #1 $x_1$ {\\input} ~^ [a](b) *b* `c` é ± τ 中'
PRINTED = EVIL.replace("中", "[U+4E2D]")


def table_of(name: str) -> TextTable:
    return TextTable(
        caption=f"Caption of {name}",
        notes="n",
        headings=(name, "size"),
        spanner=name,
        columns=("0", name),
        rows=(
            (("[x]", "*"), (TextCell(("1.0 ± 0.5", "+0.5 [−0.1, +1.1]")), TextCell(("2.0",), bold=True))),
            ((name, "b"), (TextCell(("3 failed",)), TextCell(("–",)))),
        ),
        label=f"tab:{name}",
    )


def test_latex_prints_what_was_meant() -> None:
    found = read(latex(table_of(EVIL)))
    assert found.rows == [
        ["", "", "", PRINTED],
        [PRINTED, "size", "0", PRINTED],
        ["[x]", "*", "1.0 ± 0.5", "2.0"],
        ["", "", "+0.5 [−0.1, +1.1]", ""],
        [PRINTED, "b", "3 failed", "--"],
    ]
    assert f"Caption of {PRINTED}. n" in found.text


def test_latex_is_booktabs_with_bold_where_it_is_meant() -> None:
    source = latex(table_of("a_b"))
    assert source.count("\\textbf{") == 1 and "\\textbf{2.0}" in source
    assert [source.count(f"\\{rule}") for rule in ("toprule", "cmidrule(lr){3-4}", "midrule", "bottomrule")] == [1] * 4
    assert "\\begin{tabular}{llrr}" in source
    assert "\\label{tab:a-b}" in source


def printed(name: str) -> str:
    """What LaTeX prints of `name` at the beginning of a row of a table."""
    ((cell,),) = read(f"\\begin{{tabular}}{{l}}\n\\midrule\n{escaped_latex(name)} \\\\\n\\end{{tabular}}\n").rows
    return cell


@given(st.text(max_size=40))
def test_any_text_compiles(name: str) -> None:
    printed(name)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_what_stands_on_a_keyboard_is_printed_as_it_is(name: str) -> None:
    assert printed(name) == " ".join(name.split())


def test_accents_and_letters_without_a_command() -> None:
    assert escaped_latex("é Ü ç ñ ß Ł") == "\\'{e} \\\"{U} \\c{c} \\~{n} \\ss{} \\L{}"
    assert escaped_latex("жΔ\u0000x\n y\u202e") == "{[}U+0436{]}$\\Delta$ x y{[}U+202E{]}"


def cells_of(line: str) -> list[str]:
    """The cells of a row of GitHub's Markdown with escapes undone."""
    parts = re.split(r"(?<!\\)(?:\\\\)*\|", line.strip())[1:-1]
    return [re.sub(r"\\(.)", r"\1", part.strip()) for part in parts]


def test_markdown_prints_what_was_meant() -> None:
    lines = markdown(table_of(EVIL)).splitlines()
    assert cells_of(lines[2]) == [EVIL, "size", f"{EVIL} = 0", f"{EVIL} = {EVIL}"]
    assert lines[3] == "| :-- | :-- | --: | --: |"
    assert cells_of(lines[4]) == ["[x]", "*", "1.0 ± 0.5<br>+0.5 [−0.1, +1.1]", "**2.0**"]
    assert cells_of(lines[5]) == [EVIL, "b", "3 failed", "–"]
    assert len(lines) == 8
    raw = re.sub(r"\\.", "", "\n".join(lines).replace("<br>", ""))
    assert not set("<>`[]#$&") & set(raw)


def test_html_takes_nothing_as_markup() -> None:
    page = html_table(table_of(EVIL))
    assert "<script" not in page and "&lt;script&gt;" in page
    assert page.count("<th ") == 4 + 4
    assert "<td><b>2.0</b></td>" in page
    assert '<th scope="row">[x]</th>' in page


def test_csv_gives_back_the_same_numbers() -> None:
    values = [0.1 + 0.2, 1e-300, None, -3.0]
    table = pa.table({"na,me": values, "flags": [["a", "b"], [], None, ['q"']], "best": [True, False, None, True]})
    rows = list(csv.reader(io.StringIO(csv_text(table))))
    assert rows[0] == ["na,me", "flags", "best"]
    assert [float(row[0]) if row[0] else None for row in rows[1:]] == values
    assert [row[1] for row in rows[1:]] == ["a;b", "", "", 'q"']
    assert [row[2] for row in rows[1:]] == ["true", "false", "", "true"]


def test_a_pivot_in_words(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a_sweep", registers_sweep(), baseline={REGISTERS: 0})
    table = of_pivot(pivot(evaluate(collect(folder)), OUTLIERS))
    assert (table.headings, table.spanner, table.columns) == ((), "num_registers", ("0", "1", "2", "4"))
    ((names, cells),) = table.rows
    assert names == ()
    assert [cell.bold for cell in cells] == [False, False, False, True]
    assert cells[3].lines[0] == "2.07 ± 0.08"  # 0.02 + half of 0, 0.001 and 0.003
    assert cells[3].lines[1].startswith("−3.07 [")
    assert table.caption == "Outlier fraction (last layer), %"
    rows = read(latex(table)).rows
    assert [len(row) for row in rows] == [4] * 4


def test_all_forms_are_written_and_old_ones_go(tmp_path: Path) -> None:
    folder = publish(tmp_path / "s", registers_sweep(), baseline={REGISTERS: 0})
    results = evaluate(collect(folder))
    (tmp_path / "t" / "pivots").mkdir(parents=True)
    (tmp_path / "t" / "pivots" / "old.md").touch()
    (tmp_path / "t" / "pivots" / "mine.txt").touch()
    written = write_readable(tmp_path / "t", results)
    names = {path.name for path in (tmp_path / "t" / "pivots").iterdir()}
    stems = ("test_linear_top1", "tokens_last_outlier_fraction")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("md", "tex", "csv", "parquet")} | {"mine.txt"}
    assert {path.name for path in written} == names - {"mine.txt"} | {"ablation.csv"}
    one = tmp_path / "t" / "pivots" / "tokens_last_outlier_fraction"
    assert pq.read_table(one.with_suffix(".parquet")).equals(tidy(pivot(results, OUTLIERS)))
    assert one.with_suffix(".csv").read_text() == csv_text(tidy(pivot(results, OUTLIERS)))
    rows = list(csv.DictReader(io.StringIO((tmp_path / "t" / "ablation.csv").read_text())))
    assert len(rows) == results.ablation.num_rows
    assert [float(row["mean"]) for row in rows if row["mean"]] == [
        mean for mean in results.ablation["mean"].to_pylist() if mean is not None
    ]


def test_an_empty_sweep_has_an_empty_table_and_no_pivots(tmp_path: Path) -> None:
    results = evaluate(collect(publish(tmp_path / "s", [], axes={})))
    (path,) = write_readable(tmp_path / "t", results)
    assert path.read_text().startswith("metric,primary,n,") and path.read_text().count("\n") == 1


def test_the_order_of_trials_does_not_change_a_byte(tmp_path: Path) -> None:
    trials = registers_sweep()
    texts = []
    for name, ordered in (("a", trials), ("b", trials[::-1])):
        results = evaluate(collect(publish(tmp_path / name / "s", ordered, baseline={REGISTERS: 0})))
        texts.append([path.read_bytes() for path in write_readable(tmp_path / name / "t", results)])
    assert texts[0] == texts[1]


def test_sweeps_with_other_axes_are_one_csv(tmp_path: Path) -> None:
    one = publish(tmp_path / "one", registers_sweep(counts=(0, 1)), baseline={REGISTERS: 0})
    other = publish(tmp_path / "other", [Trial({"method": "dino"}, 0, {TOP1: 0.5})], primary=[TOP1])
    found = [pivot(evaluate(collect(folder)), TOP1) for folder in (one, other)]
    rows = list(csv.DictReader(io.StringIO(text(found, "csv"))))
    assert [(row["sweep"], row[REGISTERS], row["method"]) for row in rows] == [
        ("one", "0", ""),
        ("one", "1", ""),
        ("other", "", "dino"),
    ]
    assert write(tmp_path / "x.parquet", found, "parquet").is_file()
    with pytest.raises(ValueError, match="parquet is no text"):
        text(found, "parquet")


def test_forms_and_names_of_files() -> None:
    assert form_of(None, None) == "terminal"
    assert form_of(None, Path("a.tex")) == "latex"
    assert form_of("csv", Path("a.tex")) == "csv"
    with pytest.raises(ValueError, match=r"a\.parquet would be no parquet file: --format is latex"):
        form_of("latex", Path("a.parquet"))
    with pytest.raises(ValueError, match=r"a\.doc has no ending of a table; allowed: \.md, \.tex, \.csv, \.parquet"):
        form_of(None, Path("a.doc"))
    assert safe_names(["a/b", "a_b", "A b", "../..", "x" * 200]) == ["a_b", "a_b_2", "A_b_3", "metric", "x" * 80]
