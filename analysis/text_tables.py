"""Tables as text: CSV with full precision, Markdown, HTML, and LaTeX that compiles as it is; pure."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any

import pyarrow as pa

from analysis.labels import axis_labels, cell_text, value_text
from analysis.pivots import Pivot, Show, entry_lines, legend, notes, usual_seeds


@dataclass(frozen=True)
class TextCell:
    """What one place of a table says: lines below each other, all in bold or none."""

    lines: tuple[str, ...]
    bold: bool = False


@dataclass(frozen=True)
class TextTable:
    """A table in words.

    Attributes:
        headings: of the columns that name a row.
        spanner: what the other columns have in common, above them; "" for nothing.
        columns: their headings below the spanner.
        rows: the names of a row, as many as headings, and its cells, as many as columns.
        label: by which LaTeX refers to it; letters, digits, `:` and `-` are kept.
    """

    caption: str
    notes: str
    headings: tuple[str, ...]
    spanner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[TextCell, ...]], ...]
    label: str = ""


def of_pivot(pivot: Pivot, show: Show = "both") -> TextTable:
    """The pivot in words: labels of axes and values, entries, and the legend."""
    names = axis_labels([*pivot.rows, *pivot.columns])
    single = len(pivot.columns) == 1
    usual = usual_seeds(pivot)
    noted = notes(pivot)
    nothing = TextCell(("–",))
    return TextTable(
        caption=pivot.caption,
        notes=legend(pivot, show),
        headings=tuple(names[axis] for axis in pivot.rows),
        spanner=names[pivot.columns[0]] if single else "",
        columns=tuple(
            value_text(key[0])
            if single
            else cell_text(dict(zip(pivot.columns, key, strict=True)), pivot.columns, names)
            for key in pivot.column_keys
        ),
        rows=tuple(
            (
                tuple(value_text(value) for value in key),
                tuple(
                    nothing if entry is None else TextCell(entry_lines(entry, show, usual, noted), entry.best)
                    for entry in (pivot.entries.get((row, column)) for column in range(len(pivot.column_keys)))
                ),
            )
            for row, key in enumerate(pivot.row_keys)
        ),
        label=f"tab:{pivot.sweep}-{pivot.metric}",
    )


def csv_text(table: pa.Table) -> str:
    """CSV (RFC 4180 with \\n) of flat columns and lists of texts: null is empty, a list is joined by `;`.

    Numbers have the fewest digits that give back the same number.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(table.column_names)
    writer.writerows(
        [_csv_value(value) for value in row]
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True)
    )
    return stream.getvalue()


def _csv_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    return ";".join(str(item) for item in value) if isinstance(value, list) else str(value)


def markdown(table: TextTable) -> str:
    """GitHub's Markdown: caption, table, notes. Nothing in it is taken as markup or HTML but what is meant."""
    spanner = f"{table.spanner} = " if table.spanner else ""
    heads = [*table.headings, *(f"{spanner}{column}" for column in table.columns)]
    lines = [f"**{escaped_markdown(table.caption)}**", ""] if table.caption else []
    lines += [_markdown_row([escaped_markdown(head) for head in heads])]
    lines += [_markdown_row([":--" for _ in table.headings] + ["--:" for _ in table.columns])]
    for names, cells in table.rows:
        texts = ["<br>".join(_markdown_line(line, cell.bold) for line in cell.lines) for cell in cells]
        lines.append(_markdown_row([*(escaped_markdown(name) for name in names), *texts]))
    return "\n".join([*lines, *(["", escaped_markdown(table.notes)] if table.notes else []), ""])


def _markdown_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _markdown_line(line: str, bold: bool) -> str:
    return f"**{escaped_markdown(line)}**" if bold and line else escaped_markdown(line)


