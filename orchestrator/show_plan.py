"""The command `plan`: what a sweep file would run, what exists of it already, what it will cost and can show."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator import estimate, measured, plan_changes, plan_needs, smallest_difference, spec, starting_points
from orchestrator import plan as plans
from orchestrator.budget import Budget, Spent
from orchestrator.layout import SweepLayout
from orchestrator.ledger import Ledger, LedgerError, TrialRow
from orchestrator.ledger_schema import STATES
from orchestrator.plan import Plan, PlannedTrial, plain_cell
from orchestrator.search_plan import Progress, expected, progress
from orchestrator.seed_noise import Noise, kind, noise
from orchestrator.sweep import Sweep

_MOST_LEDGERS = 50  # of other sweeps that are looked into for speeds and noise, the newest first
_ORIGINS = {
    "new": "new",
    "adopted": "finished in another sweep, adopted",
    "unfinished": "not finished",
    "reused": "over, with a result",
    "again": "failed, run again",
}


@dataclass(frozen=True)
class Asked:
    """What the command line of `plan` says."""

    file: Path
    storage: Path
    state: Path
    overrides: Sequence[str] = ()
    name: str | None = None
    as_json: bool = False
    difference: bool = False
    measure: bool = False
    max_concurrent: int | None = None
    gpu_memory: float | None = None  # GB of one GPU


@dataclass(frozen=True)
class _Facts:
    """All that is known of a plan before anything runs."""

    plan: Plan
    known: Progress
    states: dict[str, str]
    origins: dict[str, str]  # of every trial that is named, a key of _ORIGINS
    removed: int
    whole: estimate.Cost
    to_run: estimate.Cost
    at_a_time: int
    wall_seconds: float
    bases: dict[str, int]  # where prices come from, and of how many trials
    disk: plan_needs.Disk
    memory: list[plan_needs.Memory]
    budget: str | None  # what is used of it, and what that leaves undone
    noise: list[Noise]
    changed: list[str]
    replaced: dict[str, str]
    notes: list[str]


def plan(asked: Asked) -> None:
    """Print the trials of a sweep file, which of them exist, what the others take, and what they can show.

    Raises:
        SpecError: the sweep file is wrong.
        ValueError: dry steps failed, or a file of the state folder is not ours.
    """
    sweep = spec.read_sweep(asked.file, asked.overrides, asked.name, asked.state)
    planned = plans.build_plan(sweep)
    if asked.measure:
        _measure(planned, asked)
    facts = _facts(planned, SweepLayout(asked.storage.resolve(), asked.state.resolve(), sweep.name), asked)
    if asked.as_json:
        print(json.dumps(_json(facts, asked), indent=1))
    else:
        print("\n".join(_lines(facts, asked)))


def _measure(planned: Plan, asked: Asked) -> None:
    import sys

    from orchestrator import dry_steps

    wanted = dry_steps.shapes(expected(planned))
    for number, trial in enumerate(wanted, 1):
        print(f"dry steps {number} of {len(wanted)}: {trial.name}", file=sys.stderr, flush=True)
        measured.keep(asked.state, [dry_steps.measure(trial, asked.state.resolve())])


def _facts(planned: Plan, layout: SweepLayout, asked: Asked) -> _Facts:
    rows, known = _so_far(planned, layout)
    states = {row.trial_id: str(row.state) for row in rows}
    origins = _origins(known, states, layout)
    others = _other_ledgers(layout)
    own = [(layout.name, layout.ledger)] if layout.ledger.is_file() else []
    samples, unread = measured.samples_of_ledgers([*own, *others])
    samples += measured.read(layout.state)
    trials, notes = plan_needs.settle([*known.named, *known.to_come], samples)
    named, to_come = trials[: len(known.named)], trials[len(known.named) :]
    waiting = [trial for trial in named if origins[trial.trial_id] not in ("adopted", "reused")] + to_come
    prices = [measured.price(trial, samples) for trial in waiting]
    priced = [price for price in prices if price is not None]
    at_a_time = asked.max_concurrent or plan_needs.at_a_time(waiting)
    disk = plan_needs.disk(waiting, layout, rows)
    before, unreadable = _as_run(layout) if asked.difference else (None, [])
    notes += [*planned.notes, *plan_needs.of_baseline(planned), *plan_needs.of_seeds(planned)]
    notes += starting_points.absent(planned.trials, layout.storage)
    notes += [*disk.warnings(), *unread, *unreadable]
    cells = [plain_cell(cell) for cell in planned.cells]
    return _Facts(
        plan=planned,
        known=known,
        states=states,
        origins=origins,
        removed=sum(row.trial_id not in origins and not _grown(planned.sweep, row, cells) for row in rows),
        whole=estimate.estimate(trials, [measured.price(trial, samples) for trial in trials]),
        to_run=estimate.estimate(waiting, prices),
        at_a_time=at_a_time,
        wall_seconds=estimate.wall_seconds(priced, at_a_time),
        bases=dict(Counter(price.basis for price in priced).most_common()),
        disk=disk,
        memory=plan_needs.memory(trials, samples, asked.gpu_memory),
        budget=_budget(planned.sweep, layout, waiting),
        noise=_noise(planned.sweep, trials, [*own, *others]),
        changed=[] if before is None else plan_changes.changes(before, planned.sweep),
        replaced=plan_changes.replaced(planned, rows) if asked.difference else {},
        notes=notes,
    )


def _so_far(planned: Plan, layout: SweepLayout) -> tuple[list[TrialRow], Progress]:
    """What the ledger has of the sweep, and which of its trials are named by now."""
    if not layout.ledger.is_file():
        return [], progress(planned, None)
    with Ledger.open(layout.ledger, writer=False) as ledger:
        return ledger.rows(), progress(planned, ledger)


def _budget(sweep: Sweep, layout: SweepLayout, waiting: Sequence[PlannedTrial]) -> str | None:
    """What earlier runs have spent of the budget; looking at it takes no time of it."""
    if not layout.ledger.is_file():
        return plan_needs.of_budget(sweep.budget, Spent(0.0, 0.0, 0), (), waiting)
    with Ledger.open(layout.ledger, writer=False) as ledger:
        return plan_needs.of_budget(
            sweep.budget, Budget(sweep.budget, ledger, lambda: 0.0).spent(), ledger.begun(), waiting
        )


def _other_ledgers(layout: SweepLayout) -> list[tuple[str, Path]]:
    """Of all other sweeps under this state, the newest first."""
    if not layout.state.is_dir():
        return []
    places = (SweepLayout(layout.storage, layout.state, folder.name) for folder in layout.state.iterdir())
    found = [place for place in places if place.ledger.is_file() and place.name != layout.name]
    found.sort(key=lambda place: (-place.ledger.stat().st_mtime, place.name))
    return [(place.name, place.ledger) for place in found[:_MOST_LEDGERS]]


def _origins(known: Progress, states: dict[str, str], layout: SweepLayout) -> dict[str, str]:
    """Where the result of each named trial comes from, or will. A failed suggestion is one that its search counts."""
    unknown = {trial.trial_id for trial in known.named if states.get(trial.trial_id, "planned") == "planned"}
    adopted = plan_needs.published(unknown, layout)
    origins = {}
    for trial in known.named:
        state = states.get(trial.trial_id)
        if trial.trial_id in adopted:
            origin = "adopted"
        elif state is None:
            origin = "new"
        elif state in ("planned", "running"):
            origin = "unfinished"
        else:
            again = state == "failed" and (trial.role == "cell" or trial.trial_id in known.again)
            origin = "again" if again else "reused"
        origins[trial.trial_id] = origin
    return origins


def _grown(sweep: Sweep, row: TrialRow, cells: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a trial that the file does not list follows from results, by a search or more seeds in `cells`."""
    more = sweep.more_seeds
    by_seeds = more is not None and more.first <= row.seed < more.most
    return (by_seeds or sweep.search is not None) and row.cell in cells


