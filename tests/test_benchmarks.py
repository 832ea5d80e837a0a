"""What benchmarks say: ratios, their interval, goals and the JSON line; and that every listed benchmark exists."""

import importlib
import inspect
import itertools
import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.catalog import BENCHMARKS
from benchmarks.report import Comparison, Goal, Report, Settings, line, machine, median_interval, rounded
from benchmarks.turns import Partner, _Turns, serve_turns

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_listed_benchmark_takes_settings_and_gives_a_report(name: str) -> None:
    module, _, function = BENCHMARKS[name].partition(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function), eval_str=True)
    assert [parameter.annotation for parameter in signature.parameters.values()] == [Settings]
    assert signature.return_annotation is Report


def test_every_module_that_measures_is_listed() -> None:
    measuring = {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "\ndef measure(" in p.read_text()}
    assert measuring == set(BENCHMARKS)


def test_the_interval_of_the_median_is_that_of_the_binomial_distribution() -> None:
    # P(Binomial(10, 1/2) <= 1) = 11 / 1024 = 1.1 %, and <= 2 is 5.5 %: the second smallest and second largest.
    assert median_interval([5, 3, 8, 1, 10, 2, 7, 4, 9, 6]) == (2, 9)
    # P(Binomial(6, 1/2) = 0) = 1 / 64 = 1.6 %: the extremes; with five values, 3.1 %, there is no interval.
    assert median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    assert median_interval([1, 2, 3, 4, 5]) is None
    # P(Binomial(20, 1/2) <= 5) = 2.07 %, and <= 6 is 5.8 %.
    assert median_interval(list(range(1, 21))) == (6, 15)


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    # All 2^8 patterns of "below the median or above" are equally likely; values are made to match.
    missed = 0
    for above in itertools.product((False, True), repeat=8):
        low, high = median_interval([1.0 + i if up else -1.0 - i for i, up in enumerate(above)]) or (0.0, 0.0)
        missed += not low <= 0.0 <= high
    assert missed == 2  # all below, or all above: 0.8 %


def test_the_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_the_medians() -> None:
    comparison = Comparison("x", ("a", "b"), [1, 20, 300], [1, 10, 1000], "s", Goal(1.1))
    said = comparison.to_json()
    assert said["ratio"] == 1.0
    assert said["median"] == [20, 10]
    assert said["pairs"] == 3
    assert said["met"] is True


def test_goals_have_two_directions() -> None:
    assert Goal(1.1).met(1.1) and not Goal(1.1).met(1.11)
    assert Goal(50, at_most=False).met(50) and not Goal(50, at_most=False).met(49)
    assert (str(Goal(1.1)), str(Goal(50, at_most=False))) == ("<= 1.1", ">= 50")


def test_the_line_is_one_json_object_and_met_speaks_for_all_goals() -> None:
    good = Comparison("good", ("a", "b"), [1.0] * 10, [1.0] * 10, "s", Goal(1.0))
    bad = Comparison("bad", ("a", "b"), [2.0] * 10, [1.0] * 10, "s", Goal(1.0))
    shown = Comparison("shown", ("a", "b"), [2.0] * 10, [1.0] * 10, "s", None)
    text = line("mine", Report([good, bad, shown], {"n": 1}), machine(2), 1.26)
    assert "\n" not in text
    said = json.loads(text)
    wanted = {"name", "ratio", "interval_95", "goal", "met", "unit", "median", "sides", "pairs", "counts", "machine"}
    assert wanted <= set(said)
    assert (said["name"], said["comparison"], said["met"], said["seconds"]) == ("mine", "good", False, 1.3)
    assert [(other["name"], other["met"]) for other in said["also"]] == [("bad", False), ("shown", None)]
    assert {"device", "cores", "threads", "commit", "torch", "load_average"} <= set(said["machine"])
    assert json.loads(line("mine", Report([good, shown]), {}, 0.0))["met"] is True


def test_numbers_are_rounded_to_significant_digits() -> None:
    assert (rounded(0.00123456), rounded(123456.0)) == (0.001235, 123500.0)


def test_turns_time_blocks_of_steps_and_leave_the_warm_up_out() -> None:
    calls: list[int] = []
    steps = 0

    def other() -> float:
        calls.append(steps)
        return float(len(calls))

    turns = _Turns([other], blocks=3, steps=4, warm_up=2, deadline=float("inf"))
    while turns() is None:
        steps += 1
    assert calls == [2, 6, 10, 14]  # before the first block, and after each of the three
    assert [row[1] for row in turns.rows] == [2.0, 3.0, 4.0]
    assert steps == 14


def test_turns_end_early_when_time_is_over() -> None:
    turns = _Turns([], blocks=100, steps=1, warm_up=1, deadline=0.0)
    steps = 0
    while turns() is None:
        steps += 1
    assert len(turns.rows) == 1 and steps == 2


def _serve_doubled(connection: object) -> None:
    serve_turns(connection, lambda number: 2.0 * number)  # type: ignore[arg-type]


def _serve_nothing(connection: object) -> None:
    del connection


def test_a_partner_works_in_a_process_of_its_own_and_its_death_is_an_error() -> None:
    with Partner(_serve_doubled) as partner:
        assert [partner.turn(1.0), partner.turn(3.0)] == [2.0, 6.0]
    with Partner(_serve_nothing) as partner, pytest.raises(RuntimeError, match="has died"):
        partner.turn()


def test_the_machine_names_device_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine(2, "NVIDIA H100 80GB HBM3")
    assert facts["device"] == "NVIDIA H100 80GB HBM3" and machine(2)["device"] == facts["processor"]
    assert facts["torch"] == metadata.version("torch")
    assert facts["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", facts["commit"])
    monkeypatch.setattr(report, "PACKAGES", ("no-such-package",))
    monkeypatch.setenv("PATH", "")  # no git
    facts = machine(2)
    assert (facts["no-such-package"], facts["commit"], machine(2, commit="abc")["commit"]) == (None, None, "abc")
