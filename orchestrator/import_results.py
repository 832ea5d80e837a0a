"""The command `import`: results of other tools as trials of a sweep, in its ledger, its folders and its plan."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from orchestrator import import_rows, inspect, publish
from orchestrator.import_rows import Result
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, State, TrialRow
from orchestrator.ledger_schema import StoredConfig, StoredTrial
from orchestrator.plan import Plan, canonical
from orchestrator.problems import Problem, SpecError
from orchestrator.sweep import is_metric, sweep_name
from trainers.config import nest
from trainers.explain import did_you_mean, shown
from trainers.files import write_whole

IMPORTED = "imported"  # in a trial's configuration and result


@dataclass(frozen=True)
class Request:
    """What the command line says; `baseline` and `metrics` are KEY=VALUE and COLUMN=METRIC."""

    file: Path
    storage: Path
    state: Path
    sweep: str | None = None
    question: str | None = None
    baseline: Sequence[str] = ()
    primary: Sequence[str] = ()
    metrics: Sequence[str] = ()
    ignored: Sequence[str] = ()
    replace: bool = False


def import_results(asked: Request) -> None:
    """Take the results in a file into a sweep, which is made where there is none, and print its table.

    Raises:
        SpecError: rows are wrong, or contradict what the sweep has.
        SweepHeld: the sweep is running.
        ValueError: the file cannot be read, or an option is wrong.
    """
    results = import_rows.read(asked.file, _pairs(asked.metrics, "--metric", "COLUMN=METRIC"), asked.ignored)
    name = _name(asked)
    layout = SweepLayout(asked.storage.resolve(), asked.state.resolve(), name)
    known = _read_plan(layout.plan)
    axes = _axes(asked, results, known)
    _check_primary(asked, results, layout)
    plan = _new_plan(asked, name, axes, results, known, has_file=layout.sweep_file.is_file())
    layout.root.mkdir(parents=True, exist_ok=True)
    with Ledger.open(layout.ledger) as ledger:
        ledger.release_running()  # of an import that was cut off; nobody else has the sweep now
        changes = _changes(asked, results, axes, ledger, known)
        ledger.add([trial for trial, _ in changes])
        for trial, result in changes:
            _take(ledger, layout, trial, result, asked.file)
        rows = ledger.rows()
        for trial_id in publish.missing(ledger, layout.trial):
            publish.trial(ledger, layout.trial(trial_id), trial_id)
        entries = {entry["trial_id"]: entry for entry in (known or {"trials": []})["trials"]}
        entries |= {
            row.trial_id: {**entries.get(row.trial_id, {}), **_entry(row)} for row in rows if row.role == "cell"
        }
        write_whole(layout.plan, (json.dumps({**plan, "trials": list(entries.values())}, indent=1) + "\n").encode())
    print(f"{name}: {len(changes)} trials imported, {len(results) - len(changes)} as before")
    inspect.report([name], asked.storage)


def keep(ledger: Ledger, plan: Plan) -> None:
    """Put imported trials back into the plan of a sweep, which a run of its file has just made anew.

    Those that no longer fit stay out: of other axes, or in the place of a trial of the plan.
    """
    taken = {_place(trial.cell, trial.seed) for trial in plan.trials}
    fitting = [
        row
        for row in ledger.rows(in_plan_only=False)
        if is_imported(row) and row.cell.keys() == plan.sweep.axes.keys() and _place(row.cell, row.seed) not in taken
    ]
    ledger.add([StoredTrial(row.trial_id, row.name, row.cell, row.seed, StoredConfig(row.config)) for row in fitting])


def is_imported(row: TrialRow) -> bool:
    """Whether the results of a trial come from another tool, so that nothing can be run."""
    return row.config.get(IMPORTED) is True


def _entry(row: TrialRow) -> dict[str, Any]:
    return {"trial_id": row.trial_id, "name": row.name, "cell": row.cell, "seed": row.seed}


def _name(asked: Request) -> str:
    try:
        return sweep_name(asked.sweep or re.sub(r"[^A-Za-z0-9_.-]+", "_", asked.file.stem).strip("._-"))
    except ValueError as error:
        raise ValueError(f"--sweep {error}") from error


def _pairs(options: Sequence[str], option: str, form: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"{option} {text}: write {form}")
        pairs[key] = value
    return pairs


def _read_plan(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        plan = json.loads(path.read_text())
        return dict(plan, axes=dict(plan["axes"]), trials=list(plan["trials"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable plan: {error}") from error


def _axes(asked: Request, results: Sequence[Result], known: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """The values of every axis, those of the sweep first. Raises ValueError where the sweep has other axes."""
    given = list(results[0].cell)
    if known is not None and set(given) != set(known["axes"]):
        lacking = [name for name in known["axes"] if name not in given]
        more = [name for name in given if name not in known["axes"]]
        said = [f"it lacks {', '.join(lacking)}"] if lacking else []
        said += [f"it has {', '.join(more)} as well, which --ignore leaves out"] if more else []
        raise ValueError(f"{asked.file}: the axes of the sweep are {', '.join(known['axes'])}; {' and '.join(said)}")
    axes: dict[str, list[Any]] = {name: list((known or {"axes": {}})["axes"].get(name, [])) for name in given}
    axes = {name: axes[name] for name in (known["axes"] if known is not None else given)}
    for result in results:
        for name, value in result.cell.items():
            if value is not None and canonical(value) not in map(canonical, axes[name]):
                axes[name].append(value)
    return axes


def _new_plan(
    asked: Request,
    name: str,
    axes: Mapping[str, Any],
    results: Sequence[Result],
    known: Mapping[str, Any] | None,
    *,
    has_file: bool,
) -> dict[str, Any]:
    """The content of plan.json but for its trials. Raises ValueError where an option is wrong."""
    if has_file and (asked.baseline or asked.primary or asked.question):
        raise ValueError(f"{name} is the sweep of a file, which says its question, baseline and primary metrics")
    before = known or {"sweep": name, "question": "", "seeds": [], "baseline": None, "primary": [], "scheduler": None}
    seeds = list(dict.fromkeys([*before.get("seeds", []), *(result.seed for result in results)]))
    return {
        **before,
        "question": asked.question or before["question"],
        "axes": dict(axes),
        "seeds": seeds,
        "baseline": _baseline(asked.baseline, axes) or before["baseline"],
        "primary": list(asked.primary) or before["primary"],
    }


def _check_primary(asked: Request, results: Sequence[Result], layout: SweepLayout) -> None:
    """Primary metrics have values in the file, or in the sweep that it extends. Raises ValueError."""
    known = list(dict.fromkeys(metric for result in results for _, metric in result.points))
    for metric in asked.primary:
        if not is_metric(metric):
            raise ValueError(f"--primary {metric}: it is no name of a metric, such as test/top1")
        if metric not in known and not _is_reported(metric, layout):
            guess = did_you_mean(metric, known) or f"; it has {', '.join(known)}"
            raise ValueError(f"--primary {metric}: {asked.file} has no values of {metric}{guess}")


def _is_reported(metric: str, layout: SweepLayout) -> bool:
    """Whether a trial of a sweep that may not be there yet has the metric."""
    if not layout.ledger.is_file():
        return False
    with Ledger.open(layout.ledger, writer=False) as ledger:
        return bool(ledger.reported(metric))


def _baseline(given: Sequence[str], axes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The baseline of the command line as values of axes. Raises ValueError."""
    baseline: dict[str, Any] = {}
    for key, text in _pairs(given, "--baseline", "AXIS=VALUE").items():
        axis = key if key in axes else f"program.{key}"
        if axis not in axes:
            raise ValueError(f"--baseline {key}: the axes are {', '.join(axes)}{did_you_mean(key, axes)}")
        matches = [value for value in axes[axis] if text == (value if isinstance(value, str) else json.dumps(value))]
        if not matches:
            raise ValueError(f"--baseline {key}={text}: {axis} has the values {shown(list(axes[axis]))}")
        baseline[axis] = matches[0]
    return baseline


