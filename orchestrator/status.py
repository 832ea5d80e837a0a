"""The command status: who runs a sweep, how far its trials are, what they have spent, why some failed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import inspect, ledger_attempts
from orchestrator.layout import SweepLayout, TrialLayout
from orchestrator.ledger import Ledger, LedgerError, TrialRow
from orchestrator.ledger_attempts import AttemptRow
from orchestrator.progress import seconds_left
from orchestrator.recorder import Live
from orchestrator.who_runs import Holder, holder_of

REFRESH_SECONDS = 2.0
_LOG_LINES = 20
_CLEAR = "\x1b[H\x1b[2J"  # of a terminal: to the upper left corner, and everything away


@dataclass(frozen=True)
class Asked:
    """What the command line says; without a sweep, all of them are shown in a line each."""

    sweep: str | None
    storage: Path
    state: Path
    failures: bool = False
    as_json: bool = False
    watch: bool = False


def status(asked: Asked, sleep: Callable[[float], None] = time.sleep) -> None:
    """Print what is asked for, once or again every two seconds until Ctrl-C.

    Raises:
        ValueError: there is no such sweep, or its ledger is missing or damaged.
    """
    if not asked.watch:
        print(_text(asked))
        return
    try:
        while True:
            text = _text(asked)
            print(_CLEAR + text if sys.stdout.isatty() else text + "\n", flush=True)
            sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        return


def _text(asked: Asked) -> str:
    now = time.time_ns() // 1_000_000
    if asked.sweep is None:
        every = [_overview(layout, now) for layout in inspect.sweeps(asked.storage, asked.state)]
        if asked.as_json:
            return json.dumps(every, indent=1)
        return "\n".join(_overview_line(one) for one in every) or f"no sweeps under {asked.state}"
    layout = inspect.sweep_layout(asked.sweep, asked.storage, asked.state)
    if not layout.ledger.is_file():
        raise ValueError(f"{layout.ledger} is missing; orchestrate doctor {layout.name} --fix rebuilds it")
    described = describe(layout, now, failures=asked.failures)
    return json.dumps(described, indent=1) if asked.as_json else "\n".join(_lines(described))


def _overview(layout: SweepLayout, now: int) -> dict[str, Any]:
    """One sweep without its trials; a ledger that cannot be read is an `error`."""
    try:
        described = describe(layout, now)
    except LedgerError as error:
        return {"sweep": layout.name, "error": str(error)}
    return {name: value for name, value in described.items() if name != "trials"}


def describe(layout: SweepLayout, now: int, *, failures: bool = False) -> dict[str, Any]:
    """A sweep and its trials as JSON has them; `now` is in milliseconds since 1970, what is not known is null.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    with Ledger.open(layout.ledger, writer=False) as ledger:
        rows, counts = ledger.rows(), ledger.counts()
    holder = holder_of(layout.lock)
    running = ledger_attempts.running(layout.ledger) if holder is not None and holder.alive else {}
    trials = [_trial(row, running.get(row.trial_id), now) for row in rows]
    if failures:
        for row, trial in zip(rows, trials, strict=True):
            trial |= _failure(row, layout.trial(row.trial_id))
    speeds = [trial["images_per_second"] for trial in trials if trial["images_per_second"] is not None]
    return {
        "sweep": layout.name,
        "run_by": _run_by(holder),
        "counts": {state: count for state, count in counts.items() if count},
        "spent_seconds": round(ledger_attempts.spent_seconds(layout.ledger, now), 1),
        "images_per_second": sum(speeds) if speeds else None,
        "seconds_left": _seconds_left(rows, running, counts["planned"], sum(speeds)),
        "trials": trials,
    }


def _run_by(holder: Holder | None) -> dict[str, Any] | None:
    if holder is None or not holder.alive:
        return None
    return {"pid": holder.pid, "host": holder.host, "since": holder.started}