def escaped_markdown(text: str) -> str:
    """`text` in one line, with a backslash before every sign that Markdown or HTML may read."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", _one_line(text))


def html_table(table: TextTable) -> str:
    """A `table` element with its caption and notes; nothing from outside is taken as markup."""
    spanner = f"{table.spanner} = " if table.spanner else ""
    heads = [*table.headings, *(f"{spanner}{column}" for column in table.columns)]
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = []
    for names, cells in table.rows:
        row = [f'<th scope="row">{escape(name)}</th>' for name in names]
        for cell in cells:
            lines = "<br>".join(escape(line) for line in cell.lines)
            row.append(f"<td>{f'<b>{lines}</b>' if cell.bold else lines}</td>")
        body.append(f"<tr>{''.join(row)}</tr>")
    caption = f"<caption>{escape(table.caption)}</caption>"
    whole = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f"{whole}<p><small>{escape(table.notes)}</small></p>"


def latex(table: TextTable) -> str:
    """A `table` environment that needs booktabs alone and compiles with any engine and encoding."""
    before, after = len(table.headings), len(table.columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{escaped_latex(f'{table.caption}. {table.notes}' if table.notes else table.caption)}}}",
        *([f"  \\label{{{re.sub(r'[^A-Za-z0-9:]+', '-', table.label)}}}"] if table.label else []),
        f"  \\begin{{tabular}}{{{'l' * before}{'r' * after}}}",
        "    \\toprule",
    ]
    if table.spanner and after:
        lines.append(_latex_row([*[""] * before, f"\\multicolumn{{{after}}}{{c}}{{{escaped_latex(table.spanner)}}}"]))
        lines.append(f"    \\cmidrule(lr){{{before + 1}-{before + after}}}")
    lines += [_latex_row([escaped_latex(head) for head in (*table.headings, *table.columns)]), "    \\midrule"]
    for names, cells in table.rows:
        firsts, *others = zip_longest(*(cell.lines for cell in cells), fillvalue="") if cells else [()]
        marked = [_latex_line(line, cell.bold) for line, cell in zip(firsts, cells, strict=True)]
        lines.append(_latex_row([*(escaped_latex(name) for name in names), *marked]))
        for line_of in others:
            small = [
                f"{{\\scriptsize {_latex_line(line, cell.bold)}}}" if line else ""
                for line, cell in zip(line_of, cells, strict=True)
            ]
            lines.append(_latex_row([*[""] * before, *small]))
    return "\n".join([*lines, "    \\bottomrule", "  \\end{tabular}", "\\end{table}", ""])


def _latex_row(texts: Sequence[str]) -> str:
    return f"    {' & '.join(texts)} \\\\"


def _latex_line(line: str, bold: bool) -> str:
    return f"\\textbf{{{escaped_latex(line)}}}" if bold and line else escaped_latex(line)


# A bracket or a star at the beginning of a row would be an argument of the `\\` before it.
_LATEX = {
    **{sign: f"\\{sign}" for sign in "_%&#${}"},
    **{sign: f"{{{sign}}}" for sign in "[]*"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    '"': "{\\char34}",
    "–": "--",
    "—": "---",
    "’": "'",
    "…": "\\dots{}",
    **{
        sign: f"${name}$"
        for sign, name in {"±": "\\pm", "−": "-", "×": "\\times", "·": "\\cdot", "√": "\\surd"}.items()
    },
    **{sign: f"${name}$" for sign, name in {"≤": "\\leq", "≥": "\\geq", "→": "\\rightarrow", "∞": "\\infty"}.items()},
    **{sign: f"$\\{name}$" for sign, name in {"Δ": "Delta", "α": "alpha", "β": "beta", "σ": "sigma"}.items()},
    **{sign: f"$\\{name}$" for sign, name in {"τ": "tau", "μ": "mu", "µ": "mu", "λ": "lambda"}.items()},
    "ß": "\\ss{}",
    "ø": "\\o{}",
    "Ø": "\\O{}",
    "æ": "\\ae{}",
    "Æ": "\\AE{}",
    "ł": "\\l{}",
    "Ł": "\\L{}",
}
_ACCENTS = {
    "\u0300": "\\`",
    "\u0301": "\\'",
    "\u0302": "\\^",
    "\u0303": "\\~",
    "\u0308": '\\"',
    "\u0304": "\\=",
    "\u0307": "\\.",
    "\u0306": "\\u",
    "\u030a": "\\r",
    "\u030b": "\\H",
    "\u030c": "\\v",
    "\u0327": "\\c",
}


def escaped_latex(text: str) -> str:
    """`text` in one line of ASCII that LaTeX prints as it is; a letter that it has no command for as its code point."""
    return "".join(_latex_letter(letter) for letter in unicodedata.normalize("NFC", _one_line(text)))


def _latex_letter(letter: str) -> str:
    if letter in _LATEX:
        return _LATEX[letter]
    if letter.isascii():
        return letter
    parts = unicodedata.normalize("NFD", letter)
    if len(parts) == 2 and parts[0].isascii() and parts[1] in _ACCENTS:
        return f"{_ACCENTS[parts[1]]}{{{parts[0]}}}"
    return f"{{[}}U+{ord(letter):04X}{{]}}"


def _one_line(text: str) -> str:
    """`text` without control characters; any white space is one space."""
    spaced = "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)
    return " ".join(spaced.split())