def _changes(
    asked: Request,
    results: Sequence[Result],
    axes: Mapping[str, Any],
    ledger: Ledger,
    known: Mapping[str, Any] | None,
) -> list[tuple[StoredTrial, Result]]:
    """The trials that the file adds or, with --replace, changes, with all values that they then have.

    Raises:
        SpecError: values of known trials differ, or rows stand for trials that the sweep runs itself.
    """
    rows = {row.trial_id: row for row in ledger.rows(in_plan_only=False)}
    planned = [entry["trial_id"] for entry in known["trials"]] if known is not None else []
    own = {_place(r.cell, r.seed): r.name for key in planned if (r := rows.get(key)) is not None and not is_imported(r)}
    changes: list[tuple[StoredTrial, Result]] = []
    problems: list[Problem] = []
    for result in results:
        trial = _trial(result, axes)
        if (name := own.get(_place(trial.cell, trial.seed))) is not None:
            message = (
                f"the sweep runs {name} in that cell with that seed itself; give another seed, or leave the row out"
            )
            problems.append(Problem(str(asked.file), result.line, message))
            continue
        row = rows.get(trial.trial_id)
        if row is None or row.state == "planned":
            changes.append((trial, result))
            continue
        before = {(step, metric): value for step, metric, value in ledger.metrics(trial.trial_id)}
        if not asked.replace:
            problems += [Problem(str(asked.file), result.line, text) for text in _contradictions(result, row, before)]
        merged = {**before, **result.points}
        if result.status != row.state or not row.in_plan or _texts(merged) != _texts(before):
            changes.append(
                (trial, Result(result.line, result.cell, result.seed, result.status, merged, result.has_steps))
            )
    if problems:
        raise SpecError(problems[:50])
    return changes


