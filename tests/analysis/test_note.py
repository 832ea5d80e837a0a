"""The note of a sweep's run in MLflow: its numbers, its length, and that nothing of a sweep file is markup there."""

import html
import re
from typing import Any

import pytest

from analysis.collect import SweepPlan
from analysis.note import MOST_CHARACTERS, escaped, note

METRIC = "test/linear/top1"


def _plan(question: str = "Do registers help?") -> SweepPlan:
    axes = {"model.num_registers": (0, 4)}
    return SweepPlan("s", question, axes, {"model.num_registers": 0}, (METRIC,), ())


def _row(registers: Any, **values: Any) -> dict[str, Any]:
    row = {"metric": METRIC, "primary": True, "n": 3, "mean": 0.5, "std": 0.01, "delta": None, "flags": []}
    low_high = {"delta_low": None, "delta_high": None}
    return {"model.num_registers": registers, **row, **low_high, **values}


def test_question_answer_and_a_row_for_each_cell() -> None:
    rows = [_row(0), _row(4, n=2, mean=0.525, std=None, delta=0.025, delta_low=0.01, delta_high=0.04)]
    lines = note(_plan(), rows, ["model.num_registers"], "It rises.").split("\n")
    assert lines[:3] == ["Do registers help?", "", "**Answer.** It rises."]
    assert lines[4] == "| num\\_registers | n | top-1 (linear probe, test), % |"
    assert lines[5] == "| --- | --- | --- |"
    assert lines[6:] == [
        "| 0 | 3 | 50.00 ± 1.00 |",
        "| 4 | 2 | 52.50; Δ +2.50 \\[+1.00, +4.00\\] |",
    ]


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=alert(1)>", "[a](javascript:alert(1))", "a | b\n# c", "**b** _i_ `c` ~~d~~ & \\*"]
)
def test_what_a_sweep_file_says_is_shown_as_it_is(text: str) -> None:
    shown = escaped(text)
    assert "<" not in shown and "\n" not in shown
    plain = re.sub(r"\\([\\`*_\[\]|~])", r"\1", shown)
    assert html.unescape(plain) == " ".join(text.split())
    for at, character in enumerate(shown):
        if character in "*_`[]|~":
            assert shown[at - 1] == "\\"
    assert escaped(text) in note(_plan(text), [_row(0)], ["model.num_registers"], "x")


def test_rows_that_do_not_fit_are_counted() -> None:
    rows = [_row(f"value {number}") for number in range(300)]
    text = note(_plan(), rows, ["model.num_registers"], "It rises.")
    assert len(text) <= MOST_CHARACTERS
    shown = sum(line.startswith("| value") for line in text.split("\n"))
    assert text.endswith(f"\n\n{300 - shown} more cells: artifact report.html") and shown > 100


def test_without_any_score_there_is_no_table() -> None:
    assert note(_plan(), [], [], "No answer yet.") == "Do registers help?\n\n**Answer.** No answer yet."