def _noise(sweep: Sweep, trials: Sequence[PlannedTrial], ledgers: Sequence[tuple[str, Path]]) -> list[Noise]:
    """Of each primary metric, from this sweep's trials, else from the newest sweep with trials of the same kind."""
    wanted = list(sweep.primary)
    if sweep.more_seeds is not None and sweep.more_seeds.until.metric not in wanted:
        wanted.append(sweep.more_seeds.until.metric)
    baseline = sweep.model_dump(mode="json")["baseline"]
    configs = {(c.method, c.model.size, c.data.train): c for c in (trial.config for trial in trials)}
    like = [kind(config.model_dump(mode="json")) for config in configs.values()]
    found: dict[str, Noise] = {}
    for sweep_name, path in ledgers:
        missing = [metric for metric in wanted if metric not in found]
        if not missing:
            break
        own = sweep_name == sweep.name
        try:
            with Ledger.open(path, writer=False) as ledger:
                new = noise(ledger, missing, baseline if own else None, () if own else like)
        except LedgerError:
            continue  # which the notes say already, where its speeds are left out
        found |= {one.metric: one for one in new}
    return [found[metric] for metric in wanted if metric in found]


def _as_run(layout: SweepLayout) -> tuple[Sweep | None, list[str]]:
    """The sweep as it was last run, and why it cannot be read where it cannot."""
    if not layout.sweep_file.is_file():
        return None, ["the sweep has not been run, so nothing has changed since"]
    try:
        return spec.read_sweep(layout.sweep_file), []
    except spec.SpecError as error:
        return None, [f"what was run last cannot be compared: {str(error).splitlines()[0]}"]