def _seconds_left(rows: list[TrialRow], running: Mapping[str, AttemptRow], planned: int, speed: float) -> float | None:
    live = [
        Live(row.name, _setting(row, "steps"), _setting(row, "batch_size"), step=row.last_step or 0)
        for row in rows
        if row.trial_id in running
    ]
    return seconds_left(live, planned, speed)


def _trial(row: TrialRow, attempt: AttemptRow | None, now: int) -> dict[str, Any]:
    steps, batch_size = _setting(row, "steps"), _setting(row, "batch_size")
    speed = None if attempt is None else attempt.steps_per_second
    left = None if speed is None or steps is None else (steps - (row.last_step or 0)) / speed
    heard = None if attempt is None else attempt.last_ms or attempt.started_ms
    return {
        "trial_id": row.trial_id,
        "name": row.name,
        "state": row.state,
        "attempts": row.attempts,
        "step": row.last_step,
        "steps": steps,
        "images_per_second": None if speed is None or batch_size is None else speed * batch_size,
        "seconds_since_report": None if heard is None else max(0.0, (now - heard) / 1000),
        "seconds_left": left,
        "error": None if row.error is None else str(row.error.get("message") or row.error.get("type")),
    }


def _setting(row: TrialRow, name: str) -> int | None:
    value: int | None = row.config.get("optim", {}).get(name)  # of programs and imported trials only what was given
    return value


def _failure(row: TrialRow, trial: TrialLayout) -> dict[str, Any]:
    """Traceback and end of the log of a trial that has an error."""
    if row.error is None:
        return {}
    log = trial.log(row.attempts)
    log = log if log.is_file() else trial.log_file
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if log.is_file() else None
    return {"traceback": row.error.get("traceback") or row.error.get("message"), "log": lines}


def _overview_line(one: Mapping[str, Any]) -> str:
    if "error" in one:
        return f"{one['sweep']}: {one['error']}"
    counts = ", ".join(f"{count} {state}" for state, count in one["counts"].items()) or "no trials"
    return ", ".join([f"{one['sweep']}: {counts}", f"{clock(one['spent_seconds'])} spent", *_pace(one)])


def _pace(one: Mapping[str, Any]) -> Iterator[str]:
    """Speed and time left of a sweep that runs, and who runs it."""
    if one["images_per_second"] is not None:
        yield f"{one['images_per_second']:,.0f} images/s"
    if one["seconds_left"] is not None:
        yield f"about {clock(one['seconds_left'])} left"
    if one["run_by"] is not None:
        yield "run by process {pid} on {host}, since {since}".format(**one["run_by"])
    elif "running" in one["counts"]:
        yield "run by nobody: its driver is gone, and the same command goes on"


def _lines(described: Mapping[str, Any]) -> Iterator[str]:
    yield _overview_line(described)
    for trial in described["trials"]:
        yield _trial_line(trial)
        if trial.get("traceback"):
            yield str(trial["traceback"]).rstrip()
        if trial.get("log"):
            yield f"--- end of the log, {len(trial['log'])} lines"
            yield from trial["log"]


def _trial_line(trial: Mapping[str, Any]) -> str:
    of_steps = "" if trial["steps"] is None else f"/{trial['steps']}"
    step = "" if trial["step"] is None else f" step {trial['step']}{of_steps}"
    live = []
    if trial["images_per_second"] is not None:
        live.append(f"{trial['images_per_second']:,.0f} images/s")
    if trial["seconds_since_report"] is not None:
        live.append(f"last report {trial['seconds_since_report']:.0f} s ago")
    if trial["seconds_left"] is not None:
        live.append(f"about {clock(trial['seconds_left'])} left")
    shown = f" ({', '.join(live)})" if live else ""
    error = "" if not trial["error"] else f" — {trial['error'].splitlines()[0][:100]}"
    return f"{trial['trial_id']} {trial['state']:9} attempts {trial['attempts']}{step}{shown}  {trial['name']}{error}"


def clock(seconds: float) -> str:
    """A duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
