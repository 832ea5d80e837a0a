"""Schedules against vectors of the official DINO and DINOv2 code, to 1e-12."""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden_files import Golden
from trainers import schedules

pytestmark = pytest.mark.golden

WITHIN = 1e-12


def kinds(suffix: str) -> list[str]:
    """The names of all schedules of the file, which may hold others than here."""
    keys = Golden("schedules").keys()
    names = sorted(key.removesuffix(suffix) for key in keys if key.endswith(suffix))
    return [name for name in names if not name.endswith("_names")]


NAMES = kinds("_settings")


def settings(golden: Golden, name: str) -> dict[str, Any]:
    """Arguments of `schedules.cosine` for one schedule of the file."""
    given = dict(zip(golden[f"{name.split('_')[0]}_settings_names"], golden[f"{name}_settings"].tolist(), strict=True))
    if "epochs" in given:  # dino counts in epochs
        length = int(given["niter_per_ep"])
        given |= {"total_iters": given["epochs"] * length, "warmup_iters": given["warmup_epochs"] * length}
    return {
        "base": given["base"],
        "final": given["final"],
        "total": int(given["total_iters"]),
        "warmup": int(given["warmup_iters"]),
        "start": given["start_warmup_value"],
        "freeze": int(given.get("freeze_iters", 0)),
    }


def test_the_file_has_schedules_of_both() -> None:
    assert {name.split("_")[0] for name in NAMES} == {"dino", "dinov2"}


@pytest.mark.parametrize("name", NAMES)
def test_every_step(name: str) -> None:
    golden = Golden("schedules")
    arguments = settings(golden, name)
    expected = golden[name].tolist()
    assert len(expected) == arguments["total"]
    actual = [schedules.cosine(step, **arguments) for step in range(len(expected))]
    assert actual == pytest.approx(expected, rel=WITHIN, abs=WITHIN)


@pytest.mark.parametrize("name", kinds("_beyond_end"))
def test_beyond_the_end(name: str) -> None:
    golden = Golden("schedules")
    arguments = settings(golden, name)
    for after, expected in enumerate(golden[f"{name}_beyond_end"].tolist()):
        for step in (arguments["total"] + after, 10 * arguments["total"] + after):
            assert schedules.cosine(step, **arguments) == pytest.approx(expected, rel=WITHIN, abs=WITHIN)


@pytest.mark.parametrize("name", NAMES)
def test_linear_warm_ups_alone(name: str) -> None:
    """Schedules that are all warm-up are what a teacher's temperature follows."""
    golden = Golden("schedules")
    a = settings(golden, name)
    first, last = a["freeze"], a["freeze"] + a["warmup"]
    actual = [schedules.linear_then_constant(i, a["start"], a["base"], a["warmup"]) for i in range(a["warmup"])]
    assert actual == pytest.approx(golden[name][first:last].tolist(), rel=WITHIN, abs=WITHIN)
    assert schedules.linear_then_constant(a["warmup"], a["start"], a["base"], a["warmup"]) == a["base"]
