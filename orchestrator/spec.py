"""Reads a sweep file: every problem at once, each with file, line, what was given and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator import spec_checks, spec_combinations, spec_match, spec_search, yaml_file
from orchestrator.draft import Draft, nearest
from orchestrator.overrides import renamed
from orchestrator.problems import Problem, SpecError
from orchestrator.sweep import MoreSeeds, Resources, Sweep, sweep_name
from trainers.config import TrialConfig
from trainers.explain import explain

__all__ = ["Problem", "Resources", "SpecError", "Sweep", "dump", "read_sweep"]

# Parts that the schema alone decides; the others are checked setting by setting.
_SIMPLE = ("name", "question", "seeds", "primary", "match", "score", "outlier_limit", "scheduler", "search", "budget")
_OPTIONAL = ("match", "score", "scheduler", "search", "budget")


def read_sweep(path: Path, overrides: Sequence[str] = (), name: str | None = None, state: Path | None = None) -> Sweep:
    """The sweep in the YAML file at `path`, with `KEY=VALUE` overrides in the place of what the file says.

    `name` replaces the file's name. Without it, an override of a setting of the trial other than `execution.*`
    makes another experiment, named NAME@HASH; seeds and axes from the command line extend the same one. With `state`,
    the folder of ledgers, sweeps that a new search is to learn from must be there.

    Raises:
        SpecError: with all problems that were found.
    """
    draft = _opened(path)
    for override in overrides:
        draft.override(override)
    _check_keys(draft)
    more_seeds = _more_seeds(draft)
    simple = _simple_parts(draft)
    parts = spec_checks.Parts()
    spec_checks.check_trial(draft, parts)
    spec_checks.check_axes(draft, parts)
    spec_checks.check_when(draft, parts)
    spec_checks.check_exclude(draft, parts)
    spec_match.check_score(draft, parts, simple)
    baseline = spec_checks.check_baseline(draft, parts)
    num_seeds = len(simple.seeds) if more_seeds is None else more_seeds.most
    configs = spec_combinations.check_cells(draft, parts, num_seeds) if parts.axes else []
    if configs and baseline is not None:
        spec_combinations.check_baseline_cells(draft, parts, baseline)
    spec_match.check_match(draft, parts, simple, baseline, configs)
    resources = spec_combinations.check_resources(draft, configs)
    spec_combinations.check_primary(draft, configs)
    if more_seeds is not None:
        spec_combinations.check_more_seeds(draft, more_seeds, configs)
    effective = _effective_name(draft, simple.name, name)
    known = simple.model_copy(update={"name": effective, "more_seeds": more_seeds})
    spec_search.check_search(draft, parts, known, configs, resources)
    if state is not None and simple.search is not None:
        spec_search.check_earlier(draft, simple.search, effective, state)
    if draft.problems:
        raise SpecError(draft.problems)
    return Sweep(
        name=effective,
        question=simple.question,
        trial=parts.trial,
        axes=parts.axes,
        seeds=simple.seeds,
        more_seeds=more_seeds,
        when=tuple(parts.when),
        exclude=tuple(parts.exclude),
        baseline=baseline,
        primary=simple.primary,
        match=simple.match,
        score=simple.score,
        outlier_limit=simple.outlier_limit,
        resources=resources,
        scheduler=simple.scheduler,
        search=simple.search,
        budget=simple.budget,
    )


def dump(sweep: Sweep) -> str:
    """The sweep as the text of a sweep file; reading it gives the same sweep, names with @ included."""
    values = sweep.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    if (more_seeds := values.pop("more_seeds", None)) is not None:
        values["seeds"] = more_seeds
    return yaml_file.dump(values)


def _opened(path: Path) -> Draft:
    try:
        return Draft(str(path), yaml_file.read(path))
    except yaml_file.YamlError as error:
        message = error.finding.message
        if not path.exists() and path.parent.is_dir():
            siblings = sorted(file.name for file in path.parent.glob("*.y*ml"))
            near = difflib.get_close_matches(path.name, siblings, n=1)
            message += f"; did you mean {path.parent / near[0]}?" if near else ""
        raise SpecError([Problem(str(path), error.finding.line, message)]) from error


def _check_keys(draft: Draft) -> None:
    """Every key of the file is a part of a sweep."""
    parts = [key for key in Sweep.model_fields if key != "more_seeds"]
    for key in draft.raw:
        if key in parts:
            continue
        section = key.split(".")[0]
        belongs = section in TrialConfig.model_fields and section != "seed"
        hint = "; it belongs under trial:" if belongs else nearest(key, parts)
        draft.report((key,), f"{key} is not a part of a sweep file{hint}")


def _simple_parts(draft: Draft) -> Sweep:
    """The parts that need no other one, as a Sweep; those that are wrong are reported and left at their defaults."""
    raw = {key: draft.raw[key] for key in _SIMPLE if key in draft.raw}
    raw = {key: value for key, value in raw.items() if value is not None or key not in _OPTIONAL}
    if raw.get("budget") == {}:
        draft.report(("budget",), "budget is empty; give gpu_hours, hours or trials")
    _report_repeated_seeds(draft, raw.get("seeds"))
    try:
        return Sweep.model_validate(raw)
    except ValidationError as error:
        faults = explain(error, Sweep)
    for fault in faults:
        draft.report(fault.path, fault.message)
    wrong = {fault.path[0] for fault in faults}
    return Sweep.model_validate({"name": "unnamed", **{key: value for key, value in raw.items() if key not in wrong}})


def _more_seeds(draft: Draft) -> MoreSeeds | None:
    """What the file says of seeds beyond the first block, which then stands in `seeds`; None where they are listed."""
    raw = draft.raw.get("seeds")
    if not isinstance(raw, dict):
        return None
    more: MoreSeeds | None = draft.validated(MoreSeeds, raw, ("seeds",))
    draft.raw["seeds"] = [0] if more is None else list(more.block)
    return more


def _report_repeated_seeds(draft: Draft, seeds: Any) -> None:
    seen: set[int] = set()
    for index, seed in enumerate(seeds if isinstance(seeds, list) else []):
        if type(seed) is int and seed in seen:
            draft.report(("seeds", index), f"seeds has {seed} twice")
        elif type(seed) is int:
            seen.add(seed)


def _effective_name(draft: Draft, given: str, name: str | None) -> str:
    if name is None:
        return renamed(given, draft.set_settings, draft.set_parts())
    try:
        return sweep_name(name)
    except ValueError as error:
        draft.problems.append(Problem(f"--name {name}", None, f"name {error}"))
        return given
