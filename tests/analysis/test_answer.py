"""The answer to a sweep's question: what it claims, what it does not, and how it names cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from analysis.answer import Answer, answer, supported
from analysis.collect import PlannedTrial, SweepPlan, collect
from analysis.results import evaluate
from analysis.schemas import LOST
from tests.analysis.fabricated import OUTLIERS, REGISTERS, TOP1, publish, registers_sweep

BASELINE = {REGISTERS: 0}


def plan_of(counts: tuple[int, ...], primary: tuple[str, ...] = (TOP1,), **others: Any) -> SweepPlan:
    trials = tuple(PlannedTrial(f"t{count}", f"t{count}", {REGISTERS: count}, 0) for count in counts)
    return SweepPlan("s", "?", {REGISTERS: counts}, BASELINE, primary, trials, **others)


def row_of(count: int, delta: float | None, low: float | None, high: float | None, **others: Any) -> dict[str, Any]:
    row = {REGISTERS: count, "metric": TOP1, "primary": True, "n": 3, "n_paired": 3, "mean": 0.5}
    row |= {f"n_{status}": 0 for status in LOST}
    row |= {"delta": delta, "delta_low": low, "delta_high": high, "p_value": 0.01, "p_adjusted": 0.02, "flags": []}
    return row | others


BASE = row_of(0, None, None, None, n_paired=0, flags=["baseline"], p_value=None, p_adjusted=None, mean=0.4)


def said_of(*rows: Mapping[str, Any], **tables: Any) -> Answer:
    counts = tuple(row[REGISTERS] for row in rows)
    return answer(plan_of(counts), rows, [REGISTERS], **tables)


def test_a_claim_gives_size_interval_and_cells() -> None:
    said = said_of(BASE, row_of(1, 0.1, 0.05, 0.15), row_of(4, 0.2, 0.1, 0.3), row_of(8, -0.1, -0.2, -0.05))
    assert said.verdict == (
        "Top-1 (linear probe, test) is lower with 8 registers, by 10.00 points (95 % interval [−20.00, −5.00]), and "
        "higher with 1 and 4 registers, by 10.00 to 20.00 points (95 % intervals within [+5.00, +30.00]), "
        "than with 0 registers."
    )
    assert said.details == ("Top-1 (linear probe, test): 40.00 % with 0 registers, 50.00 % elsewhere.",)


def test_what_is_not_claimed_says_how_uncertain_it_is() -> None:
    said = said_of(BASE, row_of(1, 0.1, -0.05, 0.25, p_adjusted=0.2), row_of(2, 0.1, 0.01, 0.3, p_adjusted=0.06))
    assert said.verdict == (
        "Cannot tell: with 3 seeds each, no difference to 0 registers could be shown in top-1 (linear probe, test; "
        "95 % intervals span [−5.00, +30.00] points)."
    )
    wide = said_of(BASE, row_of(1, 0.1, -1.5, 1.7, p_adjusted=0.2))
    assert "(linear probe, test; 95 % intervals are wider than the whole scale from 0 to 100 %)" in wide.verdict
    both = said_of(BASE, row_of(1, 0.1, 0.05, 0.15), row_of(2, 0.1, -0.1, 0.3, p_adjusted=0.5))
    assert both.details == (
        "Top-1 (linear probe, test): 40.00 % with 0 registers, 50.00 % elsewhere; the others cannot be told apart "
        "from 0 registers (its 95 % interval is [−10.00, +30.00] points).",
    )


def test_an_interval_over_images_of_one_seed_is_no_missing_interval() -> None:
    said = said_of(BASE, row_of(1, 0.1, -0.05, 0.25, n_paired=1, p_adjusted=0.2))
    assert said.verdict.startswith("Cannot tell: with 1 seed each, no difference")
    none = said_of(BASE, row_of(1, 0.1, None, None, n_paired=1, p_value=None, p_adjusted=None))
    assert none.verdict == (
        "Cannot tell: one seed gives no interval, so no difference to 0 registers could be shown in top-1 (linear "
        "probe, test)."
    )


def test_equal_pairs_and_unfinished_trials() -> None:
    said = said_of(BASE, row_of(1, 0.0, 0.0, 0.0, p_value=None, p_adjusted=None, n=2, n_missing=1))
    assert said.verdict == "No difference in top-1 (linear probe, test) was seen: equal in every pair."
    assert said.details[-1] == "Only 5 of 6 planned trials have a score so far."
    # A mean difference of 0 may be one of pairs that differ, where the first seeds were equal.
    unequal = said_of(BASE, row_of(1, 0.0, None, None, p_value=None, p_adjusted=None))
    assert "equal" not in unequal.verdict
    single = said_of(BASE, row_of(1, 0.0, None, None, n_paired=1, p_value=None, p_adjusted=None))
    assert single.verdict.endswith("equal in every pair.")


TREND = {REGISTERS: None, "axis": REGISTERS, "metric": TOP1, "primary": True, "direction": "falls"}


def test_trends_are_claimed_by_their_corrected_p() -> None:
    rows = (BASE, row_of(1, 0.1, 0.05, 0.15))
    found = [
        (
            0.0004,
            "Top-1 (linear probe, test) falls with the number of registers (Page's trend test, corrected p < 0.001).",
        ),
        (0.051, "No trend of top-1 (linear probe, test) with the number of registers could be shown (Page's trend "
         "test, corrected p = 0.051)."),
    ]  # fmt: skip
    for p, words in found:
        assert said_of(*rows, trends=[TREND | {"page_p": 0.0001, "page_p_adjusted": p}]).details[-1] == words
    exploratory = TREND | {"primary": False, "page_p": 0.0, "page_p_adjusted": 0.0}
    assert not any("trend" in said for said in said_of(*rows, trends=[exploratory]).details)


def eliminated(count: int, smallest: bool, **others: Any) -> dict[str, Any]:
    row = {REGISTERS: count, "metric": OUTLIERS, "upper": 0.0031, "limit": 0.005, "smallest": smallest, "flags": []}
    return row | others


def test_the_smallest_number_without_outliers() -> None:
    rows = (BASE, row_of(4, 0.1, -0.05, 0.25, p_adjusted=0.2))
    some = said_of(*rows, elimination=[eliminated(0, False), eliminated(4, True)])
    assert some.verdict.endswith(" From 4 registers on, fewer than 0.5 % of patches are outliers.")
    assert some.details[-1] == (
        "Outlier fraction (last layer) is below 0.5 % with 95 % confidence from 4 registers on (upper bound 0.31 %)."
    )
    nothing = said_of(*rows, elimination=[eliminated(0, True, flags=["no_variance"]), eliminated(4, False)])
    assert nothing.verdict.endswith(" Already with 0 registers, fewer than 0.5 % of patches are outliers.")
    of_images = "(upper bound 0.31 %; with 0 registers of further images alone, as seeds give no bound)."
    assert nothing.details[-1].endswith(of_images)
    single = said_of(*rows, elimination=[eliminated(0, True, flags=["one_seed"]), eliminated(4, False)])
    assert single.details[-1].endswith(of_images)
    tracked = said_of(*rows, elimination=[eliminated(0, True, flags=["no_images"]), eliminated(4, False)])
    assert tracked.details[-1].endswith("; with 0 registers of further seeds alone, as single images are not known).")
    more = said_of(*rows, elimination=[eliminated(0, True), eliminated(4, False, upper=0.004, flags=["no_variance"])])
    assert more.details[-1].endswith(
        "(upper bound 0.4 %; with 4 registers of further images alone, as seeds give no bound)."
    )
    unknown = said_of(*rows, elimination=[eliminated(0, False), eliminated(4, False)])
    assert "patches" not in unknown.verdict
    assert unknown.details[-1] == (
        "It cannot be told from which number of registers on outlier fraction (last layer) is below 0.5 %."
    )


@pytest.mark.parametrize(
    ("primary", "p_adjusted", "low", "high", "claimed"),
    [
        (True, 0.04, 0.1, 0.3, True),
        (True, 0.04, -0.3, -0.1, True),
        (True, 0.06, 0.1, 0.3, False),
        (True, 0.04, -0.1, 0.3, False),
        (True, None, 0.1, 0.1, False),
        (False, 0.01, 0.1, 0.3, False),
    ],
)
def test_a_claim_needs_a_primary_metric_the_corrected_p_and_the_interval(
    primary: bool, p_adjusted: float | None, low: float, high: float, claimed: bool
) -> None:
    row = {"primary": primary, "p_adjusted": p_adjusted, "p_value": 0.01, "delta_low": low, "delta_high": high}
    assert supported(row) == claimed


def test_sweeps_that_cannot_tell(tmp_path: Path) -> None:
    plans: dict[str, dict[str, Any]] = {
        "no_baseline": {"baseline": None},
        "no_primary": {"primary": [], "baseline": BASELINE},
    }
    said = {
        name: evaluate(collect(publish(tmp_path / name, registers_sweep(), **plan))).answer
        for name, plan in plans.items()
    }
    assert all(sentence.startswith("Cannot tell: the sweep declares no ") for sentence in said.values()), said
    assert "no baseline" in said["no_baseline"]
    assert "no primary metric" in said["no_primary"]


def test_a_made_up_sweep_from_its_files(tmp_path: Path) -> None:
    said = evaluate(collect(publish(tmp_path / "s", registers_sweep(), baseline=BASELINE))).said
    assert said.verdict.startswith(
        "Outlier fraction (last layer) is lower with 1, 2 and 4 registers, by 1.07 to 3.07 points (95 % intervals"
    )
    assert "No difference could be shown in top-1 (linear probe, test; 95 % intervals span [−" in said.verdict
    assert any(s.startswith("Outlier fraction (last layer) falls with the number of registers") for s in said.details)