def _contradictions(result: Result, row: TrialRow, before: Mapping[tuple[int, str], float]) -> list[str]:
    """Where a file says otherwise than the sweep, whose values --replace gives up."""
    said = [] if result.status == row.state else [f"status is {result.status}; the sweep has {row.state}"]
    for (step, metric), value in result.points.items():
        if (step, metric) in before and repr(before[step, metric]) != repr(value):
            said.append(f"{metric} is {value} at step {step}; the sweep has {before[step, metric]}")
    return [f"{text}; --replace takes the new ones" for text in said]


def _trial(result: Result, axes: Mapping[str, Any]) -> StoredTrial:
    """The trial of a result. Its id is a hash of all that is known of it, and that it is imported."""
    cell = {name: result.cell[name] for name in axes}
    settings = {IMPORTED: True, "seed": result.seed, **cell}
    own = {name.removeprefix("program."): value for name, value in cell.items() if name.startswith("program.")}
    others = {name: value for name, value in cell.items() if not name.startswith("program.")}
    config = {IMPORTED: True, "seed": result.seed, **nest(others), "program": own, "execution": {}}
    words = [f"{name.removeprefix('program.')}={shown(value)}" for name, value in cell.items() if value is not None]
    trial_id = hashlib.sha256(canonical(settings).encode()).hexdigest()[:16]
    name = " ".join([IMPORTED, *words, f"seed{result.seed}"])
    return StoredTrial(trial_id, name, cell, result.seed, StoredConfig(config))


def _take(ledger: Ledger, layout: SweepLayout, trial: StoredTrial, result: Result, file: Path) -> None:
    """Record a result as an attempt of its own that has ended, and publish it."""
    if ledger.row(trial.trial_id).state != "planned":
        ledger.reset(trial.trial_id)
    folder = layout.trial(trial.trial_id)
    number = folder.begin_attempt(ledger.row(trial.trial_id).attempts)
    ledger.start_attempt(trial.trial_id, number, os.uname().nodename, os.getpid())
    by_step: dict[int, dict[str, float]] = {}
    for (step, metric), value in sorted(result.points.items()):
        by_step.setdefault(step, {})[metric] = value
    ledger.record_many(trial.trial_id, number, list(by_step.items()))
    message = f"the imported table says that the trial {result.status}"
    error = (
        {"type": "Imported", "message": message, "traceback": ""} if result.status in ("failed", "diverged") else None
    )
    found = {
        "trial_id": trial.trial_id,
        "status": result.status,
        "attempts": 1,
        "steps": max(by_step) if result.has_steps and by_step else None,
        "error": error,
        IMPORTED: {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
    }
    ledger.finish(trial.trial_id, number, cast(State, result.status), found, error)
    publish.trial(ledger, folder, trial.trial_id)


def _place(cell: Mapping[str, Any], seed: int) -> str:
    return canonical([dict(cell), seed])


def _texts(points: Mapping[tuple[int, str], float]) -> dict[tuple[int, str], str]:
    """Values by which NaN equals NaN."""
    return {place: repr(value) for place, value in points.items()}