def _lines(facts: _Facts, asked: Asked) -> list[str]:
    sweep, planned = facts.plan.sweep, facts.plan
    lines = [f"{sweep.name}: {sweep.question}"]
    searching = "" if sweep.search is None else ", those of the search included"
    lines.append(f"{facts.whole.trials} trials in {len(planned.cells)} cells, seeds {list(sweep.seeds)}{searching}")
    for origin, title in _ORIGINS.items():
        those = [trial for trial in facts.known.named if facts.origins[trial.trial_id] == origin]
        count = len(those) + (len(facts.known.to_come) if origin == "new" else 0)
        if count or origin in ("new", "unfinished", "reused"):
            lines.append(f"{title}: {count}{_states(those, facts.states)}")
        if asked.difference and origin != "reused":
            lines += [f"  {trial.trial_id} {trial.name}{_instead(trial, facts.replaced)}" for trial in those]
    lines.append(f"no longer planned: {facts.removed}")
    lines += [f"changed: {change}" for change in facts.changed]
    lines += [*_costs(facts), *([] if facts.budget is None else [facts.budget])]
    lines += [*(str(memory) for memory in facts.memory), *_shown_by_seeds(facts)]
    return lines + [f"note: {note}" for note in facts.notes]


def _states(trials: Sequence[PlannedTrial], states: dict[str, str]) -> str:
    """How many trials are in each state, where the ledger knows them."""
    counts = Counter(states[trial.trial_id] for trial in trials if trial.trial_id in states)
    listed = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    return f" ({', '.join(listed)})" if listed else ""


def _instead(trial: PlannedTrial, replaced: dict[str, str]) -> str:
    old = replaced.get(trial.trial_id)
    return "" if old is None else f" (its settings have changed; it was {old})"


def _costs(facts: _Facts) -> list[str]:
    cost = facts.to_run
    programs = f"{cost.not_known} of {cost.trials} trials are programs, whose cost is not known"
    if cost.not_known == cost.trials > 0:
        return [f"estimate: {programs}"]
    hours = f"{_number(cost.gpu_hours)} GPU-hours and {_number(cost.cpu_core_hours)} CPU-core-hours"
    clock = f"{_number(facts.wall_seconds / 3600)} hours of the clock with {facts.at_a_time} at a time"
    left_out = f"; {programs}" if cost.not_known else ""
    lines = [f"estimate: {cost.trials} trials to run: {hours}, {clock}{left_out}"]
    lines += [f"  based on {basis}: {count} trials" for basis, count in facts.bases.items()]
    if estimate.FORMULA in facts.bases:
        lines.append(f"assumed: {cost.assumed}")
    return [*lines, str(facts.disk)]


def _number(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}"


def _shown_by_seeds(facts: _Facts) -> list[str]:
    shown = smallest_difference.resolution(facts.plan)
    said, *more = smallest_difference.sentences(shown)
    lines = [said]
    if shown.half_width is None or shown.detectable is None:
        return lines
    for found in facts.noise:
        how = "pairs" if found.paired else "single trials, of which pairs may scatter less"
        sizes = f"± {shown.half_width * found.of_a_run:.4g}, found from {shown.detectable * found.of_a_run:.4g}"
        lines.append(f"  {found.metric}: {sizes}, by earlier {how} ({found.degrees} degrees)")
    return lines + more


def _json(facts: _Facts, asked: Asked) -> dict[str, Any]:
    listed = facts.plan.to_json(facts.whole.to_json())
    for entry in listed["trials"]:
        entry["state"] = facts.states.get(entry["trial_id"], "planned")
        entry["origin"] = facts.origins[entry["trial_id"]]
    clock = None if facts.to_run.not_known == facts.to_run.trials > 0 else facts.wall_seconds / 3600
    shown = smallest_difference.resolution(facts.plan)
    return {
        **listed,
        "no_longer_planned": facts.removed,
        "to_run": {**facts.to_run.to_json(), "hours": clock, "at_a_time": facts.at_a_time, "based_on": facts.bases},
        "disk": asdict(facts.disk),
        "budget": facts.budget,
        "memory": [asdict(memory) | {"fits": memory.fits} for memory in facts.memory],
        "smallest_difference": smallest_difference.to_json(
            shown, {found.metric: found.of_a_run for found in facts.noise}
        ),
        **({"changed": facts.changed, "replaced": facts.replaced} if asked.difference else {}),
        "notes": facts.notes,
    }
