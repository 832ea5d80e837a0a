"""A strict reader of LaTeX, where no LaTeX is installed: what our tables may use, and what they print."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

_TOKEN = re.compile(r"\\[A-Za-z]+ ?|\\.|%[^\n]*\n|[{}$&#^_~%]|.", re.DOTALL)
_PRINTED = {
    **{f"\\{sign}": sign for sign in "_%&#${}"},
    "\\textbackslash": "\\",
    "\\textasciitilde": "~",
    "\\textasciicircum": "^",
    "\\textbar": "|",
    "\\textless": "<",
    "\\textgreater": ">",
    "\\dots": "…",
    "\\ss": "ß",
    "\\o": "ø",
    "\\ae": "æ",
    "\\l": "ł",
    "\\L": "Ł",
    "\\O": "Ø",
    "\\AE": "Æ",
}
_MATH = {"\\pm": "±", "\\times": "×", "\\Delta": "Δ", "\\tau": "τ", "\\leq": "≤", "\\rightarrow": "→", "-": "−"}
_MATH |= {"\\alpha": "α", "\\beta": "β", "\\sigma": "σ", "\\mu": "μ", "\\lambda": "λ", "\\geq": "≥", "\\cdot": "·"}
_MATH |= {"\\surd": "√", "\\infty": "∞"}
_ACCENTS = {"\\'": "\u0301", "\\`": "\u0300", "\\^": "\u0302", "\\~": "\u0303", '\\"': "\u0308", "\\c": "\u0327"}
_ACCENTS |= {"\\v": "\u030c", "\\r": "\u030a", "\\u": "\u0306", "\\H": "\u030b", "\\=": "\u0304", "\\.": "\u0307"}
_ARGUMENTS = {"\\begin", "\\end", "\\label", "\\cmidrule", "\\multicolumn"}  # of which the tables need nothing printed
_RULES = {"\\toprule", "\\midrule", "\\bottomrule"}
_SILENT = {"\\centering", "\\scriptsize", "\\textbf", "\\caption"}


@dataclass
class Read:
    """What a table prints: its rows by cell, and its caption with it all."""

    text: str = ""
    rows: list[list[str]] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)


def read(source: str) -> Read:
    """Reads `source` as TeX would. Raises AssertionError for what does not compile or would be taken otherwise."""
    assert source.isascii()
    found, row, cell = Read(), [], ""
    depth, math, table = 0, False, False
    tokens = [token.rstrip(" ") or " " for token in _TOKEN.findall(source)]
    at = 0
    while at < len(tokens):
        token = tokens[at]
        at += 1
        if token.startswith("%"):
            continue
        if token in _ARGUMENTS:
            at, argument = _argument(tokens, at)
            if token == "\\begin":
                found.opened.append(argument)
                if argument == "tabular":
                    at, columns = _argument(tokens, at)
                    assert re.fullmatch("[lr]+", columns)
                    table, width = True, len(columns)
            elif token == "\\end":
                assert found.opened.pop() == argument
                table = table and argument != "tabular"
            elif token == "\\label":
                assert re.fullmatch("[A-Za-z0-9:-]+", argument)
            elif token == "\\multicolumn":
                at, _ = _argument(tokens, at)
                row += [""] * (int(argument) - 1)
        elif token == "\\\\":
            assert table and depth == 0 and not math
            following = "".join(tokens[at:]).lstrip()
            assert not following.startswith(("[", "*")), "an argument of the line break"
            found.rows.append([*row, cell.strip()])
            assert len(found.rows[-1]) == width, found.rows[-1]
            row, cell = [], ""
        elif token in _RULES:
            assert not "".join(tokens[at:]).lstrip().startswith("["), "an argument of the rule"
        elif token == "&":
            assert table and depth == 0 and not math
            row, cell = [*row, cell.strip()], ""
        elif token == "$":
            math = not math
        elif token in ("{", "}"):
            depth += 1 if token == "{" else -1
            assert depth >= 0
        else:
            assert token not in "#^_~", f"{token} outside of mathematics"
            at, printed = _printed(tokens, at, token, math)
            found.text += printed
            cell += printed if table else ""
    assert not found.opened and depth == 0 and not math
    return found


def _printed(tokens: list[str], at: int, token: str, math: bool) -> tuple[int, str]:
    if math:
        return at, _MATH[token]
    if token == "\\char":
        assert tokens[at : at + 2] == ["3", "4"]
        return at + 2, '"'
    if token in _ACCENTS:
        assert tokens[at] == "{" and tokens[at + 2] == "}"
        return at + 3, unicodedata.normalize("NFC", tokens[at + 1] + _ACCENTS[token])
    if token in _SILENT:
        return at, ""
    if token.startswith("\\"):
        return at, _PRINTED[token]
    return at, token


def _argument(tokens: list[str], at: int) -> tuple[int, str]:
    if tokens[at] == "(":  # that \\cmidrule is trimmed
        at = tokens.index(")", at) + 1
    assert tokens[at] == "{"
    end = tokens.index("}", at)
    return end + 1, "".join(tokens[at + 1 : end])
